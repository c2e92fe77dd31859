"""A recipe that fits its data and the processes at hand: the last check before anything is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gandist.data.dataset import Dataset, Spec
from gandist.data.decode import image_shape
from gandist.data.opening import data_spec, open_reader, refuse_idle_cache, unlabelled_spec
from gandist.data.plain import locations
from gandist.data.read import BadSample
from gandist.data.stream import PARTS
from gandist.data.transform import refuse_misfits
from gandist.game import GAMES, Game, Generative, Segmenting
from gandist.launcher import ranks
from gandist.networks.blocks import blocks
from gandist.recipe import DataOptions, Failure, InputError, Recipe, RunOptions, Source, load

MAX_BATCH = 1 << 32  # bytes of the pixels of a batch on one process
_UNLABELLED = {part for part, source in PARTS.items() if source.view != "labelled"}


def missing_parts(game: Game, spec: Spec) -> Iterator[tuple[tuple[str, ...], str]]:
    """What the game reads and the data does not have."""
    for part in game.parts(spec):
        if PARTS[part].role not in spec.roles:
            yield ("kind",), f"the game {game.kind} reads `{part}`, and the data has only {', '.join(spec.roles)}"


def learned_from(split: str) -> str:
    """Why a score on this split would mean nothing."""
    return f"{split} is what the run learns from; name another split, or pack one with --split"


def _check_first(data: DataOptions) -> None:
    """Reads the first sample; raises InputError, Failure or ValueError where it is not what `dataset.json` says."""
    reader = open_reader(data)
    stored = reader.dataset.spec(data.split)
    try:
        members = reader.uncached().members(0)
    except BadSample:
        if data.quarantine:
            return  # the stream will meet it, name it and count it
        raise
    finally:
        reader.close()
    if stored.image is not None and "image" in members:
        suffix, data_ = members["image"]
        height, width, _ = image_shape(data_, suffix)
        if stored.image.height is not None and (height, width) != (stored.image.height, stored.image.width):
            raise InputError(f"{data.path}: its first image is {width}×{height}, and dataset.json says otherwise")


def contradictions(
    source: Source, data: DataOptions | None, game: Any, run: RunOptions | None, *, allow_pipe: bool = False
) -> None:
    """Notes what a recipe's sections contradict in each other, in the data, and in the number of processes."""
    spec = None
    if data is not None:
        spec = _data_that_is_there(source, data, allow_pipe)
        if spec is not None and isinstance(game, Game):
            _check_game(source, game, spec, data, run)
    if run is not None:
        _check_run(source, run, spec, data)


def _data_that_is_there(source: Source, data: DataOptions, allow_pipe: bool) -> Spec | None:
    """What a game gets of the data, or None, the fault noted."""
    try:
        spec = data_spec(data, allow_pipe)
        if data.reader == "index":
            _check_first(data)
        elif len(locations(data)) < ranks():
            raise InputError(
                f"{len(locations(data))} shards cannot be divided over {ranks()} processes; use more shards, or fewer processes"
            )
    except (InputError, Failure) as error:
        source.fault(("data", "path"), str(error))
        return None
    except ValueError as error:
        source.fault(("data",), str(error))
        return None
    try:
        if unlabelled_spec(data, spec) is not None:
            _check_first(cast(DataOptions, data.unlabelled()))
    except (ValueError, Failure) as error:
        source.fault(("data", "unlabelled_path"), str(error))
    try:
        if not source.faults and data.reader == "index":
            refuse_idle_cache(data)
    except ValueError as error:
        source.fault(("data",), str(error))
    return spec


def _check_game(source: Source, game: Game, spec: Spec, data: DataOptions, run: RunOptions | None) -> None:
    """Notes what the game contradicts in the data, and the data in the game."""
    faults, unlabelled = [*missing_parts(game, spec)], bool(_UNLABELLED & {*game.parts_named(spec)})
    for location, message in faults or game.faults(spec):
        source.fault(("game", *location), message)
    for name, message in [] if source.faults else _misfits(game, spec, data, run):
        source.fault(("data", name), message)
    for name, message in [] if source.faults else _checkpointing(game, spec, run):
        source.fault(("game", name, "activation_checkpointing"), message)
    for message in [] if source.faults or run is None else _single_rows(game, spec, run):
        source.fault(("run", "batch"), message)
    if isinstance(game, Generative | Segmenting) and "image" in game.parts(spec):
        _check_values(source, game, data)
    if data.subset is not None and data.subset.per_class and data.reader == "index":
        counts = Dataset(data.path).manifest.counts.get(data.split)
        fewest = min(counts.labels) if counts is not None and counts.labels else data.subset.per_class
        if fewest < data.subset.per_class:
            source.fault(
                ("data", "subset", "per_class"),
                f"{data.subset.per_class}, and class {counts.labels.index(fewest) if counts else 0} has {fewest} samples; use at most {fewest}",
            )
    if run is not None and run.evaluate_images is not None and game.held_out == data.split:
        source.fault(("game", "scores", "split"), learned_from(data.split))
    for name in () if unlabelled else ("unlabelled_transform", "unlabelled_path"):
        if getattr(data, name) is not None:
            switch = "unlabelled" in type(game).model_fields
            remedy = "has no effect without `game.unlabelled`; set 'game.unlabelled={}', or leave it out"
            source.fault(
                ("data", name), remedy if switch else f"the game {game.kind} reads no unlabelled images; leave it out"
            )
    if data.subset is not None and data.shuffle == "window" and not unlabelled:
        source.fault(
            ("data", "shuffle"),
            f"window has no effect: the game {game.kind} reads the subset alone, which is read in full; leave it out",
        )


def _check_values(source: Source, game: Game, data: DataOptions) -> None:
    """Notes a transform that gives images other values than −1 … 1."""
    moved = data.transform
    if moved.mean is not None or moved.range != (-1.0, 1.0):
        why = (
            f"the game {game.kind} makes and scores images in −1 … 1, so real ones must lie there too"
            if isinstance(game, Generative)
            else f"networks of the game {game.kind} take images in −1 … 1, and those with weights normalise them themselves"
        )
        source.fault(("data", "transform", "range" if moved.mean is None else "mean"), f"{why}; leave it out")
    other = data.unlabelled_transform
    if other is not None and (other.mean is not None or other.range != (-1.0, 1.0)):
        source.fault(
            ("data", "unlabelled_transform", "range" if other.mean is None else "mean"),
            f"the game {game.kind} sees unlabelled images beside generated ones in −1 … 1; leave it out",
        )


def _check_run(source: Source, run: RunOptions, spec: Spec | None, data: DataOptions | None) -> None:
    """Notes a batch that cannot be, and trackers that are not there."""
    pieces = ranks() * run.accumulate
    if run.batch % pieces:
        source.fault(
            ("run", "batch"),
            f"{run.batch} images cannot be split over {ranks()} processes with {run.accumulate} micro-batches each; "
            f"use a multiple of {pieces}",
        )
    if "tensorboard" in run.trackers and importlib.util.find_spec("tensorboard") is None:
        source.fault(("run", "trackers"), "tensorboard is not installed; `pip install tensorboard`, or leave it out")
    image = spec.image if spec is not None else None
    if image is not None and image.height is not None and image.width is not None:
        share = run.batch // ranks() * image.height * image.width * image.channels
        if share > MAX_BATCH:
            source.fault(
                ("run", "batch"),
                f"{run.batch} images of {image.width}×{image.height} are {share / 2**30:.0f} GiB on each process; use fewer",
            )
    subset = data is not None and data.subset is not None  # cycles at its own pace, within a batch if need be
    if spec is not None and spec.samples is not None and not subset and run.batch > spec.samples:
        source.fault(
            ("run", "batch"),
            f"{run.batch} is more than the {spec.samples} samples of the split; use at most {spec.samples}",
        )


def _misfits(game: Game, spec: Spec, data: DataOptions, run: RunOptions | None) -> Iterator[tuple[str, str]]:
    """Which transform an image of several sizes does not fit: said before a run, and not when that one is met.

    With a quarantine such an image may be passed over like any other that is bad.
    """
    if data.reader != "index" or data.quarantine:
        return
    dataset, other = Dataset(data.path), data.unlabelled()
    moved = "unlabelled_transform" if data.unlabelled_transform is not None else "transform"
    wanted = []
    if run is not None and data.subset is None:
        wanted.append(("transform", data.transform, dataset.spec(data.split), ""))
    if run is not None and _UNLABELLED & {*game.parts(spec)}:
        found = dataset.spec(data.split) if other is None else Dataset(other.path).spec(other.split)
        whose = "of unlabelled images" + (f", those of {other.path}" if other is not None else "")
        hint = "" if data.unlabelled_transform is not None else " (`data.unlabelled_transform` is for them alone)"
        wanted.append((moved, getattr(data, moved), found, f"{whose}{hint}: "))
    scored = game.held_out or data.split
    scores = run is None or run.evaluate_images is not None
    if scores and not isinstance(game, Segmenting) and scored in dataset.manifest.splits:
        wanted.append(
            ("transform", data.transform.still(), dataset.spec(scored), f"of the split {scored}, which is scored: ")
        )
    told = set()
    for name, transform, stored, whose in wanted:
        try:
            refuse_misfits(transform, stored.sizes)
        except ValueError as error:
            if (name, str(error)) not in told:
                yield name, f"{whose}{error}"
            told.add((name, str(error)))


def _checkpointing(game: Game, spec: Spec, run: RunOptions | None) -> Iterator[tuple[str, str]]:
    """Why a player cannot compute its activations again."""
    for name, side in game.sides(spec).items():
        if not side.options.activation_checkpointing:
            continue
        with torch.device("meta"):
            found = blocks(side.build())
        if not found:
            yield name, "has no effect: its network has no blocks; those of resnet, r3gan and unet have"
        elif run is not None and run.compile:
            yield name, "`run.compile` chooses by itself what is computed again; leave one of them out"


def _single_rows(game: Game, spec: Spec, run: RunOptions) -> Iterator[str]:
    """Why a player cannot learn from one row at a time: its batch norm would normalise single values."""
    if run.batch != ranks() * run.accumulate:
        return
    for name, side in game.sides(spec).items():
        with torch.device("meta"):
            module = side.build()
            rows = [example[:1] for example in game.examples(spec)[name]]
        norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        if not norms or (all(getattr(norm, "of_all_processes", False) for norm in norms) and ranks() > 1):
            continue
        try:
            with torch.no_grad():
                module(*rows)
        except NotImplementedError:  # an operator that does not know its shapes
            continue
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            yield (
                f"{run.batch} leaves one image to a batch norm of the {name} whose maps have one place, and one value cannot be normalised; use "
                f"{2 * run.batch} or more"
            )


def read_recipe(path: Path, overrides: list[str], allow_pipe: bool = False) -> Recipe:
    """A recipe that fits its data and the processes at hand; raises InputError with all faults at once."""
    return load(path, overrides, GAMES, partial(contradictions, allow_pipe=allow_pipe))
