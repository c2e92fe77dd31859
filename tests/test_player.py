"""A player owns its weights: nobody else's turn changes it, and its own turn does one step and no more."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gandist import penalties
from gandist.networks import dcgan, mlp
from gandist.optimizers import AdamOptions, ScheduleOptions, SgdOptions
from gandist.player import EmaOptions, Player, PlayerOptions, Remembered

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
    poly = ScheduleOptions(kind="poly", until_images=1000)  # DeepLab: (1 − t)^0.9
    assert [poly.factor(n) for n in (0, 250, 500, 1000)] == pytest.approx([1, 0.75**0.9, 0.5**0.9, 0])
    with pytest.raises(ValueError, match="`power` has no effect on a `cosine` schedule"):
        ScheduleOptions(kind="cosine", until_images=9, power=2.0)
    assert ScheduleOptions().factor(10**9) == 1
    # Salimans et al. 2016, CIFAR-10: min(3 − epoch / 400, 1) of 1200 epochs
    tail = ScheduleOptions(kind="linear", from_images=800, until_images=1200)
    assert [tail.factor(n) for n in (0, 800, 900, 1200)] == pytest.approx(
        [min(3 - n / 400, 1) for n in (0, 800, 900, 1200)]
    )
    for wrong in ({"from_images": 5}, {"kind": "linear", "from_images": 9, "until_images": 9}, {"kind": "cosine", "warmup_images": 5, "from_images": 5, "until_images": 9}):  # fmt: skip
        with pytest.raises(ValueError, match="from_images"):
            ScheduleOptions(**wrong)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_weight_decay_pulls_the_weights_of_layers_and_no_vector(kind: str) -> None:
    torch.manual_seed(0)
    values = [torch.randn(3, 4), torch.randn(4)]
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    plain = [torch.nn.Parameter(value.clone()) for value in values]
    section = AdamOptions if kind == "adam" else SgdOptions
    options = section.model_validate({"kind": kind, "learning_rate": 0.1, "weight_decay": 0.3})
    mine, theirs = options.build(parameters), options.model_copy(update={"weight_decay": 0.0}).build(plain)
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in parameters]
        gradients = [torch.randn_like(value) for value in values]
        for group, extra in ((parameters, 0.0), (plain, 0.3 if kind == "sgd" else 0.0)):
            for parameter, gradient, old in zip(group, gradients, before, strict=True):
                parameter.grad = gradient + extra * old * (old.ndim > 1)
        for optimizer, group, which in (
            (mine, parameters, options),
            (theirs, plain, options.model_copy(update={"weight_decay": 0.0})),
        ):
            which.adjust(optimizer, [p.grad for p in group], 0.1, 0)  # type: ignore[misc]
            optimizer.step()
        with torch.no_grad():
            if kind == "adam":  # decoupled: the weight shrinks by its own share of the rate beside Adam's step
                plain[0] -= 0.1 * 0.3 * before[0]
        for one, other in zip(parameters, plain, strict=True):
            torch.testing.assert_close(one, other)


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


def pulled(**options: object) -> tuple[Player, Callable[[int], Tensor]]:
    """A player of one fp64 weight (3,), and a turn of it for ½ θᵀAθ − bᵀθ, which tells the gradient that it began with."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(3, 1, bias=False).double()
    linear.weight.data = torch.randn(1, 3, dtype=torch.float64, generator=generator)
    root = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    curvature, target = root @ root.T, torch.randn(3, dtype=torch.float64, generator=generator)
    player = Player("quadratic", linear, PlayerOptions(**options), device=CPU)

    def turn(images: int) -> Tensor:
        weight = linear.weight
        before = curvature @ weight[0].detach() - target
        with player.turn(images, 10) as turn:
            turn.backward(weight[0] @ curvature @ weight[0] / 2 - target @ weight[0])
        return before

    return player, turn


@pytest.mark.parametrize("momentum", [0.5, 0.0])
@pytest.mark.parametrize("ramp", [True, False])
def test_sgd_is_goodfellows_velocity_under_a_changing_rate_and_momentum(momentum: float, ramp: bool) -> None:
    """v ← μ v − η g and θ ← θ + v; a rate that falls leaves the velocity of earlier steps as it was."""
    final = {"final_momentum": 0.7, "momentum_images": 60} if ramp else {}
    optimizer = SgdOptions(kind="sgd", learning_rate=0.2, momentum=momentum, **final)
    schedule = ScheduleOptions(kind="exponential", half_life_images=20, final=0.1)
    player, turn = pulled(optimizer=optimizer, schedule=schedule)
    expected, velocity = player.parameters[0][0].clone(), torch.zeros(3, dtype=torch.float64)
    for images in range(0, 100, 10):
        gradient = turn(images)
        rate = 0.2 * max(0.1, 0.5 ** (images / 20))
        mu = momentum + (0.7 - momentum) * min(1, images / 60) if ramp else momentum
        velocity = mu * velocity - rate * gradient
        expected = expected + velocity
        assert torch.allclose(player.parameters[0][0], expected, rtol=0, atol=1e-12), images
        assert player.learning_rate == pytest.approx(rate)


def test_an_exponential_schedule_halves_and_stops_at_its_floor() -> None:
    schedule = ScheduleOptions(kind="exponential", half_life_images=1000, final=0.1, warmup_images=10)
    assert [schedule.factor(n) for n in (1000, 2000, 3500)] == pytest.approx([0.5, 0.25, 0.5**3.5 + (0.1 - 0.5**3.5)])
    assert [schedule.factor(n) for n in (0, 4)] == pytest.approx([0.1, 0.5], rel=1e-2)
    assert ScheduleOptions(kind="exponential", half_life_images=1000).factor(20_000) == pytest.approx(0.5**20)


def test_clipped_weights_lie_within_their_bound_and_smaller_ones_stay() -> None:
    clipped, free = make(clip_weights=0.02), make()
    images = torch.randn(4, 1, 16, 16)
    for player in (clipped, free):
        with player.turn(0, 4) as turn:
            turn.backward(player(images).logits.square().mean())
    assert max(weight.abs().max() for weight in free.parameters) > 0.02
    for ours, theirs in zip(clipped.parameters, free.parameters, strict=True):
        assert torch.equal(ours, theirs.clamp(-0.02, 0.02))


def test_historical_averaging_pulls_to_the_mean_of_all_weights_before() -> None:
    """By the gradient of w ‖θ − θ̄‖²; the first step has no past but itself."""
    player, turn = pulled(optimizer=SgdOptions(kind="sgd", learning_rate=0.1, momentum=0.0), historical_averaging=0.3)
    past: list[Tensor] = []
    for step in range(6):
        past.append(player.parameters[0][0].clone())
        here = past[-1].clone().requires_grad_(True)
        mean = torch.stack(past[:-1] or past).mean(0)
        (pull,) = torch.autograd.grad(0.3 * penalties.distance_to_history([here], [mean]), here)
        gradient = turn(10 * step)
        assert torch.allclose(player.parameters[0][0], past[-1] - 0.1 * (gradient + pull), rtol=0, atol=1e-12)
        assert torch.allclose(player.history["weight"][0], torch.stack(past).mean(0), rtol=0, atol=1e-12)


def counting(**options: object) -> Player:
    """A player that counts its turns and sums what it observes."""
    torch.manual_seed(1)
    module = dcgan.Discriminator(kind="dcgan", width=4, norm="none").build(SHAPE)
    remembered = Remembered(
        {"turns": 0.0, "sum": 0.0, "images": 0.0},
        lambda memory, observed, images: {
            "turns": memory["turns"] + 1, "sum": memory["sum"] + observed["seen"], "images": memory["images"] + images,
        },
    )  # fmt: skip
    return Player("discriminator", module, PlayerOptions(**options), device=CPU, remembered=remembered)


def test_memory_follows_the_mean_of_what_a_turn_observed() -> None:
    player = counting()
    for step in range(2):
        with player.turn(0, 4, 2) as turn:
            for value in turn.accumulate([1.0, 2.0]):
                player.observe(seen=torch.tensor(value + 10 * step))
                turn.backward(player(torch.randn(2, 1, 16, 16)).logits.mean())
    assert {name: float(value) for name, value in player.memory.items()} == {"turns": 2, "sum": 13, "images": 8}
    with pytest.raises(AssertionError, match="in its own turn alone"):
        player.observe(seen=torch.ones(()))


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": SgdOptions(kind="sgd")}])
def test_a_turn_without_a_finite_gradient_leaves_no_trace_in_memory_or_history(optimizer: dict[str, object]) -> None:
    player = counting(historical_averaging=0.1, **optimizer)
    for value in (1.0, 1.0, float("nan"), float("inf")):
        before = state(player)
        with player.turn(0, 4) as turn:
            player.observe(seen=torch.tensor(value))
            turn.backward(player(torch.randn(4, 1, 16, 16)).logits.mean() * value)
        assert same(state(player), before) == (value != 1.0)
    assert any("history/" in name for name in before)
    assert before["memory/turns"] == 2


def test_history_begins_with_the_weights_that_a_run_begins_with() -> None:
    """Also where these come from another run, or from the data."""
    player, turn = pulled(optimizer=SgdOptions(kind="sgd", learning_rate=0.1, momentum=0.0), historical_averaging=0.3)
    with torch.no_grad():
        player.parameters[0].add_(5.0)
    player.restart_average()
    before = player.parameters[0][0].clone()
    gradient = turn(0)
    assert torch.allclose(player.parameters[0][0], before - 0.1 * gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precise_is_fp32_in_any_precision_and_turn(precision: str) -> None:
    player, reference = make(precision=precision), make()
    images = torch.randn(4, 1, 16, 16)
    expected = reference(images).logits
    with torch.autocast("cpu", torch.bfloat16):  # whatever is around it
        assert torch.equal(player.precise(images).logits, expected)
    with player.turn(0, 4) as turn:
        assert torch.equal(player.precise(images).logits, expected)
        assert not torch.equal(player(images).logits.float(), expected)
        assert player.precise(images).logits.dtype == torch.float32
        turn.backward(player.precise(images).logits.mean())


STILL = ScheduleOptions(kind="linear", until_images=1)  # at a rate of 0 from the second image on


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_r1_of_half_precision_is_that_of_fp32(precision: str) -> None:
    """Of slopes near 1e-7, which fp16 holds with one digit, and bf16 with two."""
    half, full = (make(precision=name, schedule=STILL) for name in (precision, "fp32"))
    images = torch.randn(1, 1, 16, 16)
    for player in (half, full):
        with torch.no_grad():
            player.parameters[-2].mul_(1e-3)  # of the logit
    values, gradients = {}, {}
    for name, player in (("half", half), ("full", full)):
        with player.turn(1, 16) as turn:
            r1 = penalties.r1(lambda x, p=player: p.precise(x).logits, images)
            turn.backward(1e6 * r1)
        values[name], gradients[name] = r1.item(), player.parameters[0].grad
    assert values["half"] == pytest.approx(values["full"], rel=1e-6, abs=0)
    assert torch.allclose(gradients["half"], gradients["full"], rtol=1e-5, atol=0)
    rounded = penalties.r1(lambda x: half(x).logits, images).item()
    assert abs(rounded / values["full"] - 1) > 1e-4


def test_average_weights_are_divided_by_their_own_largest_singular_value() -> None:
    torch.manual_seed(0)
    module = mlp.Discriminator(kind="mlp", width=16, spectral_norm=True).build(SHAPE)
    player = Player(
        "discriminator", module, PlayerOptions(ema=EmaOptions(half_life_images=2000, ramp_up=None)), device=CPU
    )
    for step in range(300):
        with player.turn(8 * step, 8) as turn:
            # a direction of its own for each hundred steps, so that the singular vectors turn
            turn.backward(player(torch.randn(8, *SHAPE) + step // 100).logits.mul((-1) ** (step // 100)).mean())
    with player.evaluating() as average:
        normed = [layer for layer in average.modules() if hasattr(layer, "parametrizations")]
        assert len(normed) == 3
        for layer in normed:
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_the_power_iteration_of_spectral_norm_rests_outside_a_players_turn() -> None:
    torch.manual_seed(1)
    module = mlp.Discriminator(kind="mlp", width=8, spectral_norm=True).build(SHAPE)
    player = Player("discriminator", module, PlayerOptions(ema=EmaOptions()), device=CPU)
    images = torch.randn(4, 1, 16, 16)

    def vectors() -> list[Tensor]:
        return [buffer.clone() for buffer in player.module.buffers()]

    def equal(before: list[Tensor]) -> list[bool]:
        return [torch.equal(a, b) for a, b in zip(before, player.module.buffers(), strict=True)]

    before = vectors()
    assert len(before) == 6  # two a layer
    seen = images.clone().requires_grad_(True)
    player(seen).logits.sum().backward()
    player.precise(images)
    with player.evaluating() as average:
        average(images)
    player(images)
    assert seen.grad is not None
    assert all(equal(before))
    with player.turn(0, 4) as turn:
        turn.backward(player(images).logits.mean())
    assert not any(equal(before)[:4])  # the last layer has one row, and its vectors are found at once
    after = vectors()
    player(images)
    assert all(equal(after))
