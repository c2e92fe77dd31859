"""A player owns its weights: nobody else's turn changes it, and its own turn does one step and no more."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gandist.networks import dcgan
from gandist.player import EmaOptions, Player, PlayerOptions, ScheduleOptions

CPU = torch.device("cpu")
SHAPE = (1, 16, 16)  # the smallest whose dcgan has a BatchNorm


def make(norm: str = "none", precision: str = "fp32", **options: object) -> Player:
    torch.manual_seed(1)
    module = dcgan.Discriminator(kind="dcgan", width=4, norm=norm).build(SHAPE)
    return Player("discriminator", module, PlayerOptions(**options), device=CPU, precision=precision)


def state(player: Player) -> dict[str, torch.Tensor]:
    return {f"{file}/{name}": t.clone() for file, tensors in player.tensors().items() for name, t in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_outside_its_turn_a_player_is_frozen_and_its_statistics_stand_still() -> None:
    player = make("batch", ema=EmaOptions())
    before = state(player)
    image = torch.randn(4, 1, 16, 16, requires_grad=True)
    player(image).logits.sum().backward()
    assert image.grad is not None  # the gradient passes through to whoever made the image
    assert all(parameter.grad is None for parameter in player.parameters)
    assert same(state(player), before)


def test_in_its_turn_everything_of_it_moves() -> None:
    player = make("batch", ema=EmaOptions())
    before = state(player)
    with player.turn(0, 4) as turn:
        turn.backward(player(torch.randn(4, 1, 16, 16)).logits.square().mean())
    after = state(player)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_sum_to_the_gradient_of_the_batch(parts: int) -> None:
    whole, split = make(), make()
    images = torch.randn(8, 1, 16, 16)
    with whole.turn(0, 8) as turn:
        turn.backward(whole(images).logits.square().mean())
    with split.turn(0, 8, parts) as turn:
        for part in turn.accumulate(images.chunk(parts)):
            turn.backward(split(part).logits.square().mean())
    for name, value in state(whole).items():
        assert torch.allclose(value, state(split)[name], atol=1e-6), name


def test_a_micro_batch_without_its_backward_is_a_programming_error() -> None:
    player = make()
    with pytest.raises(AssertionError, match="1 of 2 micro-batches had no backward"), player.turn(0, 4, 2) as turn:
        turn.backward(player(torch.randn(2, 1, 16, 16)).logits.mean())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(clip: float | None) -> None:
    player = make(clip_norm=clip)
    for value in (1.0, float("nan"), float("inf")):
        before = state(player)
        with player.turn(0, 4) as turn:
            turn.backward(player(torch.randn(4, 1, 16, 16)).logits.mean() * value)
        assert same(state(player), before) == (value != 1.0)
    assert (float(player.skipped), float(player.skipped_in_a_row)) == (2, 2)
    with player.turn(0, 4) as turn:
        turn.backward(player(torch.randn(4, 1, 16, 16)).logits.mean())
    assert (float(player.skipped), float(player.skipped_in_a_row)) == (2, 0)


def test_clipping_bounds_the_norm_that_the_optimizer_sees() -> None:
    player = make(clip_norm=0.5)
    with player.turn(0, 4) as turn:
        turn.backward(player(torch.randn(4, 1, 16, 16)).logits.mean() * 1e3)
    seen = torch.stack([parameter.grad.norm() for parameter in player.parameters]).norm()
    assert turn.norm > 0.5
    assert seen.item() == pytest.approx(0.5, rel=1e-4)


def test_a_step_is_adams() -> None:
    player = make()
    reference = copy.deepcopy(player.module).requires_grad_(True)
    optimizer = torch.optim.Adam(reference.parameters(), lr=2e-4, betas=(0.5, 0.999))
    for _ in range(3):
        images = torch.randn(4, 1, 16, 16)
        optimizer.zero_grad()
        reference(images).logits.square().mean().backward()
        optimizer.step()
        with player.turn(0, 4) as turn:
            turn.backward(player(images).logits.square().mean())
    for ours, theirs in zip(player.module.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_the_average_has_its_half_life_in_images() -> None:
    assert EmaOptions(half_life_images=1000, ramp_up=None).decay(10**6, 1000) == pytest.approx(0.5)
    one, two = EmaOptions(half_life_images=700, ramp_up=None), EmaOptions(half_life_images=700, ramp_up=None)
    assert one.decay(0, 64) == pytest.approx(two.decay(0, 32) ** 2)  # the batch does not matter, the images do
    assert EmaOptions(half_life_images=10**6, ramp_up=0.05).decay(2000, 100) == pytest.approx(0.5)


def test_the_average_is_the_closed_form() -> None:
    player = make("batch", ema=EmaOptions(half_life_images=8, ramp_up=None))
    expected = {name: value.clone() for name, value in player.tensors()["ema"].items()}
    for step in range(4):
        with player.turn(4 * step, 4) as turn:
            turn.backward(player(torch.randn(4, 1, 16, 16)).logits.square().mean())
        for name, value in player.tensors()[""].items():
            expected[name] = expected[name].lerp(value, 1 - 0.5**0.5) if value.is_floating_point() else value.clone()
    for name, value in player.tensors()["ema"].items():
        assert torch.allclose(value, expected[name], atol=1e-7), name


def test_schedules_are_functions_of_images() -> None:
    linear = ScheduleOptions(kind="linear", warmup_images=100, until_images=1100, final=0.1)
    assert [linear.factor(n) for n in (49, 100, 600, 1100, 9999)] == pytest.approx([0.5, 1, 0.55, 0.1, 0.1])
    cosine = ScheduleOptions(kind="cosine", until_images=1000)
    assert [cosine.factor(n) for n in (0, 250, 500, 1000)] == pytest.approx([1, 0.853553, 0.5, 0])
    assert ScheduleOptions().factor(10**9) == 1


def test_the_schedule_reaches_the_optimizer() -> None:
    player = make(schedule=ScheduleOptions(kind="linear", until_images=100))
    for images, rate in ((0, 2e-4), (50, 1e-4), (100, 0.0)):
        with player.turn(images, 4) as turn:
            turn.backward(player(torch.randn(4, 1, 16, 16)).logits.mean())
        assert player.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        assert player.learning_rate == pytest.approx(rate)


def test_each_player_has_its_own_scaler_which_backs_off_alone() -> None:
    one, other = make(precision="fp16"), make(precision="fp16")
    with one.turn(0, 4) as turn:
        turn.backward(one(torch.randn(4, 1, 16, 16)).logits.mean() * 1e30)
    assert one.scaler.get_scale() == other.scaler.get_scale() / 2
    assert float(one.skipped) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_computes_in_half_and_keeps_fp32_weights(precision: str) -> None:
    player = make(precision=precision)
    reference = make()
    images = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        assert player(images).logits.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        assert torch.allclose(player(images).logits.float(), reference(images).logits, atol=2e-2)
    with player.turn(0, 4) as turn:
        turn.backward(player(images).logits.float().mean())
    assert all(parameter.dtype == torch.float32 for parameter in player.parameters)


def test_samples_come_from_the_average_in_evaluation_mode_and_leave_no_trace() -> None:
    player = make("batch", ema=EmaOptions())
    before = state(player)
    with player.evaluating() as module:
        assert module is player.ema
        assert not module.training
        module(torch.randn(4, 1, 16, 16))
    without = make("batch")
    with without.evaluating() as module:
        assert not module.training
    assert without.module.training
    assert same(state(player), before)
    norms = [m for m in without.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.track_running_stats for m in norms)  # frozen again


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_spoils_a_gradient_does_not_stay_in_the_statistics(precision: str) -> None:
    player = make("batch", precision, ema=EmaOptions())
    before = state(player)
    with player.turn(0, 4) as turn:
        turn.backward(player(torch.full((4, 1, 16, 16), float("inf"))).logits.float().mean())
    assert float(player.skipped) == 1
    after = state(player)
    for name, value in before.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, after[name]), name
