"""Two processes compute what one does: the same samples, the same noise, the same gradients, each reduced once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks, open_stream, rows, run
from torch import Tensor, nn

from gandist import checkpoint
from gandist.data.dataset import Dataset
from gandist.game import GAMES, Clock, Game, draws
from gandist.launcher import World
from gandist.player import Player, PlayerOptions
from gandist.recipe import InputError
from gandist.seeding import derive

NETWORKS = {
    "mlp": ("{kind: mlp, width: 32}", "{kind: mlp, width: 32}"),
    "dcgan": ("{kind: dcgan, width: 8, norm: none}", "{kind: dcgan, width: 8, norm: none}"),
}


@pytest.mark.parametrize("networks", NETWORKS)
def test_one_and_two_processes_give_the_same_parameters(recipe: Callable, tmp_path: Path, networks: str) -> None:
    """To 1e-5 after ten steps of the same global batches, for networks without batch statistics."""
    generator, discriminator = NETWORKS[networks]
    found = []
    # eps well above the gradients' rounding: Adam divides by their size, and would make 1e-8 of noise a step of its own
    options = ["game.generator.optimizer.eps=1e-3", "game.discriminator.optimizer.eps=1e-3", "run.log_every=10"]
    options += ["run.precision=fp32"]  # where bf16 is the default, its rounding is what they would differ by
    for name, ranks, more in (("one", 1, []), ("two", 2, []), ("split", 2, ["run.accumulate=2"])):
        path = recipe(name, generator=generator, discriminator=discriminator)
        assert run("train", path, *options, *more, ranks=ranks).code == 0
        found.append(checkpoint.find(tmp_path / name))
    assert found[1].state.ranks == 2
    one, two, split = (rows(tmp_path / name)[0] for name in ("one", "two", "split"))
    for key in ("loss/generator/adversarial", "loss/discriminator/real", "logits/fake", "grad_norm/generator"):
        assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-4) == pytest.approx(split[key], rel=1e-3, abs=1e-4)
    for name in ("generator", "generator.ema", "discriminator"):
        one, two, split = (f.tensors(name) for f in found)
        for key in one:
            assert (one[key] - two[key]).abs().max() < 1e-5, (name, key)
            assert (one[key] - split[key]).abs().max() < 1e-5, (name, key)


def _play(data: str, steps: int, batch_norm: bool) -> tuple[dict[str, Tensor], int, int]:
    """Plays some steps; returns all tensors by name, the bytes that the gradients sent, and the bytes they have."""
    norm = "batch" if batch_norm else "none"
    network = {"kind": "dcgan", "width": 4, "norm": norm}
    options = {"kind": "gan", "noise": 8, "generator": {"network": network}, "discriminator": {"network": network}}
    game = GAMES.pick(options).model_validate(options)
    assert isinstance(game, Game)
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    dataset, device = Dataset(Path(data)), torch.device("cpu")
    players = {}
    for name, side in game.sides(dataset.spec("train")).items():
        torch.manual_seed(derive(0, name))
        players[name] = Player(name, side.build(), side.options, device=device)
    stream = open_stream(data, batch=8, rank=rank, ranks=ranks, accumulate=2)
    clock, phases = Clock(8, 10**6), game.phases(stream.spec)
    for _ in range(steps):
        for phase, numbers in zip(phases, draws(phases, clock.step), strict=True):
            for draw in numbers:
                with players[phase.player].turn(clock.images, clock.batch, 2) as turn:
                    for batch in turn.accumulate(stream.read(draw)):
                        loss, _ = phase.loss(players, batch, clock)
                        turn.backward(loss)
        clock.advance()
    stream.close()
    tensors = {
        f"{name}/{file}/{key}": tensor.clone()
        for name, player in players.items()
        for file, found in player.tensors().items()
        for key, tensor in found.items()
    }
    weights = sum(4 * p.numel() for player in players.values() for p in player.parameters)
    return tensors, sum(player.reduced_bytes for player in players.values()), weights


def test_every_gradient_is_reduced_exactly_once_a_step(fashion: Path) -> None:
    """Also with two micro-batches, and with the discriminator called twice in its own turn and once in the other's."""
    steps = 3
    for _, sent, weights in on_ranks(2, _play, str(fashion), steps, True):
        assert sent == steps * weights


def _moved() -> list[bool]:
    """Whether the weights have moved: when the turn has ended, after another network was called, and after the player itself was."""
    torch.manual_seed(0)
    player, other = (Player(name, nn.Linear(3, 1), PlayerOptions(), device=torch.device("cpu")) for name in "ab")
    before, found = player.parameters[0].detach().clone(), []
    with player.turn(0, 4) as turn:
        turn.backward(player(torch.ones(4, 3)).mean())
    for act in (lambda: None, lambda: other(torch.ones(1, 3)), lambda: player(torch.ones(1, 3))):
        act()
        found.append(not torch.equal(before, player.parameters[0]))
    return found


def test_gradients_are_reduced_while_what_does_not_need_them_is_computed() -> None:
    assert on_ranks(2, _moved) == [[False, False, True]] * 2
    assert _moved() == [True, True, True]  # there is nothing to wait for


def test_ranks_stay_bitwise_equal_running_statistics_included(fashion: Path) -> None:
    (first, _, _), (second, _, _) = on_ranks(2, _play, str(fashion), 5, True)
    assert any("running_mean" in name for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_step_of_two_ranks_moves_as_one_process_does(fashion: Path) -> None:
    single, _, _ = _play(str(fashion), 1, False)
    for tensors, _, _ in on_ranks(2, _play, str(fashion), 1, False):
        for name, value in tensors.items():
            if "exp_avg_sq" not in name:  # the first moment is the gradient itself, times 1 − β1
                tolerance = 1e-7 + 1e-4 * single[name].abs().max() if "exp_avg" in name else 1e-3
                assert (value - single[name]).abs().max() < tolerance, name


def _agree(numbers: list[int]) -> str:
    world = World(torch.device("cpu"), dist.get_rank(), dist.get_world_size(), "fp32", "")
    try:
        world.agree("data", numbers[world.rank])
    except InputError as error:
        return str(error)
    return "agreed"


def test_ranks_that_differ_in_what_they_train_on_all_refuse() -> None:
    assert on_ranks(2, _agree, [7, 7]) == ["agreed", "agreed"]
    first, second = on_ranks(2, _agree, [7, 8])
    assert "another rank differs" in first
    assert "rank 1 differs from rank 0" in second


def _lead(outcome: str) -> object:
    world = World(torch.device("cpu"), dist.get_rank(), dist.get_world_size(), "fp32", "")

    def act() -> int:
        if outcome == "input":
            raise InputError("wrong")
        return 41 if outcome == "fine" else [][1]

    try:
        return world.lead(act) + 1
    except (InputError, IndexError, SystemExit) as error:
        return f"{type(error).__name__} {error}"


def test_what_rank_0_meets_ends_every_rank_and_is_told_once() -> None:
    assert on_ranks(2, _lead, "fine") == [42, 42]
    assert on_ranks(2, _lead, "input") == ["InputError wrong", "SystemExit 2"]
    assert on_ranks(2, _lead, "bug") == ["IndexError list index out of range", "SystemExit 1"]
