"""How samples change their size between the layers of a network, for sides that need not be powers of two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gandist.losses import at_least_fp32, uncast
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


def _between(image: Tensor, axis: int) -> Tensor:
    """Twice as many places along an axis: each lies a quarter of the way to a neighbour, at the border to itself."""
    last = image.shape[axis] - 1
    before = torch.cat([image.narrow(axis, 0, 1), image.narrow(axis, 0, last)], axis)
    after = torch.cat([image.narrow(axis, 1, last), image.narrow(axis, last, 1)], axis)
    return torch.stack([image.lerp(before, 0.25), image.lerp(after, 0.25)], axis + 1).flatten(axis, axis + 1)


def by_axes(image: Tensor) -> Tensor:
    """Bilinear interpolation to twice the size as sums in a fixed order, and so its gradient."""
    return _between(_between(image.permute(0, 2, 3, 1), 1), 2).permute(0, 3, 1, 2)


def _by_pixel(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


class DoubleSmoothly(nn.Module):
    """Bilinear interpolation to twice the size.

    On a GPU written out, axis by axis, channels last: there the backward of torch's own adds up in no fixed order, and that of means with padding,
    which give the same, is wrong where channels lie last (PyTorch's issue 188344): gradients come back half a pixel off. On a CPU torch's own adds in
    order, and takes a seventh of the time.
    """

    def forward(self, image: Tensor) -> Tensor:
        if image.device.type == "cuda":
            return by_axes(image)
        with uncast(image):
            doubled = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
        if (
            doubled.requires_grad and not torch.compiler.is_compiling()
        ):  # of the slice of a concatenation it would be computed five times as slowly
            doubled.register_hook(_by_pixel)  # type: ignore[no-untyped-call]
        return doubled


def stretched(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps (…, h', w') by bilinear interpolation to (…, height, width).

    As two products of matrices: the backward of torch's own adds up in no fixed order on CUDA.
    """
    maps = at_least_fp32(maps)
    rows, columns = (
        F.interpolate(torch.eye(count, dtype=maps.dtype, device=maps.device)[None], size=size, mode="linear")[0]
        for count, size in zip(maps.shape[-2:], (height, width), strict=True)
    )  # (h', height), (w', width)
    with uncast(maps):
        return rows.T @ maps @ columns


class Crop(nn.Module):
    """The centre of a sample (B, C, *sizes); all of it where its size is that already."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, sample: Tensor) -> Tensor:
        for axis, size in enumerate(self.sizes, start=2):
            sample = sample.narrow(axis, (sample.shape[axis] - size) // 2, size)
        return sample
