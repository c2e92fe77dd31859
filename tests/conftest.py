"""Real data and real processes for the tests: the embedded garments, `gandist` as users start it, and two gloo ranks."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from gandist.cli import main
from gandist.data.dataset import Dataset
from gandist.data.opening import open_batches
from gandist.data.order import Full, places_of
from gandist.data.pack import Options, Packing, pack
from gandist.data.sources.scenes import scene
from gandist.data.stream import Batch, Share, Stream
from gandist.game import Clock, Phase, Players
from gandist.launcher import World
from gandist.log import Meter
from gandist.player import Player
from gandist.recipe import DataOptions, Recipe
from gandist.steps import moves, step

ROOT = Path(__file__).parent.parent
SIZES = [(37, 50), (48, 40), (64, 64), (33, 41), (40, 57), (52, 36), (45, 45)]  # (height, width)

# A process of a test gets one thread: two ranks share two cores, and the sums of a layer stay in one order.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_", "GANDIST_"))},
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "PYTHONUNBUFFERED": "1",
}

TINY = """\
data:
  path: {data}
game:
  kind: gan
  noise: 8
  generator:
    network: {generator}
    ema: {{half_life_images: 500}}
  discriminator:
    network: {discriminator}
run:
  folder: {folder}
  images: {images}
  batch: 16
  log_every: 2
"""


def pytest_configure() -> None:
    torch.set_num_threads(1)


def packed(source: object, out: Path, workers: int = 1, **options: object) -> Dataset:
    """A source packed in this process, in the source's order unless `shuffle` says otherwise."""
    return pack(Packing(str(source), out, Options(**{"shuffle": None, **options})), workers)[0]


def samples(draw: int, rows: range, *, batch: int, length: int, seed: int) -> np.ndarray:
    """The sample numbers that stand at `rows` of global batch `draw` in the full order."""
    return Full(length, seed)(places_of(draw, rows, batch))


def open_stream(
    path: object, *, parts: tuple[str, ...] = ("image",), batch: int, seed: int = 0, rank: int = 0, ranks: int = 1,
    accumulate: int = 1, recall: int = 1, **options: object,
) -> Stream:  # fmt: skip
    """A stream of a dataset on the CPU; `options` are those of the recipe's section `data`."""
    chosen = DataOptions(path=str(path), **options)
    share = Share(parts, batch, seed, torch.device("cpu"), rank, ranks, accumulate, recall)
    return cast(Stream, open_batches(chosen, share))


@dataclass
class Table:
    """What `steps.step` needs of a run, and nothing that is written."""

    recipe: Recipe
    world: World
    players: dict[str, Player]
    stream: Stream
    clock: Clock
    meter: Meter

    @property
    def game(self) -> Any:
        return self.recipe.game

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.game.phases(self.stream.spec)  # type: ignore[no-any-return]

    def play(self, steps: int, phases: tuple[Phase, ...] | None = None) -> None:
        for _ in range(steps):
            step(self, moves(self.clock, phases or self.phases), lambda move: self.stream.read(move.draw))  # type: ignore[arg-type]
            self.clock.advance()

    def draw(self, number: int) -> Batch:
        (batch,) = self.stream.read(number)
        return batch


def tensors(players: Players) -> dict[str, np.ndarray]:
    """All that a checkpoint would hold, copied, by player, file and name."""
    return {
        f"{name}/{file}/{key}": tensor.detach().numpy().copy()
        for name, player in players.items()
        for file, found in player.tensors().items()
        for key, tensor in found.items()
    }


def scenes_on_disk(folder: Path, count: int, sizes: list[tuple[int, int]] = SIZES) -> Path:
    """Scenes cut to several sizes, as image and mask folders; the first rows of each mask are ignored."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        made = scene(number)
        mask = made.mask[:height, :width].copy()
        mask[: 1 + number % 3] = 255
        Image.fromarray(made.image[:height, :width]).save(folder / "images" / f"scene_{number:03}.png")
        Image.fromarray(mask).save(folder / "masks" / f"scene_{number:03}.png")
    return folder


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded garments, packed; not to be written to."""
    folder = tmp_path_factory.mktemp("data") / "fashion"
    packed("embedded:fashion-mnist", folder)
    return folder


@pytest.fixture
def recipe(fashion: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small recipe and returns its path."""

    def write(
        name: str = "run",
        *,
        images: int = 160,
        generator: str = "{kind: mlp, width: 32}",
        discriminator: str = "{kind: mlp, width: 32}",
        data: Path | None = None,
    ) -> Path:
        path = tmp_path / f"{name}.yaml"
        values = {"generator": generator, "discriminator": discriminator, "images": images}
        path.write_text(TINY.format(data=data or fashion, folder=tmp_path / name, **values))
        return path

    return write


class Result:
    """How a command line ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def gandist(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a verb in this process, from its argument vector to its exit code."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["gandist", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as leave:
            main()
        captured = capfd.readouterr()
        return Result(int(leave.value.code or 0), captured.out, captured.err)

    return call


DDP, FSDP2 = ("--multi_gpu",), ("--use_fsdp", "--fsdp_version", "2")


def command(*arguments: object, ranks: int = 1, launch: tuple[str, ...] = DDP) -> list[str]:
    """`gandist …`, or `accelerate launch … -m gandist …` as a user would start it on a machine without GPU."""
    words = [sys.executable, "-m", "gandist"]
    if ranks > 1:
        words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launch]
        words += ["--num_machines", "1", "--num_processes", str(ranks), "--main_process_port", "0", "-m", "gandist"]
    return [*words, *map(str, arguments)]


def start(
    *arguments: object, ranks: int = 1, launch: tuple[str, ...] = DDP, **environment: str
) -> subprocess.Popen[str]:
    """Starts a command in a session of its own."""
    return subprocess.Popen(
        command(*arguments, ranks=ranks, launch=launch), env={**ENVIRONMENT, **environment}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(
    *arguments: object, ranks: int = 1, launch: tuple[str, ...] = DDP, timeout: float = 120, **environment: str
) -> Result:
    """Runs a command to its end; one that hangs is killed and fails."""
    process = start(*arguments, ranks=ranks, launch=launch, **environment)
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # ranks have sessions of their own
            one.kill()
        raise
    return Result(process.returncode, out, out)


def rows(folder: Path) -> list[dict[str, float]]:
    """The measurements of a run's record."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def wait_for_images(folder: Path, images: int, process: subprocess.Popen[str], timeout: float = 90) -> None:
    """Waits until a run's record has come to `images`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (folder / "log.jsonl").exists() and any(row["images"] >= images for row in rows(folder)):
            return
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.02)
    raise AssertionError(f"{folder} did not come to {images} images in {timeout} s")


def tensor_files(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor file of a checkpoint: weights, averages and moments."""
    found = {path.name: path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))}
    assert found, checkpoint
    return found


def _rank(function: Callable[..., object], rank: int, ranks: int, store: str, arguments: tuple[object, ...]) -> object:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def on_ranks(ranks: int, function: Callable[..., object], *arguments: object) -> list[object]:
    """What `function` returns on each of `ranks` gloo processes, which share nothing with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gandist.train"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(ranks, mp_context=context) as pool:
        jobs = [pool.submit(_rank, function, rank, ranks, f"{folder}/store", arguments) for rank in range(ranks)]
        return [job.result(timeout=120) for job in jobs]


Update = tuple[float, list[list[float]]]  # a loss, and the gradient of each weight


def assert_equal_updates(one: Update, *others: Update) -> None:
    """To float64 rounding: what one process has with the whole batch, and what ranks have that average their gradients."""
    value, gradients = one
    for other_value, other_gradients in others:
        assert other_value == pytest.approx(value, rel=1e-12, abs=1e-14)
        for gradient, other in zip(gradients, other_gradients, strict=True):
            assert other == pytest.approx(gradient, rel=1e-10, abs=1e-13)
