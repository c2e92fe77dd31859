"""What a trained run is worth: the scores of its game, of one checkpoint, with the protocol that defines them."""

from __future__ import annotations

import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, PlainValidator, SerializeAsAny, ValidationError

from gandist import checkpoint
from gandist.check import contradictions, learned_from
from gandist.data.dataset import Dataset, Spec
from gandist.data.opening import data_digest, data_spec
from gandist.data.storage import refuse_secrets
from gandist.evaluations import channels, write_evaluation
from gandist.game import GAMES, Evaluation, Game, Segmenting
from gandist.launcher import World
from gandist.metrics.features import TorchScriptOptions
from gandist.metrics.protocol import Card, card, refuse_comparison
from gandist.recipe import DataOptions, Failure, InputError, Recipe, RunOptions, Section, Source, load, parse, wording
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
    sections = MAY_CHANGE + (
        ("game.inference.",)
        if "inference" in (game if isinstance(game := found.state.recipe.get("game"), dict) else {})
        else ()
    )
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(sections) and f"{key}." not in sections[1:]:  # a whole section, but for that of the data
            *names, last = (f"`{section}…`" for section in sections)
            raise InputError(f"{override}: only {', '.join(names)} and {last} can be changed for trained weights")
    given = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        key, _, text = override.partition("=")
        if key == "game.scores":
            given |= {f"{key}.{name}" for name in _names(text)} | {"game.scores.features"}
        if key.startswith("data.unlabelled"):
            raise InputError(f"{override}: has no effect on scores, which read no unlabelled images; leave it out")

    def check(source: Source, data: DataOptions | None, game: Any, _: RunOptions | None) -> None:
        data = data.labelled() if data is not None else None
        if data is not None and isinstance(game, Segmenting):
            return  # images of any size are answered: what else they need is looked at by `_spec`
        with suppress(InputError, Failure):  # of a dataset that is not there, which is told below
            data = _fitted(found, data, given) if data is not None else None
        contradictions(source, data, game, None)

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(yaml.safe_dump(found.state.recipe, sort_keys=False))
        try:
            recipe = load(path, overrides, GAMES, check)
        except InputError as error:  # the lines are those of a file that nobody has
            raise InputError(
                re.sub(r"\bline \d+: ", "", str(error).replace(str(path), f"the recipe of {found.folder}"))
            ) from None
    features = getattr(getattr(recipe.game, "scores", None), "features", None)
    named = {key.removeprefix("game.scores.features") for key in given}
    if isinstance(features, TorchScriptOptions) and not ("" in named or {".path", ".sha256"} <= named):
        raise InputError(
            f"{found.folder}: asks for a TorchScript program, {features.path}; name it yourself if you trust it: "
            "'game.scores.features={kind: torchscript, path: …, sha256: …}', or other features"
        )
    refuse_secrets(recipe.data.path, "a recipe is copied into logs and checkpoints")
    recipe = recipe.model_copy(update={"data": recipe.data.labelled()})
    if recipe.data.reader == "index" and _another(found, recipe.data):
        recipe = _for_another(recipe.model_copy(update={"data": _fitted(found, recipe.data, given)}), given)
    learned = getattr(getattr(recipe.game, "scores", None), "train_samples", 0)
    if any(key.startswith("data.subset") for key in given) and not learned:
        raise InputError("`data.subset`: has no effect on scores, which are of a whole split; leave it out")
    return recipe


def _names(text: str) -> set[str]:
    """Of the keys of a mapping in YAML; what is none is refused elsewhere."""
    source = Source("override")
    values = parse(text, source)
    return {str(name) for name in values} if isinstance(values, dict) else set()


def _another(found: checkpoint.Checkpoint, data: DataOptions) -> bool:
    """Whether this is another dataset than the run was trained on."""
    return bool(data_digest(data) != found.state.decisive.get("data"))


def _fitted(found: checkpoint.Checkpoint, data: DataOptions, given: set[str]) -> DataOptions:
    """The same, of another dataset all of it, and of one with a single split that one, unless `data.subset` or `data.split` was given."""
    if data.reader != "index" or not _another(found, data):
        return data
    changes: dict[str, Any] = {} if any(key.startswith("data.subset") for key in given) else {"subset": None}
    splits = [*Dataset(data.path).manifest.splits]
    changes |= {"split": splits[0]} if len(splits) == 1 and "data.split" not in given else {}
    return data.model_copy(update=changes)


def _for_another(recipe: Recipe, given: set[str]) -> Recipe:
    """Scores of another dataset are of its single split, where it has one alone, and none of them is of the run's own training."""
    assert isinstance(recipe.game, Game)
    scores, changes = getattr(recipe.game, "scores", None), dict[str, Any]()
    splits = [*Dataset(recipe.data.path).manifest.splits]
    if len(splits) == 1 and "game.scores.split" not in given and recipe.game.held_out is not None:
        changes["split"] = splits[0]
    if getattr(scores, "train_samples", 0) and "game.scores.train_samples" not in given:
        changes["train_samples"] = 0
    if not isinstance(scores, Section) or not changes:
        return recipe
    game = recipe.game.model_copy(update={"scores": scores.model_copy(update=changes)})
    return recipe.model_copy(update={"game": game})


def _spec(found: checkpoint.Checkpoint, recipe: Recipe) -> Spec:
    """What is scored; raises InputError where the run could not have been trained on the like of it.

    A segmenter answers images of any size, so that theirs may be another one; its classes are those of the run.
    """
    path, trained = recipe.data.path, found.state.spec
    if not isinstance(recipe.game, Segmenting):
        spec = data_spec(recipe.data)
        if spec.image != trained.image or spec.signal != trained.signal:
            raise InputError(f"`data.path`: {path} has other samples than those that {found.folder} was trained on")
        return spec
    dataset = Dataset(path)
    spec = dataset.spec(next(iter(dataset.manifest.splits)))  # classes and channels are those of all splits
    mine, theirs = trained.mask, spec.mask
    assert mine is not None
    assert trained.image is not None
    if spec.image is None or theirs is None:
        raise InputError(f"`data.path`: {path} has no images with masks; pack some, as docs/segment.md says")
    if spec.image.channels != trained.image.channels:
        raise InputError(
            f"`data.path`: its images have {spec.image.channels} channels, and {found.folder} was trained on {trained.image.channels}"
        )
    named = mine.names and theirs.names and mine.names[: theirs.classes] != theirs.names
    if theirs.classes > mine.classes or named:
        raise InputError(
            f"`data.path`: {path} has the {theirs.classes} mask classes {', '.join(theirs.names)}, and {found.folder} was trained on the "
            f"{mine.classes} classes {', '.join(mine.names)}; pack it with the same numbers and the same --names"
        )
    return spec.model_copy(update={"mask": mine.model_copy(update={"ignore": theirs.ignore})})


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
    spec = _spec(found, recipe)
    trained = str(found.state.recipe["data"].get("split", "train"))
    if recipe.game.held_out == trained and not _another(found, recipe.data):
        raise InputError(f"`game.scores.split`: {learned_from(trained)}")
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
