"""Losses have the fixed points and the optima that the paper proves."""

from __future__ import annotations

import math

import pytest
import torch

from gandist.data.dataset import ImageSpec
from gandist.losses import ADVERSARIAL
from gandist.networks.mlp import Discriminator
from gandist.player import AdamOptions, Player, PlayerOptions, ScheduleOptions


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_where_the_two_distributions_are_equal_the_value_is_log_4(name: str) -> None:
    logits = torch.zeros(7)
    assert sum(ADVERSARIAL[name].discriminator(logits, logits).values()).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    # gradcheck needs fp64, and losses compute in fp32: central differences with a step that fp32 resolves
    real, fake = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    loss = ADVERSARIAL[name]
    for function, inputs in [
        (lambda r, f: torch.stack([*loss.discriminator(r, f).values()]).sum(), (real, fake)),
        (lambda r, f: loss.generator(f), (real, fake)),
    ]:
        gradients = torch.autograd.grad(function(*inputs), inputs, allow_unused=True)
        for which, gradient in enumerate(gradients):
            for row in range(5):
                step = torch.zeros(5)
                step[row] = 1e-2
                up = [x.detach() + step * (i == which) for i, x in enumerate(inputs)]
                down = [x.detach() - step * (i == which) for i, x in enumerate(inputs)]
                slope = (function(*up) - function(*down)) / 2e-2
                assert slope.item() == pytest.approx(0.0 if gradient is None else gradient[row].item(), abs=1e-3)


def test_both_generator_losses_pull_the_same_way_and_the_non_saturating_one_harder_where_fakes_are_rejected() -> None:
    slopes = {}
    for name, loss in ADVERSARIAL.items():
        fake = torch.full((1,), -6.0, requires_grad=True)
        loss.generator(fake).backward()
        slopes[name] = fake.grad.item()
    assert slopes["non_saturating"] < slopes["minimax"] < 0
    assert slopes["non_saturating"] == pytest.approx(-1 / (1 + math.exp(-6)))
    assert slopes["minimax"] == pytest.approx(-1 / (1 + math.exp(6)))


@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_extreme_logits_stay_finite(value: float) -> None:
    logits = torch.full((3,), value, requires_grad=True)
    for loss in ADVERSARIAL.values():
        total = sum(loss.discriminator(logits, logits).values()) + loss.generator(logits)
        total.backward()
        assert torch.isfinite(total)
        assert torch.isfinite(logits.grad).all()


def test_the_optimal_discriminator_of_two_gaussians_is_p_over_p_plus_q() -> None:
    """Goodfellow et al. 2014, proposition 1, learned by a player; to 2 % wherever either density matters."""
    torch.manual_seed(0)
    module = Discriminator(kind="mlp", width=64).build(ImageSpec(height=1, width=1, channels=1))
    schedule = ScheduleOptions(kind="cosine", until_images=1500)
    player = Player(
        "discriminator", module, PlayerOptions(optimizer=AdamOptions(learning_rate=5e-3, beta1=0.9), schedule=schedule),
        device=torch.device("cpu"),
    )  # fmt: skip
    p, q = torch.distributions.Normal(-0.5, 1.0), torch.distributions.Normal(1.0, 0.7)
    for step in range(1500):
        with player.turn(step, 1) as turn:
            real, fake = p.sample((4096, 1, 1, 1)), q.sample((4096, 1, 1, 1))
            terms = ADVERSARIAL["minimax"].discriminator(player(real), player(fake))
            turn.backward(terms["real"] + terms["fake"])
    x = torch.linspace(-2.5, 2.4, 99)
    density_p, density_q = p.log_prob(x).exp(), q.log_prob(x).exp()
    learned = torch.sigmoid(player(x.view(-1, 1, 1, 1))).detach()
    assert (learned - density_p / (density_p + density_q)).abs().max() < 0.02
