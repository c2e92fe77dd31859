"""Images a second of the full trainer, with stream, log and EMA, against a plain PyTorch loop of the same networks.

    python benchmarks/step.py [--game gan] [--network dcgan] [--size 64] [--batch 64] [--rounds 9] [--steps 4] [--json FILE]
    python benchmarks/step.py --game semi [--precision fp32] [--batch 100] [--rounds 9] [--steps 10] [--json FILE]
    python benchmarks/step.py --game segment [--size 160] [--batch 4] [--rounds 9] [--steps 2] [--json FILE]

All run in turns of a few steps, so that what else the machine does falls on all alike; the plain loop in a process of its own, whose memory is allocated as
everybody's is (gandist/cores.py). It
is written as in the PyTorch DCGAN example: eager, fp32, default memory format and optimizer, one generator forward a
step, images waiting in memory as floats; its convolutions are torch's own (with `--layers gandist`, the trainer's). The trainer reads packed shards (of gan 1,000 images, read once before it is timed and kept in memory), draws fresh noise for each player, keeps an
average of the generator and writes its log. `step` is the trainer's step alone, on one batch that lies on the device: what the stream, the log and the
guards cost is the rest. `tuned` (of gan) is the plain loop with what an expert would write into it: the trainer's precision, channels last, fused
Adam, a frozen opponent, one forward of the discriminator, one average.

Then the trainer plays a few steps more as they are written, with a clock around each part, waiting for the device after each: `parts` are
seconds of a step, and add up to more than a step where the device would have worked ahead.

`--game semi` plays the MNIST experiment of Salimans et al. 2016, its networks and batch, on garments of 28 pixels. Its plain loop is the
usual port: fp32, layers written as their formulas are (with `--layers gandist`, the trainer's own), torch's Adam, a forward of the discriminator for each of the labelled, unlabelled and generated rows and for both sides of
feature matching, fakes detached for the discriminator, its gradients computed and thrown away in the generator's turn, and the average.

`--game segment` plays the Stanford experiment of Luc et al. 2016, the multi-scale network of Farabet et al. and the adversary of two branches, on
scenes of garments. Its plain loop: fp32, the same modules, cross entropy and the adversary's verdict for the segmenter, whose maps are then detached for
the adversary, two forwards of it for true and made maps, its gradients computed and thrown away in the segmenter's turn, images in memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
import torch
from loops import Plain, PlainDiscriminator, PlainGenerator, PlainSegment, PlainSemi, Tuned
from reporting import Plot, quartiles, report
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gandist.check import read_recipe
from gandist.data.opening import data_spec, open_batches
from gandist.data.pack import Options, Packing, pack
from gandist.data.stream import Batch, Share
from gandist.game import Game
from gandist.launcher import Stop, World
from gandist.networks.convolution import Conv2d, ConvTranspose2d
from gandist.player import DTYPES, Turn
from gandist.recipe import Recipe
from gandist.run import Run, resident_bytes, running, versions
from gandist.steps import Stepper, moves, plain_step, seed

RECIPES = {
    "gan": """\
data: {{path: {data}}}
game:
  kind: gan
  generator: {{network: {{kind: {network}, width: {width}}}}}
  discriminator: {{network: {{kind: {network}, width: {width}}}}}
run: {{folder: {folder}, images: 1_000_000_000, batch: {batch}, precision: {precision}, compile: {compile}, log_every: 10}}
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
run: {{folder: {folder}, images: 1_000_000_000, batch: {batch}, precision: {precision}, compile: {compile}, log_every: 100}}
""",
    "segment": """\
data: {{path: {data}, transform: {{canvas: [{size}, {size}]}}}}
game:
  kind: segment
  segmenter: {{network: {{kind: farabet}}, optimizer: {{learning_rate: 1e-4}}, ema: {{}}}}
  adversary: {{network: {{kind: two_branch}}, optimizer: {{learning_rate: 1e-4}}}}
run: {{folder: {folder}, images: 1_000_000_000, batch: {batch}, precision: {precision}, compile: {compile}, log_every: 10}}
""",
}
BATCH = {"gan": 64, "semi": 100, "segment": 4}
SIZE = {"gan": 64, "semi": None, "segment": 160}
# Of so many embedded images so few are soon in memory, as the tuned loop's are from the start.
FASHION, KEPT = 10_000, 1_000
SCENES = 64  # enough: neither loop looks at what is in them


class Still:
    """A stream that has one batch, on the device."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.begun: dict[int, list[Batch]] = {}

    def begin(self) -> None:
        """A step begins."""
        self.begun.clear()

    def read(self, draw: int) -> list[Batch]:
        """The same rows as another draw; what a phase of the step leaves in them for a later one is there."""
        if draw not in self.begun:
            self.begun[draw] = [replace(batch, draw=draw, made={}) for batch in self.batches]
        return self.begun[draw]


class Clocked:
    """Seconds by part, with the device waited for after each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()

    def __call__(self, name: str, act: Callable[..., Any], *arguments: Any) -> Any:
        """What `act` gives, its time noted."""
        wait(self.device)
        began = time.perf_counter()
        found = act(*arguments)
        wait(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return found


def parts_of_a_step(run: Run, stop: Stop, steps: int) -> dict[str, float]:
    """Seconds of each part of a step, the mean of `steps` of them as they are written."""
    clocked = Clocked(run.world.device)
    for _ in range(steps):
        clocked("data wait", run.data_faults)
        clocked("agreement", stop.agreed, False)
        clocked("log", run.upkeep, False)
        turns: list[Turn] = []
        for move in moves(run.clock, run.phases):
            batches = clocked("data to device", run.stream.read, move.draw)
            seed(run, move)
            name, player = move.phase.player, run.players[move.phase.player]
            share = run.clock.batch / move.phase.repeat
            with player.turn(run.clock.images, share, run.recipe.run.accumulate, hold=True) as turn:
                for batch in turn.accumulate(batches):
                    loss, values = clocked(f"{name} forward", move.phase.loss, run.players, batch, run.clock)
                    clocked(f"{name} backward", turn.backward, loss)
                    clocked("log", run.meter.add, values)
            turns.append(turn)
            if not move.phase.hold:
                clocked(f"{name} optimizer", turn.finish)
        for turn in turns:
            clocked(f"{turn.player.name} optimizer", turn.finish)
        run.clock.advance()
    return {name: total / steps for name, total in clocked.seconds.items()}


def copy_gigabytes(device: torch.device) -> float:
    """Bytes read and written a second in a copy of 256 MiB, the best of ten, in GB."""
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * source.numel() * 4 / best / 1e9


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


def one_step(run: Run, stop: Stop, step: Stepper) -> None:
    """What the loop of gandist/train.py does between two steps of the clock."""
    stop.agreed(bool(run.data_faults()))
    run.upkeep(last=False)
    step()
    run.clock.advance()


def ratios(others: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Of how many times as fast we were in each round: lower quartile, median, upper quartile."""
    return quartiles([other / own for other, own in zip(others, ours, strict=True)])


class Busy(NamedTuple):
    """Seconds of all cores that were not idle, what the hypervisor took included, and those of the processes that are measured."""

    cores: float
    processes: float

    def share_of_these_processes(self, later: Busy) -> float:
        """Of what the cores did meanwhile."""
        return min(1.0, (later.processes - self.processes) / max(1e-9, later.cores - self.cores))


def busy(other: int) -> Busy:
    """Of this process and another, until now."""
    spent = psutil.cpu_times()
    idle = spent.idle + getattr(spent, "iowait", 0.0)
    counted = sum(spent) - getattr(spent, "guest", 0.0) - getattr(spent, "guest_nice", 0.0)
    beside = psutil.Process(other).cpu_times()
    return Busy(counted - idle, time.process_time() + beside.user + beside.system)


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


def some_samples(recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and their labels or masks, in memory."""
    assert isinstance(recipe.game, Game)
    answer = "mask" if recipe.game.kind == "segment" else "label"
    count = SCENES if recipe.game.kind == "segment" else 1024
    stream = open_batches(recipe.data, Share(("image", answer), count, 0, device))
    (batch,) = stream.read(0)
    stream.close()
    return batch["image"].contiguous(), batch[answer]


def plain_loop(arguments: argparse.Namespace, recipe: Recipe, device: torch.device) -> Callable[[], object]:
    """A step of the plain loop."""
    assert isinstance(recipe.game, Game)
    images, labels = some_samples(recipe, device)
    players: list[nn.Module] = [side.build() for side in recipe.game.sides(data_spec(recipe.data)).values()]
    if arguments.layers == "plain":
        for part in (part for player in players for part in player.modules()):
            if isinstance(part, Conv2d):
                part._conv_forward = partial(nn.Conv2d._conv_forward, part)  # type: ignore[method-assign]
            elif isinstance(part, ConvTranspose2d):
                part.forward = partial(nn.ConvTranspose2d.forward, part)  # type: ignore[method-assign]
    if arguments.game == "semi" and arguments.layers == "plain":
        players = [PlainGenerator(), PlainDiscriminator()]
    first, second = (player.to(device) for player in players)
    if arguments.game == "segment":
        return PlainSegment(first, second, images, labels, 11, arguments.batch)
    if arguments.game == "semi":
        return PlainSemi(first, second, images, labels, 100, arguments.batch)
    return Plain(first, second, images, 100, arguments.batch)


class Apart:
    """The plain loop in a process of its own, which takes its turns when it is told to."""

    def __init__(self, recipe: Path) -> None:
        words = [sys.executable, __file__, *sys.argv[1:], "--plain", str(recipe)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.flops = self._answer("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self, line: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if line:
            print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("step: the plain loop has ended; its reason stands above")
        return float(answer)

    def seconds(self, steps: int) -> float:
        """Mean seconds of a step."""
        return self._answer(str(steps))


def play_apart(arguments: argparse.Namespace) -> None:
    """What that process does: operations an image first, then the mean seconds of as many steps as each line asks for."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    act = plain_loop(arguments, read_recipe(arguments.plain, []), device)
    print(flops(act, arguments.batch), flush=True)
    for line in sys.stdin:
        print(seconds(act, int(line), device), flush=True)


class Measured(NamedTuple):
    """What all rounds gave."""

    timings: dict[str, list[float]]  # mean seconds of a step, by contestant and round
    others: float  # the share of the cores that something else had meanwhile
    waited: float  # seconds that the trainer stood still for data
    memory: int  # bytes at most
    parts: dict[str, float]
    flops: dict[str, float]  # of an image
    graphs: str


def prepared(arguments: argparse.Namespace, folder: Path) -> Path:
    """Packs the data and writes the recipe of the trainer."""
    segment = arguments.game == "segment"
    few = (("train", KEPT / FASHION), ("left", 1 - KEPT / FASHION)) if arguments.game == "gan" else ()
    source = "generated:fashion-scenes" if segment else "embedded:fashion-mnist"
    pack(Packing(source, folder / "data", Options(size=arguments.size, splits=few)))
    path = folder / "recipe.yaml"
    path.write_text(RECIPES[arguments.game].format(data=folder / "data", folder=folder / "run", **vars(arguments)))
    return path


def play(arguments: argparse.Namespace, path: Path, recipe: Recipe, world: World) -> Measured:
    """All rounds: each contestant takes some steps, one after the other."""
    assert isinstance(recipe.game, Game)
    stop = Stop(world)
    with running(recipe, world) as run, Stepper(run) as step, Apart(path) as plain:

        def written() -> None:
            run.data_faults()
            plain_step(run)
            run.clock.advance()

        def alone() -> None:
            still.begin()
            stream, run.stream = run.stream, still  # type: ignore[assignment]
            step()  # without a step of the clock: the stream has the next draws at hand
            run.stream = stream

        still = Still(run.stream.read(0))
        here: dict[str, Callable[[], object]] = {"trainer": partial(one_step, run, stop, step), "step": alone}
        if arguments.game == "gan":
            sides = recipe.game.sides(data_spec(recipe.data))
            twins = [side.build().to(world.device) for side in sides.values()]
            images, _ = some_samples(recipe, world.device)
            here["tuned"] = Tuned(twins[0], twins[1], images, 100, arguments.batch, world.precision)
        contestants: dict[str, Callable[[int], float]] = {"plain": plain.seconds}
        contestants |= {name: partial(seconds, act, device=world.device) for name, act in here.items()}
        epoch = -(-KEPT // arguments.batch) if arguments.game == "gan" else 0
        for name, act in contestants.items():
            act(8 + epoch * (name == "trainer"))  # the first steps choose kernels, fill pools and record graphs
        timings: dict[str, list[float]] = {name: [] for name in contestants}
        began = busy(plain.process.pid)
        for _ in range(arguments.rounds):
            for name, act in contestants.items():
                timings[name].append(act(arguments.steps))
        others = 1 - began.share_of_these_processes(busy(plain.process.pid))
        waited = run.stream.waited
        memory = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else resident_bytes()
        parts = parts_of_a_step(run, stop, arguments.steps)
        # Operations within a graph cannot be counted: those of the step as it is written are the same.
        arithmetic = dict.fromkeys(contestants, flops(written, arguments.batch)) | {"plain": plain.flops}
        if "tuned" in here:
            arithmetic["tuned"] = flops(here["tuned"], arguments.batch)
        graphs = step.why_not or "yes" if world.device.type == "cuda" else "no: there is no GPU"
    stop.close()
    return Measured(timings, others, waited, memory, parts, arithmetic, graphs)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds, as the JSON that is written."""
    path = prepared(arguments, folder)
    recipe = read_recipe(path, [])
    world = World.join(recipe.run.precision)
    found = play(arguments, path, recipe, world)
    against = {name: ratios(taken, found.timings["trainer"]) for name, taken in found.timings.items()}
    del against["trainer"]
    low, middle, high = against["plain"]
    speeds = {name: arguments.batch / statistics.median(values) for name, values in found.timings.items()}
    own = {"semi": ("layers",), "segment": ("size",), "gan": ("layers", "size", "width")}[arguments.game]
    names = (*own, "batch", "rounds", "steps", *(("compile",) if arguments.compile else ()))
    setting = {
        "network": {"semi": "salimans_mlp", "segment": "farabet", "gan": arguments.network}[arguments.game],
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
            "busy_with_others": found.others,
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": versions(),
        "precision": world.precision,
        "precision_reason": world.reason,
        "graphs": found.graphs,
        "images_per_second": speeds,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "ratios": {name: {"ratio": two, "quartiles": [one, three]} for name, (one, two, three) in against.items()},
        "parts_seconds": found.parts,
        "peak_memory_bytes": found.memory,
        "copy_gigabytes_per_second": copy_gigabytes(world.device),
        "mflop_per_image": {name: value / 1e6 for name, value in found.flops.items()},
        "gflops": {name: speeds[name] * value / 1e9 for name, value in found.flops.items()},
        "gflops_of_a_matrix_product": {
            name: peak_gflops(world.device, DTYPES[name]) for name in sorted({"fp32", world.precision})
        },
        "data_wait_seconds": found.waited,
        "step_seconds": found.timings,
    }


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = ["", "| loop | precision | images/s | GFLOP/s | of a matrix product |", "|---|---|---:|---:|---:|"]
    for name in result["images_per_second"]:
        precision = "fp32" if name == "plain" else result["precision"]
        speed, gflops = result["images_per_second"][name], result["gflops"][name]
        share = gflops / result["gflops_of_a_matrix_product"][precision]
        lines.append(f"| {name} | {precision} | {speed:.1f} | {gflops:.0f} | {share:.0%} |")
    lines += ["", "| part of a step | ms |", "|---|---:|"]
    lines += [f"| {name} | {1000 * took:.2f} |" for name, took in result["parts_seconds"].items()]
    lines.append("")
    for name, found in result["ratios"].items():
        low, high = found["quartiles"]
        lines.append(f"{found['ratio']:.2f} times as fast as `{name}` (quartiles {low:.2f} … {high:.2f})")
    return "\n".join([*lines, f"{result['precision']}: {result['precision_reason']}; graphs: {result['graphs']}"])


def plotted(result: dict[str, Any]) -> Plot:
    """The speed of each contestant."""
    batch = result["setting"]["batch"]
    return Plot("images/s", {name: [batch / one for one in taken] for name, taken in result["step_seconds"].items()})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", default="gan", choices=[*RECIPES])
    parser.add_argument(
        "--layers", choices=["plain", "gandist"], help="of the plain loop of gan and semi; plain unless given"
    )
    parser.add_argument("--network", choices=["dcgan", "resnet"], help="of gan; dcgan unless given")
    parser.add_argument("--size", type=int, help="of gan and segment: pixels of a side, 64 and 160 unless given")
    parser.add_argument("--width", type=int, help="of gan: channels of the networks next to the image, 64 unless given")
    parser.add_argument("--batch", type=int, help="64, of semi 100 and of segment 4, unless given")
    parser.add_argument("--rounds", type=int, default=9, help="9 unless given")
    parser.add_argument("--steps", type=int, default=4, help="steps of each contestant in a round, 4 unless given")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true", help="the networks of trainer and step by torch.compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("rounds", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be 1 or more")
    if arguments.game == "semi" and (arguments.size or arguments.width):
        parser.error("--size and --width have no effect on the networks of semi")
    if arguments.game == "segment" and arguments.layers:
        parser.error("--layers has no effect on segment")
    if arguments.game != "gan" and arguments.network:
        parser.error(f"--network has no effect on {arguments.game}")
    if arguments.game == "segment" and arguments.width:
        parser.error("--width has no effect on the networks of segment")
    arguments.size, arguments.width = arguments.size or SIZE[arguments.game], arguments.width or 64
    arguments.layers, arguments.network = arguments.layers or "plain", arguments.network or "dcgan"
    arguments.batch = arguments.batch or BATCH[arguments.game]
    if arguments.plain is not None:
        play_apart(arguments)
        return
    report(measure, table, plotted, arguments)


if __name__ == "__main__":
    main()
