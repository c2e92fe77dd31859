"""How many modes of a synthetic mixture a generator finds: the test of VEEGAN (Srivastava et al. 2017) and PacGAN (Lin et al. 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gandist.metrics.distances import chunks, exact, squared
from gandist.recipe import InputError

GOOD = 1 - math.exp(-4.5)  # the mass of a Gaussian within 3 standard deviations in the plane: 98.9 %


@dataclass(frozen=True)
class Modes:
    """`covered` of `modes` have a good sample; `good` is the share of those; `divergence` how unevenly all are spread.

    The divergence is KL(share of the samples nearest to each centre ‖ uniform) in nats: 0 where all modes get as many, log
    of the number of modes where one gets all.
    """

    covered: int
    modes: int
    good: float
    divergence: float


def reach(dimensions: int) -> float:
    """How many standard deviations hold 98.9 % of a Gaussian: 3 in the plane, as both papers have it, and more in more."""
    low, high = 0.0, 10.0 + 2 * math.sqrt(dimensions)
    half = torch.tensor(dimensions / 2, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        inside = torch.special.gammainc(half, torch.tensor(middle**2 / 2, dtype=torch.float64)) < GOOD
        low, high = (middle, high) if inside else (low, middle)
    return (low + high) / 2


def coverage(samples: Tensor, centres: Tensor, deviation: float) -> Modes:
    """What samples (N, D) cover of a mixture with centres (M, D) and one standard deviation; raises InputError."""
    if samples.ndim != 2 or centres.ndim != 2 or samples.shape[1] != centres.shape[1] or not len(samples):
        raise InputError(
            f"mode coverage: samples {tuple(samples.shape)} and centres {tuple(centres.shape)}; (N, D) and (M, D) are needed, N at least 1"
        )
    if not deviation > 0:
        raise InputError(f"mode coverage: a standard deviation of {deviation}; it must be greater than 0")
    points, places = exact(samples), exact(centres)
    limit = (reach(centres.shape[1]) * deviation) ** 2
    counts = torch.zeros(len(places), dtype=torch.int64, device=places.device)
    near = torch.zeros_like(counts)
    for rows in chunks(len(points), len(places)):
        distances, nearest = squared(points[rows], places).min(1)
        counts += nearest.bincount(minlength=len(places))
        near += nearest[distances <= limit].bincount(minlength=len(places))
    shares = counts.double() / len(points)
    divergence = float(torch.special.xlogy(shares, shares * len(places)).sum())
    return Modes(int((near > 0).sum()), len(places), int(near.sum()) / len(points), max(0.0, divergence))
