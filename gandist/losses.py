"""Losses: tensors in, tensors out. Logits are (B,) and are reduced to a mean in fp32, or in fp64 where they come in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Adversarial(NamedTuple):
    """The two sides of one loss: `discriminator(real, fake, smoothing)` by term, to be summed, and `generator(fake, real)`."""

    discriminator: Callable[[Tensor, Tensor, float], dict[str, Tensor]]
    generator: Callable[[Tensor, Tensor | None], Tensor]
    reads_real: bool = False  # the generator's loss needs the logits of real rows
    smooths: bool = False  # one-sided label smoothing has a meaning; without it `smoothing` must be 0
    # The logit at which real and fake are equally likely, by the smoothing; None where single logits mean nothing.
    border: Callable[[float], float] | None = None


def uncast(values: Tensor) -> AbstractContextManager[Any]:
    """What is computed within it is in the precision of its inputs."""
    return nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Half precision widened to fp32; fp32 and fp64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return mean_over_ranks(gradient)  # its own adjoint, and so differentiable again


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over the processes, of which each holds equally many rows; the tensor itself on one process.

    A loss that bends an expectation, f(E y), is not the mean of the ranks' f(y_r). With y = (1/W) Σ_r y_r on every rank, the
    loss of the whole batch is L = (1/W) Σ_r L_r(y), and dL/dy_s = (1/W) · (1/W) Σ_r ∂L_r/∂y. DDP means the ranks' gradients
    of the weights, Σ_s (1/W) g_s ∂y_s/∂θ, which is dL/dθ if rank s goes on backwards with g_s = (1/W) Σ_r ∂L_r/∂y: the mean
    of the gradient over the ranks. Forward and backward are collective, so every rank must call it, or none.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    mean: Tensor = _MeanOverRanks.apply(tensor)  # type: ignore[no-untyped-call]
    return mean


def classify(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> dict[str, Tensor]:
    """−E log D(x) and −E log(1 − D(G(z))), with D = σ(logit): Goodfellow et al. 2014, Algorithm 1, ascent.

    The optimum is D = p / (p + q), where the sum is −2·JSD(p, q) + log 4. With the target 1 − `smoothing` for real rows
    (Salimans et al. 2016, section 3.4) it is D = (1 − smoothing) p / (p + q).
    """
    accept = F.softplus(-at_least_fp32(real)).mean()
    if smoothing:
        # −(1 − s) log σ(l) − s log σ(−l) = softplus(−l) + s·l
        accept = accept + smoothing * at_least_fp32(real).mean()
    return {"real": accept, "fake": F.softplus(at_least_fp32(fake)).mean()}


def minimax(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """E log(1 − D(G(z))): Goodfellow et al. 2014, equation 1; weak where D rejects the fakes."""
    return -F.softplus(at_least_fp32(fake)).mean()


def non_saturating(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """−E log D(G(z)): Goodfellow et al. 2014, section 3; the same fixed point, strong early gradients."""
    return F.softplus(-at_least_fp32(fake)).mean()


def regress(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> dict[str, Tensor]:
    """½ E (D(x) − 1)² and ½ E D(G(z))², with D = logit: Mao et al. 2017, section 3.2, targets 1 and 0.

    The optimum is D = p / (p + q), and (1 − smoothing) times that where the target of real rows is 1 − `smoothing`.
    """
    accept = (at_least_fp32(real) - (1 - smoothing)).square().mean() / 2
    return {"real": accept, "fake": at_least_fp32(fake).square().mean() / 2}


def least_squares(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """½ E (D(G(z)) − 1)²: Mao et al. 2017, section 3.2."""
    return (at_least_fp32(fake) - 1).square().mean() / 2


def margins(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> dict[str, Tensor]:
    """E max(0, 1 − D(x)) and E max(0, 1 + D(G(z))): Lim and Ye 2017; Miyato et al. 2018.

    The optimum is D = sign(p − q), where the sum is 2 ∫ min(p, q).
    """
    assert smoothing == 0, "a margin has no target to smooth"
    return {"real": F.relu(1 - at_least_fp32(real)).mean(), "fake": F.relu(1 + at_least_fp32(fake)).mean()}


def separate(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> dict[str, Tensor]:
    """−E D(x) and E D(G(z)): Arjovsky et al. 2017, Algorithm 1; the sum is −W₁(p, q) for the best 1-Lipschitz critic."""
    assert smoothing == 0, "a critic has no target to smooth"
    return {"real": -at_least_fp32(real).mean(), "fake": at_least_fp32(fake).mean()}


def raise_critic(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """−E D(G(z)): the generator of the Wasserstein and of the hinge loss."""
    return -at_least_fp32(fake).mean()


def compare_pairs(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> dict[str, Tensor]:
    """−E log σ(D(x) − D(G(z))) over pairs: RpGAN, Jolicoeur-Martineau 2019; the loss of R3GAN, Huang et al. 2024.

    Row i of one is paired with row i of the other. The optimum is D = log(p / q) up to a constant, where the term is
    log 2 − JSD(p⊗q, q⊗p).
    """
    assert smoothing == 0, "a comparison has no target to smooth"
    assert real.shape == fake.shape, (real.shape, fake.shape)
    return {"pair": F.softplus(at_least_fp32(fake) - at_least_fp32(real)).mean()}


def win_pairs(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """−E log σ(D(G(z)) − D(x)) over pairs: RpGAN, Jolicoeur-Martineau 2019."""
    assert real is not None
    return compare_pairs(fake, real)["pair"]


def compare_averages(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> dict[str, Tensor]:
    """−E log σ(D(x) − E D(G(z))) and −E log σ(E D(x) − D(G(z))): RaGAN, Jolicoeur-Martineau 2019.

    The inner expectations are over the batch of all ranks.
    """
    assert smoothing == 0, "a comparison has no target to smooth"
    real, fake = at_least_fp32(real), at_least_fp32(fake)
    mean_real, mean_fake = mean_over_ranks(torch.stack([real.mean(), fake.mean()]))
    return {"real": F.softplus(mean_fake - real).mean(), "fake": F.softplus(fake - mean_real).mean()}


def win_averages(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """−E log σ(D(G(z)) − E D(x)) − E log σ(E D(G(z)) − D(x)): RaGAN, Jolicoeur-Martineau 2019."""
    assert real is not None
    return torch.stack([*compare_averages(fake, real).values()]).sum()


def _logit_of_chance(smoothing: float) -> float:
    """Where real and fake are equally likely: the logit of D = (1 − smoothing) / 2."""
    return math.log((1 - smoothing) / (1 + smoothing))


ADVERSARIAL: dict[str, Adversarial] = {
    "minimax": Adversarial(classify, minimax, smooths=True, border=_logit_of_chance),
    "non_saturating": Adversarial(classify, non_saturating, smooths=True, border=_logit_of_chance),
    "least_squares": Adversarial(regress, least_squares, smooths=True, border=lambda smoothing: (1 - smoothing) / 2),
    "hinge": Adversarial(margins, raise_critic, border=lambda _: 0.0),
    "wasserstein": Adversarial(separate, raise_critic),
    "relativistic": Adversarial(compare_pairs, win_pairs, reads_real=True),
    "relativistic_average": Adversarial(compare_averages, win_averages, reads_real=True),
}


def feature_matching(real: Tensor, fake: Tensor, norm: Literal["l1", "l2"]) -> Tensor:
    """How far the mean features of fakes are from those of real rows: Salimans et al. 2016, section 3.1; (B, F) each.

    The means are over the batch of all ranks. `l2` is the mean square over the features and `l1` the mean absolute difference,
    as the released code has them for MNIST and for CIFAR-10 and SVHN; the paper writes the sum of squares.
    """
    assert real.ndim == fake.ndim == 2, (real.shape, fake.shape)
    difference = mean_over_ranks(at_least_fp32(real).mean(0) - at_least_fp32(fake).mean(0))  # (F,)
    return difference.abs().mean() if norm == "l1" else difference.square().mean()


def evidence(logits: Tensor, classes: int) -> Tensor:
    """The logit of being real, (B,), of K + 1 logits (B, K + 1), or of K with that of a fake fixed at 0, (B, K); K is `classes`.

    D(x) = Z / (Z + exp l_{K+1}) with Z = Σ_k exp l_k, so that its logit is logsumexp_k l_k − l_{K+1}: Salimans et al. 2016,
    section 5, where l_{K+1} = 0 loses nothing, since a softmax does not change when all logits move together.
    """
    logits = at_least_fp32(logits)
    assert logits.ndim == 2, logits.shape
    assert logits.shape[1] - classes in (0, 1), (logits.shape, classes)
    real = torch.logsumexp(logits[:, :classes], dim=1)
    return real if logits.shape[1] == classes else real - logits[:, classes]


def conditional_entropy(logits: Tensor) -> Tensor:
    """E −Σ_k p(k|x) log p(k|x) over the K classes of logits (B, K): Dai et al. 2017, section 3.3."""
    log = F.log_softmax(at_least_fp32(logits), dim=1)
    return -(log.exp() * log).sum(1).mean()


def pull_away(features: Tensor) -> Tensor:
    """The mean squared cosine of the pairs of rows of (B, F), on each process: Zhao et al. 2017, equation 4; Dai et al. 2017, section 3.1.

    One row has no pair, and 0.
    """
    unit = F.normalize(at_least_fp32(features), dim=1)
    cosines = (unit @ unit.T).square()
    count = len(features)
    return (cosines.sum() - cosines.diagonal().sum()) / max(1, count * (count - 1))


def pseudo_labels(logits: Tensor, threshold: float) -> Tensor:
    """Cross-entropy with the likeliest of the K classes of (B, K), over rows where that has a probability above `threshold`:
    Lee 2013, equation 15. The mean is over all B rows."""
    logits = at_least_fp32(logits)
    sure, label = logits.detach().softmax(1).max(1)
    return ((sure > threshold) * F.cross_entropy(logits, label, reduction="none")).mean()


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """E KL(p ‖ q) of the class distributions of two sets of logits (B, K), with p as it is: Miyato et al. 2018 (VAT), equation 5."""
    log_p = F.log_softmax(at_least_fp32(logits).detach(), dim=1)
    log_q = F.log_softmax(at_least_fp32(other), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()
