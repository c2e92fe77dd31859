"""Penalties are what their papers write: closed forms, finite differences, and one gradient for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from conftest import Update, assert_equal_updates, on_ranks
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from gandist.losses import mean_over_ranks
from gandist.penalties import (
    Judge,
    clip_weights_,
    consistency,
    distance_to_history,
    dragan,
    gradient_penalty,
    lecam,
    path_length,
    r1,
    r1_and_r2,
    r2,
    zero_centred,
)

Penalty = Callable[[Judge, Tensor, Tensor, Tensor], Tensor]

# Each on (judge, real, fake, u): u (B,) in 0 … 1 mixes, and the noise of dragan is made of it.
PENALTIES: dict[str, Penalty] = {
    "r1": lambda judge, real, fake, u: r1(judge, real),
    "r2": lambda judge, real, fake, u: r2(judge, fake),
    "gradient_penalty": gradient_penalty,
    "dragan": lambda judge, real, fake, u: dragan(judge, real, spread(u, real), u),
    "zero_centred": zero_centred,
}


def spread(u: Tensor, like: Tensor) -> Tensor:
    """Noise in 0 … 1 of the shape of a sample, another value everywhere."""
    places = torch.linspace(0, 0.9, like[0].numel(), dtype=u.dtype).view(like[0].shape)
    return (u.view(-1, *[1] * (like.ndim - 1)) + places) % 1


def rows(number: int = 6, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real, fake and u."""
    torch.manual_seed(0)
    real, fake = torch.randn(2, number, *(shape or (2, 3)), dtype=torch.float64)
    return 0.5 + 2 * real, fake, torch.rand(number, dtype=torch.float64)


def network(inputs: int = 6) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()


def judged_at(name: str, real: Tensor, fake: Tensor, u: Tensor) -> Tensor:
    """The points at which a penalty takes the slope, by its paper."""
    mix = u.view(-1, *[1] * (real.ndim - 1))
    if name == "dragan":
        return real + mix * 0.5 * real.std(correction=0) * spread(u, real)
    return {"r1": real, "r2": fake}.get(name, mix * real + (1 - mix) * fake)


def by_norm(name: str, norms: Tensor) -> Tensor:
    """A penalty from the lengths of the slopes, (B,), by its paper."""
    if name in ("gradient_penalty", "dragan"):
        return ((norms - 1) ** 2).mean()
    return (norms**2).mean() * (0.5 if name in ("r1", "r2") else 1.0)


def test_r1_and_r2_of_one_forward_are_those_of_two_and_so_are_their_gradients() -> None:
    real, fake, _ = rows()
    judge, forwards = network(), []
    judge.register_forward_hook(lambda *_: forwards.append(1))
    together = r1_and_r2(judge, real, fake)
    assert len(forwards) == 1
    for one, alone in zip(together, (r1(judge, real), r2(judge, fake)), strict=True):
        torch.testing.assert_close(one, alone, rtol=1e-12, atol=0)
        weights = [weight for weight in judge.parameters() if weight.ndim == 2]
        grads = (torch.autograd.grad(value, weights, retain_graph=True) for value in (one, alone))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", PENALTIES)
def test_of_a_quadratic_judge_the_penalty_is_the_closed_form(name: str) -> None:
    """D(x) = ½ xᵀAx + bᵀx has the slope Ax + b, at whichever points the paper takes it."""
    real, fake, u = rows()
    a, b = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    a = a + a.T

    def judge(samples: Tensor) -> Tensor:
        flat = samples.flatten(1)
        return 0.5 * (flat @ a * flat).sum(1) + flat @ b

    norms = (judged_at(name, real, fake, u).flatten(1) @ a + b).norm(dim=1)
    torch.testing.assert_close(PENALTIES[name](judge, real, fake, u), by_norm(name, norms))


@pytest.mark.parametrize("name", PENALTIES)
def test_of_a_network_the_penalty_is_that_of_finite_differences(name: str) -> None:
    real, fake, u = rows()
    judge = network()
    points = judged_at(name, real, fake, u)
    steps = 1e-5 * torch.eye(6, dtype=torch.float64).view(6, 2, 3)
    with torch.no_grad():
        slopes = torch.stack([(judge(points + step) - judge(points - step)) / 2e-5 for step in steps], dim=1)
    expected = by_norm(name, slopes.norm(dim=1))
    torch.testing.assert_close(PENALTIES[name](judge, real, fake, u), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", PENALTIES)
def test_the_gradient_of_a_penalty_by_the_weights_agrees_with_finite_differences(name: str) -> None:
    real, fake, u = rows()
    module = network()
    names = [weight for weight, _ in module.named_parameters()][:-1]  # the last bias has no part in the slope

    def function(*weights: Tensor) -> Tensor:
        def judge(samples: Tensor) -> Tensor:
            return functional_call(module, dict(zip(names, weights, strict=True)), (samples,))

        return PENALTIES[name](judge, real, fake, u)

    weights = [dict(module.named_parameters())[weight].detach().requires_grad_(True) for weight in names]
    assert torch.autograd.gradcheck(function, weights)


@pytest.mark.parametrize("name", PENALTIES)
def test_samples_receive_no_gradient_and_the_last_bias_none_either(name: str) -> None:
    real, fake, u = rows()
    real, fake, u = real.requires_grad_(True), fake.requires_grad_(True), u.requires_grad_(True)
    module = network()
    PENALTIES[name](module, real, fake, u).backward()
    assert (real.grad, fake.grad, u.grad) == (None, None, None)
    assert [weight.grad is not None for weight in module.parameters()] == [True, True, True, False]


@pytest.mark.parametrize("shape", [(7,), (2, 9), (3, 4, 4)])
@pytest.mark.parametrize("name", PENALTIES)
def test_of_a_linear_critic_only_the_slope_counts_at_any_shape(name: str, shape: tuple[int, ...]) -> None:
    real, fake, u = rows(5, *shape)
    direction = torch.randn(math.prod(shape), dtype=torch.float64)
    direction /= direction.norm()
    expected = {"r1": 0.5, "r2": 0.5, "gradient_penalty": 0.0, "dragan": 0.0, "zero_centred": 1.0}
    for slope, value in ((1.0, expected[name]), (3.0, {0.0: 4.0}.get(expected[name], 9 * expected[name]))):

        def critic(samples: Tensor, slope: float = slope) -> Tensor:
            return slope * (samples.flatten(1) @ direction) + 2

        assert PENALTIES[name](critic, real, fake, u).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_flat_judge_has_a_finite_gradient(name: str) -> None:
    real, fake, u = rows()
    module = network()
    nn.init.zeros_(module[3].weight)
    penalty = PENALTIES[name](module, real, fake, u)
    penalty.backward()
    assert penalty.item() == by_norm(name, torch.zeros(6)).item()
    assert all(torch.isfinite(weight.grad).all() for weight in module.parameters() if weight.grad is not None)


@pytest.mark.parametrize("name", PENALTIES)
def test_samples_in_half_precision_are_judged_in_full(name: str) -> None:
    real, fake, u = (tensor.to(torch.bfloat16) for tensor in rows())
    module = network().float()
    seen = []

    def judge(samples: Tensor) -> Tensor:
        seen.append(samples.dtype)
        return module(samples)

    half, full = PENALTIES[name](judge, real, fake, u), PENALTIES[name](judge, real.float(), fake.float(), u)
    assert seen == [torch.float32, torch.float32]
    torch.testing.assert_close(half, full, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gradient_penalty", "zero_centred"])
def test_a_mix_of_one_is_real_and_of_zero_is_fake(name: str) -> None:
    real, fake, u = rows()
    judge = network()
    penalty = PENALTIES[name]
    torch.testing.assert_close(penalty(judge, real, fake, torch.ones_like(u)), penalty(judge, real, real, u))
    torch.testing.assert_close(penalty(judge, real, fake, torch.zeros_like(u)), penalty(judge, fake, fake, u))


def test_logits_on_the_right_side_of_the_anchors_cost_nothing_and_others_the_square_of_the_distance() -> None:
    real, fake = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([-2.0, 1.0])
    # anchors: real 0.75, fake −0.5; reals above −0.5 by 1 and 3.5, fakes below 0.75 by 2.75
    penalty = lecam(real, fake, torch.tensor(0.75), torch.tensor(-0.5))
    assert penalty.item() == pytest.approx((1 + 3.5**2) / 3 + 2.75**2 / 2)
    assert lecam(real - 3, fake + 3, torch.tensor(0.75), torch.tensor(0.5)).item() == 0
    # exchanging real and fake with the signs of all numbers changes nothing
    turned = lecam(-fake, -real, torch.tensor(0.5), torch.tensor(-0.75))
    assert turned.item() == pytest.approx(penalty.item())


def test_lecam_and_consistency_have_the_gradients_of_finite_differences_and_anchors_none() -> None:
    torch.manual_seed(0)
    real, fake = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    anchors = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.3, -0.2)]
    assert torch.autograd.gradcheck(lambda r, f: lecam(r, f, *anchors), (real, fake))
    assert torch.autograd.gradcheck(consistency, (real, fake))
    lecam(real, fake, *anchors).backward()
    assert [anchor.grad for anchor in anchors] == [None, None]


def test_an_invariant_judge_is_consistent_and_one_that_is_off_by_c_costs_c_squared() -> None:
    real, _, _ = rows()
    logits, turned = (samples.square().sum((1, 2)) for samples in (real, real.flip(2)))
    assert consistency(logits, turned).item() == pytest.approx(0, abs=1e-20)
    assert consistency(logits, logits + 3).item() == pytest.approx(9)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 20)])
def test_the_path_length_of_a_linear_generator_is_the_closed_form(shape: tuple[int, ...]) -> None:
    """Of samples Jw, it is ‖Jᵀy‖ with y the noise over √pixels, which is 20 here."""
    torch.manual_seed(0)
    jacobian = torch.randn(math.prod(shape), 7, dtype=torch.float64, requires_grad=True)
    latents = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(5, *shape, dtype=torch.float64)
    lengths = (noise.flatten(1) @ jacobian / math.sqrt(20)).norm(dim=1)
    target = torch.tensor(2.5, dtype=torch.float64)
    penalty, mean = path_length((latents @ jacobian.T).view(5, *shape), latents, noise, target)
    torch.testing.assert_close(penalty, (lengths - 2.5).square().mean())
    torch.testing.assert_close(mean, lengths.mean())
    assert (penalty.requires_grad, mean.requires_grad) == (True, False)


def test_repeating_every_pixel_of_a_generator_scales_neither_up_nor_down_the_mean_square_length() -> None:
    """E ‖Jᵀy‖² = ‖J‖² / pixels: twice the pixels, each of the same slope, is the same length."""
    torch.manual_seed(0)
    jacobian = torch.randn(1, 50, 7, dtype=torch.float64)
    latents = torch.zeros(20_000, 7, dtype=torch.float64, requires_grad=True)
    found = []
    for repeat in (1, 4):
        wide = jacobian.repeat_interleave(repeat, dim=1)
        noise = torch.randn(20_000, 1, 50 * repeat, dtype=torch.float64)
        samples = torch.einsum("cpl,bl->bcp", wide, latents)
        found.append(path_length(samples, latents, noise, torch.tensor(0.0))[0].item())
    assert found == pytest.approx([jacobian.square().sum().item() / 50] * 2, rel=0.02)


def generator() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Unflatten(1, (1, 2, 3))).double()


def test_the_gradients_of_path_length_and_history_agree_with_finite_differences() -> None:
    module = generator()
    names = [weight for weight, _ in module.named_parameters()][:-1]
    torch.manual_seed(0)
    latents = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 1, 2, 3, dtype=torch.float64)
    target = torch.tensor(0.4, dtype=torch.float64)

    def function(latents: Tensor, *weights: Tensor) -> Tensor:
        samples = functional_call(module, dict(zip(names, weights, strict=True)), (latents,))
        return path_length(samples, latents, noise, target)[0]

    weights = [dict(module.named_parameters())[weight].detach().requires_grad_(True) for weight in names]
    assert torch.autograd.gradcheck(function, (latents, *weights))
    averages = [torch.randn_like(weight) for weight in weights]
    assert torch.autograd.gradcheck(lambda *weights: distance_to_history(weights, averages), weights)


def test_the_distance_to_history_pulls_each_weight_back_by_twice_its_distance_and_leaves_the_average() -> None:
    weights = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    averages = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    distance = distance_to_history(weights, averages)
    distance.backward()
    flat = torch.cat([(now - mean).flatten() for now, mean in zip(weights, averages, strict=True)])
    torch.testing.assert_close(distance, flat.norm() ** 2)
    for now, mean in zip(weights, averages, strict=True):
        torch.testing.assert_close(now.grad, 2 * (now - mean).detach())
        assert mean.grad is None
    with pytest.raises(ValueError, match="zip"):
        distance_to_history(weights, averages[:1])


def test_clipping_projects_onto_the_cube_in_place() -> None:
    module = network()
    before = [weight.detach().clone() for weight in module.parameters()]
    clip_weights_(module.parameters(), 0.1)
    for weight, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(weight, old.clamp(-0.1, 0.1))
        assert weight.requires_grad
    once = [weight.detach().clone() for weight in module.parameters()]
    clip_weights_(module.parameters(), 0.1)
    assert all(torch.equal(weight, old) for weight, old in zip(module.parameters(), once, strict=True))
    assert any((old.abs() > 0.1).any() for old in before)


# What one weight update sees of a batch of 8 rows: the whole of it on one process, half of it on each of two.


def _judging(name: str) -> Callable[[nn.Module, slice], Tensor]:
    return lambda judge, share: PENALTIES[name](judge, *(tensor[share] for tensor in rows(8)))


def _lecam(judge: nn.Module, share: slice) -> Tensor:
    real, fake, _ = rows(8)
    real, fake = judge(real[share]), judge(fake[share])
    anchors = mean_over_ranks(torch.stack([real.detach().mean(), fake.detach().mean()]))
    return lecam(real, fake, *anchors)


def _consistency(judge: nn.Module, share: slice) -> Tensor:
    real, fake, _ = rows(8)
    return consistency(judge(real[share]), judge(fake[share]))


def _path_length(judge: nn.Module, share: slice) -> Tensor:
    """Of a generator with one pixel, the target moved by the mean length as a caller would."""
    latents = rows(8)[0][share].requires_grad_(True)
    samples = judge(latents).view(-1, 1, 1, 1)
    noise = rows(8)[2][share].view(-1, 1, 1, 1)
    _, mean = path_length(samples, latents, noise, torch.zeros((), dtype=torch.float64))
    return path_length(samples, latents, noise, mean / 2)[0]


def _history(judge: nn.Module, share: slice) -> Tensor:
    return distance_to_history(judge.parameters(), [torch.ones_like(weight) for weight in judge.parameters()])


CASES: dict[str, Callable[[nn.Module, slice], Tensor]] = {
    **{name: _judging(name) for name in PENALTIES},
    "lecam": _lecam,
    "consistency": _consistency,
    "path_length": _path_length,
    "distance_to_history": _history,
}


def updates() -> dict[str, Update]:
    """Of each case the penalty, meaned over the ranks, and the gradient that DDP leaves."""
    found = {}
    for name, case in CASES.items():
        judge: nn.Module = network()
        judge[3].bias = None  # DDP waits for every weight's gradient, and a slope has none for it
        share = slice(0, 8)
        if dist.is_initialized():
            judge, share = DistributedDataParallel(judge), slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        penalty = case(judge, share)
        penalty.backward()
        gradients = [weight.grad.flatten().tolist() for weight in judge.parameters()]
        found[name] = (mean_over_ranks(penalty.detach()).item(), gradients)
    return found


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, Update]]:
    return on_ranks(2, updates)


@pytest.fixture(scope="module")
def on_one() -> dict[str, Update]:
    return updates()


@pytest.mark.parametrize("name", CASES)
def test_two_processes_that_average_their_gradients_have_the_gradient_of_one_with_the_whole_batch(
    name: str,
    on_one: dict[str, Update],
    on_two: list[dict[str, Update]],
) -> None:
    assert all(any(gradient) for gradient in on_one[name][1])
    assert_equal_updates(on_one[name], *(rank[name] for rank in on_two))
