"""Parzen-window log-likelihood, by the protocol of Goodfellow et al. 2014, section 5 (`parzen_ll.py` of its code).

It tells little of samples in many dimensions (Theis et al. 2016, section 3.2), and is here since the paper's table is in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gandist.metrics.distances import chunks, exact, squared
from gandist.recipe import InputError

VALIDATION = 1000  # images that choose σ: the first ones given
SIGMAS = tuple(10 ** (step / 9 - 1) for step in range(10))  # logspace(−1, 0, 10)


@dataclass(frozen=True)
class Parzen:
    """Mean log-likelihood in nats and its standard error over the test images; `curve` has every σ with its validation mean."""

    mean: float
    standard_error: float
    sigma: float
    curve: tuple[tuple[float, float], ...]


def _likelihoods(images: Tensor, samples: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """log p_σ(x) of float64 rows, (N, sigmas)."""
    assert images.shape[1] == samples.shape[1] > 0, (images.shape, samples.shape)
    found = images.new_empty(len(images), len(sigmas))
    dimensions, count = samples.shape[1], len(samples)
    for rows in chunks(len(images), count):
        distances = squared(images[rows], samples)
        for column, sigma in enumerate(sigmas):
            constant = math.log(count) + dimensions * math.log(sigma * math.sqrt(2 * math.pi))
            found[rows, column] = torch.logsumexp(distances / (-2 * sigma**2), dim=1) - constant
    return found


def log_likelihood(images: Tensor, samples: Tensor, sigma: float) -> Tensor:
    """log p(x) (N,) in float64 of images (N, …) under Gaussians of standard deviation `sigma` round samples (M, …).

    log p(x) = log mean_j exp(−‖x − s_j‖² / 2σ²) − d·log(σ√(2π)).
    """
    return _likelihoods(exact(images.flatten(1)), exact(samples.flatten(1)), (sigma,))[:, 0]


def parzen(samples: Tensor, validation: Tensor, test: Tensor, sigmas: tuple[float, ...] = SIGMAS) -> Parzen:
    """The protocol: σ has the greatest mean on the first 1000 validation images; then all test images.

    Pixels lie in 0 … 1: a density depends on the scale, and that of −1 … 1 would be lower by d·log 2. The paper takes 10,000
    samples; with fewer the likelihood is less. Raises InputError.
    """
    parts = {"samples": samples, "validation": validation, "test": test}
    for name, images in parts.items():
        if len(images) < 2:
            raise InputError(f"Parzen window: {len(images)} {name} images; at least 2 are needed")
        if images[0].numel() != samples[0].numel():
            raise InputError(
                f"Parzen window: {name} images are {tuple(images.shape[1:])} and the samples {tuple(samples.shape[1:])}; they must agree"
            )
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):  # a NaN is neither
            raise InputError(f"Parzen window: {name} images have values in {low:g} … {high:g}; scale them to 0 … 1")
    centres = exact(samples.flatten(1))
    means = _likelihoods(exact(validation[:VALIDATION].flatten(1)), centres, sigmas).mean(0).tolist()
    sigma = sigmas[means.index(max(means))]
    found = _likelihoods(exact(test.flatten(1)), centres, (sigma,))[:, 0]
    error = float(found.std(correction=0)) / math.sqrt(len(found))
    return Parzen(float(found.mean()), error, sigma, tuple(zip(sigmas, means, strict=True)))
