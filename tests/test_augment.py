"""Augmentation is exact where it can be, differentiable twice, and the same in any batch of any process."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import on_ranks
from pydantic import ValidationError
from torch import Tensor

from gandist.augment import (
    AUGMENTATIONS,
    AdaOptions,
    Augmentation,
    ConsistencyOptions,
    Cutout,
    DiffAugmentOptions,
    Jitter,
    Moves,
    Parameters,
    Recolour,
    adjusted,
    apply,
    brightness,
    contrast,
    draw,
    hue,
    luma_flip,
    rotation,
    saturation,
    scaling,
    shift,
)
from gandist.recipe import Section

CPU = torch.device("cpu")
POLICIES: dict[str, Augmentation] = {
    "colour": DiffAugmentOptions(policy=("colour",)),
    "translation": DiffAugmentOptions(policy=("translation",)),
    "cutout": DiffAugmentOptions(policy=("cutout",)),
    "diffaugment": DiffAugmentOptions(),
    "flip": ConsistencyOptions(policy=("flip",)),
    "consistency": ConsistencyOptions(),
    "ada blit": AdaOptions(groups=("blit",)),
    "ada geometry": AdaOptions(groups=("geometry",)),
    "ada colour": AdaOptions(groups=("colour",)),
    "ada": AdaOptions(),
}
SHAPES = [(1, 28, 28), (3, 16, 16), (3, 9, 6), (2, 5, 8), (4, 7, 7), (1, 1, 1)]
policies = pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of uniform noise in −1 … 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).mul(2).sub(1).to(dtype)


def drawn(options: Augmentation, images: Tensor, seed: int = 0) -> Parameters:
    size, *shape = images.shape
    return draw(options, size, tuple(shape), torch.Generator().manual_seed(seed), CPU)


def moved(images: Tensor, *matrices: Tensor, whole: int | None = None, **how: int) -> Tensor:
    """Images after these moves, one after the other, in one sampling."""
    value = torch.stack(matrices, 1)
    step = Moves(torch.ones(value.shape[:2]), value, whole=len(matrices) if whole is None else whole, **how)
    return apply(images, Parameters((step,)))


def recoloured(images: Tensor, *matrices: Tensor) -> Tensor:
    value = torch.stack(matrices, 1)
    return apply(images, Parameters((Recolour(torch.ones(value.shape[:2]), value),)))


def jittered(images: Tensor, which: int, amount: Tensor) -> Tensor:
    """Images after DiffAugment's brightness (0), saturation (1) or contrast (2) alone; nothing has a chance of 0."""
    chance = torch.zeros(len(images), 3)
    chance[:, which] = 1
    return apply(images, Parameters((Jitter(chance, amount[:, None].expand(-1, 3)),)))


def full(rows: int, value: float) -> Tensor:
    return torch.full((rows,), value)


# Gradients


@policies
@pytest.mark.parametrize("shape", [(3, 5, 5), (1, 4, 6)], ids=str)
def test_gradients_and_gradients_of_gradients_agree_with_finite_differences(
    options: Augmentation, shape: tuple[int, int, int]
) -> None:
    images = noise(3, *shape, dtype=torch.float64).requires_grad_()
    parameters = drawn(options, images)
    assert torch.autograd.gradcheck(lambda x: apply(x, parameters, 0.7), images, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: apply(x, parameters, 0.7).sin(), images, fast_mode=True)


@policies
def test_r1_through_the_augmentation_reaches_the_discriminator(options: Augmentation) -> None:
    """d/dw ½‖∇ₓ Σ tanh(w · T(x))‖², which takes the second derivative through T, against a central difference."""
    images = noise(4, 3, 8, 8, dtype=torch.float64).requires_grad_()
    parameters, direction = drawn(options, images), noise(3, 8, 8, seed=1, dtype=torch.float64)

    def penalty(weights: Tensor) -> Tensor:
        logits = torch.tanh((apply(images, parameters, 0.8) * weights).mean((1, 2, 3)))
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().sum() / 2

    weights = noise(3, 8, 8, seed=2, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(penalty(weights), weights)
    difference = (penalty(weights + 1e-4 * direction) - penalty(weights - 1e-4 * direction)) / 2e-4
    assert (slope * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)
    assert slope.abs().max() > 0


# Rows, chance, precision


@policies
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_without_probability_the_images_come_back_bit_for_bit(
    options: Augmentation, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    images = noise(8, *shape, dtype=dtype)
    for p in (0.0, torch.zeros(())):
        found = apply(images, drawn(options, images), p)
        assert found.dtype == dtype
        assert torch.equal(found, images)


@policies
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(options: Augmentation, shape: tuple[int, int, int]) -> None:
    images = noise(8, *shape)
    for memory in (images, images.contiguous(memory_format=torch.channels_last)):
        parameters = drawn(options, images)
        whole = apply(memory, parameters, 0.6)
        for count in (1, 2, 4):
            parts = [range(first, first + count) for first in range(0, 8, count)]
            pieces = [apply(memory[p.start : p.stop], parameters.rows(p), torch.tensor(0.6)) for p in parts]
            assert torch.equal(torch.cat(pieces), whole)
        others = memory.clone()
        others[:3], others[4:] = noise(3, *shape, seed=5), 0.0
        assert torch.equal(apply(others, parameters, 0.6)[3], whole[3])


def augmented(size: int, rows: range, seed: int) -> list[list[float]]:
    """What one process makes of its rows, by policy."""
    images = noise(size, 3, 8, 8)
    mine = images[rows.start : rows.stop]
    return [apply(mine, drawn(o, images, seed).rows(rows), 0.6).flatten().tolist() for o in POLICIES.values()]


def augmented_here(size: int, seed: int) -> list[list[float]]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return augmented(size, range(rank * size // ranks, (rank + 1) * size // ranks), seed)


def test_two_processes_with_4_rows_each_see_what_one_sees_with_8() -> None:
    first, second = on_ranks(2, augmented_here, 8, 11)
    assert [a + b for a, b in zip(first, second, strict=True)] == augmented(8, range(8), 11)


@policies
def test_what_is_drawn_is_a_function_of_the_seed(options: Augmentation) -> None:
    images = noise(16, 3, 8, 8)
    found = [apply(images, drawn(options, images, seed), 0.5) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@policies
def test_half_precision_stays_and_autocast_changes_nothing(options: Augmentation) -> None:
    images = noise(8, 3, 16, 16)
    parameters = drawn(options, images)
    exact = apply(images, parameters, 0.8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply(images, parameters, 0.8), exact)
    for dtype in (torch.bfloat16, torch.float16):
        half = images.to(dtype)
        found = apply(half, parameters, 0.8)
        assert found.dtype == dtype
        assert torch.equal(found, apply(half.float(), parameters, 0.8).to(dtype))  # computed in fp32, rounded once


UNTOUCHED = [  # policy, shape, the probability that a row of noise is not changed
    ("translation", (1, 16, 16), lambda p: 1 - p * 24 / 25),
    ("cutout", (1, 4, 4), lambda p: 1 - p),
    ("colour", (3, 4, 4), lambda p: (1 - p) ** 3),
    ("consistency", (1, 16, 16), lambda p: (1 - p / 2) * (1 - p * 24 / 25)),
    ("ada blit", (1, 16, 16), lambda p: (1 - p / 2) * (1 - p * 3 / 4) * (1 - p * 15 / 16)),
    ("ada blit", (1, 8, 16), lambda p: (1 - p / 2) * (1 - p * 7 / 8)),
    ("ada geometry", (1, 6, 6), lambda p: (1 - p) ** 4),  # the two rotations together count as one
    ("ada colour", (1, 2, 2), lambda p: (1 - p) ** 2 * (1 - p / 2)),
    ("ada colour", (3, 2, 2), lambda p: (1 - p) ** 4 * (1 - p / 2)),
]


@pytest.mark.parametrize(("name", "shape", "untouched"), UNTOUCHED)
@pytest.mark.parametrize("p", [0.1, 0.45, 1.0])
def test_each_transformation_has_the_probability_p_of_its_own(name: str, shape, untouched, p: float) -> None:
    rows, expected = 6000, untouched(p)
    images = noise(rows, *shape)
    found = (apply(images, drawn(POLICIES[name], images), torch.tensor(p)) == images).flatten(1).all(1)
    assert found.float().mean().item() == pytest.approx(
        expected, abs=4 * math.sqrt(expected * (1 - expected) / rows) + 1e-9
    )


# Moves


def test_a_flip_mirrors_the_columns_and_two_flips_are_none() -> None:
    images, flip = noise(2, 3, 6, 7), scaling(full(2, -1.0), full(2, 1.0))
    assert torch.equal(moved(images, flip), images.flip(3))
    assert torch.equal(moved(moved(images, flip), flip), images)
    assert torch.equal(moved(images, flip, flip), images)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, 3), (-3, 1), (-1, -2)])
@pytest.mark.parametrize("side", [8, 9, 28, 97])
def test_an_integer_translation_moves_pixels_exactly(right: int, down: int, side: int) -> None:
    images = noise(1, 2, side, side + 3)
    height, width = images.shape[2:]
    move = shift(full(1, right), full(1, down))
    zeros = torch.zeros_like(images)
    rows, columns = torch.arange(height) - down, torch.arange(width) - right
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    rows_mirrored = (height - 1 - (rows.abs() - (height - 1)).abs()).long()
    columns_mirrored = (width - 1 - (columns.abs() - (width - 1)).abs()).long()
    mirrored = images[:, :, rows_mirrored][:, :, :, columns_mirrored]
    assert torch.equal(moved(images, move), mirrored)
    assert torch.equal(moved(images, move, padding=0), torch.where(inside, mirrored, zeros))


@pytest.mark.parametrize("side", [1, 2, 7, 28, 64])
def test_quarter_turns_form_a_group(side: int) -> None:
    images = noise(1, 3, side, side)
    quarter = [rotation(full(1, k * math.pi / 2)).round() for k in range(4)]
    for a in range(4):
        assert torch.equal(moved(images, quarter[a]), images.rot90(-a, (2, 3)))  # clockwise
        for b in range(4):
            assert torch.equal(moved(moved(images, quarter[a]), quarter[b]), moved(images, quarter[(a + b) % 4]))
            assert torch.equal(moved(images, quarter[a], quarter[b]), moved(images, quarter[(a + b) % 4]))


def test_moves_are_done_in_their_order() -> None:
    images = noise(1, 1, 9, 9)
    flip, right = scaling(full(1, -1), full(1, 1)), shift(full(1, 2), full(1, 0))
    flipped_first = moved(images, flip, right, padding=0)
    assert torch.equal(flipped_first, moved(moved(images, flip), right, padding=0))
    assert not torch.equal(flipped_first, moved(images, right, flip, padding=0))


@pytest.mark.parametrize("options", [AdaOptions(groups=("blit",)), ConsistencyOptions()], ids=["ada", "consistency"])
def test_images_that_are_not_square_are_not_turned(options: Augmentation) -> None:
    images = noise(64, 1, 8, 1).expand(64, 1, 8, 6)  # every row of pixels has one value, flipped and shifted as well
    found = apply(images, drawn(options, images))
    assert torch.equal(found, found[:, :, :, :1].expand_as(found))
    assert not torch.equal(found, images)


def test_blit_only_moves_pixels_and_geometry_leaves_an_even_image_alone() -> None:
    images = noise(32, 1, 16, 16)
    parameters = drawn(POLICIES["ada blit"], images)
    found = apply(images, parameters)
    assert torch.equal(parameters.steps[0].value, parameters.steps[0].value.round())  # also before geometry follows
    assert all(set(a.flatten().tolist()) <= set(b.flatten().tolist()) for a, b in zip(found, images, strict=True))
    assert (found != images).any()
    even = torch.linspace(-1, 1, 32)[:, None, None, None].expand(-1, 3, 12, 16).contiguous()
    torch.testing.assert_close(apply(even, drawn(POLICIES["ada geometry"], even)), even, atol=1e-6, rtol=0)


def test_geometry_maps_a_ramp_to_a_ramp_with_the_spreads_of_the_paper() -> None:
    """Bilinear interpolation of a ramp is exact, so the matrix can be read off the middle pixels.

    It is the inverse of scale, rotation, stretch, rotation: its determinant is 1/scale², its condition stretch². Rows whose middle
    came from near the border or from beyond, where the ramp is mirrored, are left out.
    """
    rows, side = 2000, 41
    line = torch.arange(side, dtype=torch.float64) - side // 2
    ramp = torch.stack([line.expand(side, side), line[:, None].expand(side, side)])  # x, y
    images = ramp.expand(rows, 2, side, side)
    found = apply(images, drawn(POLICIES["ada geometry"], images), 1.0)
    middle = side // 2
    offset = found[:, :, middle, middle]
    matrix = torch.stack([found[:, :, middle, middle + 1] - offset, found[:, :, middle + 1, middle] - offset], 2)
    ok = (offset.abs().amax(1) < middle - 2) & (matrix.det() > 0)
    assert ok.float().mean() > 0.97
    matrix, offset = matrix[ok], offset[ok]
    larger, condition = -matrix.det().log2() / 2, torch.linalg.svdvals(matrix).log2()
    assert larger.mean().item() == pytest.approx(0.0, abs=0.02)
    assert larger.std().item() == pytest.approx(0.2, rel=0.06)
    assert (condition[:, 0] - condition[:, 1]).div(2).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.06)
    place = torch.linalg.solve(matrix, -offset)  # where the middle went
    assert (place.std(0) / side).tolist() == pytest.approx([0.125, 0.125], rel=0.06)
    turned = torch.atan2(matrix[:, 0, 1] - matrix[:, 1, 0], matrix[:, 0, 0] + matrix[:, 1, 1])
    assert turned.cos().mean().item() == pytest.approx(0.0, abs=0.07)
    assert turned.sin().mean().item() == pytest.approx(0.0, abs=0.07)


def test_translations_reach_an_eighth_of_the_size_and_no_further() -> None:
    images = torch.ones(2000, 1, 24, 32)
    found = apply(images, drawn(POLICIES["translation"], images))
    assert set(found.unique().tolist()) == {0.0, 1.0}  # the padding is 0
    left, right = (found.amax((1, 2)) == 0).float().cumprod(1).sum(1), (found.amax((1, 2)) == 0).flip(1).float()
    assert set((left - right.cumprod(1).sum(1)).tolist()) == {float(x) for x in range(-4, 5)}
    assert set((found.amax((1, 3)) == 0).sum(1).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (2, 2), (1, 1)], ids=str)
def test_cutout_leaves_a_hole_of_0_of_half_the_size_that_may_hang_over_the_border(shape: tuple[int, int]) -> None:
    images = torch.ones(3000, 2, *shape)
    hole = apply(images, drawn(POLICIES["cutout"], images)) == 0
    assert torch.equal(hole[:, 0], hole[:, 1])
    rows, columns = hole[:, 0].any(2), hole[:, 0].any(1)
    assert torch.equal(hole[:, 0], rows[:, :, None] & columns[:, None, :])
    for line, length in zip((rows, columns), shape, strict=True):
        half = int(length / 2 + 0.5)
        middle = line[~(line[:, 0] | line[:, -1])]
        assert (middle.sum(1) == half).all()
        assert set(line.sum(1).tolist()) <= set(range(max(1, half // 2), half + 1))
        assert line.any(0).all()  # it can reach every pixel
        assert (line[:, 1:] != line[:, :-1]).sum(1).max() <= 2  # and is in one piece


def test_a_hole_by_hand() -> None:
    step = Cutout(torch.ones(2, 1), torch.tensor([[[4.0, 3.0]], [[0.0, 6.0]]]))
    found = apply(torch.ones(2, 1, 6, 6), Parameters((step,)))
    expected = torch.ones(2, 1, 6, 6)
    expected[0, :, 3:6, 2:5] = 0
    expected[1, :, 0:2, 5:6] = 0
    assert torch.equal(found, expected)


def test_diffaugment_follows_the_order_of_its_policy() -> None:
    images = noise(32, 3, 8, 8)
    for names, empty in ((("colour", "cutout"), True), (("cutout", "colour"), False)):
        options = DiffAugmentOptions(policy=names)
        holes = (apply(images, drawn(options, images)) == 0).flatten(1).any(1)
        assert holes.all() if empty else not holes.any()


# Colours


def test_brightness_keeps_differences() -> None:
    images, amount = noise(4, 3, 6, 6), torch.tensor([-0.5, -0.1, 0.2, 0.5])
    expected = images + amount[:, None, None, None]
    torch.testing.assert_close(jittered(images, 0, amount), expected)
    torch.testing.assert_close(recoloured(images, brightness(amount, 3)), expected)


def test_saturation_keeps_luma_and_scales_what_is_not_luma() -> None:
    images, factor = noise(4, 3, 6, 6), torch.tensor([0.0, 0.5, 1.0, 2.0])
    luma = images.mean(1, keepdim=True)
    for found in (jittered(images, 1, factor), recoloured(images, saturation(factor, 3))):
        torch.testing.assert_close(found.mean(1, keepdim=True), luma)
        torch.testing.assert_close(found - luma, (images - luma) * factor[:, None, None, None])
    grey = noise(4, 1, 6, 6)
    torch.testing.assert_close(jittered(grey, 1, factor), grey)


def test_diffaugments_contrast_keeps_the_mean_of_the_image_and_adas_keeps_0() -> None:
    images, factor = noise(3, 3, 6, 6), torch.tensor([0.5, 1.0, 1.5])
    mean = images.mean((1, 2, 3), keepdim=True)
    found = jittered(images, 2, factor)
    torch.testing.assert_close(found.mean((1, 2, 3), keepdim=True), mean)
    torch.testing.assert_close(found - mean, (images - mean) * factor[:, None, None, None])
    torch.testing.assert_close(recoloured(images, contrast(factor, 3)), images * factor[:, None, None, None])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_luma_flip_turns_white_to_black_keeps_hues_and_undoes_itself(channels: int) -> None:
    images, flip = noise(2, channels, 5, 5), luma_flip(torch.tensor([1.0, 0.0]), channels)
    found = recoloured(images, flip)
    torch.testing.assert_close(found[0].mean(0), -images[0].mean(0))
    torch.testing.assert_close(found[0] - found[0].mean(0), images[0] - images[0].mean(0))
    torch.testing.assert_close(found[1], images[1])
    torch.testing.assert_close(recoloured(found, flip), images)


def test_hue_turns_the_channels_about_luma() -> None:
    images = noise(2, 3, 5, 5)
    third = hue(full(2, 2 * math.pi / 3))
    torch.testing.assert_close(recoloured(images, third), images.roll(1, 1))  # red → green → blue → red
    torch.testing.assert_close(recoloured(images, third, third, third), images, atol=1e-5, rtol=0)
    a, b = torch.tensor([0.3, -1.0]), torch.tensor([2.0, 0.7])
    found = recoloured(images, hue(a))
    torch.testing.assert_close(found.square().sum(1), images.square().sum(1))
    torch.testing.assert_close(found.mean(1), images.mean(1))
    torch.testing.assert_close(recoloured(found, hue(b)), recoloured(images, hue(a + b)), atol=1e-5, rtol=0)


def test_colours_are_changed_in_their_order() -> None:
    images, amount, factor = noise(2, 3, 4, 4), torch.tensor([0.3, -0.2]), torch.tensor([2.0, 0.5])
    found = recoloured(images, brightness(amount, 3), contrast(factor, 3))
    torch.testing.assert_close(found, (images + amount[:, None, None, None]) * factor[:, None, None, None])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_ada_maps_grey_to_grey_by_one_line_with_the_spreads_of_the_paper(channels: int) -> None:
    """±c (x + b), b ~ N(0, 0.2²), log₂ c ~ N(0, 0.5²), either sign: hue and saturation have no hold on grey."""
    rows = 4000
    greys = [torch.full((rows, channels, 1, 1), value) for value in (0.0, 0.5, 1.0)]
    parameters = drawn(POLICIES["ada colour"], greys[0])
    low, half, high = (apply(grey, parameters).flatten(1) for grey in greys)
    torch.testing.assert_close(low, low[:, :1].expand_as(low), atol=1e-5, rtol=0)
    torch.testing.assert_close(half, (low + high) / 2, atol=1e-5, rtol=0)
    slope = (high - low)[:, 0]
    lift = low[:, 0] / slope
    assert lift.mean().item() == pytest.approx(0.0, abs=0.015)
    assert lift.std().item() == pytest.approx(0.2, rel=0.05)
    assert slope.abs().log2().mean().item() == pytest.approx(0.0, abs=0.035)
    assert slope.abs().log2().std().item() == pytest.approx(0.5, rel=0.05)
    assert (slope > 0).float().mean().item() == pytest.approx(0.5, abs=0.035)


def test_ada_turns_hues_anywhere_and_scales_saturation_by_an_octave() -> None:
    rows = 4000
    images = torch.tensor([1.0, -0.5, -0.5])[None, :, None, None].expand(rows, 3, 1, 1)  # no luma, length √1.5
    grey = torch.zeros(rows, 3, 1, 1)
    parameters = drawn(POLICIES["ada colour"], images)
    of_grey, of_half = (apply(grey + x, parameters).flatten(1) for x in (0.0, 1.0))
    found = apply(images, parameters).flatten(1)
    found = (found - of_grey) / (of_half - of_grey).abs()  # without brightness and contrast
    assert (found.norm(dim=1) / math.sqrt(1.5)).log2().std().item() == pytest.approx(1.0, rel=0.05)
    angle = torch.atan2((found[:, 1] - found[:, 2]) / math.sqrt(2), found[:, 0] * math.sqrt(1.5))
    for times in (1, 2, 3):
        assert (times * angle).cos().mean().item() == pytest.approx(0.0, abs=0.05)
        assert (times * angle).sin().mean().item() == pytest.approx(0.0, abs=0.05)


def test_diffaugments_colour_amounts_fill_their_ranges() -> None:
    """On a red and a grey half, brightness, saturation and contrast can be read off, as they follow each other."""
    rows = 4000
    images = torch.zeros(rows, 3, 2, 1)
    images[:, :, 0, 0] = torch.tensor([0.6, -0.3, -0.3])  # mean 0, so the image's mean is 0 as well
    found = apply(images, drawn(POLICIES["colour"], images))
    lift = found.mean((1, 2, 3))
    both = (found[:, 0, 0, 0] - lift) / 0.6  # saturation × contrast
    assert lift.min() > -0.5
    assert lift.max() < 0.5
    assert lift.std().item() == pytest.approx(12**-0.5, rel=0.05)
    assert both.min() >= -1e-6
    assert both.max() < 3.0
    assert both.mean().item() == pytest.approx(1.0, abs=0.04)
    assert both.std().item() == pytest.approx(2 / 3, rel=0.05)  # E s² c² = 4/3 · 13/12
    grey = torch.tensor([0.5, -0.5]).view(1, 1, 2, 1).expand(rows, 3, 2, 1)
    found = apply(grey, drawn(POLICIES["colour"], grey))
    spread = found[:, 0, 0, 0] - found[:, 0, 1, 0]  # contrast alone
    assert spread.min() > 0.5 - 1e-6
    assert spread.max() < 1.5 + 1e-6
    assert spread.std().item() == pytest.approx(12**-0.5, rel=0.05)


# The controller of ADA


@pytest.mark.parametrize(("rate", "direction"), [(0.9, 1), (0.61, 1), (0.59, -1), (-1.0, -1), (math.nan, 0)])
def test_p_moves_by_the_images_over_the_speed_towards_the_target(rate: float, direction: int) -> None:
    options = AdaOptions(speed_images=1000)
    found = adjusted(torch.tensor(0.5), torch.tensor(rate), 64, options)
    assert found.shape == ()
    assert found.item() == pytest.approx(0.5 + direction * 0.064, abs=1e-6)


def test_p_stays_between_0_and_1_and_goes_from_one_to_the_other_in_the_images_of_its_speed() -> None:
    options = AdaOptions(speed_images=6400, target=0.0)
    p, sure, unsure = torch.tensor(0.0), torch.tensor(0.5), torch.tensor(-0.5)
    assert adjusted(p, unsure, 64, options).item() == 0.0
    for step in range(100):
        assert p.item() == pytest.approx(step / 100, abs=1e-5)
        p = adjusted(p, sure, 64, options)
    assert p.item() == pytest.approx(1.0, abs=1e-5)
    assert adjusted(adjusted(p, sure, 64, options), sure, 64, options).item() == 1.0


# Options


@pytest.mark.parametrize(
    ("section", "values", "fault"),
    [
        (DiffAugmentOptions, {"policy": ["colour", "cutout", "colour"]}, "'colour' 2 times"),
        (DiffAugmentOptions, {"policy": []}, "at least 1 item"),
        (DiffAugmentOptions, {"policy": ["color"]}, "'colour', 'translation' or 'cutout'"),
        (ConsistencyOptions, {"policy": ["cutout"]}, "'flip' or 'translation'"),
        (AdaOptions, {"groups": ["blit", "blit"]}, "'blit' 2 times"),
        (AdaOptions, {"p": 0.5, "target": 0.5}, "`target` has no effect beside a fixed `p`"),
        (AdaOptions, {"p": 0.5, "start": 0.1}, "`start` has no effect beside a fixed `p`"),
        (AdaOptions, {"p": 0.5, "every": 8}, "`every` has no effect beside a fixed `p`"),
        (AdaOptions, {"p": 0.0}, "greater than 0"),
        (AdaOptions, {"p": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(section: type[Section], values: dict, fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        section.model_validate(values)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_resolved_options_can_be_read_again(kind: str) -> None:
    section = AUGMENTATIONS[kind]()
    options = section.model_validate({"kind": kind, **({"p": 0.2} if kind == "ada" else {"policy": ["cutout"]})})
    assert section.model_validate(options.model_dump(mode="json")) == options
