"""Convolutions that are products of matrices where a CPU computes these several times as fast.

Between maps of a few places, weights are larger than the cache of a core, and oneDNN reads them again for each image: on 4×4 places the backward of
256 to 512 channels ran at a twentieth of the speed of a product. As one product of all places of all images they are read once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAVY = 1 << 20  # weights
FEW = {torch.float32: 16, torch.bfloat16: 36}  # places of the smaller map, up to which a product was faster
Sizes = tuple[int, int, int]  # kernel, stride, padding


def _places(side: int, sizes: Sizes) -> int:
    kernel, stride, padding = sizes
    return (side + 2 * padding - kernel) // stride + 1


class _Unfold(torch.autograd.Function):
    """Images (B, C, H, W) to what a convolution sees at each place, (B · places, kernel · kernel · C); `_Fold` is its adjoint."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, sizes: Sizes) -> Tensor:
        ctx.shape, ctx.sizes = images.shape, sizes
        kernel, stride, padding = sizes
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
        batch, channels, *sides = images.shape
        rows, columns = (_places(side, sizes) for side in sides)
        image, down, across, channel = padded.stride()
        steps = (image, down * stride, across * stride, down, across, channel)
        seen = padded.as_strided((batch, rows, columns, kernel, kernel, channels), steps)
        return seen.reshape(batch * rows * columns, kernel * kernel * channels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found: Tensor = _Fold.apply(gradient, ctx.shape, ctx.sizes)  # type: ignore[no-untyped-call]
        return found, None


class _Fold(torch.autograd.Function):
    """The other way: what lies at one place of the images adds up."""

    @staticmethod
    def forward(ctx: Any, seen: Tensor, shape: tuple[int, int, int, int], sizes: Sizes) -> Tensor:
        ctx.sizes = sizes
        kernel, stride, padding = sizes
        batch, channels, height, width = shape
        rows, columns = _places(height, sizes), _places(width, sizes)
        seen = seen.view(batch, rows, columns, kernel, kernel, channels)
        padded = seen.new_zeros(batch, height + 2 * padding, width + 2 * padding, channels)
        for row in range(kernel):
            for column in range(kernel):
                ends = row + stride * (rows - 1) + 1, column + stride * (columns - 1) + 1
                padded[:, row : ends[0] : stride, column : ends[1] : stride] += seen[:, :, :, row, column]
        return padded[:, padding : padding + height, padding : padding + width].permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        found: Tensor = _Unfold.apply(gradient, ctx.sizes)  # type: ignore[no-untyped-call]
        return found, None, None


def convolution(images: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
    """`F.conv2d` of images (B, C, H, W) with square kernels (C', C, k, k), channels last, as one product."""
    rows, columns = (_places(side, sizes) for side in images.shape[2:])
    seen: Tensor = _Unfold.apply(images, sizes)  # type: ignore[no-untyped-call]
    found = F.linear(seen, weight.permute(0, 2, 3, 1).flatten(1), bias)
    return found.view(len(images), rows, columns, len(weight)).permute(0, 3, 1, 2)


def transposed_convolution(
    images: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes, output_padding: int = 0
) -> Tensor:
    """`F.conv_transpose2d` of images (B, C, H, W) with square kernels (C, C', k, k), likewise."""
    kernel, stride, padding = sizes
    height, width = ((side - 1) * stride - 2 * padding + kernel + output_padding for side in images.shape[2:])
    spread = images.permute(0, 2, 3, 1).flatten(0, 2) @ weight.permute(0, 2, 3, 1).flatten(1)
    shape = (len(images), weight.shape[1], height, width)
    found: Tensor = _Fold.apply(spread, shape, sizes)  # type: ignore[no-untyped-call]
    return found if bias is None else found + bias[:, None, None].to(found.dtype)


def _precision(images: Tensor) -> torch.dtype:
    """That a convolution of them computes in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype


def _as_product(layer: nn.Conv2d | nn.ConvTranspose2d, images: Tensor, places: int) -> bool:
    plain = layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.dilation) == {1}
    square = len({*layer.kernel_size}) == len({*layer.stride}) == len({*layer.padding}) == 1
    if images.device.type != "cpu" or torch.compiler.is_compiling() or not (plain and square):
        return False
    # Not by `layer.weight`, which a parametrisation computes anew, and a spectral norm by a power iteration.
    weights = layer.in_channels * layer.out_channels * layer.kernel_size[0] ** 2
    return weights >= HEAVY and places <= FEW.get(_precision(images), 0)


def _sizes(layer: nn.Conv2d | nn.ConvTranspose2d) -> Sizes:
    assert not isinstance(layer.padding, str)
    return layer.kernel_size[0], layer.stride[0], layer.padding[0]


class Conv2d(nn.Conv2d):
    """torch's, with its names."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.padding, str):
            return cast(Tensor, super()._conv_forward(input, weight, bias))
        height, width = (_places(side, _sizes(self)) for side in input.shape[2:])
        if not _as_product(self, input, height * width):
            return cast(Tensor, super()._conv_forward(input, weight, bias))
        return convolution(input.to(_precision(input)), weight, bias, _sizes(self))


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch's, with its names."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        alike = len({*self.output_padding}) == 1
        if output_size is not None or not alike or not _as_product(self, input, input.shape[2] * input.shape[3]):
            return super().forward(input, output_size)
        images = input.to(_precision(input))
        return transposed_convolution(images, self.weight, self.bias, _sizes(self), self.output_padding[0])
