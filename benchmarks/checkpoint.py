"""Seconds of a checkpoint, saved and restored, against bare safetensors of the same tensors.

    python benchmarks/checkpoint.py [--width 64] [--rounds 7] [--json FILE]

The players are a DCGAN of 64 pixels with its averages and Adam's moments. `gandist` looks at every number (a NaN is never saved), writes aside, syncs, names the digests in
a manifest, renames, reads all of it again and compares; to restore it reads and compares once more. `bare` is `safetensors.torch.save_file` of
the same tensors, a file for each of ours, synced to the disk as well, and `load_file`. Both in turns, in one folder.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reporting import Plot, report
from safetensors.torch import load_file, save_file
from step import RECIPES, processor

from gandist import checkpoint
from gandist.check import read_recipe
from gandist.data.opening import data_spec
from gandist.data.pack import Options, Packing, pack
from gandist.run import make_players, versions


def timed(act: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def synced(path: Path) -> None:
    """Waits until the disk has it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds, as the JSON that is written."""
    pack(Packing("embedded:fashion-mnist", folder / "data", Options(size=64)))
    path = folder / "recipe.yaml"
    values = {"data": folder / "data", "folder": folder / "run", "width": arguments.width}
    path.write_text(RECIPES["gan"].format(network="dcgan", compile="false", batch=64, precision="fp32", **values))
    recipe = read_recipe(path, [])
    spec, device = data_spec(recipe.data), torch.device("cpu")
    players = make_players(recipe, spec, device, "fp32")
    files = {
        f"{name}.{part}" if part else name: tensors
        for name, player in players.items()
        for part, tensors in player.tensors().items()
    }
    written = sum(tensor.numel() * tensor.element_size() for tensors in files.values() for tensor in tensors.values())
    root, bare = folder / "checkpoints", folder / "bare"
    bare.mkdir()
    count = 0

    def save() -> None:
        nonlocal count
        count += 1
        state = checkpoint.State(
            step=count, images=64 * count, seconds=0.0, run_id="0" * 16, init_from=None, precision="fp32", ranks=1, spec=spec, quarantined=(),
            recipe=recipe.model_dump(mode="json"), decisive=checkpoint.as_json(recipe.decisive()), versions=versions(),
            players={name: player.numbers() for name, player in players.items()},
        )  # fmt: skip
        checkpoint.save(root, state, files, 1)

    def save_bare() -> None:
        for name, tensors in files.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, bare / f"{name}.safetensors")
            synced(bare / f"{name}.safetensors")

    def restore() -> None:
        found, _ = checkpoint.newest(root)
        assert found is not None
        for name, tensors in files.items():
            found.restore(name, tensors)

    def restore_bare() -> None:
        for name, tensors in files.items():
            for key, tensor in load_file(bare / f"{name}.safetensors").items():
                tensors[key].copy_(tensor)

    acts = {"save": save, "save, bare": save_bare, "restore": restore, "restore, bare": restore_bare}
    timings: dict[str, list[float]] = {name: [] for name in acts}
    with torch.no_grad():
        for act in acts.values():
            act()
        for _ in range(arguments.rounds):
            for name, act in acts.items():
                timings[name].append(timed(act))
    ratios = {
        name: statistics.median(a / b for a, b in zip(timings[name], timings[f"{name}, bare"], strict=True))
        for name in ("save", "restore")
    }
    return {
        "benchmark": "checkpoint",
        "setting": {"network": "dcgan", "width": arguments.width, "rounds": arguments.rounds},
        "machine": {"device": processor(), "cores": os.cpu_count()},
        "versions": versions(),
        "bytes": written,
        "seconds": timings,
        "ratios_to_bare": ratios,
    }


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = [f"{result['bytes'] / 2**20:.0f} MiB", "", "| | ms | MiB/s |", "|---|---:|---:|"]
    for name, values in result["seconds"].items():
        median = statistics.median(values)
        lines.append(f"| {name} | {1000 * median:.0f} | {result['bytes'] / median / 2**20:,.0f} |")
    ratios = ", ".join(f"{name} {ratio:.2f} times" for name, ratio in result["ratios_to_bare"].items())
    return "\n".join([*lines, "", f"{ratios} as long as bare safetensors"])


def plotted(result: dict[str, Any]) -> Plot:
    """Seconds of each act."""
    return Plot("ms", {name: [1000 * one for one in taken] for name, taken in result["seconds"].items()})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="channels of the networks next to the image")
    parser.add_argument("--rounds", type=int, default=7, help="7 unless given")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name in ("width", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be 1 or more")
    report(measure, table, plotted, arguments)


if __name__ == "__main__":
    main()
