"""The multi-scale network of Farabet et al. 2013: one set of convolutions over a Laplacian pyramid of the image."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gandist.losses import at_least_fp32
from gandist.networks.resampling import DoubleSmoothly, halve
from gandist.networks.segmentation import SegmenterOptions

LEVELS = 3
NEIGHBOURHOOD = 15  # pixels a side
GREY = 1 / 127.5  # one grey level of −1 … 1: a neighbourhood that deviates less is flat, and stays so

_doubled = DoubleSmoothly()


def yuv(images: Tensor) -> Tensor:
    """RGB (B, 3, H, W) as luminance and two differences from it, both 0 for grey: ITU-R BT.601."""
    red, green, blue = images.unbind(1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luminance, 0.492 * (blue - luminance), 0.877 * (red - luminance)], dim=1)


def pyramid(images: Tensor) -> list[Tensor]:
    """Laplacian pyramid (Burt and Adelson 1983): what each halving of the size takes away, finest first, and what is left at the end.

    The sides must be multiples of 4. Halving takes means of 2×2 pixels, and doubling interpolates between them.
    """
    levels = []
    for _ in range(LEVELS - 1):
        smaller = halve(images)
        levels.append(images - _doubled(smaller))
        images = smaller
    return [*levels, images]


def _around(images: Tensor, axis: int) -> Tensor:
    """The sum of each pixel's neighbours along an axis, as far as there are pixels: sums of 1, 2, 4 and 8 of them, and the last two of each put together."""
    side = images.shape[axis]
    padding = [0] * (2 * (images.ndim - axis))
    padding[-2:] = [NEIGHBOURHOOD // 2, NEIGHBOURHOOD // 2]
    one = F.pad(images, padding)
    two = one.narrow(axis, 0, side + 13) + one.narrow(axis, 1, side + 13)
    four = two.narrow(axis, 0, side + 11) + two.narrow(axis, 2, side + 11)
    eight = four.narrow(axis, 0, side) + four.narrow(axis, 4, side)
    seven = four.narrow(axis, 8, side) + two.narrow(axis, 12, side)
    return eight + (seven + one.narrow(axis, 14, side))


def _mean_around(images: Tensor) -> Tensor:
    """Of the neighbourhood of each pixel, as far as there are pixels."""
    rows, columns = (
        (place + NEIGHBOURHOOD // 2 + 1).clamp(max=side) - (place - NEIGHBOURHOOD // 2).clamp(min=0)
        for side in images.shape[2:]
        for place in [torch.arange(side, device=images.device)]
    )
    return _around(_around(images, 2), 3) / (rows[:, None] * columns)


def standardised(images: Tensor) -> Tensor:
    """Each pixel less the mean of its neighbourhood, over the deviation there, channel by channel."""
    images = images - images.mean((2, 3), keepdim=True)  # the difference of squares below is rounded less
    mean = _mean_around(images)
    variance = (_mean_around(images.square()) - mean.square()).clamp(min=GREY**2)
    return (images - mean) / variance.sqrt()


class _Farabet(nn.Module):
    """Images (B, C, H, W), sides multiples of 16, to logits (B, K, H/4, W/4)."""

    def __init__(self, channels: int, classes: int, hidden: int | None) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 7, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 64, 7, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 256, 7, padding=3),
        )
        inputs = 256 * LEVELS
        self.classifier = nn.Sequential(
            *([nn.Conv2d(inputs, hidden, 1), nn.Tanh()] if hidden is not None else []),
            nn.Conv2d(hidden or inputs, classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        images = at_least_fp32(images)
        scales = []
        for level, band in enumerate(pyramid(yuv(images) if images.shape[1] == 3 else images)):
            seen = self.features(standardised(band))  # (B, 256, H/4/2^level, W/4/2^level)
            for _ in range(level):
                seen = _doubled(seen)
            scales.append(seen)
        logits: Tensor = self.classifier(torch.cat(scales, dim=1))
        return logits


def _initialise(module: nn.Module) -> None:
    """Glorot and Bengio 2010, equation 16, as tanh wants it, and zero biases."""
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Farabet(SegmenterOptions):
    """Each level of the pyramid by itself through two convolutions 7×7 with tanh and pools and a third without, and a classifier of all.

    `hidden` is for a classifier with one hidden layer of tanh. RGB images are seen as YUV; the neighbourhoods of every level and
    channel have mean 0 and deviation 1, always in fp32.
    """

    kind: Literal["farabet"]
    hidden: Annotated[int, Field(ge=1, le=8192)] | None = None

    @property
    def stride(self) -> int:
        return 4  # two pools

    @property
    def multiple(self) -> int:
        return self.stride << (LEVELS - 1)

    def module(self, channels: int, classes: int) -> nn.Module:
        return _Farabet(channels, classes, self.hidden).apply(_initialise)
