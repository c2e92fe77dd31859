"""What a trained run is worth: the scores of its game, of one checkpoint, with the protocol that defines them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from gandist import checkpoint
from gandist.check import contradictions
from gandist.data.opening import data_spec
from gandist.game import GAMES, Evaluation, Game
from gandist.launcher import World
from gandist.metrics.protocol import Protocol, refuse_comparison
from gandist.recipe import InputError, Recipe, load
from gandist.restored import restored
from gandist.run import channels, write_evaluation

MAY_CHANGE = ("data.", "game.scores.")  # by overrides: what the weights do not depend on


def read_for(found: checkpoint.Checkpoint, overrides: list[str]) -> Recipe:
    """The recipe of a checkpoint under overrides of its data and its scores; raises InputError."""
    for override in overrides:
        if not override.startswith(MAY_CHANGE):
            raise InputError(f"{override}: only `data.…` and `game.scores.…` can be changed for trained weights")
    stored = found.state.recipe.get("game", {}).get("scores", {}).get("features") or {}
    named = any(override.startswith("game.scores.features") for override in overrides)
    if stored.get("kind") == "torchscript" and not named:
        raise InputError(
            f"{found.folder}: asks for a TorchScript program, {stored.get('path')}; name it yourself if you trust it: "
            "'game.scores.features={kind: torchscript, path: …, sha256: …}', or other features"
        )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(yaml.safe_dump(found.state.recipe, sort_keys=False))
        return load(path, overrides, GAMES, lambda source, data, game, _: contradictions(source, data, game, None))


def evaluate(
    found: checkpoint.Checkpoint, overrides: list[str], world: World, out: Path | None = None
) -> tuple[Evaluation | None, Path | None]:
    """Scores a checkpoint on all processes; rank 0 gets the scores and the file that they were written to."""
    recipe = read_for(found, overrides)
    _, players = restored(found, world.device)
    assert isinstance(recipe.game, Game)
    spec = data_spec(recipe.data)
    if spec.image != found.state.spec.image or spec.signal != found.state.spec.signal:
        raise InputError(
            f"`data.path`: {recipe.data.path} has other samples than those that {found.folder} was trained on"
        )
    evaluation = recipe.game.evaluator(recipe.data, spec, world.device)(players)
    if evaluation is None:
        return None, None
    folder = out or found.folder.parent.parent
    return evaluation, write_evaluation(folder, found.state.images, evaluation, channels(spec))


def earlier(path: Path) -> Evaluation:
    """An evaluation that was written before; raises InputError."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        card = Protocol.model_validate(values["protocol"])
        scores = {str(name): float(value) for name, value in values["scores"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no evaluation: {error}; name a file of RUN/evaluations") from None
    return Evaluation(scores, card.model_dump(mode="json"))


def compared(evaluation: Evaluation, before: Evaluation) -> dict[str, float]:
    """The earlier scores that both have; raises InputError unless both are of one protocol."""
    refuse_comparison(Protocol.model_validate(evaluation.protocol), Protocol.model_validate(before.protocol))
    return {name: before.scores[name] for name in evaluation.scores if name in before.scores}
