"""Differentiable augmentation of what a discriminator sees: DiffAugment, ADA, and the moves of consistency regularisation.

Random numbers are drawn for the whole global batch, and each process takes its rows, so that they do not depend on the number
of processes. Nothing waits for the device: every row goes through every transformation, and chance decides which result it
keeps. Short sums are written out and long ones taken in fp64, so that a row has the same bits in any batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from gandist.constants import made_once
from gandist.recipe import Section

Shape = tuple[int, int, int]  # (C, H, W) of one image
BILINEAR, NEAREST = 0, 1  # grid_sampler's numbers of its modes …
ZEROS, MIRROR = 0, 2  # … and of its paddings


@dataclass(frozen=True)
class Step(ABC):
    """Transformations of each row of a batch: which chance each has, and what it would do."""

    chance: Tensor  # (size, T) in 0 < chance ≤ 1: a transformation is applied where this is more than 1 − p
    value: Tensor  # (size, T, …)

    def rows(self, rows: slice) -> Self:
        """The same for some rows of the batch."""
        return replace(self, chance=self.chance[rows], value=self.value[rows])

    @abstractmethod
    def __call__(self, images: Tensor, spared: Tensor | float) -> Tensor:
        """Images (B, C, H, W) in fp32 or fp64 after the transformations whose chance is more than `spared` = 1 − p."""


@dataclass(frozen=True)
class Parameters:
    """What is to be done to each row of a batch, in order; not yet thresholded by p."""

    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps[0].chance)

    def rows(self, rows: range) -> Parameters:
        """The part of one process or micro-batch: `rows` of the global batch."""
        assert rows.step == 1, rows
        assert 0 <= rows.start <= rows.stop <= len(self), (rows, len(self))
        return Parameters(tuple(step.rows(slice(rows.start, rows.stop)) for step in self.steps))


def apply(images: Tensor, parameters: Parameters, p: Tensor | float | None = None) -> Tensor:
    """Images (B, C, H, W) in −1 … 1 as a discriminator is to see them, in their own dtype; twice differentiable.

    `p` is the probability of each transformation for each row, 0-d on the device; None is 1, as DiffAugment and
    consistency regularisation want. With p = 0 the images come back bit for bit.
    """
    assert len(images) == len(parameters), (len(images), len(parameters))
    spared = 0.0 if p is None else 1 - p
    result = images if images.dtype == torch.float64 else images.float()  # places and colours need more than 8 bits
    for step in parameters.steps:
        result = step(result, spared)
    return result.to(images.dtype)


@dataclass(frozen=True)
class Dice:
    """Random numbers for each row of a global batch, (size,) each."""

    size: int
    generator: torch.Generator
    device: torch.device

    def chance(self, transformations: int) -> Tensor:
        """(size, transformations), uniform in 0 < chance ≤ 1."""
        shape = self.size, transformations
        return 1 - torch.rand(shape, generator=self.generator, device=self.device)

    def uniform(self, low: float, high: float) -> Tensor:
        """Uniform in low … high."""
        return low + (high - low) * torch.rand(self.size, generator=self.generator, device=self.device)

    def normal(self, deviation: float) -> Tensor:
        """Normal about 0."""
        return deviation * torch.randn(self.size, generator=self.generator, device=self.device)

    def factor(self, octaves: float) -> Tensor:
        """Lognormal about 1; `octaves` is the standard deviation of the logarithm to base 2."""
        return torch.exp2(self.normal(octaves))

    def whole(self, low: int, high: int) -> Tensor:
        """Uniform among low, …, high; fp32."""
        drawn = torch.randint(low, high + 1, (self.size,), generator=self.generator, device=self.device)
        return drawn.float()


class Augmentation(Section):
    """A policy: what is drawn for the rows of a batch."""

    @abstractmethod
    def steps(self, shape: Shape, dice: Dice) -> tuple[Step, ...]:
        """The steps for images of `shape`."""


def draw(
    options: Augmentation, size: int, image_shape: Shape, generator: torch.Generator, device: torch.device
) -> Parameters:
    """What is to be done to the `size` rows of a global batch: a function of the generator's state and nothing else.

    The generator lies on `device`. Real and fake images of one step want parameters of their own.
    """
    return Parameters(options.steps(image_shape, Dice(size, generator, device)))


# Where pixels come from. A matrix maps the place of a pixel of the result to its place in the source: (x, y, 1) in pixels
# from the centre, y downwards. Of `first, then second` the matrix is first @ second.


def shift(x: Tensor, y: Tensor) -> Tensor:
    """(size, 3, 3): to the right by `x` and down by `y` pixels."""
    return _matrix([[1, 0, -x], [0, 1, -y], [0, 0, 1]], x)


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """(size, 3, 3): larger by these factors; −1 flips."""
    return _matrix([[1 / x, 0, 0], [0, 1 / y, 0], [0, 0, 1]], x)


def rotation(angle: Tensor) -> Tensor:
    """(size, 3, 3): clockwise by `angle`."""
    cos, sin = angle.cos(), angle.sin()
    return _matrix([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], angle)


def _matrix(entries: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    flat = [[entry if isinstance(entry, Tensor) else torch.full_like(like, entry) for entry in row] for row in entries]
    return torch.stack([torch.stack(row, 1) for row in flat], 1)


def _times(a: Tensor, b: Tensor) -> Tensor:
    # Not a matrix product of the library: autocast makes that bf16 and a GPU TF32, and a batch of another size rounds differently.
    terms = (a[..., :, k, None] * b[..., None, k, :] for k in range(a.shape[-1]))
    return _sum(*terms)


def _sum(first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = first + other
    return first


def product(matrices: Tensor) -> Tensor:
    """(B, n, n): the product of (B, T, n, n), from left to right."""
    while (count := matrices.shape[1]) > 1:
        pairs = _times(matrices[:, : count - 1 : 2], matrices[:, 1::2])
        matrices = torch.cat([pairs, matrices[:, count - count % 2 :]], 1)
    return matrices[:, 0]


def _where(applied: Tensor, matrices: Tensor) -> Tensor:
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(applied[..., None, None], matrices, identity)


@dataclass(frozen=True)
class Moves(Step):
    """Moves (size, T, 3, 3) in order, composed and sampled once; the first `whole` of them put pixels onto pixels.

    A row that only these have moved keeps its values exactly; any other row is interpolated bilinearly.
    """

    whole: int
    padding: int = MIRROR  # about the centre of the border's pixels, as often as needed

    def __call__(self, images: Tensor, spared: Tensor | float) -> Tensor:
        applied = self.chance > spared
        grid = places(product(_where(applied, self.value.to(images.dtype))), images.shape[2], images.shape[3])
        result = _sampled(images, grid, NEAREST, self.padding) if self.whole else images
        if self.whole == applied.shape[1]:
            return result
        between = applied[:, self.whole :].any(1)[:, None, None, None]
        return torch.where(between, _sampled(images, grid, BILINEAR, self.padding), result)


def places(matrices: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width, 2): where each pixel comes from, −1 and 1 being the centres of the outermost pixels."""
    x, y = (
        torch.arange(length, dtype=matrices.dtype, device=matrices.device) - (length - 1) / 2
        for length in (width, height)
    )
    of_x, of_y, offset = (matrices[:, :2, column, None, None] for column in range(3))  # (B, 2, 1, 1)
    source = of_x * x + of_y * y[:, None] + offset  # (B, 2, height, width)
    return torch.stack([source[:, 0] * (2 / max(width - 1, 1)), source[:, 1] * (2 / max(height - 1, 1))], dim=3)


def _sampled(images: Tensor, grid: Tensor, mode: int, padding: int) -> Tensor:
    result: Tensor = _Sample.apply(images, grid, mode, padding)  # type: ignore[no-untyped-call]
    return result


class _Sample(torch.autograd.Function):
    """F.grid_sample, which PyTorch differentiates once, and R1 needs twice: linear in the images, so its adjoint is all it takes."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor, mode: int, padding: int) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.how = mode, padding
        return torch.grid_sampler(images, grid, mode, padding, True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Adjoint.apply(gradient, *ctx.saved_tensors, *ctx.how), None, None, None  # type: ignore[no-untyped-call]


class _Adjoint(torch.autograd.Function):
    """Each value back to the places that it was sampled from. On CUDA it adds in any order, so that its last bit may differ."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, mode: int, padding: int) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.how = mode, padding
        images = gradient.new_zeros(()).expand_as(gradient)  # only their shape counts
        found: tuple[Tensor, Tensor] = torch.ops.aten.grid_sampler_2d_backward(
            gradient, images, grid, mode, padding, True, [True, False]
        )
        return found[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Sample.apply(gradient, *ctx.saved_tensors, *ctx.how), None, None, None  # type: ignore[no-untyped-call]


# Colours. A matrix (size, C + 1, C + 1) maps (channels, 1) to channels; the luma axis is the mean direction (1, …, 1)/√C. All
# but `brightness` turn about 0, the middle of −1 … 1.


def brightness(amount: Tensor, channels: int) -> Tensor:
    """All channels higher by `amount`."""
    return _about_identity((amount, _raise(channels, amount.device)))


def contrast(factor: Tensor, channels: int) -> Tensor:
    """All channels times `factor`."""
    return _about_identity((factor - 1, _colours(channels, factor.device)))


def luma_flip(flip: Tensor, channels: int) -> Tensor:
    """Mirrors luma where `flip` is 1, so that white becomes black and hues stay."""
    return _about_identity((-2 * flip, _luma(channels, flip.device)))


def hue(angle: Tensor) -> Tensor:
    """Turns three channels about luma: by 2π/3 red becomes green, green blue, and blue red."""
    across = _colours(3, angle.device) - _luma(3, angle.device)
    return _about_identity((angle.cos() - 1, across), (angle.sin(), _turn(angle.device)))


def saturation(factor: Tensor, channels: int) -> Tensor:
    """What is not luma, times `factor`."""
    return _about_identity((factor - 1, _colours(channels, factor.device) - _luma(channels, factor.device)))


def _about_identity(*terms: tuple[Tensor, Tensor]) -> Tensor:
    identity = torch.eye(len(terms[0][1]), device=terms[0][1].device)
    return _sum(identity, *(amount[:, None, None] * matrix for amount, matrix in terms))


@made_once
def _raise(channels: int, device: torch.device) -> Tensor:
    matrix = torch.zeros(channels + 1, channels + 1)
    matrix[:channels, channels] = 1
    return matrix.to(device)


@made_once
def _turn(device: torch.device) -> Tensor:
    matrix = torch.zeros(4, 4)
    for channel in range(3):
        matrix[(channel + 1) % 3, channel] = 3**-0.5
        matrix[channel, (channel + 1) % 3] = -(3**-0.5)
    return matrix.to(device)


@made_once
def _colours(channels: int, device: torch.device) -> Tensor:
    matrix = torch.eye(channels + 1)
    matrix[channels, channels] = 0
    return matrix.to(device)


@made_once
def _luma(channels: int, device: torch.device) -> Tensor:
    matrix = torch.zeros(channels + 1, channels + 1)
    matrix[:channels, :channels] = 1 / channels
    return matrix.to(device)


@dataclass(frozen=True)
class Recolour(Step):
    """Changes of colour (size, T, C + 1, C + 1) in order, composed and done once."""

    def __call__(self, images: Tensor, spared: Tensor | float) -> Tensor:
        # The last change is the leftmost factor.
        matrices = product(_where(self.chance > spared, self.value.to(images.dtype)).flip(1))
        channels = images.shape[1]
        weights = matrices[:, :channels, :, None, None]  # (B, C, C + 1, 1, 1)
        terms = (weights[:, :, k] * images[:, k, None] for k in range(channels))
        return _sum(weights[:, :, channels], *terms)


@dataclass(frozen=True)
class Jitter(Step):
    """DiffAugment's colours (size, 3), done once: brightness + b, then saturation × s about the pixel's mean over its channels,
    then contrast × c about the image's mean: c s x + c (1 − s) grey(x) + b + (1 − c) mean(x)."""

    def __call__(self, images: Tensor, spared: Tensor | float) -> Tensor:
        applied = (self.chance > spared)[..., None, None, None]  # (B, 3, 1, 1, 1)
        b, s, c = self.value.to(images.dtype)[..., None, None, None].unbind(1)
        b, s, c = b * applied[:, 0], torch.where(applied[:, 1], s, 1.0), torch.where(applied[:, 2], c, 1.0)
        grey = _sum(*images.unbind(1))[:, None] / images.shape[1]  # (B, 1, H, W)
        # In fp64, since the order of the sum depends on how many rows there are, and so would the last bits in fp32.
        mean = grey.mean((2, 3), keepdim=True, dtype=torch.float64).to(images.dtype)
        return c * s * images + (c * (1 - s) * grey + b + (1 - c) * mean)


@dataclass(frozen=True)
class Cutout(Step):
    """A rectangle of 0 over half the height and half the width; its centre (size, 1, 2) in pixels from the top and the left."""

    def __call__(self, images: Tensor, spared: Tensor | float) -> Tensor:
        hole = (self.chance > spared)[..., None]  # (B, 1, 1)
        for axis, length in enumerate(images.shape[2:]):
            half = _part(length, 2)
            first = self.value[:, 0, axis, None] - half // 2  # (B, 1)
            place = torch.arange(length, device=images.device)
            inside = (place >= first) & (place < first + half)  # (B, length)
            hole = hole & (inside[:, :, None] if axis == 0 else inside[:, None, :])
        return images.masked_fill(hole[:, None], 0.0)


def _part(length: int, of: int) -> int:
    return int(length / of + 0.5)


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"names {name!r} {names.count(name)} times; once is enough")
    return names


class DiffAugmentOptions(Augmentation):
    """DiffAugment (Zhao et al. 2020): always, on real and fake images and in both players' turns, in the order of `policy`.

    Brightness + U(−½, ½), saturation × U(0, 2), contrast × U(½, 1½); translation by up to an eighth of the size and cutout of
    half of it, both leaving 0, which is the middle grey of −1 … 1, as in the released code.
    """

    kind: Literal["diffaugment"] = "diffaugment"
    policy: Annotated[
        tuple[Literal["colour", "translation", "cutout"], ...],
        Field(strict=False, min_length=1),
        AfterValidator(_once),
    ] = ("colour", "translation", "cutout")

    def steps(self, shape: Shape, dice: Dice) -> tuple[Step, ...]:
        _, height, width = shape
        steps: list[Step] = []
        for name in self.policy:
            if name == "colour":
                amounts = [dice.uniform(-0.5, 0.5), dice.uniform(0, 2), dice.uniform(0.5, 1.5)]
                steps.append(Jitter(dice.chance(3), torch.stack(amounts, 1)))
            elif name == "translation":
                steps.append(Moves(dice.chance(1), _translation(height, width, dice)[:, None], whole=1, padding=ZEROS))
            else:
                # Where the hole has an even length, its centre may lie one beyond the last pixel.
                centres = [dice.whole(0, length - _part(length, 2) % 2) for length in (height, width)]
                steps.append(Cutout(dice.chance(1), torch.stack(centres, 1)[:, None]))
        return tuple(steps)


def _translation(height: int, width: int, dice: Dice) -> Tensor:
    y, x = (dice.whole(-_part(length, 8), _part(length, 8)) for length in (height, width))
    return shift(x, y)


class ConsistencyOptions(Augmentation):
    """The moves under which a discriminator is to judge alike (Zhang et al. 2020): half the images flipped, all of them translated
    by up to an eighth of the size, as 4 pixels are of CIFAR-10's 32, with a mirrored border."""

    policy: Annotated[
        tuple[Literal["flip", "translation"], ...], Field(strict=False, min_length=1), AfterValidator(_once)
    ] = ("flip", "translation")

    def steps(self, shape: Shape, dice: Dice) -> tuple[Step, ...]:
        _, height, width = shape
        moves = [_flip(dice) if name == "flip" else _translation(height, width, dice) for name in self.policy]
        return (Moves(dice.chance(len(moves)), torch.stack(moves, 1), whole=len(moves)),)


def _flip(dice: Dice) -> Tensor:
    return scaling(1 - 2 * dice.whole(0, 1), torch.ones(dice.size, device=dice.device))


class AdaOptions(Augmentation):
    """Adaptive discriminator augmentation (Karras et al. 2020, appendix B): each transformation with probability `p` of its own.

    The groups are done in the order blit, geometry, colour: the paper's best set, "bgc". `p` is fixed, or starts at `start` and
    moves by `adjusted` every `every` steps. Unlike in the paper, pixels are interpolated bilinearly at the image's own size, not
    in one that symlet wavelets have doubled: fine detail gets softer, and aliases where an image shrinks. The border is mirrored
    as often as needed. 90° rotations are left to square images; hue and saturation to 3 channels.
    """

    kind: Literal["ada"] = "ada"
    groups: Annotated[
        tuple[Literal["blit", "geometry", "colour"], ...], Field(strict=False, min_length=1), AfterValidator(_once)
    ] = ("blit", "geometry", "colour")
    p: Annotated[float, Field(gt=0, le=1)] | None = None
    target: Annotated[float, Field(gt=-1, lt=1)] = 0.6  # of E[sign D(real)]
    speed_images: Annotated[int, Field(ge=1)] = 500_000  # that take p from 0 to 1
    every: Annotated[int, Field(ge=1)] = 4  # steps
    start: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> AdaOptions:
        if self.p is not None:
            for name in ("target", "speed_images", "every", "start"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"`{name}` has no effect beside a fixed `p`; leave one out")
        return self

    def steps(self, shape: Shape, dice: Dice) -> tuple[Step, ...]:
        channels, height, width = shape
        blit = self._blit(height, width, dice) if "blit" in self.groups else []
        chances = [dice.chance(len(blit))]
        geometry = []
        if "geometry" in self.groups:
            geometry = self._geometry(height, width, dice)
            chance = dice.chance(len(geometry))
            # The two rotations count as one, so each has 1 − √(1 − p): a chance is above √(1 − p) where its square is above 1 − p.
            chances.append(
                torch.stack([chance[:, 0], chance[:, 1] ** 2, chance[:, 2], chance[:, 3] ** 2, chance[:, 4]], 1)
            )
        steps: list[Step] = []
        if blit or geometry:
            steps.append(Moves(torch.cat(chances, 1), torch.stack(blit + geometry, 1), whole=len(blit)))
        if "colour" in self.groups:
            colour = self._colour(channels, dice)
            steps.append(Recolour(dice.chance(len(colour)), torch.stack(colour, 1)))
        return tuple(steps)

    def _blit(self, height: int, width: int, dice: Dice) -> list[Tensor]:
        turn = [rotation(dice.whole(0, 3) * (math.pi / 2)).round()] if height == width else []
        y, x = (torch.round(dice.uniform(-0.125, 0.125) * length) for length in (height, width))
        return [_flip(dice), *turn, shift(x, y)]

    def _geometry(self, height: int, width: int, dice: Dice) -> list[Tensor]:
        larger, wider = dice.factor(0.2), dice.factor(0.2)
        before, after = dice.uniform(-math.pi, math.pi), dice.uniform(-math.pi, math.pi)
        y, x = dice.normal(0.125) * height, dice.normal(0.125) * width
        return [scaling(larger, larger), rotation(before), scaling(wider, 1 / wider), rotation(after), shift(x, y)]

    def _colour(self, channels: int, dice: Dice) -> list[Tensor]:
        changes = [
            brightness(dice.normal(0.2), channels),
            contrast(dice.factor(0.5), channels),
            luma_flip(dice.whole(0, 1), channels),
        ]
        if channels == 3:
            changes += [hue(dice.uniform(-math.pi, math.pi)), saturation(dice.factor(1.0), channels)]
        return changes


AUGMENTATIONS: dict[str, Callable[[], type[Section]]] = {
    "diffaugment": lambda: DiffAugmentOptions,
    "ada": lambda: AdaOptions,
}


def adjusted(p: Tensor, sign_rate: Tensor, images: float, options: AdaOptions) -> Tensor:
    """p after `images` more images: up where the discriminator is too sure of real ones, down where it is not.

    sign_rate: r_t = E[sign D(real)] over the rows of all processes since the last adjustment (Karras et al. 2020, equation 1). One
    that is not a number, as after a step that was skipped, moves nothing. p and sign_rate are 0-d.
    """
    direction = torch.sign(sign_rate - options.target)  # 0 of what is not a number
    return (p + direction * (images / options.speed_images)).clamp(0, 1)
