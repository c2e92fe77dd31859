"""Augmentation of images and their masks together, on the device: scale, turn, crop, flip and colours, drawn by position.

Numbers are drawn for the whole global batch, and each process takes its rows. A crop is sampled once from its canvas, bilinearly, its
mask at the nearest pixel; what lies beside the image is 0, and ignored in the mask.
"""

from __future__ import annotations

from math import log, radians
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gandist.augment import Dice, Recolour, brightness, contrast, hue, saturation
from gandist.data.stream import IGNORED, Batch
from gandist.recipe import Section, Side

Amount = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(strict=False, ge=0.05, le=20)]


class PairOptions(Section):
    """In this order: a crop of the image `scale` times as large, stretched, turned and flipped; then its colours.

    `scale` is log-uniform between its two factors, `stretch` 0.1 changes the ratio of the sides by up to ±10 %. A crop lies within the
    image where it is smaller, and the image within it where it is larger. Below a scale of ½ sampling skips pixels: set
    `data.transform.size` instead, which smooths.
    """

    crop: Annotated[tuple[Side, Side] | None, Field(strict=False)] = (
        None  # (height, width); the whole canvas unless given
    )
    scale: Annotated[tuple[Factor, Factor], Field(strict=False)] = (1.0, 1.0)
    stretch: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    flip: bool = True
    colour_chance: Annotated[float, Field(gt=0, le=1)] = 0.8
    brightness: Amount = 0.0  # ± on −1 … 1
    contrast: Amount = 0.0  # × 1 ± this
    saturation: Amount = 0.0  # × 1 ± this
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # ± turns

    @model_validator(mode="after")
    def _scale_is_ordered(self) -> PairOptions:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"`scale` {list(self.scale)}: the first factor must not be more than the second")
        if self.colour_chance != 0.8 and not self._colours:
            raise ValueError("`colour_chance` has no effect without `brightness`, `contrast`, `saturation` or `hue`")
        return self

    @property
    def _colours(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what comes out of a canvas of this size."""
        return self.crop if self.crop is not None else (height, width)

    def faults(self, channels: int) -> list[tuple[str, str]]:
        """Keys that images of so many channels give no meaning, and why."""
        return [
            (name, f"is for colours, and the images have {channels} channel{'s' * (channels > 1)}; leave it out")
            for name in ("saturation", "hue")
            if getattr(self, name) and channels != 3
        ]


class View(NamedTuple):
    """Crops (B, C, h, w) of images, where they show one (B, h, w), and the class numbers there (B, h, w); all ignored without masks."""

    images: Tensor
    inside: Tensor
    mask: Tensor


def views(options: PairOptions, batch: Batch, images: str, masks: str | None = None) -> View:
    """The crops of a part of the batch, and of its masks."""
    canvas = batch[images]
    dice = Dice(batch.size, batch.source(f"pairs/{images}"), batch.device)
    rows = slice(batch.rows.start, batch.rows.stop)
    height, width = options.size(*canvas.shape[2:])
    x, y = _places(options, dice, rows, batch.extent(images).float(), height, width)
    extent = batch.extent(images).float()[:, :, None, None]  # (B, 2, 1, 1)
    inside = (y >= -0.5) & (y < extent[:, 0] - 0.5) & (x >= -0.5) & (x < extent[:, 1] - 0.5)
    y, x = torch.minimum(y.clamp_min(0), extent[:, 0] - 1), torch.minimum(x.clamp_min(0), extent[:, 1] - 1)
    grid = torch.stack([x * (2 / max(canvas.shape[3] - 1, 1)) - 1, y * (2 / max(canvas.shape[2] - 1, 1)) - 1], 3)
    found = torch.grid_sampler(canvas.float(), grid, 0, 1, True)
    if options._colours:
        found = _recolour(options, dice, canvas.shape[1], rows)(found, 1 - options.colour_chance)
    # A canvas lies in memory by pixel, and so should its crop: convolutions run faster on it.
    found = (found * inside[:, None]).contiguous(memory_format=torch.channels_last)
    if masks is None:
        return View(found, inside, torch.full_like(inside, IGNORED, dtype=torch.int64))
    place = (y.round().long() * canvas.shape[3] + x.round().long()).flatten(1)
    mask = batch[masks].flatten(1).gather(1, place).view(-1, height, width)
    return View(found, inside, torch.where(inside, mask, IGNORED))


def _places(
    options: PairOptions, dice: Dice, rows: slice, extent: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Column and row in the canvas (B, h, w) that each pixel of a crop comes from, 0 being the centre of the first pixel.

    extent: (B, 2), height and width of the image on its canvas.
    """
    low, high = (log(factor) for factor in options.scale)
    scale = dice.uniform(low, high).exp()[rows]
    stretch = dice.uniform(-options.stretch, options.stretch)[rows]
    angle = dice.uniform(-radians(options.degrees), radians(options.degrees))[rows]
    flip = torch.where(dice.uniform(0, 1)[rows] < 0.5 * options.flip, -1.0, 1.0)
    down, across = dice.uniform(0, 1)[rows], dice.uniform(0, 1)[rows]
    ratio = (1 + stretch).sqrt()
    by_x, by_y = 1 / (scale * ratio), ratio / scale  # pixels of the image for one of the crop
    middle = []
    for share, length, size in ((down, extent[:, 0], height * by_y), (across, extent[:, 1], width * by_x)):
        first, last = torch.minimum(size / 2, length - size / 2), torch.maximum(size / 2, length - size / 2)
        middle.append(first + share * (last - first))
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u = (torch.arange(width, device=extent.device) - (width - 1) / 2) * (by_x * flip)[:, None, None]  # (B, 1, w)
    v = (torch.arange(height, device=extent.device) - (height - 1) / 2)[:, None] * by_y[:, None, None]  # (B, h, 1)
    x = middle[1][:, None, None] - 0.5 + u * cos - v * sin
    y = middle[0][:, None, None] - 0.5 + u * sin + v * cos
    return x, y


def _recolour(options: PairOptions, dice: Dice, channels: int, rows: slice) -> Recolour:
    """All changes of colour of a row together, or none."""
    changes = [
        brightness(dice.uniform(-options.brightness, options.brightness), channels),
        contrast(dice.uniform(1 - options.contrast, 1 + options.contrast), channels),
    ]
    if channels == 3:
        changes.append(saturation(dice.uniform(1 - options.saturation, 1 + options.saturation), channels))
        changes.append(hue(dice.uniform(-options.hue, options.hue) * (2 * torch.pi)))
    value = torch.stack(changes, 1)  # (size, T, C + 1, C + 1)
    chance = dice.chance(1).expand(-1, value.shape[1])
    return Recolour(chance, value).rows(rows)
