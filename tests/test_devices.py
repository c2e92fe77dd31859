"""A GPU computes what a CPU does, to rounding: whole steps without chance, crops by the same draws, optimizers by the same gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import open_stream, packed, scenes_on_disk
from torch import Tensor, nn

from gandist import pairs
from gandist.augment import Dice
from gandist.check import read_recipe
from gandist.launcher import World
from gandist.optimizers import AdamOptions, OptimizerOptions, SgdOptions
from gandist.player import EmaOptions, Player, PlayerOptions
from gandist.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda")

SEGMENT = """\
data: {{path: {data}, transform: {{canvas: [48, 64]}}}}
game:
  kind: segment
  segmenter:
    network: {{kind: unet, width: 8, blocks: [1, 1, 1], decoder: 16, dropout: 0.0}}
    optimizer: {{kind: adam, learning_rate: 2e-3, beta1: 0.9, weight_decay: 0.05}}
    schedule: {{kind: cosine, warmup_images: 32, until_images: 640}}
    ema: {{half_life_images: 400}}
    clip_norm: 1.0
  adversary: {network}
  adversarial: {{weight: 0.1, input: scaling}}
  dice: 0.5
  class_weights: log_frequency
run: {{folder: {folder}, images: 640, batch: 16, precision: {precision}, log_every: 4, save_images: 100_000}}
"""


@pytest.fixture(autouse=True)
def fp32_is_fp32() -> Iterator[None]:
    """TF32 rounds what goes into a convolution to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    sizes = [(48, 64), (40, 60), (48, 50)]
    packed(scenes_on_disk(folder / "raw", 48, sizes), folder / "packed")
    return folder / "packed"


def measured(path: Path, device: torch.device, precision: Any) -> list[dict[str, float]]:
    """The record of a run on a device."""
    recipe = read_recipe(path, [f"run.folder={path.parent / device.type}"])
    assert train(recipe, World(device, 0, 1, precision, "for the test")) == 0
    found = [json.loads(line) for line in (path.parent / device.type / "log.jsonl").read_text().splitlines()]
    return [row for row in found if "event" not in row]


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-2), ("bf16", 5e-2)])
@pytest.mark.parametrize("adversary", ["null", "{network: {kind: patch, width: 8, layers: 2}}"])
def test_steps_without_chance_measure_the_same(
    scenes: Path, tmp_path: Path, precision: str, rounding: float, adversary: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(SEGMENT.format(data=scenes, folder=tmp_path / "run", precision=precision, network=adversary))
    cpu, gpu = (measured(path, device, precision) for device in (CPU, GPU))
    names = [name for name in cpu[0] if name.startswith(("loss/", "grad_norm/segmenter", "learning_rate/"))]
    assert len(names) >= 4
    for here, there in zip(cpu, gpu, strict=True):
        assert {n: there[n] for n in names} == pytest.approx({n: here[n] for n in names}, rel=rounding, abs=1e-3)


class Carried(Dice):
    """Draws on the CPU, whatever the device."""

    def chance(self, transformations: int) -> Tensor:
        return 1 - torch.rand((self.size, transformations), generator=self.generator).to(self.device)

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.size, generator=self.generator).to(self.device)


def test_crops_by_the_same_draws_show_the_same(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "Dice", Carried)
    (batch,) = open_stream(scenes, parts=("image", "mask"), batch=32, workers=0, transform={"canvas": [48, 64]}).read(0)
    options = pairs.PairOptions(
        crop=(40, 44), scale=(0.6, 1.6), stretch=0.15, degrees=20, brightness=0.2, contrast=0.3, saturation=0.3, hue=0.1
    )
    found = []
    for device in (CPU, GPU):
        parts = {name: part.to(device) for name, part in batch.parts.items()}
        moved = type(batch)(parts, batch.draw, batch.rows, batch.size, batch.seed, device)
        monkeypatch.setattr(type(moved), "source", lambda self, purpose: torch.Generator().manual_seed(7))
        view = pairs.views(options, moved, "image", "mask")
        found.append(pairs.View(*(part.cpu() for part in view)))
    cpu, gpu = found
    assert ((cpu.images - gpu.images).abs() < 1e-3).float().mean() > 0.999
    assert (cpu.mask == gpu.mask).float().mean() > 0.999
    assert (cpu.inside == gpu.inside).float().mean() > 0.999


OPTIMIZERS: dict[str, Callable[[], OptimizerOptions]] = {
    "adam": lambda: AdamOptions(),
    "inside": lambda: AdamOptions(eps_inside_root=True),
    "decay": lambda: AdamOptions(weight_decay=0.05, beta1=0.9),
    "sgd": lambda: SgdOptions(kind="sgd", momentum=0.5, weight_decay=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_player_moves_by_the_same_gradients_to_the_same_weights(name: str) -> None:
    options = PlayerOptions(optimizer=OPTIMIZERS[name](), ema=EmaOptions(half_life_images=50), clip_norm=2.0)
    players = []
    for device in (CPU, GPU):
        torch.manual_seed(0)
        players.append(
            Player("one", nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)), options, device=device)
        )
    for number in range(30):
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(number))
        for player in players:
            with player.turn(number * 8, 8) as turn:
                turn.backward(player(inputs.to(player.device)).square().mean())
    cpu, gpu = (player.tensors() for player in players)
    for file in ("", "ema"):
        for key, tensor in cpu[file].items():
            torch.testing.assert_close(gpu[file][key].cpu(), tensor, rtol=1e-3, atol=2e-5)
