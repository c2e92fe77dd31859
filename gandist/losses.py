"""Losses: tensors in, tensors out. Logits are (B,) and are reduced to a mean in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Adversarial(NamedTuple):
    """The two sides of one loss: `discriminator(real, fake)` by term, and `generator(fake)`."""

    discriminator: Callable[[Tensor, Tensor], dict[str, Tensor]]
    generator: Callable[[Tensor], Tensor]


def classify(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """−E log D(x) and −E log(1 − D(G(z))), with D = σ(logit): Goodfellow et al. 2014, Algorithm 1, ascent.

    The optimum is D = p / (p + q), where the sum is −2·JSD(p, q) + log 4.
    """
    return {"real": F.softplus(-real.float()).mean(), "fake": F.softplus(fake.float()).mean()}


def minimax(fake: Tensor) -> Tensor:
    """E log(1 − D(G(z))): Goodfellow et al. 2014, equation 1; weak where D rejects the fakes."""
    return -F.softplus(fake.float()).mean()


def non_saturating(fake: Tensor) -> Tensor:
    """−E log D(G(z)): Goodfellow et al. 2014, section 3; the same fixed point, strong early gradients."""
    return F.softplus(-fake.float()).mean()


ADVERSARIAL = {"minimax": Adversarial(classify, minimax), "non_saturating": Adversarial(classify, non_saturating)}
