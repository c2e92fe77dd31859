"""Images a second of the full trainer, with stream, log and EMA, against a plain PyTorch loop of the same DCGAN.

    python benchmarks/step.py [--size 64] [--batch 64] [--rounds 9] [--steps 4] [--json FILE]

Both run in this process, in turns of a few steps, so that what else the machine does falls on both alike. The plain loop
is written as in the PyTorch DCGAN example: eager, fp32, default memory format and optimizer, one generator forward a
step, images waiting in memory as floats. The trainer reads packed shards, draws fresh noise for each player, keeps an
average of the generator and writes its log.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gandist.check import read_recipe
from gandist.data.opening import data_spec, open_batches
from gandist.data.pack import Options, Packing, pack
from gandist.data.stream import Share
from gandist.game import Game
from gandist.launcher import Stop, World
from gandist.player import DTYPES
from gandist.run import running, versions
from gandist.train import step

RECIPE = """\
data: {{path: {data}}}
game:
  kind: gan
  generator: {{network: {{kind: dcgan, width: {width}}}}}
  discriminator: {{network: {{kind: dcgan, width: {width}}}}}
run: {{folder: {folder}, images: 1_000_000_000, batch: {batch}, precision: {precision}, log_every: 10}}
"""


class Plain:
    """The loop that a user would otherwise write."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, images: Tensor, noise: int, batch: int) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.images, self.noise, self.batch = images, noise, batch
        self.criterion = nn.BCEWithLogitsLoss()
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (discriminator, generator)
        ]
        self.place = 0

    def __call__(self) -> None:
        first = self.place % (len(self.images) - self.batch + 1)
        self.place += self.batch
        real = self.images[first : first + self.batch]
        ones, zeros = torch.ones(self.batch, device=real.device), torch.zeros(self.batch, device=real.device)

        self.discriminator.zero_grad()
        loss_real = self.criterion(self.discriminator(real).logits, ones)
        loss_real.backward()
        fake = self.generator(torch.randn(self.batch, self.noise, device=real.device))
        loss_fake = self.criterion(self.discriminator(fake.detach()).logits, zeros)
        loss_fake.backward()
        self.optimizers[0].step()

        self.generator.zero_grad()
        loss = self.criterion(self.discriminator(fake).logits, ones)
        loss.backward()
        self.optimizers[1].step()


def peak_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """What a 2048³ matrix product reaches, the best of ten."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best / 1e9


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(act: Callable[[], object], steps: int, device: torch.device) -> float:
    """Mean seconds of a step."""
    began = time.perf_counter()
    for _ in range(steps):
        act()
    wait(device)
    return (time.perf_counter() - began) / steps


def flops(act: Callable[[], object], batch: int) -> float:
    """Floating-point operations of products and convolutions in one step, by image."""
    with FlopCounterMode(display=False) as counter:
        act()
    return float(counter.get_total_flops()) / batch


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds, as the JSON that is written."""
    data = folder / "data"
    pack(Packing("embedded:fashion-mnist", data, Options(size=arguments.size)))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(data=data, folder=folder / "run", **vars(arguments)))
    recipe = read_recipe(path, [])
    world = World.join(recipe.run.precision)
    assert isinstance(recipe.game, Game)

    sides = recipe.game.sides(data_spec(recipe.data))
    stream = open_batches(recipe.data, Share(("image",), 1024, 0, world.device))
    images = stream.read(0)[0]["image"].contiguous()
    stream.close()
    bare = {name: side.build().to(world.device) for name, side in sides.items()}
    plain = Plain(bare["generator"], bare["discriminator"], images, 100, arguments.batch)
    stop = Stop(world)
    timings: dict[str, list[float]] = {"plain": [], "trainer": []}
    with running(recipe, world) as run:

        def trainer() -> None:
            stop.agreed(bool(run.data_faults()))
            run.upkeep(last=False)
            step(run, run.phases)
            run.clock.advance()

        contestants: dict[str, Callable[[], object]] = {"plain": plain, "trainer": trainer}
        for act in contestants.values():
            seconds(act, 2, world.device)  # first steps choose kernels and fill pools
        for _ in range(arguments.rounds):
            for name, act in contestants.items():
                timings[name].append(seconds(act, arguments.steps, world.device))
        waited = run.stream.waited
        arithmetic = {name: flops(act, arguments.batch) for name, act in contestants.items()}
    stop.close()
    ratios = sorted(p / t for p, t in zip(timings["plain"], timings["trainer"], strict=True))
    quarter = len(ratios) // 4
    speeds = {name: arguments.batch / statistics.median(values) for name, values in timings.items()}
    peaks = {name: peak_gflops(world.device, DTYPES[name]) for name in sorted({"fp32", world.precision})}
    setting = {
        "network": "dcgan",
        **{name: getattr(arguments, name) for name in ("size", "width", "batch", "rounds", "steps")},
    }
    return {
        "benchmark": "step",
        "setting": setting,
        "machine": {
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": versions(),
        "precision": world.precision,
        "precision_reason": world.reason,
        "images_per_second": speeds,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "mflop_per_image": {name: value / 1e6 for name, value in arithmetic.items()},
        "gflops": {name: speeds[name] * value / 1e9 for name, value in arithmetic.items()},
        "gflops_of_a_matrix_product": peaks,
        "data_wait_seconds": waited,
        "step_seconds": timings,
    }


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = ["", "| loop | precision | images/s | GFLOP/s | of a matrix product |", "|---|---|---:|---:|---:|"]
    for name, precision in (("plain", "fp32"), ("trainer", result["precision"])):
        speed, gflops = result["images_per_second"][name], result["gflops"][name]
        share = gflops / result["gflops_of_a_matrix_product"][precision]
        lines.append(f"| {name} | {precision} | {speed:.1f} | {gflops:.0f} | {share:.0%} |")
    low, high = result["ratio_quartiles"]
    return "\n".join(
        [*lines, "", f"ratio {result['ratio']:.2f} (quartiles {low:.2f} … {high:.2f}); {result['precision_reason']}"]
    )


def report(
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    arguments: argparse.Namespace,
) -> None:
    """Measures in a folder of its own, prints the table, and writes the JSON where it was asked for."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    print(table(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--width", type=int, default=64, help="channels of the networks next to the image")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps of each contestant in a round")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report(measure, table, arguments)


if __name__ == "__main__":
    main()
