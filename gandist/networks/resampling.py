"""How samples change their size between the layers of a network, for sides that need not be powers of two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gandist.losses import uncast
from gandist.networks import Shape


def halvings(shape: Shape) -> int:
    """How often the smaller side of an image halves before it is under 4 pixels: 3 for 32, 4 for 64, 5 for 128."""
    return (min(shape[1:]) // 4).bit_length() - 1


def divided(side: int, by: int) -> int:
    """A side after steps that divide it by `by` in all, each of which rounds up."""
    return -(-side // by)


def halve(image: Tensor) -> Tensor:
    """The mean of 2×2 pixels; of those that there are at the end of an odd side."""
    return F.avg_pool2d(image, 2, ceil_mode=True)


class Halve(nn.Module):
    """`halve` as a layer."""

    def forward(self, image: Tensor) -> Tensor:
        return halve(image)


def double(image: Tensor) -> Tensor:
    """Each pixel as 2×2, in the precision that it has: CUDA's autocast would go on in fp32."""
    with uncast(image):
        return F.interpolate(image, scale_factor=2, mode="nearest")


class DoubleSmoothly(nn.Module):
    """Bilinear interpolation to twice the size.

    As means of neighbours, twice, of the doubled pixels and one more of the border on each side: the backward of torch's own adds up in no
    fixed order on CUDA, and that of a mean with padding is wrong there where channels lie last (PyTorch's issue 188344): gradients come back half a pixel off.
    """

    def forward(self, image: Tensor) -> Tensor:
        wide = double(image)
        for axis in (2, 3):
            last = wide.shape[axis] - 1
            wide = torch.cat([wide.narrow(axis, 0, 1), wide, wide.narrow(axis, last, 1)], axis)
        return F.avg_pool2d(F.avg_pool2d(wide, 2, stride=1), 2, stride=1)


class Crop(nn.Module):
    """The centre of a sample (B, C, *sizes); all of it where its size is that already."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, sample: Tensor) -> Tensor:
        for axis, size in enumerate(self.sizes, start=2):
            sample = sample.narrow(axis, (sample.shape[axis] - size) // 2, size)
        return sample
