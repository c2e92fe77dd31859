"""What a trained run is worth: the scores of its game, of one checkpoint, with the protocol that defines them."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, Field, PlainValidator, SerializeAsAny, ValidationError

from gandist import checkpoint
from gandist.check import contradictions, learned_from
from gandist.data.dataset import Dataset
from gandist.data.opening import data_digest, data_spec
from gandist.evaluations import channels, write_evaluation
from gandist.game import GAMES, Evaluation, Game
from gandist.launcher import World
from gandist.metrics.features import TorchScriptOptions
from gandist.metrics.protocol import Card, card, refuse_comparison
from gandist.recipe import InputError, Recipe, Section, load, wording
from gandist.restored import restored

_MAX_EVALUATION = 4 << 20
MAY_CHANGE = ("data.", "game.scores.")  # by overrides: what the weights do not depend on


class _Written(Section):
    """An evaluation as `write_evaluation` wrote it, as far as a comparison needs it."""

    model_config = ConfigDict(extra="ignore")
    scores: Annotated[dict[str, float], Field(min_length=1)]
    protocol: Annotated[SerializeAsAny[Card], PlainValidator(card)]


def read_for(found: checkpoint.Checkpoint, overrides: list[str]) -> Recipe:
    """The recipe of a checkpoint under overrides of its data and its scores; raises InputError."""
    sections = MAY_CHANGE + (("game.inference.",) if "inference" in found.state.recipe.get("game", {}) else ())
    for override in overrides:
        if not override.startswith(sections):
            *names, last = (f"`{section}…`" for section in sections)
            raise InputError(f"{override}: only {', '.join(names)} and {last} can be changed for trained weights")
    overrides = [*overrides, *_only_split(found, overrides)]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(yaml.safe_dump(found.state.recipe, sort_keys=False))
        try:
            recipe = load(
                path, overrides, GAMES, lambda source, data, game, _: contradictions(source, data, game, None)
            )
        except InputError as error:  # the lines are those of a file that nobody has
            raise InputError(
                re.sub(r"\bline \d+: ", "", str(error).replace(str(path), f"the recipe of {found.folder}"))
            ) from None
    features = getattr(getattr(recipe.game, "scores", None), "features", None)
    named = {override.partition("=")[0].removeprefix("game.scores.features") for override in overrides}
    if isinstance(features, TorchScriptOptions) and not ("" in named or {".path", ".sha256"} <= named):
        raise InputError(
            f"{found.folder}: asks for a TorchScript program, {features.path}; name it yourself if you trust it: "
            "'game.scores.features={kind: torchscript, path: …, sha256: …}', or other features"
        )
    return recipe


def _only_split(found: checkpoint.Checkpoint, overrides: list[str]) -> list[str]:
    """Another dataset of one split alone is scored on that one, whatever it is called."""
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    if "data.path" not in given:
        return []
    splits = [*Dataset(given["data.path"]).manifest.splits]
    scores = found.state.recipe.get("game", {}).get("scores", {})
    wanted = {"data.split": found.state.recipe.get("data", {}).get("split", "train")}
    if isinstance(scores, dict) and isinstance(scores.get("split"), str):
        wanted["game.scores.split"] = scores["split"]
    return [
        f"{key}={splits[0]}"
        for key, split in wanted.items()
        if len(splits) == 1 and key not in given and split != splits[0]
    ]


def evaluate(
    found: checkpoint.Checkpoint, overrides: list[str], world: World, out: Path | None = None
) -> tuple[Evaluation | None, Path | None]:
    """Scores a checkpoint on all processes; rank 0 gets the scores and the file that they were written to."""
    recipe = read_for(found, overrides)
    folder = checkpoint.outside(out or found.folder.parent.parent)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; name a folder")
    _, players = restored(found, world.device)
    assert isinstance(recipe.game, Game)
    spec = data_spec(recipe.data)
    if recipe.game.held_out == recipe.data.split and data_digest(recipe.data) == found.state.decisive.get("data"):
        raise InputError(f"`game.scores.split`: {learned_from(recipe.data.split)}")
    if spec.image != found.state.spec.image or spec.signal != found.state.spec.signal:
        raise InputError(
            f"`data.path`: {recipe.data.path} has other samples than those that {found.folder} was trained on"
        )
    evaluation = recipe.game.evaluator(recipe.data, spec, world.device)(players)
    if evaluation is None:
        return None, None
    return evaluation, write_evaluation(folder, found.state.images, evaluation, channels(spec))


def earlier(path: Path) -> Evaluation:
    """An evaluation that was written before; raises InputError."""
    try:
        if not path.is_file():  # a device or a pipe may have no end
            raise ValueError("it is no plain file")
        with path.open("rb") as file:
            raw = file.read(_MAX_EVALUATION + 1)
        if len(raw) > _MAX_EVALUATION:
            raise ValueError(f"it has more than {_MAX_EVALUATION} bytes")
        found = _Written.model_validate_json(raw)
        if found.scores.keys() != {*found.protocol.scores}:
            raise ValueError("its scores are not those that its protocol names")
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{path}: is no evaluation: `{'.'.join(map(str, first['loc']))}`: {wording(first)}; name a file of RUN/evaluations"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no evaluation: {error}; name a file of RUN/evaluations") from None
    return Evaluation(dict(found.scores), found.protocol.model_dump(mode="json"))


def compared(evaluation: Evaluation, before: Evaluation) -> tuple[dict[str, float], list[str]]:
    """The earlier scores that both have, and warnings of other versions; raises InputError unless both are of one protocol."""
    cards = (card(one.protocol) for one in (evaluation, before))
    warnings = refuse_comparison(*cards)
    return {name: before.scores[name] for name in evaluation.scores if name in before.scores}, warnings
