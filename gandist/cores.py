"""What a process takes of its machine: a share of the cores as threads, and memory that it keeps."""

from __future__ import annotations

import ctypes
import os
import sys
from math import ceil
from pathlib import Path

import psutil
import torch

LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")
QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
THREADS = "OMP_NUM_THREADS"
# Parameters of glibc's mallopt: allocations from this size on are mappings of their own; the end of the heap goes back when it is longer;
# and it grows by more than is asked for.
MAPPED = -3
KEPT = {MAPPED: 1 << 30, -1: (1 << 31) - 1, -2: 64 << 20}


def quota(paths: tuple[Path, ...] = QUOTAS) -> int | None:
    """Cores that the container may use, rounded up; None where nothing bounds it. torch counts those of the whole machine."""
    for path in paths:
        try:
            allowed, *period = path.read_text().split()
            every = period or (path.parent / "cpu.cfs_period_us").read_text().split()
            if allowed not in ("max", "-1"):
                return max(1, ceil(int(allowed) / int(every[0])))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def cores() -> int:
    """Of this machine that this process may use."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, quota() or here)


def launched() -> list[psutil.Process]:
    """The launchers that this process comes from."""
    found = []
    for process in psutil.Process().parents():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(name in line for name in LAUNCHERS):
            found.append(process)
    return found


def chosen() -> bool:
    """Whether the user said how many threads: a launcher sets one for each process that it starts, as if somebody had."""
    launchers = launched()
    if not launchers:
        return THREADS in os.environ
    try:
        return any(
            THREADS in process.environ() or "--num_cpu_threads_per_process" in " ".join(process.cmdline())
            for process in launchers
        )
    except psutil.Error:  # not ours to read
        return True


def share_cores() -> None:
    """Gives this process as many threads as its share of the cores, unless the user said how many."""
    if not chosen():
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_memory() -> None:
    """Lets glibc keep the memory of large tensors for the next step: it gives each back when it is freed, and the system fills the next one
    with zeros, page by page. Left alone where the user set how it allocates."""
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or told:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    # An older glibc bounds the first, and with the others alone it would map even small tensors anew.
    if mallopt(MAPPED, KEPT[MAPPED]) or mallopt(MAPPED, 32 << 20):
        for parameter, value in KEPT.items():
            mallopt(parameter, value)
