"""Strided 1-D convolutions without normalisation, as in WaveGAN (Donahue et al. 2019), for signals of any length of 16 or more.

`width` 64 gives its networks for 16,384 values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from einops.layers.torch import Rearrange
from pydantic import Field
from torch import nn

from gandist.networks import DiscriminatorOptions, GeneratorOptions, Shape
from gandist.networks.resampling import Crop, divided

Width = Annotated[int, Field(ge=1, le=1024)]
Kernel = Annotated[int, Field(ge=2, le=255)]
Stride = Annotated[int, Field(ge=2, le=16)]


def _stride(options: Generator | Discriminator, length: int) -> int:
    return options.stride or (4 if length >= 256 else 2)


def _kernel(options: Generator | Discriminator, length: int) -> int:
    return options.kernel or 6 * _stride(options, length) + 1


def _stages(length: int, stride: int) -> int:
    """How often a length is divided before it is under 16, but at least once: 5 for 16,384."""
    stages = 1
    while divided(length, stride ** (stages + 1)) >= 16:
        stages += 1
    return stages


def _initialise(module: nn.Module) -> None:
    """Normal weights that keep the variance (He et al. 2015) and zero biases."""
    if isinstance(module, nn.ConvTranspose1d):  # a value is the sum of kernel / stride taps of each channel
        nn.init.normal_(
            module.weight, 0.0, (2 * module.stride[0] / (module.in_channels * module.kernel_size[0])) ** 0.5
        )
    elif isinstance(module, nn.Conv1d):
        nn.init.normal_(module.weight, 0.0, (2 / (module.in_channels * module.kernel_size[0])) ** 0.5)
    elif isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, 0.0, module.weight.shape[1] ** -0.5)
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _kernel_faults(options: Generator | Discriminator, shape: Shape) -> Iterator[str]:
    stride, kernel = _stride(options, shape[1]), _kernel(options, shape[1])
    if kernel < stride:
        yield f"`kernel` {kernel} is less than the stride of {stride}, which skips values; use {stride} or more"


class Generator(GeneratorOptions):
    """Transposed convolutions with ReLU; `output: tanh` is for signals in −1 … 1."""

    kind: Literal["signal"]
    width: Width = 64  # channels before the signal; doubled at each step down in length, to at most 16 times as many
    kernel: Kernel | None = None  # 6·stride + 1, that is 25 or 13
    stride: Stride | None = None  # 4, or 2 for signals of fewer than 256 values
    output: Literal["linear", "tanh"] = "linear"
    axes: ClassVar[tuple[int, ...]] = (2,)
    smallest: ClassVar[int] = 16

    def module(self, noise: int, shape: Shape) -> nn.Module:
        stride, kernel = _stride(self, shape[1]), _kernel(self, shape[1])
        stages = _stages(shape[1], stride)
        channels = [self.width * min(16, 2**stage) for stage in reversed(range(stages))]
        length = divided(shape[1], stride**stages)
        layers: list[nn.Module] = [
            nn.Linear(noise, channels[0] * length),
            Rearrange("b (c l) -> b c l", l=length),
        ]
        padding = (kernel - stride + 1) // 2
        for inputs, outputs in zip(channels, [*channels[1:], shape[0]], strict=True):
            layers += [
                nn.ReLU(),
                nn.ConvTranspose1d(inputs, outputs, kernel, stride, padding, stride - kernel + 2 * padding),
            ]
        layers += [Crop(shape[1]), *([nn.Tanh()] if self.output == "tanh" else [])]
        return nn.Sequential(*layers).apply(_initialise)

    def faults(self, shape: Shape) -> Iterator[str]:
        yield from [*super().faults(shape)] or _kernel_faults(self, shape)


class Discriminator(DiscriminatorOptions):
    """Convolutions with leaky ReLU."""

    kind: Literal["signal"]
    width: Width = 64  # channels after the first convolution; doubled at each further one, to at most 16 times as many
    kernel: Kernel | None = None  # 6·stride + 1, that is 25 or 13
    stride: Stride | None = None  # 4, or 2 for signals of fewer than 256 values
    axes: ClassVar[tuple[int, ...]] = (2,)
    smallest: ClassVar[int] = 16

    def trunk(self, shape: Shape) -> tuple[nn.Module, int]:
        stride, kernel = _stride(self, shape[1]), _kernel(self, shape[1])
        stages = _stages(shape[1], stride)
        channels = [self.width * min(16, 2**stage) for stage in range(stages)]
        layers: list[nn.Module] = []
        length = shape[1]
        for inputs, outputs in zip([shape[0], *channels], channels, strict=False):
            shorter = divided(length, stride)
            padding = divided((shorter - 1) * stride + kernel - length, 2)  # so that the last values are seen as well
            layers += [nn.Conv1d(inputs, outputs, kernel, stride, padding), nn.LeakyReLU(0.2)]
            length = shorter
        return nn.Sequential(*layers, nn.Flatten()).apply(_initialise), channels[-1] * length

    def initialise(self, head: nn.Module) -> None:
        head.apply(_initialise)

    def faults(self, shape: Shape) -> Iterator[str]:
        yield from [*super().faults(shape)] or _kernel_faults(self, shape)
