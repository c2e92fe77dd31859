"""DCGAN (Radford, Metz and Chintala 2015) for any size of 8 pixels a side or more and any number of channels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from einops.layers.torch import Rearrange
from pydantic import Field
from torch import nn

from gandist.networks import DiscriminatorOptions, GeneratorOptions, Shape
from gandist.networks.convolution import Conv2d, ConvTranspose2d
from gandist.networks.resampling import Crop, halvings

Width = Annotated[int, Field(ge=1, le=1024)]
Norm = Literal["batch", "none"]


def _normed(channels: int, norm: Norm) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels)] if norm == "batch" else []


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) weights, N(1, 0.02) gains and zero biases (section 3 of the paper; gains as in the released code)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Generator(GeneratorOptions):
    """Transposed convolutions 4×4 with stride 2, ReLU, tanh."""

    kind: Literal["dcgan"]
    width: Width = 64  # channels before the image; doubled at each halving of the size
    norm: Norm = "batch"
    smallest: ClassVar[int] = 8

    @property
    def sees_batch(self) -> str | None:
        return "norm: batch" if self.norm == "batch" else None

    def module(self, noise: int, shape: Shape) -> nn.Module:
        image_channels, image_height, image_width = shape
        stages = halvings(shape)
        height, width = -(-image_height // 2**stages), -(-image_width // 2**stages)
        bias = self.norm == "none"
        channels = self.width * 2 ** (stages - 1)
        layers: list[nn.Module] = [
            nn.Linear(noise, channels * height * width, bias=bias),
            Rearrange("b (c h w) -> b c h w", h=height, w=width),
            *_normed(channels, self.norm),
            nn.ReLU(),
        ]
        for _ in range(stages - 1):
            layers += [
                ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=bias),
                *_normed(channels // 2, self.norm),
                nn.ReLU(),
            ]
            channels //= 2
        layers += [ConvTranspose2d(channels, image_channels, 4, 2, 1), Crop(image_height, image_width), nn.Tanh()]
        return nn.Sequential(*layers).apply(_initialise)


class Discriminator(DiscriminatorOptions):
    """Convolutions 4×4 with stride 2, leaky ReLU, one logit; no normalisation at either end."""

    kind: Literal["dcgan"]
    width: Width = 64  # channels after the first convolution; doubled at each further one
    norm: Norm = "batch"
    smallest: ClassVar[int] = 8

    @property
    def sees_batch(self) -> str | None:
        return "norm: batch" if self.norm == "batch" else super().sees_batch

    def trunk(self, shape: Shape) -> tuple[nn.Module, int]:
        bias = self.norm == "none"
        stages, height, width, channels = halvings(shape), shape[1] // 2, shape[2] // 2, self.width
        layers: list[nn.Module] = [Conv2d(shape[0], channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for _ in range(stages - 1):
            layers += [
                Conv2d(channels, 2 * channels, 4, 2, 1, bias=bias),
                *_normed(2 * channels, self.norm),
                nn.LeakyReLU(0.2),
            ]
            height, width, channels = height // 2, width // 2, 2 * channels
        return nn.Sequential(*layers, nn.Flatten()).apply(_initialise), channels * height * width

    def initialise(self, head: nn.Module) -> None:
        head.apply(_initialise)
