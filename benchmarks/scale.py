"""What more processes give: images a second of 1 … W of them, the bytes that they exchange, and what a model of that says of many more.

    python benchmarks/scale.py [--processes 1,2] [--size 32] [--batch 64] [--rounds 7] [--steps 3] [--threads N] [--json FILE]

Starts itself by `accelerate launch` for each number of processes, with the cores shared between them. *Strong*: `--batch` images a step, of all
processes together; *weak*: of each. In every process the full trainer plays, and counts the bytes of gradients that it hands over. Then, in turns: steps as they are; the same steps without reducing (`no_sync`, the weights then drift apart, and are thrown away); and an all-reduce of as many
bytes alone. What reducing adds to a step over what it takes alone is the share that is not hidden behind the backward.

The model: a step of the weak kind takes its time on one process, plus the exposed share of a ring all-reduce, 2 (W − 1) / W · bytes / bandwidth + 2 (W − 1) · latency.
Latency and bandwidth are fitted to all-reduces of several sizes on the largest number of processes that was run; --bandwidth (GB/s) and --latency (µs) are those
of another network, and make predictions for 8 to 1,024 processes. It assumes equal processes, one ring, no other traffic, and the exposed share that was measured; all of it where that cannot be told from noise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from reporting import Plot, quartiles, report
from step import RECIPES, one_step, processor, wait
from torch.nn.parallel import DistributedDataParallel

from gandist.check import read_recipe
from gandist.cores import cores
from gandist.data.pack import Options, Packing, pack
from gandist.launcher import Stop, World
from gandist.run import running, versions
from gandist.steps import Stepper

SIZES = [2**12, 2**16, 2**20, 2**22, 2**24]  # bytes of the all-reduces that the network is fitted to
MANY = (8, 16, 32, 64, 128, 256, 512, 1024)


def reduce_seconds(size: int, device: torch.device, rounds: int) -> float:
    """Median seconds of an all-reduce of so many bytes."""
    values = torch.zeros(size // 4, device=device)
    taken = []
    for _ in range(rounds + 2):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def work(arguments: argparse.Namespace) -> None:
    """What each process does; rank 0 writes what it measured."""
    recipe = read_recipe(arguments.worker, [])
    world = World.join(recipe.run.precision)
    stop = Stop(world)
    with running(recipe, world) as run, Stepper(run) as step:
        wrapped = [p.wrapped for p in run.players.values() if isinstance(p.wrapped, DistributedDataParallel)]
        trainer = partial(one_step, run, stop, step)

        def local() -> None:
            with ExitStack() as stack:
                for one in wrapped:
                    stack.enter_context(one.no_sync())
                trainer()

        def seconds(act: Callable[[], None]) -> float:
            if world.ranks > 1:
                dist.barrier()
            began = time.perf_counter()
            for _ in range(arguments.steps):
                act()
            wait(world.device)
            return (time.perf_counter() - began) / float(arguments.steps)

        for _ in range(4):
            trainer()
        before = sum(player.reduced_bytes for player in run.players.values())
        trainer()
        found: dict[str, Any] = {
            "bytes_per_step": sum(player.reduced_bytes for player in run.players.values()) - before
        }
        contestants = {"step": trainer} | ({"local": local} if wrapped else {})
        timings: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(arguments.rounds):
            for name, act in contestants.items():
                timings[name].append(seconds(act))
        found |= {
            "ranks": world.ranks,
            "step_seconds": timings["step"],
            "images_per_second": recipe.run.batch / statistics.median(timings["step"]),
            "weights_bytes": sum(
                p.numel() * p.element_size() for player in run.players.values() for p in player.parameters
            ),
            "precision": world.precision,
            "device": str(world.device),
            "threads": torch.get_num_threads(),
        }
        if wrapped:
            alone = reduce_seconds(found["bytes_per_step"], world.device, arguments.rounds)
            low, exposed, _ = quartiles([a - b for a, b in zip(timings["step"], timings["local"], strict=True)])
            found |= {
                "local_seconds": timings["local"],
                "reduce_alone_seconds": alone,
                "reduce_exposed_seconds": exposed,
                # Where what reducing adds cannot be told from nothing, neither can what is hidden of it.
                "overlap": 1 - min(1.0, exposed / alone) if low > 0 else None,
                "reduces": {str(size): reduce_seconds(size, world.device, arguments.rounds) for size in SIZES},
            }
        if world.leads:
            arguments.answer.write_text(json.dumps(found))
    stop.close()
    world.leave()


def start(arguments: argparse.Namespace, folder: Path, processes: int, weak: bool) -> dict[str, Any]:
    """One measurement, in processes of its own."""
    name = f"{'weak' if weak else 'strong'}-{processes}"
    path, answer = folder / f"{name}.yaml", folder / f"{name}.json"
    values = {
        "data": folder / "data",
        "folder": folder / name,
        "width": arguments.width,
        "precision": arguments.precision,
    }
    path.write_text(
        RECIPES["gan"].format(
            network="dcgan", compile="false", batch=arguments.batch * (processes if weak else 1), **values
        )
    )
    given = ["--worker", path, "--answer", answer, "--rounds", arguments.rounds, "--steps", arguments.steps]
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
    ]
    words += ["--multi_gpu"] * (processes > 1) + ["--num_processes", str(processes), __file__, *map(str, given)]
    threads = arguments.threads or max(1, cores() // processes)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not answer.exists():
        sys.exit(f"scale: {processes} processes ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(answer.read_text()))


def fitted(found: dict[str, Any]) -> tuple[float, float]:
    """Latency of a step of the ring (s) and bandwidth (bytes/s), by least squares relative to what was measured."""
    ranks = found["ranks"]
    sizes = np.array([int(size) for size in found["reduces"]], float)
    taken = np.array([*found["reduces"].values()])
    columns = np.stack([np.full_like(sizes, 2 * (ranks - 1)), 2 * (ranks - 1) / ranks * sizes], 1)
    (latency, per_byte), *_ = np.linalg.lstsq(columns / taken[:, None], np.ones_like(taken), rcond=None)
    return max(0.0, float(latency)), 1 / max(1e-15, float(per_byte))


def predicted(result: dict[str, Any], latency: float, bandwidth: float) -> dict[str, float]:
    """Efficiency, weak, of many processes: the time of one step on one process over that on W."""
    most = max(result["weak"].values(), key=lambda one: one["ranks"])
    compute = statistics.median(result["weak"]["1"]["step_seconds"])
    share = 1 - (most.get("overlap") or 0.0)
    found = {}
    for count in MANY:
        ring = 2 * (count - 1) / count * most["bytes_per_step"] / bandwidth + 2 * (count - 1) * latency
        found[str(count)] = compute / (compute + share * ring)
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All numbers of processes, as the JSON that is written."""
    pack(Packing("embedded:fashion-mnist", folder / "data", Options(size=arguments.size)))
    counts = sorted({1, *arguments.processes})
    result: dict[str, Any] = {
        "benchmark": "scale",
        "setting": {
            "network": "dcgan",
            **{name: getattr(arguments, name) for name in ("size", "width", "batch", "rounds", "steps")},
        },
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
            "cores": os.cpu_count(),
        },
        "versions": versions(),
    }
    for kind in ("weak", "strong"):
        result[kind] = {str(count): start(arguments, folder, count, kind == "weak") for count in counts}
    most = result["weak"][str(counts[-1])]
    if counts[-1] > 1:
        latency, bandwidth = fitted(most)
        result["model"] = {
            "latency_seconds": latency,
            "bytes_per_second": bandwidth,
            "overlap": most["overlap"],
            "network": "as measured here",
        }
        if arguments.bandwidth is not None:
            latency, bandwidth = arguments.latency * 1e-6, arguments.bandwidth * 1e9
            result["model"] |= {"latency_seconds": latency, "bytes_per_second": bandwidth, "network": "as given"}
        result["predicted_weak_efficiency"] = predicted(result, latency, bandwidth)
    return result


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = [
        "| | processes | threads | images/s | efficiency | MiB reduced a step | of the weights | hidden |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in ("weak", "strong"):
        for one in result[kind].values():
            ideal = result[kind]["1"]["images_per_second"] * (
                one["ranks"] if result["machine"]["device"].startswith("NVIDIA") else 1
            )
            reduced = one["bytes_per_step"]
            lines.append(
                f"| {kind} | {one['ranks']} | {one['threads']} | {one['images_per_second']:,.0f} | {one['images_per_second'] / ideal:.1%} | "
                f"{reduced / 2**20:.2f} | {reduced / one['weights_bytes']:.3f} | {'' if one.get('overlap') is None else format(one['overlap'], '.0%')} |"
            )
    lines += [
        "",
        "On a CPU the same cores are shared by all processes, so that efficiency is against one process with all of them.",
    ]
    if "model" in result:
        model = result["model"]
        lines.append(
            f"\nnetwork {model['network']}: {model['latency_seconds'] * 1e6:.0f} µs a hop, {model['bytes_per_second'] / 1e9:.2f} GB/s; weak efficiency predicted for "
            + ", ".join(f"{count}: {share:.1%}" for count, share in result["predicted_weak_efficiency"].items())
        )
    return "\n".join(lines)


def plotted(result: dict[str, Any]) -> Plot:
    """The speed of each number of processes."""
    batch = result["setting"]["batch"]
    found = {}
    for kind, what in (("weak", f"batch {batch} of each"), ("strong", f"batch {batch} of all")):
        for one in result[kind].values():
            images = batch * (one["ranks"] if kind == "weak" else 1)
            found[f"{one['ranks']} processes, {what}"] = [images / taken for taken in one["step_seconds"]]
    return Plot("images/s", found)


def numbers(text: str) -> list[int]:
    """1,2,4 as numbers."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=numbers, default=[1, 2], help="how many, as 1,2,4; 1,2 unless given")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side, 32 unless given")
    parser.add_argument(
        "--width", type=int, default=64, help="channels of the networks next to the image, 64 unless given"
    )
    parser.add_argument("--batch", type=int, default=64, help="64 unless given")
    parser.add_argument("--rounds", type=int, default=7, help="7 unless given")
    parser.add_argument("--steps", type=int, default=3, help="steps of a round, 3 unless given")
    parser.add_argument("--threads", type=int, help="of each process; the cores divided by the processes unless given")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--bandwidth", type=float, help="GB/s of another network to predict for")
    parser.add_argument("--latency", type=float, default=5.0, help="µs of that network, 5 unless given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    for name in ("size", "width", "batch", "rounds", "steps", "threads", "bandwidth", "latency"):
        given = getattr(arguments, name)
        if given is not None and given <= 0:
            parser.error(f"--{name} {given}: must be more than 0")
    if any(arguments.batch % count for count in arguments.processes):
        parser.error(f"--batch {arguments.batch}: cannot be divided among {max(arguments.processes)} processes")
    report(measure, table, plotted, arguments)


if __name__ == "__main__":
    main()
