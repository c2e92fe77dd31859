"""What a trained generator is for: sheets, files, datasets, paths between samples, and their nearest real images."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor

from gandist import checkpoint
from gandist.check import missing_parts
from gandist.data.dataset import Dataset, Spec
from gandist.data.decode import LABEL_SUFFIX
from gandist.data.opening import data_spec, open_reader
from gandist.data.order import Integers
from gandist.data.pack import Options, Packing, pack
from gandist.data.read import Reader
from gandist.data.sources import Item, Source, Split
from gandist.data.sources.arrays import image_members, npy_bytes, signal_members
from gandist.data.stream import Share, Stream
from gandist.game import GAMES, Game, Generative
from gandist.metrics.distances import exact, squared
from gandist.metrics.duplicates import duplicates
from gandist.metrics.features import FEATURES, FeatureNetwork, FeatureOptions, in_8_bits
from gandist.networks.noise import BLOCK
from gandist.pictures import Picture, grid, plots, save_png, save_video, sheet
from gandist.player import Player
from gandist.recipe import DataOptions, Failure, InputError, suggestion
from gandist.tensors import NO_FILE

CHECKED, FEWEST = 256, 16  # samples that are looked through for duplicates, and how many it takes
MAX_SHEET = 1 << 28  # values of the samples of one sheet: a GiB of float32
MAX_TRUNCATION = 8.0  # a normal number is larger once in 10¹⁵
MAX_FRAMES = 1000
SECONDS = 2.0  # that a video takes from one end to the other
REAL = 256  # real samples read at once

Progress = Callable[[int, int], None]


def restored(found: checkpoint.Checkpoint, device: torch.device) -> tuple[Game, dict[str, Player]]:
    """The game and its players with the weights of a checkpoint; needs no dataset."""
    try:
        game = GAMES.pick(found.state.recipe.get("game")).model_validate(found.state.recipe.get("game"))
    except ValueError as error:
        raise Failure(f"{found.folder}: its recipe is not one of this version: {error}") from None
    assert isinstance(game, Game)
    for _, fault in [*missing_parts(game, found.state.spec)] or game.faults(found.state.spec):
        raise Failure(f"{found.folder}: its recipe contradicts its data: {fault}")
    players = {}
    for name, side in game.sides(found.state.spec).items():
        with torch.device("meta"):  # a checkpoint cannot ask for more memory than its own file has
            needed = sum(p.numel() * p.element_size() for p in side.build().parameters())
        if needed > found.files.get(f"{name}.safetensors", NO_FILE).bytes:
            raise Failure(f"{found.folder}: its recipe describes a larger {name} than the one it holds")
        player = players[name] = Player(
            name,
            side.build(),
            side.options,
            device=device,
            precision=found.state.precision,
            remembered=side.remembered,
        )
        for part, tensors in player.tensors().items():
            if part in ("", "ema"):
                found.restore(f"{name}.{part}" if part else name, tensors)
    return game, players


class Asked(NamedTuple):
    """Which samples: the same number has the same noise for the same seed, however many there are."""

    samples: int
    seed: int = 0
    classes: str | None = None  # numbers or names with commas between; all in turns unless given
    truncation: float | None = None


@dataclass
class Sampler:
    """A trained generator, and what is asked of it; raises InputError where it cannot make that."""

    found: checkpoint.Checkpoint
    device: torch.device
    asked: Asked
    classes: tuple[int, ...] = field(init=False)  # which take turns; () where it is not conditional
    game: Generative = field(init=False)
    players: dict[str, Player] = field(init=False)

    def __post_init__(self) -> None:
        game, self.players = restored(self.found, self.device)
        if not isinstance(game, Generative):
            raise InputError(f"{self.found.folder}: its game, {game.kind}, has no generator to sample from")
        self.game, truncation = game, self.asked.truncation
        self.classes = _classes(self.asked.classes, game.classes(self.spec), self.spec)
        if truncation is not None and not self.normal:
            raise InputError(f"--truncation {truncation:g}: cuts the tails of normal noise, and this run's is uniform")
        if truncation is not None and not 0 < truncation <= MAX_TRUNCATION:
            raise InputError(f"--truncation {truncation:g}: must be above 0 and at most {MAX_TRUNCATION:g}")

    @property
    def spec(self) -> Spec:
        """The data that the run was trained with."""
        return self.found.state.spec

    @property
    def normal(self) -> bool:
        """Whether the noise is normal, with its length near √noise, or else uniform."""
        return getattr(self.game, "noise_distribution", "normal") == "normal"

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image or (C, L) of a signal."""
        return self.spec.shape

    @property
    def turns(self) -> int:
        """How many classes take turns."""
        return max(1, len(self.classes))

    def label(self, number: int) -> int | None:
        """The class of a sample."""
        return self.classes[number % len(self.classes)] if self.classes else None

    def labels(self, count: int) -> Tensor | None:
        """The classes of the first samples, (count,)."""
        return torch.tensor(self.classes)[torch.arange(count) % len(self.classes)] if self.classes else None

    def blocks(self, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """The samples on the device from block `first` on, with the number of the first one of each block."""
        count, seed, _, truncation = self.asked
        labels = self.labels(count)
        yield from self.game.made(
            self.players, self.spec, count, seed, labels=labels, truncation=truncation, first=first
        )

    def check_sheet(self, count: int) -> None:
        """Raises InputError for more samples than a picture holds."""
        most = max(1, MAX_SHEET // math.prod(self.shape))
        if count > most:
            raise InputError(
                f"{count:,} samples in one picture are too many: of these it holds {most:,}; ask for fewer"
            )

    def all(self) -> Tensor:
        """All samples, on the CPU, for a picture of them."""
        self.check_sheet(self.asked.samples)
        return torch.cat([made.cpu() for _, made in self.blocks()])

    def made_of(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """Samples (N, *shape) of latents (N, noise), in the blocks that all samples are made in."""
        parts = []
        with self.players["generator"].evaluating() as module:
            for first in range(0, len(latents), BLOCK):
                rows = latents[first : first + BLOCK]
                padded = torch.cat([rows, rows.new_zeros(BLOCK - len(rows), rows.shape[1])])
                asked = None
                if labels is not None:
                    asked = torch.zeros(BLOCK, dtype=torch.int64, device=rows.device)
                    asked[: len(rows)] = labels[first : first + BLOCK]
                parts.append(self.game.make(module, padded, asked)[: len(rows)].float().cpu())
        return torch.cat(parts)

    def told(self) -> Iterator[str]:
        """A line on which classes there are, and in which rows."""
        if self.classes:
            names = self.spec.label.names if self.spec.label is not None else ()
            words = [f"{number} {names[number]}" if names else str(number) for number in self.classes]
            yield f"classes in turns: {', '.join(words)}"


def _classes(wanted: str | None, classes: int | None, spec: Spec) -> tuple[int, ...]:
    """The classes of `--class`, or all; a word is a name first, and else a number."""
    if classes is None:
        if wanted is not None:
            raise InputError(f"--class {wanted}: has no effect: this run is not conditional on classes; leave it out")
        return ()
    if wanted is None:
        return tuple(range(classes))
    names = list(spec.label.names) if spec.label is not None else []
    found = []
    for word in (word.strip() for word in wanted.split(",")):
        if word in names:
            found.append(names.index(word))
        elif word.isascii() and word.isdigit() and len(word) < 9 and int(word) < classes:
            found.append(int(word))
        else:
            near = suggestion(word, names) if names and not word.isdigit() else ""
            raise InputError(f"--class {word!r}: must be 0 to {classes - 1}, or a name{near}")
    if len(set(found)) < len(found):
        raise InputError(f"--class {wanted}: a class stands twice")
    return tuple(found)


def _fresh(folder: Path) -> None:
    """Refuses a folder that holds anything: samples of two generators or seeds would be mixed in it; raises InputError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not empty; name another folder with --out, or delete it")
    folder.mkdir(parents=True, exist_ok=True)


def _alike(samples: list[Tensor]) -> Iterator[str]:
    """A line on the share of samples that are nearly the same as another one."""
    looked = torch.cat(samples)[:CHECKED] if samples else torch.empty(0)
    if len(looked) >= FEWEST and not plots(tuple(looked.shape[1:])):  # of points and numbers many are near each other
        share = duplicates(looked)
        yield f"duplicates: {share:.0%} of {'the first ' * (len(looked) == CHECKED)}{len(looked)} are nearly the same as another one"


def write_sheet(sampler: Sampler, out: Path) -> Iterator[str]:
    """Writes all samples as one picture; where the run is conditional, each class has a row."""
    samples = sampler.all()
    save_png(sheet(samples, turns=sampler.turns), out / "grid.png")
    yield from sampler.told()
    yield from _alike([samples])
    yield f"{len(samples)} samples of {sampler.found.folder} (seed {sampler.asked.seed}): {out / 'grid.png'}"


def write_single(sampler: Sampler, out: Path, progress: Progress = lambda *_: None) -> Iterator[str]:
    """Writes each image as a PNG of its own size, and each signal as a .npy of float32 (C, L), while the next ones are made."""
    _fresh(out)
    kept = []
    for first, made in sampler.blocks():
        samples = made.cpu()
        if first < CHECKED:
            kept.append(samples)
        for number, one in enumerate(samples, first):
            if one.ndim == 3:
                save_png(grid(one[None], magnify=False), out / f"{number:06d}.png")
            else:
                (out / f"{number:06d}.npy").write_bytes(npy_bytes(one.numpy().astype("<f4")))
        progress(first + len(samples), sampler.asked.samples)
    yield from sampler.told()
    yield from _alike(kept)
    yield f"{sampler.asked.samples} samples of {sampler.found.folder} (seed {sampler.asked.seed}): {out}"


# ---- a dataset


@dataclass(frozen=True)
class _Made(Packing):
    """A packing of what a generator makes."""

    sampler: Sampler | None = None

    def open(self) -> Source:
        assert self.sampler is not None
        return made_source(self.sampler)


def made_source(sampler: Sampler) -> Source:
    """The samples as numbered items with their classes; each is a function of its number, and made with its block."""
    asked, label = sampler.asked, sampler.spec.label
    block: dict[int, Tensor] = {}  # the last one that was made

    def read(number: int) -> Item:
        if number // BLOCK not in block:
            block.clear()
            _, made = next(sampler.blocks(number // BLOCK))
            block[number // BLOCK] = made.cpu()
        sample = block[number // BLOCK][number % BLOCK]
        if sample.ndim == 3:
            members = image_members(in_8_bits(sample).byte().permute(1, 2, 0).numpy())
        else:
            members = signal_members(sample.numpy())
        asked_for = sampler.label(number)
        return Item("", members if asked_for is None else {**members, LABEL_SUFFIX: str(asked_for).encode()})

    record: dict[str, str | int | None] = {
        "kind": "generator",
        "checkpoint": sampler.found.digest,
        "images": sampler.found.state.images,
        "count": asked.samples,
        "seed": asked.seed,
        "classes": ", ".join(map(str, sampler.classes)) or None,
        "truncation": None if asked.truncation is None else repr(asked.truncation),
    }
    digest = hashlib.blake2b(json.dumps(record).encode(), digest_size=16).hexdigest()
    names = label.names if label is not None and sampler.classes else ()
    return Source(record, {"train": Split(asked.samples, read, digest)}, names)


def write_shards(sampler: Sampler, out: Path, progress: Progress = lambda *_: None) -> Iterator[str]:
    """Packs the samples as a dataset, in their order, as `gandist pack` packs any other source."""
    packing = _Made(f"generator of {sampler.found.folder}", out, Options(shuffle=None), sampler=sampler)
    _, made = pack(packing, 1, progress)
    yield from sampler.told()
    yield from _alike([samples.cpu() for _, samples in takewhile(lambda block: block[0] < CHECKED, sampler.blocks())])
    if not made:
        yield f"{out}: packed already from the same checkpoint, seed and classes; nothing to do"
    else:
        yield f"{sampler.asked.samples} samples of {sampler.found.folder} (seed {sampler.asked.seed}): {out}"


# ---- paths between samples


def between(start: Tensor, end: Tensor, frames: int, normal: bool) -> Tensor:
    """(N, frames, noise) from `start` to `end`, both (N, noise): along the sphere for normal noise, straight for uniform.

    A straight way between normal latents leads through lengths that a generator has never seen, since nearly all are near
    √noise (White 2016, section 2.1, slerp). Here the direction turns evenly and the length changes linearly.
    """
    a, b = start.double()[:, None], end.double()[:, None]
    share = torch.linspace(0, 1, frames, dtype=torch.float64, device=start.device)[:, None]
    straight = (1 - share) * a + share * b
    if not normal:
        return straight.float()
    lengths = a.norm(dim=2, keepdim=True), b.norm(dim=2, keepdim=True)
    directions = a / lengths[0], b / lengths[1]
    angle = torch.acos((directions[0] * directions[1]).sum(2, keepdim=True).clamp(-1, 1))
    turned = (torch.sin((1 - share) * angle) * directions[0] + torch.sin(share * angle) * directions[1]) / angle.sin()
    around = turned * ((1 - share) * lengths[0] + share * lengths[1])
    return torch.where(angle.sin() > 1e-6, around, straight).float()  # no way is the shortest between opposite ends


def write_interpolation(sampler: Sampler, out: Path, frames: int, video: bool) -> Iterator[str]:
    """Writes `count` strips from one sample to another of the same class, one below the other; as a video, all strips at once."""
    if not 2 <= frames <= MAX_FRAMES:
        raise InputError(f"--interpolate {frames}: must be from 2 to {MAX_FRAMES} frames")
    count, seed, _, truncation = sampler.asked
    sampler.check_sheet(count * frames)
    if video:
        _fresh(out / "frames")
    blocks = range(-(-2 * count // BLOCK))
    latents = torch.cat([sampler.game.latents(block, seed, sampler.device, truncation) for block in blocks])
    ways = between(latents[0 : 2 * count : 2], latents[1 : 2 * count : 2], frames, sampler.normal)
    labels = sampler.labels(count)
    made = sampler.made_of(
        rearrange(ways, "n f z -> (n f) z"), None if labels is None else labels.repeat_interleave(frames)
    )
    save_png(sheet(made, frames), out / "interpolation.png")
    yield from sampler.told()
    yield f"{count} strips of {frames} samples of {sampler.found.folder} (seed {seed}): {out / 'interpolation.png'}"
    if video:
        shown = [sheet(made[frame::frames], like=made) for frame in range(frames)]
        for number, frame in enumerate(shown):
            save_png(frame, out / "frames" / f"{number:06d}.png")
        save_video(shown, out / "interpolation.webp", SECONDS / frames)
        yield f"video: {out / 'interpolation.webp'}, forth and back; its frames: {out / 'frames'}"


# ---- nearest real samples


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
        options = DataOptions.model_validate(recipe)
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
    yield from _alike([made])
    yield f"{len(made)} samples of {sampler.found.folder} (seed {sampler.asked.seed}): {out / 'neighbours.png'}"


def _gap(picture: Picture, column: int) -> Picture:
    """The picture with a white line right of its first column."""
    line = np.full((picture.shape[0], 4, picture.shape[2]), 255, np.uint8)
    return np.concatenate([picture[:, :column], line, picture[:, column:]], 1)
