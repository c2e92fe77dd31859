"""Adversaries that judge places: PatchGAN (Isola et al. 2017), and the one of AdvSemiSeg for every pixel (Hung et al. 2018)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from gandist.losses import at_least_fp32, uncast
from gandist.networks.heads import normalise_spectra
from gandist.networks.resampling import stretched
from gandist.networks.segmentation import AdversaryOptions

Width = Annotated[int, Field(ge=1, le=1024)]


def sampled(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Maps (B, h, w) at the places (n,) × (m,) of a grid, in pixels from the middle of the first one: (B, n, m), bilinearly, and beyond
    the border as at the border. As products of matrices too.
    """
    maps = at_least_fp32(maps)
    down, across = (
        (1 - (where.clamp(0, count - 1) - torch.arange(count, device=maps.device)[:, None]).abs()).clamp_min(0)
        for count, where in zip(maps.shape[1:], (rows, columns), strict=True)
    )  # (h, n), (w, m)
    with uncast(maps):
        return down.to(maps.dtype).T @ maps @ across.to(maps.dtype)


def _convolutions(inputs: int, outputs: list[int], strides: list[int]) -> nn.Sequential:
    """4×4 with a padding of 1 and leaky ReLU, but after the last."""
    parts: list[nn.Module] = []
    for before, after, stride in zip([inputs, *outputs], outputs, strides, strict=False):
        parts += [nn.Conv2d(before, after, 4, stride, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*parts[:-1])


class _Patch(nn.Module):
    """Label maps (B, maps, h, w), and images (B, C, h, w) where it reads them, to logits (B, h', w')."""

    def __init__(self, convolutions: nn.Module) -> None:
        super().__init__()
        self.convolutions = convolutions

    def forward(self, labels: Tensor, images: Tensor | None = None) -> Tensor:
        seen = labels if images is None else torch.cat([labels, images.to(labels.dtype)], dim=1)
        logits: Tensor = rearrange(self.convolutions(seen), "b 1 h w -> b h w")
        return logits


class _PerPixel(nn.Module):
    """Label maps (B, maps, h, w) to logits (B, h, w)."""

    def __init__(self, convolutions: nn.Module) -> None:
        super().__init__()
        self.convolutions = convolutions

    def forward(self, labels: Tensor) -> Tensor:
        logits = rearrange(self.convolutions(labels), "b 1 h w -> b h w")
        return stretched(logits, *labels.shape[2:])


class Patch(AdversaryOptions):
    """Convolutions that halve the size `layers` times, two that keep it, and a logit for each patch: Isola et al. 2017, section 3.2.2.

    The defaults give their 70×70 patches. There is no batch norm, by which a label map's logits would depend on the others.
    """

    kind: Literal["patch"]
    image: bool = False  # whether it sees the image beside the label map
    width: Width = (
        64  # channels after the first convolution; doubled at each further one, to at most eight times as many
    )
    layers: Annotated[int, Field(ge=1, le=6)] = 3
    spectral_norm: bool = False

    @property
    def reads_image(self) -> bool:
        return self.image

    @property
    def smallest(self) -> int:
        return 3 << self.layers  # each of the two convolutions that do not halve takes one off

    def places(self, side: int, count: int) -> tuple[float, float]:
        step = 2.0**self.layers
        return step + (step - 1) / 2, step  # and so the first place of what is left is the second of all

    def build(self, maps: int, channels: int) -> nn.Module:
        outputs = [self.width * min(8, 2**layer) for layer in range(self.layers + 1)]
        inputs = maps + channels * self.image
        module = _Patch(_convolutions(inputs, [*outputs, 1], [2] * self.layers + [1, 1]))
        if self.spectral_norm:
            normalise_spectra(module)
        return module


class PerPixel(AdversaryOptions):
    """Five convolutions that halve the size, and their logits stretched to one for each pixel: Hung et al. 2018."""

    kind: Literal["per_pixel"]
    width: Width = 64  # channels after the first convolution; doubled at each further one

    @property
    def smallest(self) -> int:
        return 32

    def build(self, maps: int, channels: int) -> nn.Module:
        outputs = [self.width * 2**layer for layer in range(4)]
        return _PerPixel(_convolutions(maps, [*outputs, 1], [2] * 5))
