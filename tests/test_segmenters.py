"""Segmenters and their adversaries take images of any size, compute what their papers say, and start from the weights of others."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Result, scenes_on_disk
from conftest import packed as packed_dataset
from einops import rearrange
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from gandist.networks import farabet
from gandist.networks.dilated import Dilated8
from gandist.networks.luc import receptive_field
from gandist.networks.resampling import stretched
from gandist.networks.segmentation import (
    AdversaryOptions,
    AnyAdversary,
    AnySegmenter,
    PretrainedOptions,
    SegmenterOptions,
)
from gandist.recipe import Failure, InputError
from gandist.tensors import packed

SEGMENTERS: list[dict[str, Any]] = [
    {"kind": "farabet"},
    {"kind": "farabet", "hidden": 5},
    {"kind": "dilated8", "width": 2},
    {"kind": "dilated8", "width": 2, "context": False},
]
ADVERSARIES: list[dict[str, Any]] = [
    {"kind": "two_branch"},
    {"kind": "large_fov", "light": True},
    {"kind": "large_fov", "output": "places"},
    {"kind": "small_fov"},
    {"kind": "small_fov", "light": True, "output": "places"},
    {"kind": "patch", "width": 4},
    {"kind": "patch", "width": 4, "layers": 1, "image": True},
    {"kind": "patch", "width": 4, "layers": 4, "spectral_norm": True},
    {"kind": "per_pixel", "width": 4},
]


def segmenter(**options: Any) -> SegmenterOptions:
    return TypeAdapter(AnySegmenter).validate_python(options)


def adversary(**options: Any) -> AdversaryOptions:
    return TypeAdapter(AnyAdversary).validate_python(options)


def name_of(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


def written(path: Path, tensors: dict[str, Tensor]) -> PretrainedOptions:
    """A file of weights, as a recipe names it."""
    path.write_bytes(packed(tensors))
    return PretrainedOptions(path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def judged(options: AdversaryOptions, module: nn.Module, height: int, width: int) -> Tensor:
    """The logits of 2 label maps of 5 classes, beside images of 3 channels where they are read."""
    labels = torch.randn(2, 5, height, width).softmax(1)
    return cast(Tensor, module(labels, *([torch.randn(2, 3, height, width)] if options.reads_image else [])))


def means(module: nn.Module) -> nn.Module:
    """With positive weights, and means for maxima, so that every pixel that an output can depend on has a gradient."""
    for part in [*module.modules()]:
        for name, child in [*part.named_children()]:
            if isinstance(child, nn.MaxPool2d):
                setattr(part, name, nn.AvgPool2d(2))
    for parameter in module.parameters():
        parameter.data.abs_()
    return module.double()


def seen_by_the_middle(module: nn.Module, maps: int, side: int) -> Tensor:
    """Which pixels (side, side) the place in the middle of the logits (1, h', w') depends on."""
    labels = torch.rand(1, maps, side, side, dtype=torch.double, requires_grad=True)
    logits = module(labels)
    logits[0, logits.shape[1] // 2, logits.shape[2] // 2].backward()
    assert labels.grad is not None
    return labels.grad.abs().sum((0, 1)) > 0


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("options", ADVERSARIES, ids=name_of)
def test_an_adversary_judges_label_maps_from_its_smallest_on_and_none_below(options: dict[str, Any]) -> None:
    chosen = adversary(**options)
    module, smallest = chosen.build(5, 3), chosen.smallest
    for height, width in ((smallest, smallest), (smallest + 3, 2 * smallest + 1)):
        logits = judged(chosen, module, height, width)
        places = options["kind"] in ("patch", "per_pixel") or options.get("output") == "places"
        assert logits.ndim == (3 if places else 1)
        assert len(logits) == 2
        assert logits.numel() > 0
        assert options["kind"] != "per_pixel" or logits.shape == (2, height, width)
    for height, width in ((smallest - 1, smallest + 9), (smallest + 9, smallest - 1)):
        try:
            logits = judged(chosen, module, height, width)
        except RuntimeError:
            continue
        assert logits.numel() == 0 or bool(logits.isnan().all())


@pytest.mark.parametrize("options", ADVERSARIES, ids=name_of)
def test_every_weight_of_an_adversary_and_all_that_it_reads_get_a_gradient(options: dict[str, Any]) -> None:
    chosen = adversary(**options)
    module = chosen.build(5, 3)
    side = 2 * chosen.smallest
    inputs = [torch.randn(2, count, side, side, requires_grad=True) for count in (5, *([3] * chosen.reads_image))]
    module(*inputs).square().sum().backward()
    for name, tensor in [*module.named_parameters(), *enumerate(inputs)]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("kind", "pixels"), [("large_fov", 34), ("small_fov", 18)])
@pytest.mark.parametrize("light", [False, True])
def test_a_place_sees_the_field_of_view_of_its_name(kind: str, pixels: int, light: bool) -> None:
    module = adversary(kind=kind, light=light, output="places").build(2, 3)
    assert receptive_field(module) == pixels
    assert seen_by_the_middle(means(module), 2, 56).sum() == pixels**2


def test_a_patch_has_70_pixels_a_side() -> None:
    module = adversary(kind="patch", width=1).build(2, 3)
    assert receptive_field(module) == 70
    assert seen_by_the_middle(means(module), 2, 120).sum() == 70**2


@pytest.mark.parametrize(
    "options",
    [
        *({"kind": "patch", "width": 1, "layers": layers} for layers in (1, 2, 3)),
        {"kind": "large_fov", "output": "places"},
        {"kind": "small_fov", "output": "places"},
    ],
)
def test_a_place_lies_in_the_middle_of_what_it_sees(options: dict[str, Any]) -> None:
    chosen = adversary(**options)
    labels = torch.rand(1, 2, 120, 126, dtype=torch.double, requires_grad=True)
    logits = means(chosen.build(2, 3))(labels)[0]
    for number in (logits.shape[1] // 2, logits.shape[1] // 2 + 1):
        (seen,) = torch.autograd.grad(logits[logits.shape[0] // 2, number], labels, retain_graph=True)
        columns = seen[0].abs().sum((0, 1)).nonzero().flatten()
        first, step = chosen.places(126, logits.shape[1])
        assert first + step * number == (columns[0] + columns[-1]).item() / 2


# Kernel and channels of each convolution; what they have with the two outputs of the paper, in millions, for 21 and 63 maps.
LARGE = [(3, 96), (3, 128), (3, 128), (3, 256), (3, 256), (3, 512), (3, 2)]
LARGE_LIGHT = [(3, 96), (3, 128), (3, 128), (3, 128), (3, 128), (3, 256), (3, 2)]
SMALL = [(3, 96), (1, 128), (3, 256), (1, 256), (3, 512), (1, 2)]
SMALL_LIGHT = [(3, 96), (1, 128), (3, 128), (1, 128), (3, 256), (1, 2)]


@pytest.mark.parametrize(
    ("kind", "light", "layers", "millions"),
    [
        ("large_fov", False, LARGE, (2.35, 2.39)),
        ("large_fov", True, LARGE_LIGHT, (0.87, 0.91)),
        ("small_fov", False, SMALL, (1.57, 1.61)),
        ("small_fov", True, SMALL_LIGHT, (0.49, 0.53)),
    ],
)
def test_the_four_fields_of_view_have_the_weights_of_the_published_ones(
    kind: str, light: bool, layers: list[tuple[int, int]], millions: tuple[float, float]
) -> None:
    for maps, published in zip((21, 63), millions, strict=True):
        inputs = [maps, *(channels for _, channels in layers)]
        counts = [(kernel**2 * before + 1) * after for before, (kernel, after) in zip(inputs, layers, strict=False)]
        assert sum(counts) / 1e6 == pytest.approx(published, abs=0.00501)
        module = adversary(kind=kind, light=light).build(maps, 3)
        assert sum(p.numel() for p in module.parameters()) == sum(counts) - counts[-1] // 2  # one logit for two


@pytest.mark.parametrize("kind", ["large_fov", "small_fov"])
def test_the_logit_of_a_map_is_the_mean_of_its_places(kind: str) -> None:
    one, places = (adversary(kind=kind, output=output).build(3, 3) for output in ("mean", "places"))
    places.load_state_dict(one.state_dict())
    labels = torch.rand(2, 3, 20, 33)
    assert places(labels).shape == (2, 5, 8)
    torch.testing.assert_close(one(labels), places(labels).mean((1, 2)))


def test_spectral_norm_leaves_each_weight_a_largest_singular_value_of_one() -> None:
    for spectral_norm in (True, False):
        module = adversary(kind="patch", width=2, layers=2, spectral_norm=spectral_norm).build(2, 3)
        for _ in range(200):
            module(torch.rand(1, 2, 12, 12))
        module.eval()
        largest = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in convolutions(module)]
        assert (largest == pytest.approx([1.0] * 4, rel=1e-3)) == spectral_norm


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize("sizes", [((1, 1), (32, 63)), ((3, 2), (96, 65)), ((5, 7), (4, 20))])
def test_stretching_is_bilinear_interpolation(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    maps = torch.randn(2, *sizes[0], dtype=torch.double)
    expected = F.interpolate(maps[None], size=sizes[1], mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(stretched(maps, *sizes[1]), expected)


@pytest.mark.parametrize("options", SEGMENTERS, ids=name_of)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_segmenter_has_logits_for_images_of_any_size(options: dict[str, Any], channels: int) -> None:
    chosen = segmenter(**options)
    assert not [*chosen.faults(channels, 37, 50)]
    module = chosen.build(channels, 6)
    for height, width in ((37, 50), (16, 32), (1, 3)):
        logits = module(torch.rand(2, channels, height, width) * 2 - 1)
        assert logits.shape == (2, 6, -(-height // chosen.stride), -(-width // chosen.stride))
        assert bool(logits.isfinite().all())


@pytest.mark.parametrize("options", SEGMENTERS, ids=name_of)
def test_every_weight_of_a_segmenter_gets_a_gradient(options: dict[str, Any]) -> None:
    module = segmenter(**options).build(3, 3)
    for layer in convolutions(module):  # the context module lets nothing but positive values pass
        assert layer.bias is not None
        nn.init.uniform_(layer.bias, 0.1, 0.2)
    module(torch.randn(2, 3, 40, 48)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_levels_of_the_pyramid_sum_up_to_the_image() -> None:
    images = torch.randn(2, 3, 48, 64)
    levels = farabet.pyramid(images)
    assert [level.shape[2:] for level in levels] == [(48, 64), (24, 32), (12, 16)]
    whole = levels[2]
    for level in levels[1::-1]:
        whole = F.interpolate(whole, scale_factor=2, mode="bilinear") + level
    torch.testing.assert_close(whole, images)
    for level in farabet.pyramid(torch.full((1, 1, 16, 16), 0.7))[:2]:  # what is even has no edges
        torch.testing.assert_close(level, torch.zeros_like(level))


def neighbourhoods(images: Tensor) -> Tensor:
    """(B, C, 225, H − 14, W − 14): the 15×15 pixels around each that has so many."""
    batch, channels, height, width = images.shape
    columns = F.unfold(images.flatten(0, 1)[:, None], 15)
    return rearrange(columns, "(b c) n (h w) -> b c n h w", b=batch, c=channels, h=height - 14, w=width - 14)


def test_neighbourhoods_get_a_mean_of_zero_and_a_deviation_of_one() -> None:
    images = torch.randn(2, 3, 40, 50) * torch.linspace(0.1, 1, 50) + torch.linspace(-1, 1, 40)[:, None]
    around = neighbourhoods(images)
    mean, deviation = around.mean(2, keepdim=True), around.std(2, keepdim=True, unbiased=False)
    made = (around - mean) / deviation
    torch.testing.assert_close(made.mean(2), torch.zeros_like(made[:, :, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.square().mean(2), torch.ones_like(made[:, :, 0]))
    found = farabet.standardised(images)
    torch.testing.assert_close(found[:, :, 7:-7, 7:-7], made[:, :, 225 // 2], atol=1e-4, rtol=1e-4)
    # In a corner, the neighbourhood is what there is of it.
    corner = images[:, :, :8, :8].flatten(2)
    expected = (images[:, :, 0, 0] - corner.mean(2)) / corner.std(2, unbiased=False)
    torch.testing.assert_close(found[:, :, 0, 0], expected, atol=1e-4, rtol=1e-4)


def test_neighbourhoods_lose_their_brightness_and_contrast_and_flat_ones_stay_flat() -> None:
    images = torch.randn(2, 3, 40, 50)
    for contrast, brightness in ((0.05, 0.9), (3.0, -20.0)):
        changed = farabet.standardised(images * contrast + brightness)
        torch.testing.assert_close(changed, farabet.standardised(images), atol=2e-4, rtol=1e-3)
    noise = 1e-4 * torch.randn(1, 1, 32, 32)
    assert farabet.standardised(0.5 + noise).abs().max() < 0.1
    assert farabet.standardised(torch.full((1, 1, 32, 32), 0.5)).abs().max() == 0


def test_colours_are_those_of_bt_601_and_grey_has_none() -> None:
    grey = torch.linspace(-1, 1, 9).reshape(1, 1, 3, 3).expand(2, 3, 3, 3)
    seen = farabet.yuv(grey)
    torch.testing.assert_close(seen[:, 0], grey[:, 0])
    assert seen[:, 1:].abs().max() < 1e-6
    # The matrix of ITU-R BT.601 as it is published, to three digits.
    published = [[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]]
    matrix = farabet.yuv(torch.eye(3).reshape(3, 3, 1, 1)).flatten(1).T
    torch.testing.assert_close(matrix, torch.tensor(published), atol=6e-4, rtol=0)


def test_all_scales_are_seen_by_the_same_weights() -> None:
    module = segmenter(kind="farabet").build(3, 4)
    sizes = [(49 * before + 1) * after for before, after in ((3, 16), (16, 64), (64, 256))]
    assert sum(p.numel() for p in module.parameters()) == sum(sizes) + (768 + 1) * 4
    network = cast(Any, module).network
    weight = network.classifier[-1].weight.detach().clone()
    for scale in range(3):  # each by itself reaches all of them
        module.zero_grad()
        network.classifier[-1].weight.data.zero_()
        mine = slice(256 * scale, 256 * (scale + 1))
        network.classifier[-1].weight.data[:, mine] = weight[:, mine]
        module(torch.randn(1, 3, 32, 32)).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in network.features.parameters())


def test_the_classifier_sees_each_scale_beside_the_others_at_the_size_of_the_finest() -> None:
    module = segmenter(kind="farabet").build(2, 4)
    network, seen = cast(Any, module).network, []
    network.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 2, 32, 48)
    module(images)
    assert seen[0].shape == (1, 768, 8, 12)
    for scale, level in enumerate(farabet.pyramid(images)):
        features = network.features(farabet.standardised(level))
        for _ in range(scale):
            features = F.interpolate(features, scale_factor=2, mode="bilinear")
        torch.testing.assert_close(seen[0][:, 256 * scale : 256 * (scale + 1)], features)


def test_the_multi_scale_network_sees_no_brightness_and_no_contrast_and_both_in_full_precision() -> None:
    module = segmenter(kind="farabet").build(1, 4)
    images = torch.rand(1, 1, 48, 64) * 2 - 1
    torch.testing.assert_close(module(0.4 * images + 0.5), module(images), atol=1e-3, rtol=1e-3)
    seen = []
    cast(Any, module).network.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(images.bfloat16().float()).dtype == torch.bfloat16
        module(images)
    for exact, found in zip(seen[:3], seen[6:], strict=True):
        assert torch.equal(exact, found)


def front_of(module: nn.Module) -> nn.Sequential:
    return cast(nn.Sequential, cast(Any, module).network.front)


def test_the_context_module_begins_as_the_identity_on_what_is_not_negative() -> None:
    chosen = segmenter(kind="dilated8", width=1)
    module = chosen.build(3, 5).eval()
    images = torch.randn(2, 3, 64, 80)
    front = front_of(module)(images)
    assert front.min() < 0 < front.max()
    torch.testing.assert_close(module(images), front.relu())


def test_the_context_module_sees_67_places_and_keeps_the_size() -> None:
    context = cast(Any, segmenter(kind="dilated8", width=1).build(3, 2)).network.context
    assert receptive_field(context) == 67  # table 1 of the paper
    for layer in convolutions(context):
        layer.weight.data.uniform_(0.1, 1)
    features = torch.rand(1, 2, 80, 80, requires_grad=True)
    made = context(features)
    assert made.shape == features.shape
    made[0, 0, 40, 40].backward()
    assert features.grad is not None
    assert (features.grad.abs().sum((0, 1)) > 0).sum() == 67**2


def test_dilation_computes_at_every_second_place_what_the_pooled_network_does() -> None:
    front = front_of(segmenter(kind="dilated8", width=1).build(3, 5)).eval()
    pools = [number for number, layer in enumerate(front) if isinstance(layer, nn.MaxPool2d)]
    assert len(pools) == 3
    tail = front[pools[-1] + 1 + 6 :]  # after the three convolutions of the fourth stage
    sparse = copy.deepcopy(tail)
    for layer in convolutions(sparse)[:4]:
        layer.dilation, layer.padding = (tuple(value // 2 for value in pair) for pair in (layer.dilation, layer.padding))  # type: ignore[union-attr, operator]  # fmt: skip
    assert [layer.dilation[0] for layer in convolutions(tail)] == [2, 2, 2, 4, 1, 1]
    features = torch.randn(1, 8, 24, 32)
    torch.testing.assert_close(tail(features)[:, :, ::2, ::2], sparse(features[:, :, ::2, ::2]))


def vgg(width: int) -> nn.ModuleDict:
    """VGG-16 as torchvision builds it, but narrow."""
    layers: list[nn.Module] = []
    inputs = 3
    for factor, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, factor * width, 3, padding=1), nn.ReLU()]
            inputs = factor * width
        layers.append(nn.MaxPool2d(2))
    hidden = 64 * width
    classifier = [nn.Linear(49 * inputs, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, 9)]  # fmt: skip
    return nn.ModuleDict({"features": nn.Sequential(*layers), "classifier": nn.Sequential(*classifier)})


def test_the_front_end_computes_what_the_vgg_does_whose_weights_it_started_from(tmp_path: Path) -> None:
    pretrained = vgg(2)
    chosen = Dilated8(kind="dilated8", width=2, weights=written(tmp_path / "vgg.safetensors", pretrained.state_dict()))
    assert chosen.pretrained == chosen.weights
    module = chosen.build(3, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    chosen.start(module)
    front = front_of(module).eval()
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = ((images + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
    normalised = cast(Any, module).network.normalise(images)
    torch.testing.assert_close(normalised, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast(Any, module).network.normalise(images), normalised)
    features, classifier = (cast(nn.Sequential, pretrained[part]) for part in ("features", "classifier"))
    torch.testing.assert_close(front[:23](normalised), features[:23](wanted))  # as far as the fourth pool
    for mine, theirs in zip(convolutions(front)[10:13], convolutions(features)[10:], strict=True):
        assert torch.equal(mine.weight, theirs.weight)
    # The hidden layers, at the one place of a map of 7×7 pixels.
    fc6, fc7 = convolutions(front)[13:15]
    whole = torch.randn(2, 16, 7, 7)
    first = F.conv2d(whole, fc6.weight, fc6.bias)
    torch.testing.assert_close(first.flatten(1), classifier[0](whole.flatten(1)))
    torch.testing.assert_close(fc7(first).flatten(1), classifier[3](first.flatten(1)))


def test_without_weights_images_are_seen_as_they_are_and_nothing_is_filled() -> None:
    chosen = segmenter(kind="dilated8", width=1)
    module = chosen.build(3, 5)
    before = copy.deepcopy(module.state_dict())
    chosen.start(module)
    assert chosen.pretrained is None
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    images = torch.randn(1, 3, 8, 8)
    assert cast(Any, module).network.normalise(images) is images


@pytest.mark.parametrize("name", ["features.10.bias", "classifier.0.weight", "classifier.3.weight"])
def test_weights_that_lack_one_or_have_another_shape_are_refused_by_its_name(tmp_path: Path, name: str) -> None:
    tensors = vgg(1).state_dict()
    for found in ({key: tensor for key, tensor in tensors.items() if key != name}, {**tensors, name: torch.zeros(5)}):
        weights = written(tmp_path / "vgg.safetensors", found)
        chosen = Dilated8(kind="dilated8", width=1, weights=weights)
        with pytest.raises(Failure, match=re.escape(name)):
            chosen.start(chosen.build(3, 5))


def test_weights_of_another_digest_are_refused(tmp_path: Path) -> None:
    weights = written(tmp_path / "vgg.safetensors", vgg(1).state_dict())
    other = weights.model_copy(update={"sha256": "0" * 64})
    chosen = Dilated8(kind="dilated8", width=1, weights=other)
    with pytest.raises(InputError, match="has the SHA-256"):
        chosen.start(chosen.build(3, 5))


def test_the_weights_of_vgg_16_are_for_its_width_and_for_three_channels(tmp_path: Path) -> None:
    weights = {"path": str(tmp_path / "vgg.safetensors"), "sha256": "0" * 64}
    assert not [*segmenter(kind="dilated8", weights=weights).faults(3, 64, 64)]
    (fault,) = segmenter(kind="dilated8", weights=weights).faults(1, 64, 64)
    assert "3 channels" in fault
    (fault,) = segmenter(kind="dilated8", weights=weights, width=32).faults(3, 64, 64)
    assert "`width` 64, not 32" in fault


REASON = "pip install 'gandist[zoo]'"


@pytest.fixture(scope="module")
def zoo() -> Iterator[Any]:
    """timm, beside segmentation_models_pytorch; also where torchvision was built for another torch, whose operators it then lacks."""
    # In a folder of its own: torchmetrics imports a torchvision that it finds, and this one fails without the operators below.
    apart = str(ROOT / ".venv" / "zoo")
    sys.path.append(apart)
    for name in ("torchvision", "timm", "segmentation_models_pytorch"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: {REASON}")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # an operator does not exist; none of them is called here
        found = importlib.util.find_spec("torchvision")
        assert found is not None
        assert found.submodule_search_locations
        text = Path(found.submodule_search_locations[0], "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in sorted(set(re.findall(r'register_fake\("torchvision::(\w+)"\)', text))):
            library.define(f"{name}(Tensor boxes) -> Tensor")
    pytest.importorskip("segmentation_models_pytorch", reason=REASON)
    yield pytest.importorskip("timm", reason=REASON)
    sys.path.remove(apart)


ZOO: list[dict[str, Any]] = [
    {"kind": "smp", "model": "Unet", "encoder": "resnet18"},
    {"kind": "smp", "model": "Unet", "encoder": "resnet18", "depth": 3},
    {"kind": "smp", "model": "FPN", "encoder": "tu-mobilenetv3_small_100"},
    {"kind": "smp", "model": "DeepLabV3Plus", "encoder": "resnet18"},
    {"kind": "smp", "model": "Segformer", "encoder": "mit_b0"},
    {"kind": "smp", "model": "PSPNet", "encoder": "efficientnet-b0"},
    {"kind": "timm", "model": "resnet18", "width": 8},
    {"kind": "timm", "model": "mobilenetv3_small_100", "width": 8},
    {"kind": "timm", "model": "convnext_atto", "width": 8},
    {"kind": "timm", "model": "vit_tiny_patch16_224", "width": 8},
    {"kind": "timm", "model": "vit_small_patch14_dinov2", "width": 8},
    {"kind": "timm", "model": "swin_tiny_patch4_window7_224", "width": 8},
    {"kind": "smp", "model": "DPT", "encoder": "tu-vit_tiny_patch16_224.augreg_in21k"},
]


@pytest.mark.parametrize("options", ZOO, ids=name_of)
def test_networks_of_other_packages_have_logits_for_images_of_any_size(zoo: Any, options: dict[str, Any]) -> None:
    chosen = segmenter(**options)
    for channels in (3, 1):
        assert not [*chosen.faults(channels, 64, 96)]
    module = chosen.build(1, 4)
    assert module(torch.randn(2, 1, 64, 96)).shape == (2, 4, 64, 96)
    logits = module(torch.randn(2, 1, 37, 50))
    assert logits.shape == (2, 4, 37, 50)
    logits.square().sum().backward()
    assert not [name for name, parameter in module.named_parameters() if parameter.grad is None]
    for layer in inner(module).lateral if options["kind"] == "timm" else ():  # no stage is left out
        assert layer.weight.grad is not None
    with torch.device("meta"):  # where sizes are asked for
        sizes = {name: tensor.shape for name, tensor in chosen.build(1, 4).state_dict().items()}
    assert sizes == {name: tensor.shape for name, tensor in module.state_dict().items()}


def test_unknown_names_are_faults_with_the_nearest_known_one(zoo: Any) -> None:
    faults = [*segmenter(kind="smp", model="UNet", encoder="resnet43").faults(3, 64, 64)]
    assert [bool(re.search("`model`: 'UNet' is not there; did you mean `Unet`", fault)) for fault in faults] == [True, False]  # fmt: skip
    assert "`encoder`: 'resnet43' is not there; did you mean `resnet34`" in faults[1]
    (fault,) = segmenter(kind="smp", model="Unet", encoder="tu-convnext_ato").faults(3, 64, 64)
    assert "did you mean `tu-convnext_atto`" in fault
    (fault,) = segmenter(kind="timm", model="mobilenetv3_smal_100").faults(3, 64, 64)
    assert "did you mean `mobilenetv3_small_100`" in fault
    (fault,) = segmenter(kind="timm", model="zzzzzz").faults(3, 64, 64)
    assert "`timm.list_models()` lists them" in fault
    assert len(fault) < 200


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": "timm", "model": "beit_base_patch16_224"}, "doesn't match model"),
        ({"kind": "smp", "model": "PAN", "encoder": "resnet18"}, "too small"),
        ({"kind": "smp", "model": "Linknet", "encoder": "mit_b0"}, "not supported for Linknet"),
        ({"kind": "smp", "model": "PSPNet", "encoder": "resnet18", "depth": 4}, "of 64×64 it makes logits of 32×32"),
        ({"kind": "smp", "model": "PSPNet", "encoder": "resnet18", "depth": 2}, "of 64×64 it makes logits of 128×128"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_images_is_a_fault_and_not_a_crash(zoo: Any, options: dict[str, Any], why: str) -> None:
    (fault,) = segmenter(**options).faults(3, 50, 64)
    assert "images of 3 channels and 64×50" in fault
    assert why in fault


@pytest.mark.parametrize("name", ["hf-hub:someone/network", "local-dir:/tmp", "tu-hf-hub:a/b", "a/b", ""])
def test_a_name_cannot_make_a_package_fetch_or_read_a_file(name: str) -> None:
    for options in ({"kind": "timm", "model": name}, {"kind": "smp", "model": "Unet", "encoder": name}):
        with pytest.raises(ValidationError, match="must be a name of letters"):
            segmenter(**options)


@pytest.mark.parametrize(
    ("options", "package"),
    [
        ({"kind": "smp", "model": "Unet"}, "segmentation_models_pytorch"),
        ({"kind": "timm", "model": "resnet18"}, "timm"),
    ],
    ids=str,
)
def test_without_its_package_a_network_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (fault,) = segmenter(**options).faults(3, 64, 64)
    assert fault == f"`{options['kind']}` needs {package}: pip install 'gandist[zoo]'"


def inner(module: nn.Module) -> Any:
    """The package's network in what `build` gave, after the normalisation."""
    return cast(Any, module).network[1]


@pytest.mark.parametrize("what", ["model", "encoder", "bare encoder"])
def test_a_model_starts_from_weights_of_all_of_it_or_of_its_encoder(zoo: Any, tmp_path: Path, what: str) -> None:
    options = {"kind": "smp", "model": "Unet", "encoder": "resnet18"}
    other = {name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor + 3 for name, tensor in inner(segmenter(**options).build(3, 4)).state_dict().items()}  # fmt: skip
    given = {name: tensor for name, tensor in other.items() if what == "model" or name.startswith("encoder.")}
    if what == "bare encoder":  # as torchvision's files have them, with a last layer that a segmenter lacks
        given = {name.removeprefix("encoder."): tensor for name, tensor in given.items()} | {"fc.bias": torch.zeros(9)}
    weights = written(tmp_path / "w.safetensors", given)
    chosen = segmenter(**options, weights=weights.model_dump())
    assert chosen.pretrained == weights
    module = chosen.build(3, 4)
    before = copy.deepcopy(inner(module).state_dict())
    chosen.start(module)
    for name, tensor in inner(module).state_dict().items():
        filled = what == "model" or name.startswith("encoder.")
        assert torch.equal(tensor, other[name] if filled else before[name]), name
    images = torch.rand(1, 3, 32, 32)
    assert not torch.equal(cast(Any, module).network[0](images), images)
    # One that is missing is named, beside what the file was taken for.
    name = next(name for name in given if name.endswith("layer1.0.conv1.weight"))
    less = written(tmp_path / "w.safetensors", {key: tensor for key, tensor in given.items() if key != name})
    with pytest.raises(Failure, match=rf"layer1\.0\.conv1\.weight.*weights of the {'whole model' if what == 'model' else 'encoder'}"):  # fmt: skip
        segmenter(**options, weights=less.model_dump()).start(module)
    (fault,) = chosen.faults(1, 64, 64)
    assert "3 channels" in fault


@pytest.mark.parametrize("model", ["resnet18", "mobilenetv3_small_100", "convnext_atto"])
def test_a_backbone_computes_what_the_classifier_does_whose_weights_it_started_from(
    zoo: Any, tmp_path: Path, model: str
) -> None:
    plain = zoo.create_model(model, pretrained=False).eval()
    for parameter in plain.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    state = {name: tensor for name, tensor in plain.state_dict().items() if not name.endswith("num_batches_tracked")}
    weights = written(tmp_path / "w.safetensors", state)
    chosen = segmenter(kind="timm", model=model, width=4, weights=weights.model_dump())
    module = chosen.build(3, 4).eval()
    chosen.start(module)
    images = torch.rand(1, 3, 64, 96)
    expected = plain.forward_intermediates(images, intermediates_only=True)
    found = inner(module).backbone(images)
    assert found[-1].shape == expected[-1].shape
    torch.testing.assert_close(found[-1], expected[-1])
    less = written(tmp_path / "w.safetensors", dict([*state.items()][2:]))
    with pytest.raises(Failure, match=re.escape(next(iter(inner(module).backbone.state_dict())))):
        segmenter(kind="timm", model=model, weights=less.model_dump()).start(module)


# ---- U-Net


def test_a_unet_gives_logits_at_half_the_size_of_any_image_that_it_takes() -> None:
    options = segmenter(kind="unet", width=4, blocks=[1, 1, 1], decoder=8)
    module = options.build(3, 5).eval()
    for height, width in ((8, 8), (37, 50), (9, 16)):
        assert module(torch.zeros(2, 3, height, width)).shape == (2, 5, -(-height // 2), -(-width // 2))
    assert not [*options.faults(3, 8, 8)]
    (fault,) = options.faults(3, 7, 30)
    assert "needs images of 8 pixels a side or more, and these have 30×7" in fault


def test_residual_branches_of_a_unet_give_nothing_at_first_and_all_weights_learn() -> None:
    module = segmenter(kind="unet", width=4, blocks=[2, 2], decoder=8).build(3, 5)
    block = module.network.stages[0][1]
    features = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(block(features), features)
    with torch.no_grad():
        for part in module.modules():  # as after a step: a branch that gives nothing has no gradient behind it
            if isinstance(part, nn.BatchNorm2d):
                part.weight.add_(0.1)
    module(torch.randn(4, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_a_dropped_path_is_left_out_of_whole_rows_in_training_alone() -> None:
    module = segmenter(kind="unet", width=4, blocks=[1, 1], decoder=8, drop_path=0.5).build(3, 5)
    block = module.network.stages[1][0]
    nn.init.ones_(block.norm2.weight)
    torch.manual_seed(0)
    features = torch.rand(400, 4, 4, 4)
    skipped = block.skip(features).relu()
    left_out = (block(features) == skipped).flatten(1).all(1)
    assert 0.4 < left_out.float().mean() < 0.6
    block.eval()
    assert not (block(features) == block.skip(features).relu()).flatten(1).all(1).any()


def test_a_model_of_another_package_is_trained_scored_and_used_like_ours(
    zoo: Any, gandist: Callable[..., Result], tmp_path: Path
) -> None:
    scenes_on_disk(tmp_path / "source", 20)
    packed_dataset(tmp_path / "source", tmp_path / "scenes", splits=(("train", 0.8), ("test", 0.2)), shuffle=0)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
data: {{path: {tmp_path / "scenes"}, transform: {{canvas: [64, 64]}}}}
game:
  kind: segment
  segmenter: {{network: {{kind: smp, model: Unet, encoder: resnet18, depth: 3}}}}
  adversary: {{network: {{kind: small_fov, light: true}}}}
  augmentation: {{crop: [32, 32]}}
run: {{folder: {tmp_path / "run"}, images: 16, batch: 8, evaluate_images: 16}}
"""
    )
    done = gandist("train", path)
    assert done.code == 0, done.err
    scored = gandist("evaluate", tmp_path / "run", "--json")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out)["samples"] == 4
    used = gandist("predict", tmp_path / "run", tmp_path / "source" / "images", "--out", tmp_path / "out")
    assert used.code == 0, used.err
    assert len([*(tmp_path / "out" / "masks").rglob("*.png")]) == 20
