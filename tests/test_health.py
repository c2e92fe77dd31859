"""A game's health is told early, once, and with what to try."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from conftest import run

from gandist.game import GAMES
from gandist.games.gan import Gan
from gandist.health import PATIENCE, Health, Symptom


def _gan(**options: object) -> Gan:
    network = {"network": {"kind": "mlp"}}
    values = {"kind": "gan", "generator": network, "discriminator": network, **options}
    game = GAMES.pick(values).model_validate(values)
    assert isinstance(game, Gan)
    return game


def test_a_symptom_is_told_when_it_lasts_and_again_only_after_it_was_gone() -> None:
    health, symptom = Health(), Symptom("ill", "it is ill", "rest")
    told = [health.told([symptom]) for _ in range(2 * PATIENCE)]
    assert [len(found) for found in told] == [0] * (PATIENCE - 1) + [1] + [0] * PATIENCE
    health.told([])
    assert [len(health.told([symptom])) for _ in range(PATIENCE)] == [0] * (PATIENCE - 1) + [1]


def test_what_a_row_says_becomes_symptoms_and_only_where_it_is_bad() -> None:
    winning = {"accuracy/real": 0.999, "accuracy/fake": 0.995}
    assert [s.name for s in _gan().symptoms(winning)] == ["discriminator_wins"]
    assert not [*_gan().symptoms({"accuracy/real": 0.999, "accuracy/fake": 0.9})]
    assert [s.name for s in _gan().symptoms({"grad_norm/ratio": 1e4})] == ["generator_starves"]
    assert [s.name for s in _gan().symptoms({"duplicates": 0.5})] == ["modes_collapse"]
    assert not [*_gan().symptoms({})]


def test_a_generator_that_cannot_move_collapses_and_the_run_says_so(recipe: Callable, tmp_path: Path) -> None:
    """All samples are near one image at the start, and a learning rate of almost nothing leaves them there."""
    path = recipe(images=320, generator="{kind: mlp, width: 4, weights: 0.001}")
    options = ["game.generator.optimizer.learning_rate=1e-9", "run.sample_images=16"]
    result = run("train", path, *options)
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    told = [line for line in lines if line.get("event") == "symptom" and line["symptom"] == "modes_collapse"]
    assert len(told) == 1
    assert "have a near twin" in result.out
    assert "relativistic" in result.out
    measured = [line for line in lines if "duplicates" in line]
    assert measured
    assert measured[-1]["duplicates"] == 1.0
    assert all(line["grad_norm/ratio"] > 0 for line in measured)
