"""Losses have the fixed points and the optima that their papers prove, and the same gradient for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from conftest import Update, assert_equal_updates, on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gandist.losses import ADVERSARIAL, feature_matching, mean_over_ranks
from gandist.optimizers import AdamOptions, ScheduleOptions
from gandist.player import Player, PlayerOptions

# Two distributions over four atoms on a line, as batches whose rows stand in those proportions; every real row meets
# every fake one, which is what a loss over pairs takes the expectation of.
P, Q = torch.tensor([1, 2, 3, 4]), torch.tensor([4, 1, 2, 3])
ATOMS = torch.arange(4)
p, q = P.double() / 10, Q.double() / 10


def rows(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The atom of each real and of each fake row of a batch, from counts."""
    ours, theirs = ATOMS.repeat_interleave(real), ATOMS.repeat_interleave(fake)
    return ours.repeat_interleave(len(theirs)), theirs.repeat(len(ours))


def total(name: str, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    return torch.stack([*ADVERSARIAL[name].discriminator(real, fake, smoothing).values()]).sum()


def jsd(one: Tensor, other: Tensor) -> Tensor:
    middle = (one + other) / 2
    return ((one * (one / middle).log()).sum() + (other * (other / middle).log()).sum()) / 2


def learned(name: str, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """One free logit for each atom, and the discriminator's loss there, minimised by LBFGS from a random start."""
    torch.manual_seed(0)
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ours, theirs = rows(real, fake)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = total(name, logits[ours], logits[theirs], smoothing)
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = closure()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-8
    return logits.detach(), loss.detach()


SMOOTH = ["minimax", "non_saturating", "least_squares"]
STRICT = [*SMOOTH, "relativistic", "relativistic_average"]  # those whose best discriminator is one, up to a constant


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("name", SMOOTH)
def test_the_best_discriminator_is_p_over_p_plus_q_times_the_target_of_real_rows(name: str, smoothing: float) -> None:
    logits, _ = learned(name, P, Q, smoothing)
    decision = logits if name == "least_squares" else torch.sigmoid(logits)
    torch.testing.assert_close(decision, (1 - smoothing) * p / (p + q), atol=1e-7, rtol=0)


def test_the_best_discriminator_of_pairs_is_the_logarithm_of_p_over_q_up_to_a_constant() -> None:
    logits, _ = learned("relativistic", P, Q)
    expected = (p / q).log()
    torch.testing.assert_close(logits - logits.mean(), expected - expected.mean(), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("minimax", math.log(4) - 2 * jsd(p, q)),
        ("non_saturating", math.log(4) - 2 * jsd(p, q)),
        ("least_squares", (p * q / (p + q)).sum() / 2),
        ("relativistic", math.log(2) - jsd(torch.outer(p, q), torch.outer(q, p))),
    ],
)
def test_the_value_of_the_best_discriminator_is_the_divergence_of_its_paper(name: str, expected: Tensor) -> None:
    torch.testing.assert_close(learned(name, P, Q)[1], expected, atol=1e-10, rtol=0)


def test_no_logits_beat_the_sign_of_p_minus_q_under_the_hinge_loss() -> None:
    ours, theirs = rows(P, Q)
    best = torch.sign(p - q)
    least = total("hinge", best[ours], best[theirs])
    torch.testing.assert_close(least, 2 * torch.minimum(p, q).sum())
    torch.manual_seed(0)
    for scale in (0.01, 1.0, 3.0):  # the loss is convex: what holds nearby holds everywhere
        for other in best + scale * torch.randn(200, 4, dtype=torch.float64):
            assert total("hinge", other[ours], other[theirs]) > least


def test_the_best_critic_of_slope_one_measures_the_distance_between_the_distributions() -> None:
    ours, theirs = rows(P, Q)
    distance = (ours.sort().values - theirs.sort().values).abs().double().mean()  # W₁ on a line, by sorting
    ahead = torch.sign((q - p).cumsum(0))[:-1]
    torch.manual_seed(0)
    for number, slopes in enumerate([ahead, *torch.empty(200, 3, dtype=torch.float64).uniform_(-1, 1)]):
        critic = torch.cat([torch.zeros(1, dtype=torch.float64), slopes.cumsum(0)])
        measured = -total("wasserstein", critic[ours], critic[theirs])
        assert measured.item() == pytest.approx(distance.item()) if number == 0 else measured < distance


# Where p = q: the logit of an indifferent discriminator, and its loss there.
EQUAL = {
    "minimax": (0.0, math.log(4)),
    "non_saturating": (0.0, math.log(4)),
    "least_squares": (0.5, 0.25),
    "hinge": (0.0, 2.0),
    "wasserstein": (0.0, 0.0),
    "relativistic": (0.0, math.log(2)),
    "relativistic_average": (0.0, math.log(4)),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_where_the_distributions_are_equal_the_indifferent_discriminator_is_stationary_at_its_known_value(
    name: str,
) -> None:
    logit, value = EQUAL[name]
    ours, theirs = rows(P, P)
    logits = torch.full((4,), logit, dtype=torch.float64, requires_grad=True)
    loss = total(name, logits[ours], logits[theirs])
    loss.backward()
    assert loss.item() == pytest.approx(value)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("name", STRICT)
def test_where_the_distributions_are_equal_the_learned_discriminator_leaves_the_generator_indifferent(
    name: str,
) -> None:
    logits, loss = learned(name, P, P)
    assert loss.item() == pytest.approx(EQUAL[name][1], abs=1e-10)
    losses = []
    for fakes in (P, Q, P.flip(0)):
        ours, theirs = rows(P, fakes)
        losses.append(ADVERSARIAL[name].generator(logits[theirs], logits[ours]).item())
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_generator_gains_by_moving_fakes_to_where_it_makes_too_few(name: str) -> None:
    """From atom 0, of which q has 0.4 and p 0.1, to atom 3; judged by the best discriminator of p and q."""
    if name in STRICT:
        logits, loss = learned(name, P, Q)
        assert loss < EQUAL[name][1] - 1e-3  # that there is something to gain is what the discriminator has found
    else:
        logits = torch.sign(p - q) if name == "hinge" else torch.arange(4.0)  # of p, more lies to the right
    before, after = (
        ADVERSARIAL[name].generator(logits[theirs], logits[ours])
        for ours, theirs in (rows(P, Q), rows(P, Q + torch.tensor([-1, 0, 0, 1])))
    )
    assert after < before


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_real_and_fake_are_exchangeable_when_the_logits_are_mirrored(name: str) -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(2, 50, dtype=torch.float64)
    middle = EQUAL[name][0]
    torch.testing.assert_close(total(name, real, fake), total(name, 2 * middle - fake, 2 * middle - real))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_generator_has_the_discriminators_loss_under_turned_labels_or_against_it(name: str) -> None:
    torch.manual_seed(0)
    real, fake = torch.rand(2, 50, dtype=torch.float64)  # within the margins, where max(0, 1 + D) is 1 + D
    loss = ADVERSARIAL[name]
    against = {"minimax": 0.0, "hinge": 1.0, "wasserstein": 0.0}
    if name in against:
        expected = against[name] - loss.discriminator(real, fake, 0.0)["fake"]
    elif loss.reads_real:
        expected = total(name, fake, real)
    else:
        expected = loss.discriminator(fake, real, 0.0)["real"]
    torch.testing.assert_close(loss.generator(fake, real), expected)


def test_only_the_relativistic_generators_read_real_logits() -> None:
    real, fake = torch.randn(2, 8)
    for loss in ADVERSARIAL.values():
        if loss.reads_real:
            with pytest.raises(AssertionError):
                loss.generator(fake, None)
        else:
            assert torch.equal(loss.generator(fake, None), loss.generator(fake, real))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_labels_are_smoothed_where_there_are_labels_and_nowhere_else(name: str) -> None:
    real, fake = torch.randn(2, 8)
    loss = ADVERSARIAL[name]
    assert loss.smooths == (name in SMOOTH)
    if loss.smooths:
        sharp, smooth = loss.discriminator(real, fake, 0.0), loss.discriminator(real, fake, 0.1)
        assert not torch.equal(sharp["real"], smooth["real"])
        assert torch.equal(sharp["fake"], smooth["fake"])  # one-sided
    else:
        with pytest.raises(AssertionError):
            loss.discriminator(real, fake, 0.1)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(2, 5, dtype=torch.float64, requires_grad=True).unbind()
    loss = ADVERSARIAL[name]
    for smoothing in (0.0, 0.25) if loss.smooths else (0.0,):
        assert torch.autograd.gradcheck(lambda r, f, s=smoothing: total(name, r, f, s), (real, fake))
    assert torch.autograd.gradcheck(lambda f, r: loss.generator(f, r), (fake, real))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_of_feature_matching_agree_with_finite_differences(norm: str) -> None:
    torch.manual_seed(0)
    real, fake = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda r, f: feature_matching(r, f, norm), (real, fake))


def test_feature_matching_compares_means_and_nothing_else() -> None:
    torch.manual_seed(0)
    real, shift = torch.randn(64, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    other = real[torch.randperm(64)]
    spread = other + (other - other.mean(0))  # twice the deviation about the same mean
    assert feature_matching(real, spread, "l2").item() == pytest.approx(0, abs=1e-20)
    torch.testing.assert_close(feature_matching(real, spread + shift, "l2"), shift.square().mean())
    torch.testing.assert_close(feature_matching(real, spread + shift, "l1"), shift.abs().mean())


def test_both_losses_of_2014_pull_the_same_way_and_the_non_saturating_one_harder_where_fakes_are_rejected() -> None:
    slopes = {}
    for name, loss in ADVERSARIAL.items():
        fake = torch.full((1,), -6.0, requires_grad=True)
        loss.generator(fake, torch.zeros(1)).backward()
        slopes[name] = fake.grad.item()
    assert max(slopes.values()) < 0  # every generator wants rejected fakes to be accepted
    assert slopes["non_saturating"] < slopes["minimax"] < 0
    assert slopes["non_saturating"] == pytest.approx(-1 / (1 + math.exp(-6)))
    assert slopes["minimax"] == pytest.approx(-1 / (1 + math.exp(6)))


@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_extreme_logits_stay_finite(value: float) -> None:
    for name, loss in ADVERSARIAL.items():
        logits = torch.full((3,), value, requires_grad=True)
        opposite = torch.full((3,), -value, requires_grad=True)
        sum_of_both = total(name, logits, opposite) + loss.generator(logits, opposite)
        sum_of_both.backward()
        assert torch.isfinite(sum_of_both)
        assert torch.isfinite(logits.grad).all()
        assert torch.isfinite(opposite.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_reduced_in_full(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(2, 1000).to(dtype)
    for name, loss in ADVERSARIAL.items():
        assert torch.equal(total(name, real, fake), total(name, real.float(), fake.float()))
        assert torch.equal(loss.generator(fake, real), loss.generator(fake.float(), real.float()))
        assert loss.generator(fake, real).dtype == torch.float32
    for norm in ("l1", "l2"):
        features = feature_matching(real[:, None], fake[:, None], norm)
        assert torch.equal(features, feature_matching(real[:, None].float(), fake[:, None].float(), norm))


def test_the_optimal_discriminator_of_two_gaussians_is_p_over_p_plus_q() -> None:
    """Goodfellow et al. 2014, proposition 1, learned by a player; to 2 % wherever either density matters."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(1, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1),
        nn.Flatten(0),
    )  # fmt: skip
    schedule = ScheduleOptions(kind="cosine", until_images=700)
    player = Player(
        "discriminator", module, PlayerOptions(optimizer=AdamOptions(learning_rate=5e-3, beta1=0.9), schedule=schedule),
        device=torch.device("cpu"),
    )  # fmt: skip
    p, q = torch.distributions.Normal(-0.5, 1.0), torch.distributions.Normal(1.0, 0.7)
    strata = torch.arange(512).view(
        -1, 1, 1, 1
    )  # one sample of each 512th of the mass: the noise of many more by chance
    for step in range(700):
        with player.turn(step, 1) as turn:
            real, fake = (density.icdf((strata + torch.rand(strata.shape)) / 512) for density in (p, q))
            terms = ADVERSARIAL["minimax"].discriminator(player(real), player(fake))
            turn.backward(terms["real"] + terms["fake"])
    x = torch.linspace(-2.5, 2.4, 99)
    density_p, density_q = p.log_prob(x).exp(), q.log_prob(x).exp()
    decision = torch.sigmoid(player(x.view(-1, 1, 1, 1))).detach()
    assert (decision - density_p / (density_p + density_q)).abs().max() < 0.02


def test_the_value_of_a_learned_discriminator_measures_the_divergence_of_two_gaussians() -> None:
    """Goodfellow et al. 2014, theorem 1: the value is −log 4 + 2·JSD; to 2 % of what integration over a line gives."""
    torch.manual_seed(0)
    one, other = torch.distributions.Normal(-0.5, 1.0), torch.distributions.Normal(1.0, 0.7)
    network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        optimizer.zero_grad()
        total("minimax", network(one.sample((1024, 1))), network(other.sample((1024, 1)))).backward()
        optimizer.step()
        schedule.step()
    quantiles = ((torch.arange(20_000) + 0.5) / 20_000).unsqueeze(1)
    with torch.no_grad():
        value = -total("minimax", network(one.icdf(quantiles)), network(other.icdf(quantiles)))
    x = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
    width = x[1] - x[0]
    expected = jsd(one.log_prob(x).exp() * width, other.log_prob(x).exp() * width)
    assert (value.item() + math.log(4)) / 2 == pytest.approx(expected.item(), rel=0.02)


# What one weight update sees of a batch of 8 rows: the whole of it on one process, half of it on each of two.


def logits_of(samples: Tensor) -> Tensor:
    """A discriminator that stands still."""
    return samples.sin().sum(1) + samples.prod(1)


def features_of(samples: Tensor) -> Tensor:
    return torch.cat([samples.sin(), samples.square()], dim=1)


def cubed(network: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The squared slope of a cubed mean, which differentiates the mean over ranks twice."""
    samples = real.clone().requires_grad_(True)
    (slopes,) = torch.autograd.grad(mean_over_ranks(network(samples).mean()) ** 3, samples, create_graph=True)
    return (
        (len(samples) * slopes).square().sum(1).mean()
    )  # slopes of a mean over rows shrink as the rows grow in number


Case = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {"slope of a mean": cubed}
    for name, loss in ADVERSARIAL.items():
        for smoothing in (0.0, 0.25) if loss.smooths else (0.0,):
            found[f"{name} discriminator {smoothing}"] = lambda network, real, fake, n=name, s=smoothing: total(
                n, network(real)[:, 0], network(fake)[:, 0], s
            )
        found[f"{name} generator"] = lambda network, real, noise, loss=loss: loss.generator(
            logits_of(network(noise)), logits_of(real)
        )
    for norm in ("l1", "l2"):
        found[f"feature matching {norm}"] = lambda network, real, noise, norm=norm: feature_matching(
            features_of(real), features_of(network(noise)), norm
        )
    return found


def updates() -> dict[str, Update]:
    """Of each case the loss, meaned over the ranks, and the gradient that DDP leaves."""
    found = {}
    for name, case in cases().items():
        torch.manual_seed(0)
        network: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        real, fake = torch.randn(2, 8, 3, dtype=torch.float64)
        if dist.is_initialized():
            share = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
            network, real, fake = DistributedDataParallel(network), real[share], fake[share]
        loss = case(network, real, fake)
        loss.backward()
        gradients = [weight.grad for weight in network.parameters()]
        flat = [[] if gradient is None else gradient.flatten().tolist() for gradient in gradients]
        found[name] = (mean_over_ranks(loss.detach()).item(), flat)
    return found


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, Update]]:
    return on_ranks(2, updates)


@pytest.fixture(scope="module")
def on_one() -> dict[str, Update]:
    return updates()


@pytest.mark.parametrize("name", cases())
def test_two_processes_that_average_their_gradients_have_the_gradient_of_one_with_the_whole_batch(
    name: str,
    on_one: dict[str, Update],
    on_two: list[dict[str, Update]],
) -> None:
    assert any(any(gradient) for gradient in on_one[name][1])
    assert_equal_updates(on_one[name], *(rank[name] for rank in on_two))


def test_one_process_has_nothing_to_average() -> None:
    tensor = torch.randn(3)
    assert mean_over_ranks(tensor) is tensor
