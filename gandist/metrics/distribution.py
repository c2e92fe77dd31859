"""Distances between the distributions of real and generated samples, of features that a `FeatureNetwork` gives.

All is computed in float64 from features in the order of their samples, so that no score depends on the number of processes.
Of torchmetrics the kernel of KID is used. Its other metrics are not: FID sums moments rank by rank and takes eigenvalues of
a product that is not symmetric, KID and the inception score draw from the global generator. `prdc` holds all pairs at once and
starts 8 processes. The tests hold each score here to theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gandist.metrics.distances import chunks, exact, squared
from gandist.metrics.features import Features
from gandist.recipe import Failure, InputError, Section
from gandist.seeding import derive

Neighbours = Annotated[int, Field(ge=1, le=100)]


class DistributionOptions(Section):
    """What defines the scores, as published: a protocol holds these."""

    kernel_subsets: Annotated[int, Field(ge=1, le=10_000)] = 100
    kernel_subset_size: Annotated[int, Field(ge=2, le=50_000)] = 1000  # or all, where there are fewer samples
    inception_splits: Annotated[int, Field(ge=1, le=1000)] = 10
    precision_neighbours: Neighbours = 3
    coverage_neighbours: Neighbours = 5


def in_order(rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows (N, …) as gathered from processes, sorted by the numbers 0 … N − 1 of their samples."""
    places = numbers.argsort()
    if not torch.equal(numbers[places], torch.arange(len(rows), device=numbers.device)):
        raise Failure(f"the {len(rows)} gathered samples are not those numbered 0 … {len(rows) - 1}, once each")
    return rows[places.to(rows.device)]


def moments(pool: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F) of features (N, F) in float64, divided by N − 1 as in the code of Heusel et al. 2017."""
    values = exact(pool)
    mean = values.mean(0)
    values = values - mean
    return mean, values.T @ values / (len(values) - 1)


def _root(covariance: Tensor) -> Tensor:
    """A (F, rank) with A Aᵀ = covariance; directions that are only rounding are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    real = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = vectors[:, real] * values[real].sqrt()
    return root


def frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """‖μ − ν‖² + tr(C + D − 2 (C D)^½), the squared Fréchet distance of two Gaussians (Heusel et al. 2017, equation 6).

    With C = A Aᵀ and D = B Bᵀ the trace of the root is the sum of the singular values of Aᵀ B: no root of a rounding error is
    taken, so that covariances of fewer samples than features do no harm.
    """
    root = torch.linalg.svdvals(_root(exact(covariance)).T @ _root(exact(other_covariance))).sum()
    shift = (exact(mean) - exact(other_mean)).square().sum()
    return max(0.0, float(shift + exact(covariance).trace() + exact(other_covariance).trace() - 2 * root))


def kernel_distance(real: Tensor, fake: Tensor, seed: int, subsets: int, subset_size: int) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased MMD² with (xᵀy / F + 1)³ over subsets: KID (Bińkowski et al. 2018).

    Subsets are drawn without repetition, by `seed` and their number. Unbiased: values below 0 do occur.
    """
    from torchmetrics.image.kid import poly_mmd  # importing it takes 2 s

    size = min(subset_size, len(real), len(fake))
    found = []
    for number in range(subsets):
        generator = torch.Generator().manual_seed(derive(seed, "kernel distance", number))
        chosen = [rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)] for rows in (real, fake)]
        found.append(poly_mmd(exact(chosen[0]), exact(chosen[1])).cpu())
    values = torch.stack(found)
    return float(values.mean()), float(values.std(correction=0))


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) ‖ p(y)), mean and standard deviation over consecutive parts of logits (N, K): Salimans et al. 2016.

    Log probabilities are logits, too.
    """
    if len(logits) < splits:
        raise InputError(f"inception score: {len(logits)} samples cannot be split into {splits} parts")
    logs = exact(logits).log_softmax(1)
    scores = []
    for part in logs.tensor_split(splits):
        marginal = part.exp().mean(0)
        entropies = torch.special.xlogy(marginal, marginal).sum()
        scores.append(((part.exp() * part).nan_to_num(0.0).sum(1).mean() - entropies).exp())  # 0·log 0 is 0
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def radii(pool: Tensor, neighbours: int) -> Tensor:
    """Squared distances (N, neighbours) of each row to its nearest others, the nearest first."""
    if len(pool) <= neighbours:
        raise InputError(f"{len(pool)} samples have no {neighbours} neighbours each; take more samples")
    rows = exact(pool)
    found = rows.new_empty(len(rows), neighbours)
    for part in chunks(len(rows), len(rows)):
        distances = squared(rows[part], rows)
        distances[torch.arange(len(distances)), torch.arange(part.start, part.stop)] = (
            torch.inf
        )  # not its own neighbour
        found[part] = distances.topk(neighbours, largest=False).values
    return found


@dataclass(frozen=True)
class Manifold:
    """Shares of fakes among reals and of reals among fakes: Kynkäänniemi et al. 2019 and, more robust, Naeem et al. 2020."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(
    real: Tensor, real_radii: Tensor, fake: Tensor, precision_neighbours: int = 3, coverage_neighbours: int = 5
) -> Manifold:
    """Improved precision and recall, density and coverage of features, with the `radii` of the reals.

    A sample counts where it is nearer than the radius, not at it, as in `prdc`. In memory lie some 2²³ distances at a time.
    """
    k, m = precision_neighbours - 1, coverage_neighbours - 1
    fakes = exact(fake)
    fake_radius = radii(fake, precision_neighbours)[:, k]
    precise = torch.zeros(len(fakes), dtype=torch.bool, device=fakes.device)
    recalled = within = covered = 0
    reals = exact(real)
    balls = exact(real_radii)
    for part in chunks(len(reals), len(fakes)):
        distances = squared(reals[part], fakes)  # (reals, fakes)
        precise |= (distances < balls[part, k, None]).any(0)
        recalled += int((distances < fake_radius).any(1).sum())
        inside = distances < balls[part, m, None]
        within += int(inside.sum())
        covered += int(inside.any(1).sum())
    return Manifold(
        precision=float(precise.double().mean()),
        recall=recalled / len(reals),
        density=within / (coverage_neighbours * len(fakes)),
        coverage=covered / len(reals),
    )


@dataclass(frozen=True)
class RealStatistics:
    """What scores need of the real samples, computed once: features, moments and, unless left out, `radii`."""

    pool: Tensor  # (N, F) float32
    mean: Tensor  # (F,) float64
    covariance: Tensor  # (F, F) float64
    radii: Tensor  # (N, neighbours) float64

    @classmethod
    def of(cls, pool: Tensor, neighbours: int = 5) -> RealStatistics:
        """Of features (N, F) in the order of their samples; 0 `neighbours` saves the N² distances, and the four scores of them."""
        _check(pool, "real")
        mean, covariance = moments(pool)
        nearest = radii(pool, neighbours) if neighbours else mean.new_empty(len(pool), 0)
        return cls(pool.float(), mean, covariance, nearest)

    def as_arrays(self) -> dict[str, Tensor]:
        """Plain tensors by name, on the CPU, for a file."""
        return {name: getattr(self, name).cpu().contiguous() for name in ("pool", "mean", "covariance", "radii")}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor], device: torch.device | str = "cpu") -> RealStatistics:
        """What `as_arrays` gave; raises InputError for anything else."""
        pool = arrays.get("pool", torch.empty(0))
        rows, width = pool.shape if pool.ndim == 2 else (0, 0)
        shapes = {"pool": (rows, width), "mean": (width,), "covariance": (width, width)}
        near = arrays.get("radii", torch.empty(0))
        fits = near.ndim == 2 and len(near) == rows >= 2 and width >= 1 and arrays.keys() == {*shapes, "radii"}
        fits = fits and all(
            array.dtype == (torch.float32 if name == "pool" else torch.float64) for name, array in arrays.items()
        )
        if not fits or any(arrays[name].shape != shape for name, shape in shapes.items()):
            found = {name: tuple(array.shape) for name, array in arrays.items()}
            raise InputError(f"statistics of real samples: {found} are not pool (N, F), mean, covariance and radii")
        return cls(**{name: array.to(device) for name, array in arrays.items()})


@dataclass(frozen=True)
class Scores:
    """The scores of one set of samples; None where the features have no logits, or the real statistics no radii."""

    frechet: float
    kernel: float
    kernel_std: float
    inception: float | None
    inception_std: float | None
    manifold: Manifold | None

    def named(self, inception: bool) -> dict[str, float]:
        """The scores by their public names: `fid` and `kid` for the features of Inception, `fd` and `kd` for any others."""
        names = ("fid", "kid", "inception_score") if inception else ("fd", "kd", "classifier_score")
        found = {names[0]: self.frechet, names[1]: self.kernel, f"{names[1]}_std": self.kernel_std}
        if self.inception is not None and self.inception_std is not None:
            found |= {names[2]: self.inception, f"{names[2]}_std": self.inception_std}
        return found | (vars(self.manifold) if self.manifold is not None else {})


def _check(pool: Tensor, whose: str) -> None:
    if pool.ndim != 2 or len(pool) < 2:
        raise InputError(f"{whose} features are {tuple(pool.shape)}; (N, F) of at least 2 samples are needed")
    if not bool(torch.isfinite(pool).all()):
        raise Failure(f"{whose} features are not finite: samples hold NaN, or values beyond all bounds")


def score(real: RealStatistics, fake: Features, seed: int, options: DistributionOptions | None = None) -> Scores:
    """All scores that the features allow, of fakes in the order of their samples; raises InputError, or Failure for NaN."""
    options = options or DistributionOptions()
    _check(fake.pool, "fake")
    if fake.pool.shape[1] != real.pool.shape[1]:
        raise InputError(
            f"{fake.pool.shape[1]} features of the fakes and {real.pool.shape[1]} of the reals; use one feature network"
        )
    neighbours = max(options.precision_neighbours, options.coverage_neighbours)
    near = None
    if real.radii.shape[1]:
        if real.radii.shape[1] < neighbours:
            raise InputError(
                f"the real statistics have {real.radii.shape[1]} neighbours, and {neighbours} are needed; compute them anew"
            )
        near = manifold(real.pool, real.radii, fake.pool, options.precision_neighbours, options.coverage_neighbours)
    kernel, kernel_std = kernel_distance(real.pool, fake.pool, seed, options.kernel_subsets, options.kernel_subset_size)
    inception, inception_std = None, None
    if fake.logits is not None:
        inception, inception_std = inception_score(fake.logits, options.inception_splits)
    distance = frechet(real.mean, real.covariance, *moments(fake.pool))
    return Scores(distance, kernel, kernel_std, inception, inception_std, near)
