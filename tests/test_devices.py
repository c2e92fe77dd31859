"""A GPU computes what a CPU does, to rounding: whole steps without chance, crops by the same draws, optimizers by the same gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import open_stream, packed, scenes_on_disk
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gandist import pairs
from gandist.augment import Dice
from gandist.check import read_recipe
from gandist.launcher import World
from gandist.networks import AnyDiscriminator, AnyGenerator
from gandist.networks.segmentation import AnyAdversary, AnySegmenter
from gandist.optimizers import AdamOptions, OptimizerOptions, SgdOptions
from gandist.player import EmaOptions, Player, PlayerOptions
from gandist.train import train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
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


# Every family, small and without chance: options, the shapes of what it is called with, and how it is built.
def generator(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: TypeAdapter(AnyGenerator).validate_python({"kind": kind, **options}).build(12, (3, 32, 32))


def discriminator(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: TypeAdapter(AnyDiscriminator).validate_python({"kind": kind, **options}).build((3, 32, 32))


def segmenter(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: TypeAdapter(AnySegmenter).validate_python({"kind": kind, **options}).build(3, 5)


def adversary(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: TypeAdapter(AnyAdversary).validate_python({"kind": kind, **options}).build(5, 3)


NOISE, IMAGES, LARGER, MAPS = (6, 12), (6, 3, 32, 32), (3, 3, 44, 52), (3, 5, 33, 30)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "generator dcgan": (generator("dcgan", width=4), [NOISE]),
    "generator mlp": (generator("mlp", width=8), [NOISE]),
    "generator resnet": (generator("resnet", width=4), [NOISE]),
    "generator r3gan": (generator("r3gan", width=8, group_size=2), [NOISE]),
    "generator salimans_mlp": (generator("salimans_mlp", width=8), [NOISE]),
    "generator salimans_conv": (generator("salimans_conv", width=8), [NOISE]),
    "discriminator dcgan": (discriminator("dcgan", width=4), [IMAGES]),
    "discriminator dcgan, spectral norm": (discriminator("dcgan", width=4, norm="none", spectral_norm=True), [IMAGES]),
    "discriminator mlp": (discriminator("mlp", width=8), [IMAGES]),
    "discriminator resnet": (discriminator("resnet", width=4), [IMAGES]),
    "discriminator r3gan": (discriminator("r3gan", width=8, group_size=2), [IMAGES]),
    "discriminator salimans_mlp": (discriminator("salimans_mlp", widths=[8, 8], input_noise=0.0, hidden_noise=0.0), [IMAGES]),
    "discriminator salimans_conv": (discriminator("salimans_conv", width=4, input_dropout=0.0, hidden_dropout=0.0), [IMAGES]),
    "segmenter unet": (segmenter("unet", width=8, blocks=[1, 1, 1], decoder=8, dropout=0.0), [LARGER]),
    "segmenter farabet": (segmenter("farabet"), [LARGER]),
    "segmenter dilated8": (segmenter("dilated8", width=2), [LARGER]),
    "adversary two_branch": (adversary("two_branch"), [MAPS, LARGER[:2] + MAPS[2:]]),
    "adversary large_fov": (adversary("large_fov"), [MAPS]),
    "adversary small_fov": (adversary("small_fov"), [MAPS]),
    "adversary patch": (adversary("patch", width=4, layers=2), [MAPS]),
    "adversary per_pixel": (adversary("per_pixel", width=4), [(3, 5, 64, 64)]),
}  # fmt: skip


def logits_of(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer.logits


def computed(name: str, device: torch.device) -> dict[str, Tensor]:
    """The answer of a network, and the gradient of each weight, in fp32, channels last."""
    build, shapes = NETWORKS[name]
    torch.manual_seed(0)
    module = build()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        for parameter in module.parameters():  # away from those that begin at zero
            parameter += 0.1 * torch.randn_like(parameter)
    module = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=source).to(device) for shape in shapes]
    inputs = [part.contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part for part in inputs]
    answer = logits_of(module(*inputs))
    (answer * torch.randn(answer.shape, generator=source).to(device)).sum().backward()  # type: ignore[no-untyped-call]
    found = {key: p.grad.cpu() for key, p in module.named_parameters() if p.grad is not None}
    return found | {"answer": answer.detach().cpu()}


@needs_gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_answer_and_the_gradients_of_a_cpu(name: str) -> None:
    cpu, gpu = computed(name, CPU), computed(name, GPU)
    assert cpu.keys() == gpu.keys()
    for key, expected in cpu.items():
        away = (gpu[key] - expected).norm() / expected.norm().clamp_min(1e-6)
        assert away < 5e-3, f"{key}: {away:.4f}"


class Padded(TorchDispatchMode):
    """The means over neighbours with padding whose backward was called."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ == "avg_pool2d_backward" and any(args[4]):
            self.found += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_gradient_passes_through_a_mean_with_padding(name: str) -> None:
    """On CUDA it comes back shifted where channels lie last (PyTorch's issue 188344), without a word."""
    with Padded() as padded:
        computed(name, CPU)
    assert padded.found == 0


def test_a_mean_with_padding_would_be_found() -> None:
    image = torch.randn(1, 2, 6, 6, requires_grad=True)
    with Padded() as padded:
        F.avg_pool2d(image, 2, 1, 1).sum().backward()
    assert padded.found == 1


def test_the_networks_are_all_there_are() -> None:
    known = {f"{role} {kind}" for role, kind in (name.split(",")[0].split() for name in NETWORKS)}
    registered = {point.name.replace(".", " ") for point in entry_points(group="gandist.networks")}
    assert registered - known == {"segmenter smp", "segmenter timm", "generator signal", "discriminator signal"}


@needs_gpu
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
    for here, there in zip(cpu[:3], gpu[:3], strict=True):  # later ones have been led apart by rounding
        assert {n: there[n] for n in names} == pytest.approx({n: here[n] for n in names}, rel=rounding, abs=1e-3)


class Carried(Dice):
    """Draws on the CPU, whatever the device."""

    def chance(self, transformations: int) -> Tensor:
        return 1 - torch.rand((self.size, transformations), generator=self.generator).to(self.device)

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.size, generator=self.generator).to(self.device)


@needs_gpu
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


@needs_gpu
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
