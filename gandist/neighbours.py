"""The real samples nearest to those of a generator: whether it remembers, or makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from gandist.data.dataset import Dataset
from gandist.data.opening import data_spec, open_reader
from gandist.data.order import Integers
from gandist.data.read import Reader
from gandist.data.stream import Share, Stream
from gandist.metrics.distances import exact, squared
from gandist.metrics.features import FEATURES, FeatureNetwork, FeatureOptions
from gandist.pictures import Picture, plots, save_png, sheet
from gandist.recipe import DataOptions, Failure, InputError
from gandist.sample import Progress, Sampler, alike

REAL = 256  # real samples read at once


@dataclass(frozen=True)
class InOrder:
    """All samples, one after the other."""

    length: int

    def __call__(self, places: Integers) -> Integers:
        return places % np.uint64(self.length)


def real_data(sampler: Sampler, path: str | None) -> DataOptions:
    """The data section of the run's recipe, without what moves images at random; `path` is another dataset, or the same elsewhere.

    Raises InputError where it is not the run's dataset, or its samples have another shape.
    """
    recipe = sampler.found.state.recipe.get("data")
    try:
        options = DataOptions.model_validate(recipe).labelled()
    except ValueError as error:
        raise Failure(f"{sampler.found.folder}: its recipe is not one of this version: {error}") from None
    if path is None and options.reader != "index":
        raise InputError("--neighbours: the run's shards have no index; index them, and name the dataset with --data")
    cache = DataOptions.model_fields["cache_gib"].default
    changes = {"reader": "index", "shuffle": "full", "transform": options.transform.still(), "cache_gib": cache}
    options = options.model_copy(update=changes if path is None else {**changes, "path": path, "cache": None})
    dataset = Dataset(options.path)
    stored = dataset.spec(options.split)
    if path is None and dataset.digest != sampler.found.state.decisive.get("data"):
        raise InputError(f"{options.path}: is not the dataset that the run was trained with; name one with --data")
    try:
        spec = data_spec(options) if (stored.image is None) == (sampler.spec.image is None) else stored
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{options.path}: {error}") from None
    if (spec.image, spec.signal) != (sampler.spec.image, sampler.spec.signal):
        raise InputError(f"{options.path}: its samples are of another kind or size than the run's")
    return options


def real_samples(
    reader: Reader, options: DataOptions, device: torch.device, numbers: Integers | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and samples of a split in its order, or of `numbers` alone; bad ones are left out where `data.quarantine` allows."""
    part = "image" if reader.dataset.manifest.image is not None else "signal"
    stream = Stream(reader, options, Share((part,), REAL, 0, device))
    try:
        (view,) = stream.views
        view.items = numbers if numbers is not None else view.items
        length = len(reader) if view.items is None else len(view.items)
        view.order = InOrder(length)
        for draw in range(-(-length // REAL)):
            for fault in stream.ready([draw]):
                if fault.number < 0 or not options.quarantine:
                    raise Failure(fault.message)
            for batch in stream.read(draw):
                places = np.arange(draw * REAL, min(length, (draw + 1) * REAL), dtype=np.uint64)
                wanted, got = view.numbers(places).tolist(), batch.numbers[part]
                sound = [row for row, number in enumerate(wanted) if got[row] == number]  # and no substitutes
                yield [wanted[row] for row in sound], batch[part][sound]
    finally:
        stream.close()


def nearest(
    samples: Tensor, real: Iterable[tuple[list[int], Tensor]], features: FeatureNetwork, count: int
) -> tuple[Tensor, Tensor]:
    """Distances and numbers (N, count) of the nearest real samples, the nearest first and of equal ones the first by number.

    Euclidean, between features. `real` goes by once, in pieces, and no more than one of them is held.
    """
    rows = exact(features(samples).pool)
    best = torch.full((len(rows), count), torch.inf, dtype=torch.float64, device=rows.device)
    known = torch.full((len(rows), count), -1, device=rows.device)
    for numbers, piece in real:
        if numbers:
            distances = torch.cat([best, squared(rows, exact(features(piece).pool)).sqrt()], 1)
            among = torch.cat([known, torch.tensor(numbers, device=rows.device).expand(len(rows), -1)], 1)
            order = distances.sort(dim=1, stable=True).indices[:, :count]
            best, known = distances.gather(1, order), among.gather(1, order)
    return best.cpu(), known.cpu()


def _features(kind: str | None, shape: tuple[int, ...]) -> FeatureNetwork:
    """A feature network by its kind alone, or the pixels; raises InputError."""
    try:
        section = FEATURES.pick({"kind": kind or "pixels"})
        options = section.model_validate({"kind": kind or "pixels"})
    except ValidationError:
        raise InputError(f"--features {kind}: needs options, which cannot be given here; choose another kind") from None
    except ValueError as error:
        raise InputError(f"--features {kind}: {error}") from None
    assert isinstance(options, FeatureOptions)
    for fault in options.faults(shape):
        raise InputError(f"--features {kind}: {fault}")
    return options.build()


def write_neighbours(
    sampler: Sampler, out: Path, count: int, kind: str | None, path: str | None, progress: Progress = lambda *_: None
) -> Iterator[str]:
    """Writes a picture with a row for each sample and the `count` nearest real ones right of it; tells which, and how far."""
    options = real_data(sampler, path)
    network = _features(kind, sampler.shape).to(sampler.device)
    sampler.check_sheet(sampler.asked.samples * (count + 1))
    made, reader = sampler.all(), open_reader(options)
    total = data_spec(options).samples or len(reader)
    if not 1 <= count <= total:
        raise InputError(f"--neighbours {count}: must be from 1 to the {total:,} samples of the split")

    def counted(pieces: Iterable[tuple[list[int], Tensor]]) -> Iterator[tuple[list[int], Tensor]]:
        for done, piece in enumerate(pieces, 1):
            yield piece
            progress(min(done * REAL, total), total)

    distances, numbers = nearest(
        made.to(sampler.device), counted(real_samples(reader, options, sampler.device)), network, count
    )
    if bool((numbers < 0).any()):
        raise Failure(f"{options.path}: fewer than {count} samples are sound")
    reader = open_reader(options)
    keys = {number: reader.key(number) for number in {*numbers.flatten().tolist()}}
    chosen = np.array(sorted(keys), np.uint64)
    images: dict[int, Tensor] = {}
    for found, piece in real_samples(reader, options, torch.device("cpu"), chosen):
        images.update(zip(found, piece, strict=True))
    beside = [
        torch.stack([one, *(images[number] for number in row)]) for one, row in zip(made, numbers.tolist(), strict=True)
    ]
    picture = sheet(torch.cat(beside), count + 1)
    save_png(
        picture if plots(sampler.shape) else _gap(picture, picture.shape[1] // (count + 1)), out / "neighbours.png"
    )
    yield from sampler.told()
    what = (
        "values"
        if kind is None and len(sampler.shape) == 2
        else "pixels in 0 … 1"
        if kind is None
        else f"features of {network.name}"
    )
    yield f"nearest of {total:,} real samples by the Euclidean distance of {what}:"
    for number, (row, away) in enumerate(zip(numbers.tolist(), distances.tolist(), strict=True)):
        yield f"sample {number}: " + ", ".join(f"{keys[real]} {d:.4g}" for real, d in zip(row, away, strict=True))
    yield from alike([made])
    yield f"{len(made)} samples of {sampler.found.folder} (seed {sampler.asked.seed}): {out / 'neighbours.png'}"


def _gap(picture: Picture, column: int) -> Picture:
    """The picture with a white line right of its first column."""
    line = np.full((picture.shape[0], 4, picture.shape[2]), 255, np.uint8)
    return np.concatenate([picture[:, :column], line, picture[:, column:]], 1)
