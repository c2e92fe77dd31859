"""Penalties: what keeps a player smooth, near or bounded. Tensors in, a scalar mean out; its weight and how often are the caller's.

A `judge` gives logits (B,) in fp32, outside autocast, row by row: where rows see each other, as with BatchNorm, the gradient
of the sum of logits is not each row's own. Samples are taken as constants, so only the weights of the judge can receive
gradients; those that do not bear on its slope, as the bias of a last layer, receive none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gandist.losses import at_least_fp32, mean_over_ranks

Judge = Callable[[Tensor], Tensor]


def _slopes(judge: Judge, samples: Tensor) -> Tensor:
    """∇D at each sample, (B, N); it can be differentiated again."""
    samples = at_least_fp32(samples.detach()).requires_grad_(True)
    logits = judge(samples)
    assert logits.shape == samples.shape[:1], (logits.shape, samples.shape)
    (slopes,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
    flat: Tensor = rearrange(slopes, "b ... -> b (...)")
    return flat


def _between(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """mix · real + (1 − mix) · fake, with one `mix` in 0 … 1 for each row, (B,)."""
    assert mix.shape == real.shape[:1], (mix.shape, real.shape)
    weight = at_least_fp32(mix).view(-1, *[1] * (real.ndim - 1))
    return torch.lerp(at_least_fp32(fake), at_least_fp32(real), weight)


def _off_unit(slopes: Tensor) -> Tensor:
    """E (‖∇D‖ − 1)²; the norm's gradient is 0 where the slope is, not NaN."""
    lengths: Tensor = torch.linalg.vector_norm(slopes, dim=1)
    return (lengths - 1).square().mean()


def r1(judge: Judge, real: Tensor) -> Tensor:
    """½ E ‖∇D(x)‖² at real samples: Mescheder et al. 2018, equation 9, without its γ."""
    return _slopes(judge, real).square().sum(1).mean() / 2


def r2(judge: Judge, fake: Tensor) -> Tensor:
    """½ E ‖∇D(G(z))‖² at fakes: Mescheder et al. 2018, section 4.1, without its γ."""
    return r1(judge, fake)


def r1_and_r2(judge: Judge, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Both from one forward of a judge of (2B, …), real rows first: half the passes over the network of one after the other."""
    of_real, of_fake = _slopes(judge, torch.cat([at_least_fp32(real), at_least_fp32(fake)])).square().sum(1).chunk(2)
    return of_real.mean() / 2, of_fake.mean() / 2


def gradient_penalty(judge: Judge, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """E (‖∇D(x̂)‖ − 1)² at x̂ = mix · x + (1 − mix) · G(z): Gulrajani et al. 2017, equation 3; mix (B,) is uniform in 0 … 1."""
    return _off_unit(_slopes(judge, _between(real, fake, mix)))


def dragan(judge: Judge, real: Tensor, noise: Tensor, mix: Tensor) -> Tensor:
    """E (‖∇D(x̂)‖ − 1)² at x̂ = x + mix · ½ std(x) · noise: Kodali et al. 2017, as released; noise and mix (B,) are uniform in 0 … 1.

    The deviation is one number, of all values of the batch of all ranks.
    """
    assert noise.shape == real.shape, (noise.shape, real.shape)
    real = at_least_fp32(real.detach())
    mean = mean_over_ranks(real.mean())
    deviation = mean_over_ranks((real - mean).square().mean()).sqrt()
    return _off_unit(_slopes(judge, _between(real + deviation / 2 * noise, real, mix)))


def zero_centred(judge: Judge, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """E ‖∇D(x̂)‖² at x̂ = mix · x + (1 − mix) · G(z): Thanh-Tung et al. 2019; mix (B,) is uniform in 0 … 1."""
    return _slopes(judge, _between(real, fake, mix)).square().sum(1).mean()


def lecam(real_logits: Tensor, fake_logits: Tensor, anchor_real: Tensor, anchor_fake: Tensor) -> Tensor:
    """E max(0, D(x) − α_F)² + E max(0, α_R − D(G(z)))²: Tseng et al. 2021, as released.

    The anchors α are moving averages of `mean_over_ranks` of the logits, kept by the caller; they are taken as constants.
    """
    above = F.relu(at_least_fp32(real_logits) - anchor_fake.detach())
    below = F.relu(anchor_real.detach() - at_least_fp32(fake_logits))
    return above.square().mean() + below.square().mean()


def consistency(logits: Tensor, logits_of_augmented: Tensor) -> Tensor:
    """E (D(x) − D(T(x)))²: Zhang et al. 2020 for real rows, Zhao et al. 2021 for fakes as well."""
    assert logits.shape == logits_of_augmented.shape, (logits.shape, logits_of_augmented.shape)
    return (at_least_fp32(logits) - at_least_fp32(logits_of_augmented)).square().mean()


def path_length(samples: Tensor, latents: Tensor, noise: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """E (‖Jᵀy‖ − target)² and the mean length E ‖Jᵀy‖ over all ranks: Karras et al. 2020, equation 4.

    samples: (B, C, *pixels), computed from `latents` (B, …) outside autocast.  noise: like them, standard normal.  The noise
    is divided by √pixels, so that the length does not grow with the resolution.  The mean length has no gradient: the caller
    moves the target by it, and it is alike on all ranks.
    """
    assert noise.shape == samples.shape, (noise.shape, samples.shape)
    direction = noise / prod(samples.shape[2:]) ** 0.5
    (pulled,) = torch.autograd.grad((samples * direction).sum(), latents, create_graph=True)
    lengths = torch.linalg.vector_norm(rearrange(pulled, "b ... -> b (...)"), dim=1)
    return (lengths - target.detach()).square().mean(), mean_over_ranks(lengths.detach().mean())


def distance_to_history(parameters: Iterable[Tensor], averages: Iterable[Tensor]) -> Tensor:
    """Σ ‖θ − θ̄‖² for the averages θ̄ of all parameters so far: Salimans et al. 2016, section 3.3; the caller keeps them."""
    distances = [(now - mean.detach()).square().sum() for now, mean in zip(parameters, averages, strict=True)]
    return torch.stack(distances).sum()


@torch.no_grad()
def clip_weights_(parameters: Iterable[Tensor], limit: float) -> None:
    """Brings every weight into −limit … limit: Arjovsky et al. 2017, Algorithm 1, after each step of the critic."""
    assert limit > 0, limit
    weights = [*parameters]
    torch._foreach_clamp_min_(weights, -limit)
    torch._foreach_clamp_max_(weights, limit)
