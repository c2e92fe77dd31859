"""Scores agree with their closed forms and with other people's code, and do not depend on how the samples came together."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from gandist.metrics import distances
from gandist.metrics.distribution import (
    DistributionOptions,
    RealStatistics,
    frechet,
    in_order,
    inception_score,
    kernel_distance,
    manifold,
    moments,
    radii,
    score,
)
from gandist.metrics.duplicates import duplicates
from gandist.metrics.features import Features
from gandist.metrics.modes import coverage, reach
from gandist.metrics.protocol import Protocol, differences, installed, refuse_comparison
from gandist.recipe import Failure, InputError

GARMENTS = Path(__file__).parent.parent / "gandist/data/embedded/fashion-mnist/t10k-images-idx3-ubyte.gz"


def normal(count: int, width: int, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


class Identity(nn.Module):
    """Features as they are, for torchmetrics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


# Fréchet distance


def test_of_diagonal_gaussians_the_frechet_distance_is_that_of_each_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 20, generator=generator, dtype=torch.float64) * 3
    s, t = torch.rand(2, 20, generator=generator, dtype=torch.float64) * 3
    turn, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))
    expected = ((a - b) ** 2 + (s - t) ** 2).sum().item()
    found = frechet(turn @ a, turn @ (s**2).diag() @ turn.T, turn @ b, turn @ (t**2).diag() @ turn.T)
    assert found == pytest.approx(expected, rel=1e-10)


def test_the_frechet_distance_is_a_distance_with_and_without_a_full_rank() -> None:
    for count in (400, 10):  # of 30 features
        a, b = moments(normal(count, 30)), moments(normal(count, 30, seed=1, shift=0.3))
        assert frechet(*a, *a) == pytest.approx(0, abs=1e-10)
        assert frechet(*a, *b) == pytest.approx(frechet(*b, *a), rel=1e-9)
        assert frechet(*a, *b) > 0.1


def test_of_covariances_in_different_planes_nothing_cancels() -> None:
    zero = torch.zeros(6, dtype=torch.float64)
    c, d = zero.clone(), zero.clone()
    c[:3], d[3:] = torch.tensor([1.0, 4.0, 9.0]), 1e8
    assert frechet(zero, c.diag(), zero, d.diag()) == pytest.approx(14 + 3e8, rel=1e-12)
    assert frechet(zero, 0 * c.diag(), zero, c.diag()) == pytest.approx(14)


def test_the_frechet_distance_is_that_of_torchmetrics() -> None:
    real, fake = normal(300, 16), normal(200, 16, seed=1, shift=0.2, scale=1.3)
    theirs = FrechetInceptionDistance(feature=Identity(16))
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert frechet(*moments(real), *moments(fake)) == pytest.approx(theirs.compute().item(), rel=1e-5)


# KID


def brute(real: Tensor, fake: Tensor) -> float:
    """Bińkowski et al. 2018, equation 4, with their kernel, by loops."""

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    m = len(real)
    pairs = [(i, j) for i in range(m) for j in range(m)]
    within = sum(kernel(part[i], part[j]) for part in (real, fake) for i, j in pairs if i != j)
    return within / (m * (m - 1)) - 2 * sum(kernel(real[i], fake[j]) for i, j in pairs) / m**2


def test_with_one_subset_of_all_the_kernel_distance_is_its_formula_and_that_of_torchmetrics() -> None:
    real, fake = normal(20, 8).double(), normal(20, 8, seed=1, shift=0.5).double()
    mean, deviation = kernel_distance(real, fake, 0, 1, 1000)
    assert mean == pytest.approx(brute(real, fake), rel=1e-10)
    assert deviation == 0
    theirs = KernelInceptionDistance(feature=Identity(8), subsets=1, subset_size=20)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert mean == pytest.approx(theirs.compute()[0].item(), rel=1e-5)


def test_of_one_distribution_the_kernel_distance_is_0_on_the_average_and_its_subsets_follow_the_seed_alone() -> None:
    real, fake = normal(400, 8), normal(400, 8, seed=1)
    mean, deviation = kernel_distance(real, fake, 0, 50, 100)
    assert abs(mean) < deviation
    torch.manual_seed(7)
    assert kernel_distance(real, fake, 0, 50, 100) == (mean, deviation)
    assert kernel_distance(real, fake, 1, 50, 100) != (mean, deviation)


# Inception score


def test_the_inception_score_is_1_of_equal_and_the_number_of_classes_of_sure_and_balanced_answers() -> None:
    assert inception_score(torch.zeros(50, 7)) == pytest.approx((1, 0))
    assert inception_score(torch.eye(5).repeat(20, 1) * 1e4) == pytest.approx((5, 0))
    assert inception_score((torch.eye(5).repeat(20, 1)).log()) == pytest.approx((5, 0))  # log probabilities: −∞


def test_the_inception_score_is_that_of_torchmetrics_which_shuffles_first() -> None:
    logits = normal(200, 10, scale=2)
    theirs = InceptionScore(feature=Identity(10), splits=4)
    theirs.update(logits)
    torch.manual_seed(3)
    order = torch.randperm(200)
    torch.manual_seed(3)
    mean, deviation = theirs.compute()
    found = inception_score(logits[order], 4)
    assert found[0] == pytest.approx(mean.item(), rel=1e-5)
    assert found[1] == pytest.approx(deviation.item() * math.sqrt(3 / 4), rel=1e-4)  # theirs divides by 3


# Precision, recall, density, coverage


@pytest.mark.parametrize("chunk", [1 << 23, 500])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_and_coverage_are_those_of_prdc(
    k: int, chunk: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distances, "CHUNK", chunk)
    real, fake = normal(120, 6), normal(90, 6, seed=1, shift=0.4, scale=0.8)
    found = vars(manifold(real, radii(real, 5), fake, k, k))
    theirs = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
    assert found == pytest.approx({name: float(value) for name, value in theirs.items()}, rel=1e-12)


def test_copies_are_precise_and_one_repeated_copy_covers_little() -> None:
    real = normal(100, 6)
    near = radii(real, 5)
    copied = manifold(real, near, real)
    assert (copied.precision, copied.recall, copied.coverage) == (1, 1, 1)
    collapsed = manifold(real, near, real[:1].expand(100, 6))
    assert collapsed.precision == 1
    assert collapsed.recall == 0  # the radius of equal samples is 0, and nothing is nearer
    assert collapsed.coverage < 0.5
    far = manifold(real, near, real + 100)
    assert vars(far) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


# All together


def test_no_score_depends_on_the_order_in_which_processes_gave_the_features() -> None:
    real, fake, logits = normal(100, 6), normal(80, 6, seed=1), normal(80, 5, seed=2)
    statistics = RealStatistics.of(real)
    options = DistributionOptions(kernel_subsets=5, kernel_subset_size=50)
    expected = score(statistics, Features(fake, logits), 0, options)
    assert None not in vars(expected).values()
    numbers = torch.cat([torch.arange(rank, 80, 3) for rank in range(3)])  # as three ranks hold them
    gathered = Features(in_order(fake[numbers], numbers), in_order(logits[numbers], numbers))
    assert score(statistics, gathered, 0, options) == expected
    for wrong in (numbers.clone().fill_(3), numbers + 1):
        with pytest.raises(Failure, match="once each"):
            in_order(fake, wrong)


def test_real_statistics_come_back_from_plain_arrays_and_damaged_ones_are_refused() -> None:
    statistics = RealStatistics.of(normal(30, 6))
    arrays = statistics.as_arrays()
    again = RealStatistics.from_arrays(arrays)
    fake = Features(normal(30, 6, seed=1))
    assert score(again, fake, 0) == score(statistics, fake, 0)
    without: list[dict[str, Tensor]] = [
        {},
        {**arrays, "mean": arrays["mean"][:-1]},
        {**arrays, "radii": arrays["radii"][:-1]},
        {**arrays, "more": arrays["mean"]},
        {name: array for name, array in arrays.items() if name != "covariance"},
    ]
    for damaged in without:
        with pytest.raises(InputError, match="statistics of real samples"):
            RealStatistics.from_arrays(damaged)


def test_what_the_features_cannot_give_is_left_out_and_only_inception_gives_a_fid() -> None:
    real, fake = normal(30, 6), normal(30, 6, seed=1)
    few = score(RealStatistics.of(real, neighbours=0), Features(fake), 0)
    assert set(few.named(inception=True)) == {"fid", "kid", "kid_std"}
    named = score(RealStatistics.of(real), Features(fake, fake), 0).named(inception=False)
    assert set(named) == {
        "fd", "kd", "kd_std", "classifier_score", "classifier_score_std", "precision", "recall", "density", "coverage",
    }  # fmt: skip
    assert all(type(value) is float for value in named.values())


def test_samples_of_a_diverged_generator_or_another_network_are_refused_by_name() -> None:
    statistics = RealStatistics.of(normal(30, 6))
    with pytest.raises(Failure, match="fake features are not finite"):
        score(statistics, Features(normal(30, 6) * torch.inf), 0)
    with pytest.raises(InputError, match="7 features of the fakes and 6 of the reals"):
        score(statistics, Features(normal(30, 7)), 0)
    with pytest.raises(InputError, match="5 neighbours"):
        RealStatistics.of(normal(5, 6))
    with pytest.raises(InputError, match="compute them anew"):
        score(RealStatistics.of(normal(30, 6), neighbours=2), Features(normal(30, 6)), 0)


# Protocol


def protocol(**changes: Any) -> Protocol:
    card: dict[str, Any] = {
        "scores": ["fid"], "features": "inception", "features_digest": "f5", "resize": "299", "dataset": "d", "split": "test",
        "transform": "none", "reals": 10, "fakes": 10, "seed": 0, "ema": True, "settings": {"kernel_subsets": 100}, "versions": {"torch": "2"},
    }  # fmt: skip
    return Protocol(**{**card, **changes})


OTHERS: dict[str, Any] = {
    "features": "x", "features_digest": "x", "resize": "x", "dataset": "x", "split": "x", "reals": 9, "fakes": 9, "seed": 9,
    "ema": False, "truncation": 0.5, "labels": "uniform", "transform": "crop", "precision": "bf16", "settings": {"kernel_subsets": 9},
}  # fmt: skip


def test_every_field_of_a_protocol_but_scores_and_versions_keeps_two_scores_apart() -> None:
    assert {*OTHERS, "scores", "versions"} == set(Protocol.model_fields)
    for name, value in OTHERS.items():
        other = protocol(**{name: value})
        assert [entry.split()[0] for entry in differences(protocol(), other)] == [f"`{name}`"]
        assert other.digest() != protocol().digest()
        with pytest.raises(InputError, match=f"`{name}` .* and "):
            refuse_comparison(protocol(), other)
    with pytest.raises(InputError, match=r"`fakes` 10 and 9; `seed` 0 and 9"):
        refuse_comparison(protocol(), protocol(fakes=9, seed=9))


def test_other_versions_warn_and_other_scores_matter_only_where_none_is_common() -> None:
    other = protocol(versions={"torch": "3"}, scores=["kid", "fid"])
    assert other.digest() == protocol().digest()
    assert refuse_comparison(protocol(), other) == ["torch 2 and 3: scores may differ by rounding"]
    assert refuse_comparison(protocol(), protocol()) == []
    with pytest.raises(InputError, match="`scores`"):
        refuse_comparison(protocol(), protocol(scores=["kid"]))


def test_a_protocol_comes_back_from_json() -> None:
    card = protocol(truncation=0.7, versions=installed())
    assert Protocol.model_validate_json(card.model_dump_json()) == card
    assert Protocol.model_validate(card.model_dump(mode="json")).digest() == card.digest()


# Modes


def ring(modes: int = 8) -> Tensor:
    angles = torch.arange(modes) * 2 * math.pi / modes
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_samples_of_the_mixture_itself_cover_all_modes_and_so_many_are_good_as_a_gaussian_has_within_3_deviations() -> (
    None
):
    centres = ring()
    found = coverage(centres.repeat(5000, 1) + normal(40_000, 2, scale=0.01), centres, 0.01)
    assert (found.covered, found.modes, found.divergence) == (8, 8, 0.0)
    assert found.good == pytest.approx(1 - math.exp(-4.5), abs=2e-3)


def test_modes_without_a_good_sample_are_lost_and_a_single_one_diverges_by_the_log_of_their_number() -> None:
    centres = ring()
    one = coverage(centres[3].expand(50, 2), centres, 0.01)
    assert (one.covered, one.good) == (1, 1.0)
    assert one.divergence == pytest.approx(math.log(8))
    half = coverage(centres[::2].repeat(10, 1), centres, 0.01)
    assert (half.covered, half.divergence) == (4, pytest.approx(math.log(2)))
    bad = coverage(centres + torch.tensor([0.0301, 0.0]), centres, 0.01)
    assert (bad.covered, bad.good, bad.divergence) == (0, 0.0, 0.0)
    assert coverage(centres + torch.tensor([0.0299, 0.0]), centres, 0.01).covered == 8


@pytest.mark.parametrize("dimensions", [1, 2, 3, 100])
def test_the_reach_holds_the_same_share_of_a_gaussian_in_any_number_of_dimensions(dimensions: int) -> None:
    inside = normal(20_000, dimensions).norm(dim=1) <= reach(dimensions)
    assert inside.double().mean().item() == pytest.approx(1 - math.exp(-4.5), abs=4e-3)
    assert reach(2) == pytest.approx(3)


def test_samples_of_other_dimensions_than_the_centres_are_refused() -> None:
    for samples, deviation in [(torch.zeros(4, 3), 0.1), (torch.zeros(0, 2), 0.1), (torch.zeros(4, 2), 0.0)]:
        with pytest.raises(InputError, match="mode coverage"):
            coverage(samples, ring(), deviation)


# Duplicates


def garments(count: int) -> Tensor:
    pixels = np.frombuffer(gzip.decompress(GARMENTS.read_bytes()), np.uint8, count * 784, offset=16)
    return torch.from_numpy(pixels.copy()).view(count, 1, 28, 28) / 127.5 - 1


def test_real_images_have_no_duplicates_and_each_of_a_pair_of_twins_is_one() -> None:
    images = garments(64)
    assert duplicates(images) == 0
    noisy = (images[:16] + normal(16, 784, scale=0.005).view(16, 1, 28, 28)).clamp(-1, 1)
    assert duplicates(torch.cat([images, images[:16]])) == 32 / 80
    assert duplicates(torch.cat([images, noisy])) == 32 / 80


def test_of_a_total_collapse_all_are_duplicates_and_a_wide_one_is_seen_against_real_images() -> None:
    images = garments(64)
    assert duplicates(images[:1].expand(64, -1, -1, -1)) == 1
    assert (
        duplicates(images[:1] + normal(64, 784, scale=0.004).view(64, 1, 28, 28)) == 1
    )  # what 8 bits do not tell apart
    blurred = images[:1] + normal(64, 784, scale=0.03).view(64, 1, 28, 28)
    assert duplicates(blurred, reference=images) == 1
    assert duplicates(blurred) == 0  # against themselves they are as far apart as any
    assert duplicates(images, reference=images) == 0
    with pytest.raises(InputError, match="at least 2"):
        duplicates(images[:1])
