"""Fully connected networks, as in Goodfellow et al. 2014, for images of any size."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from einops.layers.torch import Rearrange
from pydantic import Field
from torch import nn

from gandist.data.dataset import ImageSpec
from gandist.networks import DiscriminatorOptions, GeneratorOptions

Width = Annotated[int, Field(ge=1, le=65536)]
Depth = Annotated[int, Field(ge=1, le=64)]


def _shape(image: ImageSpec) -> tuple[int, int, int]:
    assert image.height is not None
    assert image.width is not None
    return image.channels, image.height, image.width


def _layers(inputs: int, width: int, depth: int, activation: type[nn.Module]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return layers


class Generator(GeneratorOptions):
    """Linear layers with ReLU and a tanh at the end."""

    kind: Literal["mlp"]
    width: Width = 1200
    depth: Depth = 2

    def build(self, noise: int, image: ImageSpec) -> nn.Module:
        c, h, w = _shape(image)
        body = _layers(noise, self.width, self.depth, nn.ReLU)
        unfold = Rearrange("b (c h w) -> b c h w", c=c, h=h, w=w)
        return nn.Sequential(*body, nn.Linear(self.width, c * h * w), nn.Tanh(), unfold)


class Discriminator(DiscriminatorOptions):
    """Linear layers with leaky ReLU and one logit."""

    kind: Literal["mlp"]
    width: Width = 512
    depth: Depth = 2

    def build(self, image: ImageSpec) -> nn.Module:
        body = _layers(prod(_shape(image)), self.width, self.depth, lambda: nn.LeakyReLU(0.2))  # type: ignore[arg-type]
        return nn.Sequential(nn.Flatten(), *body, nn.Linear(self.width, 1), nn.Flatten(0))
