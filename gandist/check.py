"""A recipe that fits its data and the processes at hand: the last check before anything is made."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from gandist.data.dataset import Dataset
from gandist.data.decode import IMAGE_SUFFIXES, image_shape
from gandist.data.read import Reader
from gandist.game import GAMES, Game
from gandist.launcher import ranks
from gandist.recipe import DataOptions, Failure, InputError, Recipe, RunOptions, Source, load


def contradictions(source: Source, data: DataOptions | None, game: Any, run: RunOptions | None) -> None:
    """Notes what a recipe's sections contradict in each other, in the data, and in the number of processes."""
    spec = None
    if data is not None:
        try:
            dataset = Dataset(Path(data.path))
            spec = dataset.spec(data.split)
            first = Reader(dataset, data.split).members(0)
            suffix = next((suffix for suffix in first if suffix in IMAGE_SUFFIXES), None)
            if suffix is None:
                raise InputError(f"{dataset.folder}: its first sample holds no image")
            height, width, _ = image_shape(first[suffix], suffix)
            if spec.image.height is not None and (height, width) != (spec.image.height, spec.image.width):
                raise InputError(
                    f"{dataset.folder}: its first image is {width}×{height}, and dataset.json says otherwise"
                )
        except (InputError, Failure, ValueError) as error:
            spec = None
            source.fault(("data", "path"), str(error))
    if spec is not None and isinstance(game, Game):
        for location, message in game.faults(spec):
            source.fault(("game", *location), message)
    if run is not None:
        parts = ranks() * run.accumulate
        if run.batch % parts:
            source.fault(
                ("run", "batch"),
                f"{run.batch} images cannot be split over {ranks()} processes with {run.accumulate} micro-batches each; "
                f"use a multiple of {parts}",
            )
        if "tensorboard" in run.trackers and importlib.util.find_spec("tensorboard") is None:
            source.fault(
                ("run", "trackers"), "tensorboard is not installed; `pip install tensorboard`, or leave it out"
            )
        if spec is not None and run.batch > spec.samples:
            source.fault(
                ("run", "batch"),
                f"{run.batch} is more than the {spec.samples} samples of the split; use at most {spec.samples}",
            )


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """A recipe that fits its data and the processes at hand; raises InputError with all faults at once."""
    return load(path, overrides, GAMES, contradictions)
