"""R3GAN (Huang et al. 2024, "The GAN is dead; long live the GAN! A modern baseline GAN") for images of 8 pixels a side or more.

No normalisation: residual blocks begin as the identity. `width` 768 gives the networks for CIFAR-10 and FFHQ (96 channels at 256 pixels).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gandist.networks import DiscriminatorOptions, GeneratorOptions, Shape, amount
from gandist.networks.blocks import Block
from gandist.networks.resampling import Crop, DoubleSmoothly, Halve, divided, halvings

Width = Annotated[int, Field(ge=1, le=8192)]
Blocks = Annotated[int, Field(ge=1, le=64)]
GroupSize = Annotated[int, Field(ge=1, le=1024)]
SLOPE = 0.2
GAIN = sqrt(2 / (1 + SLOPE**2))  # what a leaky ReLU takes from the variance


def _filled(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> nn.Module:
    """The layer with normal weights that scale the variance of its input by `gain`², and zero biases."""
    nn.init.normal_(layer.weight, 0.0, gain / sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class _Block(Block):
    """x + 1×1(3×3 in groups(1×1(x))) with twice the channels between, and leaky ReLU after the first two.

    As in fix-up initialisation (Zhang et al. 2019) the last convolution is zero and the others are smaller by L^−¼, for L blocks
    in the network.
    """

    def __init__(self, channels: int, group_size: int, blocks: int) -> None:
        super().__init__()
        gain = GAIN * blocks**-0.25
        self.expand = _filled(nn.Conv2d(channels, 2 * channels, 1), gain)
        self.mix = _filled(nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels // group_size), gain)
        self.reduce = _filled(nn.Conv2d(2 * channels, channels, 1, bias=False), 0.0)

    def forward(self, features: Tensor) -> Tensor:
        branch = F.leaky_relu(self.expand(features), SLOPE)
        made: Tensor = features + self.reduce(F.leaky_relu(self.mix(branch), SLOPE))
        return made


class _Basis(nn.Module):
    """Noise (B, noise) to learned maps (B, C, H, W), each times a learned linear function of the noise."""

    def __init__(self, noise: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(1, channels, height, width))
        self.scale = _filled(nn.Linear(noise, channels, bias=False))

    def forward(self, noise: Tensor) -> Tensor:
        scale: Tensor = self.scale(noise)
        return scale[:, :, None, None] * self.maps.to(scale.dtype)


def _channels(options: Generator | Discriminator, shape: Shape) -> list[int]:
    """Channels of each stage from the smallest maps on: `width` for four stages, then half as many at each doubling."""
    return [options.width // 2 ** max(0, stage - 3) for stage in range(halvings(shape) + 1)]


def _blocks(options: Generator | Discriminator, channels: int, stages: int) -> list[nn.Module]:
    return [_Block(channels, options.group_size, options.blocks * stages) for _ in range(options.blocks)]


def _transition(inputs: int, outputs: int) -> list[nn.Module]:
    return [_filled(nn.Conv2d(inputs, outputs, 1, bias=False))] if inputs != outputs else []


def _width_faults(options: Generator | Discriminator, shape: Shape) -> Iterator[str]:
    step = options.group_size // (2 - options.group_size % 2) << max(0, halvings(shape) - 3)
    if options.width % step:
        yield (
            f"`width` {options.width} cannot be divided into groups of `group_size` {options.group_size} for "
            f"{amount(shape)}; use a multiple of {step}"
        )


class Generator(GeneratorOptions):
    """A stage of residual blocks for each size, bilinear interpolation between them.

    The paper's output is linear; here a tanh bounds it, as it does every image.
    """

    kind: Literal["r3gan"]
    width: Width = 768  # channels up to 32 pixels, halved at each doubling beyond
    blocks: Blocks = 2  # of each stage
    group_size: GroupSize = 16  # channels that a 3×3 convolution sees
    smallest: ClassVar[int] = 8

    def module(self, noise: int, shape: Shape) -> nn.Module:
        channels = _channels(self, shape)
        stages = len(channels)
        layers: list[nn.Module] = [
            _Basis(noise, channels[0], *(divided(side, 2 ** (stages - 1)) for side in shape[1:]))
        ]
        for stage in range(stages):
            if stage > 0:
                layers += [*_transition(channels[stage - 1], channels[stage]), DoubleSmoothly()]
            layers += _blocks(self, channels[stage], stages)
        layers += [_filled(nn.Conv2d(channels[-1], shape[0], 1, bias=False)), Crop(*shape[1:]), nn.Tanh()]
        return nn.Sequential(*layers)

    def faults(self, shape: Shape) -> Iterator[str]:
        yield from [*super().faults(shape)] or _width_faults(self, shape)


class Discriminator(DiscriminatorOptions):
    """The generator's mirror image: means of 2×2 pixels between the stages, and a convolution of each last map at the end."""

    kind: Literal["r3gan"]
    width: Width = 768  # channels up to 32 pixels, halved at each doubling beyond
    blocks: Blocks = 2  # of each stage
    group_size: GroupSize = 16  # channels that a 3×3 convolution sees
    smallest: ClassVar[int] = 8

    def trunk(self, shape: Shape) -> tuple[nn.Module, int]:
        channels = _channels(self, shape)
        stages = len(channels)
        layers = [_filled(nn.Conv2d(shape[0], channels[-1], 1, bias=False))]
        for stage in reversed(range(stages)):
            layers += _blocks(self, channels[stage], stages)
            if stage > 0:
                layers += [Halve(), *_transition(channels[stage], channels[stage - 1])]
        last = tuple(divided(side, 2 ** (stages - 1)) for side in shape[1:])
        layers += [
            _filled(nn.Conv2d(channels[0], channels[0], last, groups=channels[0], bias=False)),  # type: ignore[arg-type]
            nn.Flatten(),
        ]
        return nn.Sequential(*layers), channels[0]

    def initialise(self, head: nn.Module) -> None:
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                _filled(layer)
            elif isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, 0.0, layer.embedding_dim**-0.5)

    def faults(self, shape: Shape) -> Iterator[str]:
        yield from [*super().faults(shape)] or _width_faults(self, shape)
        if self.spectral_norm:
            yield "`spectral_norm` divides weights by their norm, and blocks of `r3gan` begin with weights of zero; leave it out"
