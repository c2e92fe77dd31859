"""A player that is spread over the processes (FSDP2) learns what a whole one learns, and keeps a share of everything on each of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import FSDP2, ROOT, Table, on_ranks, open_stream, packed, run, scenes_on_disk, tensor_files
from torch import Tensor

from gandist import checkpoint
from gandist.check import read_recipe
from gandist.data.opening import data_spec
from gandist.game import GAMES, Clock, Game
from gandist.launcher import World, wanted_sharding
from gandist.log import Meter
from gandist.player import Player
from gandist.recipe import DataOptions, InputError, Recipe, RunOptions
from gandist.run import Run, make_players
from gandist.sharding import Sharding, Shards

CPU = torch.device("cpu")
BATCH = 8
ADAM = {"eps": 1e-3}  # well above the gradients' rounding, which Adam would make steps of
# Attention has a weight of no dimension; three channels are not spread evenly; spectral norms have a power iteration in each forward.
NETWORKS = {
    "generator": {"kind": "r3gan", "width": 16, "group_size": 4},
    "discriminator": {"kind": "resnet", "width": 8, "attention": 14},
}
WAYS = {
    "by block": Sharding(),
    "whole turns": Sharding(by_block=False),
    "recomputed": Sharding(activation_checkpointing=True),
}


def _table(data: str, sharding: Sharding | None, **more: object) -> Table:
    sides = {name: {"network": network, "optimizer": ADAM} for name, network in NETWORKS.items()}
    sides["generator"] |= {"ema": {"half_life_images": 20}, "historical_averaging": 1e-2}
    sides["discriminator"] |= {"clip_norm": 1.0, "optimizer": {**ADAM, "weight_decay": 0.1}}
    options = {"kind": "gan", "noise": 8, **sides, **more}
    game = GAMES.pick(options).model_validate(options)
    assert isinstance(game, Game)
    made = RunOptions(folder="unused", images=8 * BATCH, batch=BATCH)
    recipe = Recipe(data=DataOptions(path=data), game=game, run=made)
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    spec = data_spec(recipe.data)
    stream = open_stream(data, batch=BATCH, rank=rank, ranks=ranks, accumulate=2, recall=2)
    players = make_players(recipe, spec, CPU, "fp32", sharding)
    world = World(CPU, rank, ranks, "fp32", "", sharding=sharding)
    return Table(recipe, world, players, stream, Clock(BATCH, 100 * BATCH), Meter())


def _all_of(table: Table) -> dict[str, Tensor]:
    return {
        f"{name}/{part}/{key}": tensor.clone()
        for name, player in table.players.items()
        for part, tensors in player.tensors().items()
        for key, tensor in tensors.items()
    }


PENALTIES = {"r1": {"weight": 0.1, "every": 2}, "path_length": {"weight": 0.1, "every": 2}}


def _trained(data: str, sharding: Sharding | None) -> dict[str, Tensor]:
    table = _table(data, sharding, discriminator_steps=2, regularisers=PENALTIES)
    table.play(3)
    distance = table.players["generator"].distance_to_history()
    return _all_of(table) | {"distance": distance}


@pytest.fixture(scope="module")
def whole(fashion: Path) -> dict[str, Tensor]:
    """What two processes have after three steps that each keep all weights."""
    return on_ranks(2, _trained, str(fashion), None)[0]  # type: ignore[return-value]


@pytest.mark.parametrize("way", WAYS)
def test_a_player_that_is_spread_learns_what_a_whole_one_learns(
    fashion: Path, whole: dict[str, Tensor], way: str
) -> None:
    """Through penalties of gradients, clipping, historical averaging, micro-batches, repeated turns and averages; moments included."""
    first, second = on_ranks(2, _trained, str(fashion), WAYS[way])
    assert first.keys() == whole.keys()  # type: ignore[attr-defined]
    for name, expected in whole.items():
        found = first[name]  # type: ignore[index]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        assert (found - expected).abs().max() <= 1e-8 + 2e-5 * expected.abs().max(), name
        assert second[name].is_meta or torch.equal(second[name], found), name  # type: ignore[index]


def _shares(player: Player) -> tuple[int, list[int], int]:
    """Of a player: its weights, what this process keeps of them, of their moments and averages, and bytes that it has gathered."""
    kept = [rows for rows in player.weights.rows.values() if rows.ndim]
    moments = [state["exp_avg"] for rows, state in player.optimizer.state.items() if rows.ndim]
    averages = [rows for rows in player.averages.rows.values() if rows.ndim] if player.averages else kept
    weights = player.weights
    assert isinstance(weights, Shards)
    assert isinstance(weights, Shards)
    groups = [part._get_fsdp_state()._fsdp_param_group for part in weights._parts]
    gathered = [param._unsharded_param for group in groups for param in group.fsdp_params]
    return (
        sum(weight.numel() for weight in player.module.parameters() if weight.ndim),
        [sum(tensor.numel() for tensor in tensors) for tensors in (kept, moments, averages)],
        sum(tensor.untyped_storage().size() for tensor in gathered),
    )


def _used(data: str, sharding: Sharding | None) -> tuple[list[Tensor], list[tuple[int, list[int], int]], str]:
    """What the generator makes on rank 0 alone, before and after a step; what each process keeps; and what using a part says."""
    table, made = _table(data, sharding), []
    for _ in range(2):
        with table.players["generator"].gathered():
            if dist.get_rank() == 0:
                made += table.game.samples(table.players, table.stream.spec, 4, 0)
        table.play(1)
    if sharding is None:
        return made, [], ""
    with pytest.raises(AssertionError) as said, table.players["generator"].evaluating():
        pass
    return made, [_shares(player) for player in table.players.values()], str(said.value)


@pytest.fixture(scope="module")
def used(fashion: Path) -> list[tuple[list[Tensor], list[tuple[int, list[int], int]], str]]:
    return on_ranks(2, _used, str(fashion), Sharding())  # type: ignore[return-value]


def test_a_process_keeps_its_share_of_weights_moments_and_averages_and_no_more(used: list) -> None:
    (_, first, _), (_, second, _) = used
    for (whole, mine, left), (_, others, _) in zip(first, second, strict=True):
        assert left == 0
        for here, there in zip(mine, others, strict=True):
            assert here + there == whole
            assert max(here, there) < 0.6 * whole


def test_one_process_uses_what_all_have_gathered(fashion: Path, used: list) -> None:
    (made, _, said), (none, _, _) = used
    (expected, _, _), _ = on_ranks(2, _used, str(fashion), None)  # type: ignore[misc]
    assert none == []
    for one, other in zip(made, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(expected[0], expected[-1], atol=1e-3)
    assert "all have to have `gathered` it" in said


# ---- runs

R3GAN = {
    "generator": "{kind: r3gan, width: 16, group_size: 4}",
    "discriminator": "{kind: r3gan, width: 16, group_size: 4}",
}
OPTIONS = ("run.precision=fp32", "game.generator.optimizer.eps=1e-3", "game.discriminator.optimizer.eps=1e-3")
OPTIONS += ("run.sample_images=64", "run.images=96")


def final(folder: Path) -> dict[str, bytes]:
    return tensor_files(checkpoint.folders(folder / "checkpoints")[0])


def test_a_run_goes_on_with_its_weights_spread_or_not(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    """Bit for bit as it was begun, and to rounding with another number of processes: the files are the same."""
    spread, half = {"ranks": 2, "launch": FSDP2}, "run.images=48"
    straight = run("train", recipe("straight", **R3GAN), *OPTIONS, **spread)
    assert straight.code == 0, straight.out
    assert "2 processes, their weights spread (FSDP2), on cpu" in straight.out
    assert run("train", recipe("spread", **R3GAN), *OPTIONS, half, **spread).code == 0
    shutil.copytree(tmp_path / "spread", tmp_path / "joined")
    assert gandist("train", recipe("parted", **R3GAN), *OPTIONS, half).code == 0
    gone_on = [run("train", tmp_path / f"{name}.yaml", *OPTIONS, **spread) for name in ("spread", "parted")]
    gone_on.append(gandist("train", recipe("joined", **R3GAN), *OPTIONS))
    assert all(result.code == 0 and "going on at 48 images" in result.out + result.err for result in gone_on)
    assert final(tmp_path / "spread") == final(tmp_path / "straight")
    expected = checkpoint.find(tmp_path / "straight")
    for name in ("parted", "joined"):
        found = checkpoint.find(tmp_path / name)
        assert found.files.keys() == expected.files.keys()
        for file in ("generator", "generator.ema", "generator.optimizer", "discriminator", "discriminator.optimizer"):
            for key, tensor in expected.tensors(file).items():
                assert (found.tensors(file)[key] - tensor).abs().max() <= 1e-6 + 1e-4 * tensor.abs().max(), (file, key)


def test_segments_are_scored_while_weights_are_spread(gandist: Callable, tmp_path: Path) -> None:
    """By processes that have different numbers of images, as one process scores the same checkpoint."""
    scenes_on_disk(tmp_path / "source", 21)
    names, splits = ("background", *map(str, range(10))), (("train", 0.6), ("test", 0.4))
    packed(tmp_path / "source", tmp_path / "data", splits=splits, shuffle=0, names=names)
    words = [f"data.path={tmp_path / 'data'}", f"run.folder={tmp_path / 'run'}", "run.images=16", "run.batch=8"]
    words += [
        "data.transform.canvas=[64, 64]",
        "game.scores.train_samples=5",
        "run.evaluate_images=16",
        "run.sample_images=8",
        "run.precision=fp32",
    ]
    trained = run("train", ROOT / "configs" / "fashion_segment.yaml", *words, ranks=2, launch=FSDP2)
    assert trained.code == 0, trained.out
    assert "could not be scored" not in trained.out
    (path,) = (tmp_path / "run" / "evaluations").glob("*.json")
    during = json.loads(path.read_text())["scores"]
    path.unlink()
    evaluated = gandist("evaluate", tmp_path / "run")
    assert evaluated.code == 0, evaluated.err
    (path,) = (tmp_path / "run" / "evaluations").glob("*.json")
    assert json.loads(path.read_text())["scores"] == pytest.approx(during, abs=1e-3)


# ---- what is refused


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FSDP_VERSION": "1"}, "add `--fsdp_version 2`"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params"),
        ({"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "--fsdp_auto_wrap_policy"),
        ({"FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "--fsdp_sharding_strategy"),
        ({"FSDP_VERSION": "2", "FSDP_FORWARD_PREFETCH": "true"}, "--fsdp_forward_prefetch"),
        (
            {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "SHARD_GRAD_OP"},
            "settings are refused: invalid truth value",
        ),
        ({"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "BY_COLOUR"}, "settings are refused: Invalid auto wrap policy"),
    ],
)
def test_settings_of_fsdp_that_are_not_served_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    assert wanted_sharding() is None
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        wanted_sharding()


def test_accelerates_settings_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert wanted_sharding() == Sharding(by_block=True, activation_checkpointing=True)
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert wanted_sharding() == Sharding(by_block=False, activation_checkpointing=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("run.compile=true", "`run.compile` is not served beside FSDP"),
        (
            "game.discriminator.network={kind: salimans_mlp}",
            "begin the run with `--multi_gpu`, stop it, and go on with FSDP",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused_before_anything_is_written(
    recipe: Callable, tmp_path: Path, change: str, words: str
) -> None:
    made = read_recipe(recipe(), [change])
    with pytest.raises(InputError, match=words):
        Run(made, World(CPU, 0, 1, "fp32", "", sharding=Sharding()))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()  # of a run that was killed before its first checkpoint
    with pytest.raises(InputError, match=words):
        Run(made, World(CPU, 0, 1, "fp32", "", sharding=Sharding()))


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (("--use_fsdp",), "gandist: accelerate was told to use FSDP 1; gandist serves FSDP2: add `--fsdp_version 2`"),
        ((*FSDP2, "--mixed_precision", "fp16"), "gandist: fp16 is not served beside FSDP"),
    ],
)
def test_what_is_not_served_is_told_in_a_sentence(recipe: Callable, tmp_path: Path, launch: tuple, words: str) -> None:
    refused = run("train", recipe(), ranks=2, launch=launch)
    assert words in refused.out
    assert "exitcode  : 2" in refused.out
    assert not (tmp_path / "run").exists()
