"""Colours of classes: the same class has the same colour in masks, overlays, panels and legends."""

from __future__ import annotations

import colorsys

import torch
import torch.nn.functional as F
from torch import Tensor

SHADES = 256
LINE = 2  # pixels between panels
BLACK = (0.0, 0.0, 0.0)


def palette() -> Tensor:
    """(256, 3) in 0 … 1: neighbouring classes far apart in hue, and 255, which most data sets ignore, black."""
    colours = [colorsys.hsv_to_rgb(n * 0.381966 % 1, 0.8 - 0.25 * (n // 8 % 2), 0.95) for n in range(SHADES - 1)]
    return torch.tensor([*colours, BLACK])


def coloured(mask: Tensor) -> Tensor:
    """(B, 3, H, W) in −1 … 1 of class numbers (B, H, W) in −1 … 255, of which the first is black like the last."""
    return palette().to(mask.device)[mask].permute(0, 3, 1, 2) * 2 - 1


def beside(images: Tensor, *masks: Tensor) -> Tensor:
    """(B, 3, H + 2, n (W + 2)): images (B, C, H, W) in −1 … 1 and right of them masks (B, H, W) in colours, black where there is no class;
    a white line right of each and below.
    """
    shown = images if images.shape[1] in (1, 3) else images[:, :1]
    panels = [shown.expand(-1, 3, -1, -1), *(coloured(mask).to(shown.dtype) for mask in masks)]
    return torch.cat([F.pad(panel, (0, LINE, 0, LINE), value=1.0) for panel in panels], dim=3)


def bytes_of_palette() -> list[int]:
    """768 numbers in 0 … 255, as a palette PNG holds them."""
    return [int(value) for value in palette().mul(255).round().flatten().tolist()]
