"""An early sign of collapse that needs no feature network: samples of one batch that are nearly the same."""

from __future__ import annotations

import torch
from torch import Tensor

from gandist.metrics.distances import exact, squared
from gandist.recipe import InputError

NEAR = 0.1  # of the median pair distance; of 256 real garments the nearest other one lies at 0.18 or more, half of them at 0.45
LEVEL = 2 / 255  # one step of 8 bits in −1 … 1: what is no further apart, root mean square, looks the same


def _pairs(images: Tensor) -> Tensor:
    """‖x_i − x_j‖ (B, B) per pixel (root mean square)."""
    rows = exact(images.flatten(1))
    return (squared(rows, rows) / rows.shape[1]).sqrt()


def duplicates(images: Tensor, reference: Tensor | None = None) -> float:
    """The share of images (B, …) in −1 … 1 whose nearest other one is nearer than a tenth of the median pair distance.

    The median is over all pairs of `reference`, best a batch of real images: of `images` alone, it shrinks with them when all
    collapse to one mode that is wider than a step of 8 bits, which counts as near in any case. O(B²·pixels): milliseconds for 256.
    """
    if len(images) < 2 or (reference is not None and len(reference) < 2):
        raise InputError(f"duplicates: {len(images)} images; at least 2 are needed, and 2 of the reference")
    pairs = _pairs(images)
    others = pairs if reference is None else _pairs(reference)
    first, second = torch.triu_indices(len(others), len(others), 1, device=others.device)
    limit = max(NEAR * float(others[first, second].median()), LEVEL)
    return float((pairs.fill_diagonal_(torch.inf).amin(1) <= limit).double().mean())
