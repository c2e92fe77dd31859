"""Heavy convolutions between small maps: torch's own against one product of matrices, in turns.

    python benchmarks/convolution.py [--rounds 7] [--precision bf16] [--json FILE]

Forward alone, forward with the backward of everything, and forward with the backward of the images alone, as beside a frozen opponent.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from reporting import Plot, report
from step import processor
from torch import Tensor

from gandist.networks.convolution import convolution, transposed_convolution
from gandist.player import DTYPES
from gandist.run import versions


class Shape(NamedTuple):
    """Images, channels in and out, places of a side, kernel, stride, padding, and whether it is transposed."""

    images: int
    inputs: int
    outputs: int
    side: int
    kernel: int
    stride: int
    padding: int
    transposed: bool = False

    def __str__(self) -> str:
        kind = " transposed" if self.transposed else ""
        return f"{self.images}, {self.inputs} → {self.outputs}, {self.side}×{self.side}, {self.kernel}×{self.kernel} / {self.stride}{kind}"


SHAPES = [
    Shape(64, 256, 512, 8, 4, 2, 1),
    Shape(64, 512, 256, 4, 4, 2, 1, True),
    Shape(64, 512, 512, 4, 3, 1, 1),
    Shape(100, 512, 256, 4, 5, 2, 2, True),
    Shape(64, 256, 512, 12, 4, 2, 1),
    Shape(64, 512, 256, 6, 4, 2, 1, True),
    Shape(64, 128, 256, 8, 4, 2, 1),
    Shape(64, 128, 256, 16, 4, 2, 1),
]


def acts(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    inputs, outputs, kernel = shape.inputs, shape.outputs, shape.kernel
    sizes = kernel, shape.stride, shape.padding

    def made(*size: int) -> Tensor:
        return torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)

    image = made(shape.images, inputs, shape.side, shape.side).requires_grad_()
    weight = made(*((inputs, outputs) if shape.transposed else (outputs, inputs)), kernel, kernel).requires_grad_()
    own: Any = F.conv_transpose2d if shape.transposed else F.conv2d
    product: Any = transposed_convolution if shape.transposed else convolution
    forwards: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: own(image, weight, None, shape.stride, shape.padding),
        "product": lambda: product(image, weight, None, sizes),
    }
    gradient = torch.randn_like(forwards["torch"]())
    found: dict[str, Callable[[], object]] = {}
    for name, forward in forwards.items():

        def alone(forward: Callable[[], Tensor] = forward) -> None:
            with torch.no_grad():
                forward()

        def whole(forward: Callable[[], Tensor] = forward) -> None:
            torch.autograd.grad(forward(), [image, weight], gradient)

        def frozen(forward: Callable[[], Tensor] = forward) -> None:
            weight.requires_grad_(False)
            torch.autograd.grad(forward(), image, gradient)
            weight.requires_grad_(True)

        found |= {f"forward, {name}": alone, f"with backward, {name}": whole, f"frozen, {name}": frozen}
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds, as the JSON that is written."""
    found: dict[str, dict[str, list[float]]] = {}
    for shape in SHAPES:
        timed = acts(shape, DTYPES[arguments.precision])
        found[str(shape)] = {name: [] for name in timed}
        for turn in range(arguments.rounds + 1):
            for name, act in timed.items():
                began = time.perf_counter()
                act()
                if turn:  # the first chooses kernels
                    found[str(shape)][name].append(1000 * (time.perf_counter() - began))
    return {
        "benchmark": "convolution",
        "setting": {"rounds": arguments.rounds},
        "precision": arguments.precision,
        "machine": {"device": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "milliseconds": found,
    }


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = [
        "| images, channels, map, kernel / stride | forward: torch, product | with backward | frozen |",
        "|---|---:|---:|---:|",
    ]
    for shape, found in result["milliseconds"].items():
        cells = [
            f"{median(found[f'{what}, torch']):.1f}, {median(found[f'{what}, product']):.1f}"
            for what in ("forward", "with backward", "frozen")
        ]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"ms, {result['precision']}, {result['machine']['threads']} threads"])


def plotted(result: dict[str, Any]) -> Plot:
    """Forward with backward."""
    found = {
        f"{shape}: {name}": taken[f"with backward, {name}"]
        for shape, taken in result["milliseconds"].items()
        for name in ("torch", "product")
    }
    return Plot("ms, forward with backward", found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="7 unless given")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: must be 1 or more")
    report(measure, table, plotted, arguments)


if __name__ == "__main__":
    main()
