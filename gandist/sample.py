"""What a trained generator is for: sheets, files, datasets, and paths between samples."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from gandist import checkpoint
from gandist.data.dataset import Spec
from gandist.data.decode import LABEL_SUFFIX
from gandist.data.pack import Options, Packing, pack
from gandist.data.sources import Item, Source, Split
from gandist.data.sources.arrays import image_members, npy_bytes, signal_members
from gandist.game import Generative
from gandist.metrics.duplicates import duplicates
from gandist.metrics.features import in_8_bits
from gandist.networks.noise import BLOCK
from gandist.pictures import grid, plots, save_png, save_video, sheet
from gandist.player import Player
from gandist.recipe import InputError, suggestion
from gandist.restored import restored

CHECKED, FEWEST = 256, 16  # samples that are looked through for duplicates, and how many it takes
MAX_SHEET = 1 << 28  # values of the samples of one sheet: a GiB of float32
MAX_TRUNCATION = 8.0  # a normal number is larger once in 10¹⁵
MAX_FRAMES = 1000
SECONDS = 2.0  # that a video takes from one end to the other

Progress = Callable[[int, int], None]


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
        width = self.game.latents(0, 0, torch.device("cpu")).shape[1]
        most = max(1, MAX_SHEET // max(width, math.prod(self.shape)))
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


def refuse_taken(folder: Path, picture: str) -> None:
    """Refuses to write over a picture in a folder that the user named, which may be somebody else's; raises InputError."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; name a folder")
    if (folder / picture).exists():
        raise InputError(f"--out {folder}: holds {picture} already; name another folder, or delete it")


def _fresh(folder: Path) -> None:
    """Refuses a folder that holds anything: samples of two generators or seeds would be mixed in it; raises InputError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not empty; name another folder with --out, or delete it")
    folder.mkdir(parents=True, exist_ok=True)


def alike(samples: list[Tensor]) -> Iterator[str]:
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
    yield from alike([samples])
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
    yield from alike(kept)
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
    yield from alike([samples.cpu() for _, samples in takewhile(lambda block: block[0] < CHECKED, sampler.blocks())])
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
