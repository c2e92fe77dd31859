"""Runs of one recipe under several overrides, side by side, finished ones read and unfinished ones resumed; and how such a program ends."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gandist.cores import cores
from gandist.recipe import Failure, InputError

if TYPE_CHECKING:
    from gandist.plots import Curve


class Trial(NamedTuple):
    """A run: where it lies, and the overrides that set it apart."""

    folder: Path
    overrides: list[str]


def train(recipe: Path, trial: Trial, threads: int) -> None:
    """Trains a run, or goes on with it; raises Failure with what it printed where it did not end well."""
    folder = f"run.folder={trial.folder}"
    command = [sys.executable, "-m", "gandist", "train", str(recipe), *trial.overrides, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{trial.folder}: exit code {done.returncode}:\n{done.stderr[-2000:]}")


def train_all(recipe: Path, trials: Sequence[Trial], jobs: int | None, out: Path) -> None:
    """Trains all of them, `jobs` at a time, one a core unless given, with the cores shared between them."""
    at_once = jobs or cores()
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(trials)} runs, {min(at_once, len(trials))} at a time; {out}/*/log.jsonl shows how far they are",
        file=sys.stderr,
    )
    with ThreadPoolExecutor(at_once) as pool:
        waiting = {pool.submit(train, recipe, trial, max(1, cores() // at_once)): trial for trial in trials}
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                done.result()
                print(f"{number} of {len(trials)}: {waiting[done].folder}", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def curve(folder: Path, score: str) -> Curve:
    """A score of a run by images trained on."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    points = {row["images"]: row[f"score/{score}"] for row in found if row.get(f"score/{score}") is not None}
    return [*points], [*points.values()]


def refuse_ours(overrides: Sequence[str], ours: tuple[str, ...]) -> None:
    """Raises InputError where an override is one that tells the runs apart."""
    for override in overrides:
        if override.startswith(ours):
            raise InputError(f"{override}: is set for each run here; leave it out")


def refuse_few(arguments: argparse.Namespace, *names: str) -> None:
    """Raises InputError where one of these options is less than 1."""
    for name in names:
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise InputError(f"--{name} {given}: must be 1 or more")


def machine() -> dict[str, Any]:
    """What the runs were trained on."""
    import torch  # a program that only reads files does not wait for it

    found: dict[str, Any] = {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()}
    return found | ({"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The text of a program as it stands, and the defaults."""


def options(parser: argparse.ArgumentParser, seeds: int, out: str) -> None:
    """What all such programs take."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as `gandist train` takes them")
    parser.add_argument("--seeds", type=int, default=seeds, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="the seeds are this one and the next ones")
    parser.add_argument("--jobs", type=int, help="runs side by side; one a core unless given")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the runs and the report")


def finish(name: str, measure: Callable[[], int]) -> None:
    """Exit codes: 0 done, 1 failed, 2 the input is at fault, 75 stopped."""
    try:
        code = measure()
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on", file=sys.stderr)
        code = 75
    except Failure as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)
