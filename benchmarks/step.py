"""Images a second of the full trainer, with stream, log and EMA, against a plain PyTorch loop of the same networks.

    python benchmarks/step.py [--game gan] [--size 64] [--batch 64] [--rounds 9] [--steps 4] [--json FILE]
    python benchmarks/step.py --game semi [--precision fp32] [--batch 100] [--rounds 9] [--steps 10] [--json FILE]
    python benchmarks/step.py --game segment [--size 160] [--batch 4] [--rounds 9] [--steps 2] [--json FILE]

Both run in this process, in turns of a few steps, so that what else the machine does falls on both alike. The plain loop
is written as in the PyTorch DCGAN example: eager, fp32, default memory format and optimizer, one generator forward a
step, images waiting in memory as floats. The trainer reads packed shards, draws fresh noise for each player, keeps an
average of the generator and writes its log.

`--game semi` plays the MNIST experiment of Salimans et al. 2016, its networks and batch, on garments of 28 pixels. Its plain loop is the
usual port: fp32, layers written as their formulas are (with `--layers gandist`, the trainer's own), torch's Adam, a forward of the discriminator for each of the labelled, unlabelled and generated rows and for both sides of
feature matching, fakes detached for the discriminator, its gradients computed and thrown away in the generator's turn, and the average.

`--game segment` plays the Stanford experiment of Luc et al. 2016, the multi-scale network of Farabet et al. and the adversary of two branches, on
scenes of garments. Its plain loop: fp32, the same modules, cross entropy and the adversary's verdict for the segmenter, whose maps are then detached for
the adversary, two forwards of it for true and made maps, its gradients computed and thrown away in the segmenter's turn, images in memory.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gandist.check import read_recipe
from gandist.data.opening import data_spec, open_batches
from gandist.data.pack import Options, Packing, pack
from gandist.data.stream import Share
from gandist.game import Game
from gandist.launcher import Stop, World
from gandist.networks import Judged
from gandist.player import DTYPES
from gandist.run import running, versions
from gandist.steps import Stepper, plain_step

RECIPES = {
    "gan": """\
data: {{path: {data}}}
game:
  kind: gan
  generator: {{network: {{kind: dcgan, width: {width}}}}}
  discriminator: {{network: {{kind: dcgan, width: {width}}}}}
run: {{folder: {folder}, images: 1_000_000_000, batch: {batch}, precision: {precision}, log_every: 10}}
""",
    "semi": """\
data: {{path: {data}, subset: {{per_class: 10, seed: 0}}}}
game:
  kind: semi
  generator: {{network: {{kind: salimans_mlp}}, optimizer: {{learning_rate: 3e-3, eps_inside_root: true}}}}
  discriminator:
    network: {{kind: salimans_mlp}}
    optimizer: {{learning_rate: 3e-3, eps_inside_root: true}}
    ema: {{half_life_images: 693_113, ramp_up: null, from_zero: true}}
run: {{folder: {folder}, images: 1_000_000_000, batch: {batch}, precision: {precision}, log_every: 100}}
""",
    "segment": """\
data: {{path: {data}, transform: {{canvas: [{size}, {size}]}}}}
game:
  kind: segment
  segmenter: {{network: {{kind: farabet}}, optimizer: {{learning_rate: 1e-4}}, ema: {{}}}}
  adversary: {{network: {{kind: two_branch}}, optimizer: {{learning_rate: 1e-4}}}}
run: {{folder: {folder}, images: 1_000_000_000, batch: {batch}, precision: {precision}, log_every: 10}}
""",
}
BATCH = {"gan": 64, "semi": 100, "segment": 4}
SIZE = {"gan": 64, "semi": None, "segment": 160}
SCENES = 64  # enough: neither loop looks at what is in them


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


class PlainNormed(nn.Module):
    """W = g θ / ‖θ‖ as it is written."""

    def __init__(self, inputs: int, outputs: int, learns_gain: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(outputs, inputs))
        self.gain = nn.Parameter(torch.ones(outputs), requires_grad=learns_gain)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, values: Tensor) -> Tensor:
        length = torch.sqrt(torch.sum(self.weight**2, dim=1))
        return F.linear(values, self.weight * (self.gain / length)[:, None], self.bias)


class PlainNoise(nn.Module):
    """Gaussian noise."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, values: Tensor) -> Tensor:
        return values + torch.randn_like(values) * self.deviation


class PlainDiscriminator(nn.Module):
    """784-1000-500-250-250-250-10."""

    def __init__(self) -> None:
        super().__init__()
        widths = [784, 1000, 500, 250, 250, 250]
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(pairwise(widths)):
            layers += [PlainNoise(0.5 if place else 0.3), PlainNormed(inputs, outputs, False), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Sequential(PlainNoise(0.5), PlainNormed(250, 10, True))

    def forward(self, images: Tensor) -> Judged:
        features = self.hidden((images.flatten(1) + 1) / 2)
        classes = self.last(features)
        return Judged(torch.logsumexp(classes, 1), features, classes)


class PlainGenerator(nn.Module):
    """100-500-500-784."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(100, 500), nn.BatchNorm1d(500), nn.Softplus(), nn.Linear(500, 500), nn.BatchNorm1d(500),
            nn.Softplus(), PlainNormed(500, 784, True), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        made: Tensor = 2 * self.layers(noise) - 1
        return made.view(-1, 1, 28, 28)


class PlainSemi:
    """The same of the semi game."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, images: Tensor, labels: Tensor, noise: int, batch: int
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.images, self.labels, self.noise, self.batch = images, labels, noise, batch
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=3e-3, betas=(0.5, 0.999)) for m in (discriminator, generator)
        ]
        self.average = [torch.zeros_like(p) for p in discriminator.parameters()]

    def rows(self) -> Tensor:
        """Numbers of some rows."""
        return torch.randint(len(self.images), (self.batch,), device=self.images.device)

    def __call__(self) -> None:
        labelled, device = self.rows(), self.images.device
        self.optimizers[0].zero_grad()
        fake = self.generator(torch.rand(self.batch, self.noise, device=device)).detach()
        supervised = self.discriminator(self.images[labelled])
        real, made = self.discriminator(self.images[self.rows()]), self.discriminator(fake)
        loss = F.cross_entropy(supervised.classes, self.labels[labelled])
        loss = loss + 0.5 * F.softplus(-real.logits).mean() + 0.5 * F.softplus(made.logits).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers[0].step()
        with torch.no_grad():
            for average, parameter in zip(self.average, self.discriminator.parameters(), strict=True):
                average += 1e-4 * (parameter - average)

        self.optimizers[1].zero_grad()
        real = self.discriminator(self.images[self.rows()])
        made = self.discriminator(self.generator(torch.rand(self.batch, self.noise, device=device)))
        loss = (real.features.mean(0) - made.features.mean(0)).square().mean()
        loss.backward()
        self.optimizers[1].step()


class PlainSegment:
    """The same of the segment game."""

    def __init__(
        self, segmenter: nn.Module, adversary: nn.Module, images: Tensor, masks: Tensor, classes: int, batch: int
    ) -> None:
        self.segmenter, self.adversary = segmenter, adversary
        self.images, self.masks, self.classes, self.batch = images, masks, classes, batch
        self.criterion = nn.BCEWithLogitsLoss()
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=1e-4, betas=(0.5, 0.999)) for m in (segmenter, adversary)
        ]
        self.place = 0

    def __call__(self) -> None:
        first = self.place % (len(self.images) - self.batch + 1)
        self.place += self.batch
        images, masks = self.images[first : first + self.batch], self.masks[first : first + self.batch]
        ones, zeros = torch.ones(self.batch, device=images.device), torch.zeros(self.batch, device=images.device)

        self.optimizers[0].zero_grad()
        logits = self.segmenter(images)
        size = logits.shape[2:]
        small = F.interpolate(images, size, mode="bilinear", align_corners=False)
        truth = F.interpolate(masks[:, None].float(), size, mode="nearest")[:, 0].long()
        made = logits.softmax(1)
        loss = F.cross_entropy(logits, truth) + self.criterion(self.adversary(made, small), ones)
        loss.backward()
        self.optimizers[0].step()

        self.optimizers[1].zero_grad()
        right = F.one_hot(truth, self.classes).permute(0, 3, 1, 2).float()
        loss = self.criterion(self.adversary(right, small), ones)
        loss = loss + self.criterion(self.adversary(made.detach(), small), zeros)
        loss.backward()
        self.optimizers[1].step()


def peak_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """What a 2048³ matrix product reaches, on a GPU one of 8192³; the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e9


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
    semi, segment = arguments.game == "semi", arguments.game == "segment"
    pack(
        Packing("generated:fashion-scenes" if segment else "embedded:fashion-mnist", data, Options(size=arguments.size))
    )
    path = folder / "recipe.yaml"
    path.write_text(RECIPES[arguments.game].format(data=data, folder=folder / "run", **vars(arguments)))
    recipe = read_recipe(path, [])
    world = World.join(recipe.run.precision)
    assert isinstance(recipe.game, Game)

    sides = recipe.game.sides(data_spec(recipe.data))
    answer = "mask" if segment else "label"
    stream = open_batches(recipe.data, Share(("image", answer), SCENES if segment else 1024, 0, world.device))
    (batch,) = stream.read(0)
    images, labels = batch["image"].contiguous(), batch[answer]
    stream.close()
    bare = {name: side.build().to(world.device) for name, side in sides.items()}
    players: tuple[nn.Module, ...] = (*bare.values(),)
    if semi and arguments.layers == "plain":
        players = PlainGenerator().to(world.device), PlainDiscriminator().to(world.device)
    first, second = players
    plain: Callable[[], object]
    if segment:
        plain = PlainSegment(first, second, images, labels, 11, arguments.batch)
    elif semi:
        plain = PlainSemi(first, second, images, labels, 100, arguments.batch)
    else:
        plain = Plain(first, second, images, 100, arguments.batch)
    stop = Stop(world)
    timings: dict[str, list[float]] = {"plain": [], "trainer": []}
    with running(recipe, world) as run:
        step = Stepper(run)

        def trainer() -> None:
            stop.agreed(bool(run.data_faults()))
            run.upkeep(last=False)
            step()
            run.clock.advance()

        def written() -> None:
            run.data_faults()
            plain_step(run)
            run.clock.advance()

        contestants: dict[str, Callable[[], object]] = {"plain": plain, "trainer": trainer}
        for act in contestants.values():
            seconds(act, 8, world.device)  # first steps choose kernels, fill pools and record graphs
        for _ in range(arguments.rounds):
            for name, act in contestants.items():
                timings[name].append(seconds(act, arguments.steps, world.device))
        waited = run.stream.waited
        # Operations within a graph cannot be counted: those of the step as it is written are the same.
        arithmetic = {"plain": flops(plain, arguments.batch), "trainer": flops(written, arguments.batch)}
        graphs = step.why_not or "yes" if world.device.type == "cuda" else "no: there is no GPU"
    stop.close()
    ratios = sorted(p / t for p, t in zip(timings["plain"], timings["trainer"], strict=True))
    quarter = len(ratios) // 4
    speeds = {name: arguments.batch / statistics.median(values) for name, values in timings.items()}
    peaks = {name: peak_gflops(world.device, DTYPES[name]) for name in sorted({"fp32", world.precision})}
    own = {"semi": ("layers",), "segment": ("size",), "gan": ("size", "width")}[arguments.game]
    names = (*own, "batch", "rounds", "steps")
    setting = {
        "network": {"semi": "salimans_mlp", "segment": "farabet", "gan": "dcgan"}[arguments.game],
        **{name: getattr(arguments, name) for name in names},
    }
    return {
        "benchmark": "step",
        "game": arguments.game,
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
        "graphs": graphs,
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
    parser.add_argument("--game", default="gan", choices=[*RECIPES])
    parser.add_argument("--layers", choices=["plain", "gandist"], help="of the plain loop of semi; plain unless given")
    parser.add_argument("--size", type=int, help="of gan and segment: pixels of a side, 64 and 160 unless given")
    parser.add_argument("--width", type=int, help="of gan: channels of the networks next to the image, 64 unless given")
    parser.add_argument("--batch", type=int, help="64, of semi 100 and of segment 4, unless given")
    parser.add_argument("--rounds", type=int, default=9, help="9 unless given")
    parser.add_argument("--steps", type=int, default=4, help="steps of each contestant in a round, 4 unless given")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name in ("rounds", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be 1 or more")
    if arguments.game == "semi" and (arguments.size or arguments.width):
        parser.error("--size and --width have no effect on the networks of semi")
    if arguments.game != "semi" and arguments.layers:
        parser.error(f"--layers has no effect on {arguments.game}")
    if arguments.game == "segment" and arguments.width:
        parser.error("--width has no effect on the networks of segment")
    arguments.size, arguments.width = arguments.size or SIZE[arguments.game], arguments.width or 64
    arguments.layers = arguments.layers or "plain"
    arguments.batch = arguments.batch or BATCH[arguments.game]
    report(measure, table, arguments)


if __name__ == "__main__":
    main()
