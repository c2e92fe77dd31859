"""The Parzen window is what its formula says, chosen as the paper chose it."""

from __future__ import annotations

import math
import time

import pytest
import torch
from sklearn.neighbors import KernelDensity

from gandist.metrics import distances
from gandist.metrics.parzen import SIGMAS, VALIDATION, log_likelihood, parzen
from gandist.recipe import InputError


def uniform(count: int, pixels: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, pixels, generator=torch.Generator().manual_seed(seed))


def test_each_density_is_the_mean_of_the_gaussians_round_the_samples() -> None:
    images, samples, sigma = uniform(5, 3), uniform(7, 3, seed=1), 0.3
    for image, found in zip(images.double(), log_likelihood(images, samples, sigma), strict=True):
        normal = torch.distributions.Normal(samples.double(), sigma)
        density = normal.log_prob(image).sum(1).exp().mean()
        assert found.item() == pytest.approx(math.log(density), abs=1e-10)


@pytest.mark.parametrize("chunk", [1 << 23, 100])
def test_it_is_the_kernel_density_of_scikit_learn_in_chunks_of_any_size(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "CHUNK", chunk)
    images, samples = uniform(50), uniform(40, seed=1)
    model = KernelDensity(bandwidth=0.2, rtol=1e-12).fit(samples.double().numpy())
    expected = torch.from_numpy(model.score_samples(images.double().numpy()))
    torch.testing.assert_close(log_likelihood(images, samples, 0.2), expected, rtol=0, atol=1e-9)


def test_of_many_samples_of_a_gaussian_it_is_the_log_density_of_the_wider_gaussian() -> None:
    """Samples of N(0, 1) under kernels of σ are N(0, 1 + σ²)."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    images = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    sigma = 0.5
    expected = torch.distributions.Normal(0.0, math.sqrt(1 + sigma**2)).log_prob(images).sum(1)
    assert log_likelihood(images, samples, sigma).mean().item() == pytest.approx(expected.mean().item(), abs=0.02)


def test_a_lone_far_image_has_a_finite_likelihood() -> None:
    found = log_likelihood(torch.full((1, 784), 1.0), torch.zeros(3, 784), 0.1)
    assert found.item() == pytest.approx(-784 / (2 * 0.01) - 784 * math.log(0.1 * math.sqrt(2 * math.pi)))


def test_sigma_is_the_best_of_ten_on_the_first_thousand_validation_images_alone() -> None:
    assert torch.tensor(SIGMAS).allclose(torch.logspace(-1, 0, 10))
    samples, validation, test = uniform(300), uniform(VALIDATION, seed=1), uniform(200, seed=2)
    found = parzen(samples, validation, test)
    means = {sigma: log_likelihood(validation, samples, sigma).mean().item() for sigma in SIGMAS}
    assert found.curve == tuple((sigma, pytest.approx(mean)) for sigma, mean in means.items())
    assert found.sigma == max(means, key=means.__getitem__)
    likelihoods = log_likelihood(test, samples, found.sigma)
    assert found.mean == pytest.approx(likelihoods.mean().item())
    assert found.standard_error == pytest.approx(likelihoods.numpy().std() / math.sqrt(200))
    assert parzen(samples, torch.cat([validation, torch.ones(500, 6)]), test) == found


def test_images_in_a_row_and_in_a_square_are_the_same() -> None:
    parts = [uniform(20, seed=seed) for seed in range(3)]
    assert parzen(*parts) == parzen(*(part.view(20, 1, 2, 3) for part in parts))


@pytest.mark.parametrize(
    ("test", "fault"),
    [
        (uniform(9) * 2 - 1, "scale them to 0 … 1"),
        (uniform(9) * torch.nan, "scale them to 0 … 1"),
        (uniform(9, 5), "must agree"),
        (uniform(1), "at least 2"),
    ],
)
def test_images_of_another_scale_or_shape_are_refused(test: torch.Tensor, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        parzen(uniform(9), uniform(9, seed=1), test)


def test_ten_thousand_by_ten_thousand_takes_half_a_minute_of_one_core_at_most() -> None:
    images, samples = uniform(500, 784), uniform(10_000, 784, seed=1)
    start = time.process_time()  # of all threads: other work on the machine does not count
    log_likelihood(images, samples, 0.2)
    assert (time.process_time() - start) * 20 < 30
