"""Stream: the data as a function of the draw number; its only state is an integer, and it belongs to the clock."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gandist.data.dataset import ImageSpec, MaskSpec, Spec
from gandist.data.decode import (
    Pixels,
    decoded,
    image_pixels,
    image_shape,
    label_number,
    mask_classes,
    npy_header,
    signal_values,
)
from gandist.data.kept import Kept
from gandist.data.order import Full, Order, Permutation, Windowed, places_of
from gandist.data.read import BadSample, Member, Reader
from gandist.data.transform import GREY, Moves, laid, moves, moves_at_random, placed, result, values
from gandist.recipe import DataOptions, Failure, InputError, TransformOptions
from gandist.seeding import derive

IGNORED = -1  # in a mask: no class
EXTENT = "/extent"  # of a part: how much of each canvas its image takes
MAX_SUBSTITUTES = 100  # samples tried in the place of a bad one


class Source(NamedTuple):
    """Where a part of a batch comes from: a view of the data, and the members that it reads."""

    view: str
    role: str


# What a game may read. `image label mask signal` are of one sample each row, and of the subset where the recipe asks for one;
# the others are images of the whole split, each in an order of its own.
PARTS = {
    "image": Source("labelled", "image"),
    "label": Source("labelled", "label"),
    "mask": Source("labelled", "mask"),
    "signal": Source("labelled", "signal"),
    "unlabelled": Source("unlabelled", "image"),
    "unlabelled_again": Source("unlabelled_again", "image"),
}
_PURPOSES = {"labelled": "order", "unlabelled": "order/unlabelled", "unlabelled_again": "order/unlabelled_again"}


@dataclass(frozen=True)
class Batch:
    """The rows of a global batch that this process works on, on its device.

    image, unlabelled: (B, C, H, W) float, channels last in memory.  label: (B,) int64.  mask: (B, H, W) int64, `IGNORED` where a
    pixel has no class.  signal: (B, C, L) float.  numbers: the sample numbers of each row by part.  made: what a phase leaves to a later one of the
    same step and draw, so that nothing is computed twice.
    """

    parts: dict[str, Tensor]
    draw: int
    rows: range  # of the global batch
    size: int  # of the global batch
    seed: int
    device: torch.device
    numbers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, part: str) -> Tensor:
        return self.parts[part]

    def extent(self, part: str) -> Tensor:
        """(B, 2) int64: height and width of each image at the upper left of its canvas."""
        images = self.parts[part]
        if (found := self.parts.get(part + EXTENT)) is not None:
            return found
        sides = (torch.full((len(images),), side, device=images.device) for side in images.shape[2:])
        return torch.stack([*sides], 1)

    def inside(self, part: str) -> Tensor:
        """(B, H, W) bool: where a canvas has its image."""
        return within(self.extent(part), *self.parts[part].shape[2:])

    def source(self, purpose: str) -> torch.Generator:
        """Random numbers for the whole global batch, the same on every process, which then takes its own rows of them."""
        return torch.Generator(self.device).manual_seed(derive(self.seed, purpose, self.draw))

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """(B, *shape) of N(0, 1): these rows of the noise of the global batch, so that any process count draws the same."""
        noise = torch.randn(self.size, *shape, generator=self.source(purpose), device=self.device)
        return noise[self.rows.start : self.rows.stop]

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """(B, *shape) of U(0, 1), likewise."""
        noise = torch.rand(self.size, *shape, generator=self.source(purpose), device=self.device)
        return noise[self.rows.start : self.rows.stop]


def within(extent: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width) bool: which pixels of a canvas are of its image, for extents (B, 2)."""
    down, across = (torch.arange(side, device=extent.device) for side in (height, width))
    return (down[:, None] < extent[:, 0, None, None]) & (across < extent[:, 1, None, None])


@dataclass(frozen=True)
class Share:
    """What one process reads of every draw: which parts, which rows, and in how many micro-batches."""

    parts: Sequence[str]
    batch: int  # of all processes
    seed: int
    device: torch.device
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1
    recall: int = 1  # draws that may be read again without a second load: those of one step

    def __post_init__(self) -> None:
        assert set(self.parts) <= PARTS.keys(), self.parts
        assert self.batch % (self.ranks * self.accumulate) == 0, (self.batch, self.ranks, self.accumulate)

    @property
    def rows(self) -> range:
        """The rows of the global batch that this process works on."""
        count = self.batch // self.ranks
        return range(self.rank * count, (self.rank + 1) * count)

    def micro_batches(
        self, draw: int, parts: Mapping[str, Tensor], numbers: Mapping[str, Sequence[int]]
    ) -> list[Batch]:
        """The rows of a draw in equal pieces; `numbers` are those of the samples by part, where they are known."""
        first, count = self.rows.start, len(self.rows) // self.accumulate
        return [
            Batch(
                {name: tensor[begin : begin + count] for name, tensor in parts.items()},
                draw,
                range(first + begin, first + begin + count),
                self.batch,
                self.seed,
                self.device,
                {name: found[begin : begin + count] for name, found in numbers.items()},
            )
            for begin in range(0, len(self.rows), count)
        ]


class Fault(NamedTuple):
    """What went wrong with the data: one bad sample by number, or, with the number -1, all of it."""

    number: int
    message: str


class Batches(Protocol):
    """What the loop needs of a stream, whichever way it reads."""

    spec: Spec
    waited: float  # seconds that training stood still for data

    def ready(self, draws: Sequence[int]) -> list[Fault]:
        """Waits for these draws and returns what is wrong with them, each fault once."""

    def read(self, draw: int) -> list[Batch]:
        """The micro-batches of a draw, on the device; asks for the following draws in the background."""

    def promises(self) -> list[str]:
        """What the reader cannot promise, in sentences for the user."""

    def close(self) -> None:
        """Ends what runs in the background."""


def view_spec(spec: Spec, options: DataOptions) -> Spec:
    """What a game gets of data that is stored like `spec`; raises ValueError where the transform does not fit it."""
    image = stored = spec.image
    if image is None and options.transform != TransformOptions():
        raise ValueError("`transform` has no effect on signals; leave it out")
    if stored is not None:
        image = result(options.transform, stored)
        moved = options.unlabelled_transform if options.unlabelled_path is None else None
        if moved is not None and result(moved, stored) != image:
            raise ValueError("`unlabelled_transform` gives images of another size than `transform`")
    samples = spec.samples
    if options.subset is not None:  # what was counted is of all samples
        spec = spec.model_copy(update={"mask_pixels": (), "mask_present": ()})
    sizes = tuple(placed(options.transform, *size) for size in spec.sizes)
    if options.subset is not None and options.subset.per_class is not None:
        if spec.label is None:
            raise ValueError("`subset.per_class` chooses by class, and the dataset has no labels; use `subset.samples`")
        samples = options.subset.per_class * spec.label.classes
    elif options.subset is not None:
        samples = options.subset.samples
    return spec.model_copy(update={"image": image, "samples": samples, "sizes": sizes})


def choose(reader: Reader, options: DataOptions, classes: int | None) -> npt.NDArray[np.uint64]:
    """The samples of `data.subset`: the first, or the first of each class, in an order of its own; raises InputError where there are
    too few.

    Labels are read one by one until every class has its number; with a quarantine those that are damaged are passed over.
    """
    subset = options.subset
    assert subset is not None
    if subset.samples is not None:
        if subset.samples > len(reader):
            raise InputError(
                f"`data.subset`: `samples` asks for {subset.samples}, and the split has {len(reader)}; use at most as many"
            )
        return Permutation(len(reader), subset.seed, "subset", 0)(np.arange(subset.samples, dtype=np.uint64))
    assert subset.per_class is not None
    assert classes is not None
    counts = reader.dataset.manifest.counts.get(options.split)
    known = list(counts.labels) if counts is not None and counts.labels else [subset.per_class] * classes
    left, found = [subset.per_class] * classes, list[int]()
    length, ranged = len(reader), reader.uncached()
    permutation = Permutation(length, subset.seed, "subset", 0)
    for first in range(0, length if min(known) >= subset.per_class else 0, 1024):
        numbers = permutation(np.arange(first, min(first + 1024, length), dtype=np.uint64))
        for number, shard, place in zip(numbers.tolist(), *reader.locate(numbers), strict=True):
            try:
                label = label_number(ranged.read(shard, place, ("label",))["label"][1])
            except (BadSample, ValueError):
                if not options.quarantine:
                    raise
                continue
            if label < classes and left[label]:
                left[label] -= 1
                found.append(number)
        if not any(left):
            return np.array(found, np.uint64)
    enough = min(known) >= subset.per_class  # as `dataset.json` says; a damaged label may still be one too few
    has = [subset.per_class - missing for missing in left] if enough else known
    short = next(label for label, count in enumerate(has) if count < subset.per_class)
    raise InputError(
        f"`data.subset`: class {short} has {has[short]} samples in the split, and `per_class` asks for {subset.per_class}"
    )


def refuse_strange(mask: Pixels, stored: MaskSpec) -> None:
    """Raises ValueError where a mask has a value that is neither a class nor the ignored one."""
    classes, ignore = stored.classes, stored.ignore
    if int(mask.max(initial=0)) >= classes and (strange := mask[(mask >= classes) & (mask != (ignore or 0))]).size:
        raise ValueError(f"has a mask with the value {strange[0]}, and there are {classes} classes")


def whole_image(member: Member, stored: ImageSpec | None) -> Pixels:
    """(H, W, C) pixels of an image in its own size; raises ValueError where it is damaged or not what the dataset says."""
    assert stored is not None
    height, width = image_shape(member[1], member[0])[:2]
    if stored.height is not None and (height, width) != (stored.height, stored.width):
        raise ValueError(f"is {width}×{height}, and the dataset says {stored.width}×{stored.height}")
    pixels = decoded(member[1], member[0], stored.channels)
    if pixels.shape[2] != stored.channels:
        if pixels.shape[2] != 1:
            raise ValueError(f"has {pixels.shape[2]} channels, and the dataset says {stored.channels}")
        pixels = np.broadcast_to(pixels, (height, width, stored.channels))
    return pixels


@dataclass
class View:
    """A sequence of samples: its order, the members that are read of each, and what is done to its images."""

    name: str
    parts: dict[str, str]  # role -> part
    order: Order
    items: npt.NDArray[np.uint64] | None  # the samples that the order permutes, where these are not all
    transform: TransformOptions
    image: ImageSpec | None
    stored: ImageSpec | None
    reader: Reader
    source: Reader  # that one, or the one whose cache of whole shards it does not use
    first: int  # what tells its samples from those of another dataset, by number
    header: bytes = b""  # of .npy images that can be read straight into a batch
    kept: Kept | None = None  # where all of it fits into memory, and a sample is the same whenever it is met

    @property
    def roles(self) -> tuple[str, ...]:
        """The members read of each sample."""
        return tuple(self.parts)

    def numbers(self, picks: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Sample numbers of places in the order."""
        return picks if self.items is None else self.items[picks]


@dataclass
class Loaded:
    """A draw as the disk has it, and what went wrong on the way; a fault with the number -1 is in place of data."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, list[int]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


class Stream:
    """Batches by draw number. While one draw trains, the next ones are read and decoded by background threads.

    Threads, not processes: reading, hashing and decoding release the interpreter's lock, and a batch from another process
    has to be copied (measured in benchmarks/data.py).
    """

    def __init__(self, reader: Reader, options: DataOptions, share: Share, other: Reader | None = None) -> None:
        """`other` reads the dataset at `data.unlabelled_path`; its samples are numbered on from those of the first."""
        self.reader, self.options, self.share, self.other = reader, options, share, other or reader
        self.spec = view_spec(reader.dataset.spec(options.split), options)
        self.batch, self.seed, self.device, self.rows = share.batch, share.seed, share.device, share.rows
        self.waited = 0.0
        classes = self.spec.label.classes if self.spec.label is not None else None
        self.subset = choose(reader, options, classes) if options.subset is not None else None
        self.views = self._views(share.parts)
        self._ahead = max(2, options.workers)
        self._threads = ThreadPoolExecutor(options.workers, "stream") if options.workers else None
        self._pending: dict[int, Future[Loaded]] = {}
        self._recent: OrderedDict[int, list[Batch]] = OrderedDict()
        self._told: set[int] = set()  # draws whose faults `ready` has handed on
        self._windows: dict[str, list[list[int]]] = {}  # shards that each view wants, this window's and the next one's
        self._window_lock = threading.Lock()

    def _views(self, parts: Sequence[str]) -> list[View]:
        found: dict[str, View] = {}
        for part in parts:
            name, role = PARTS[part]
            if name not in found:
                items = self.subset if name == "labelled" else None
                unlabelled = name != "labelled" and self.options.unlabelled_transform is not None
                transform = self.options.unlabelled_transform if unlabelled else self.options.transform
                assert transform is not None
                source = self.reader if name == "labelled" else self.other
                stored = source.dataset.manifest.image
                order = self._order(source, _PURPOSES[name], items)
                reader = source if isinstance(order, Windowed) else source.uncached()
                first = 0 if source is self.reader else len(self.reader)
                found[name] = View(name, {}, order, items, transform, self.spec.image, stored, reader, source, first)
            found[name].parts[role] = part
        for view in found.values():
            if "image" in view.parts and not moves(view.transform) and view.image is not None and view.image.height:
                view.header = self._header(view)
        left = self.options.memory_gib * 2**30
        kept: dict[str, Kept] = {}  # two orders of the same samples keep them once
        for view in found.values():
            same = repr((view.transform, sorted(view.parts), view.items is None, view.first))
            size = self._bytes(view)
            if same not in kept and size is not None and size <= left:
                kept[same] = Kept(view.order.length)
                left -= size
            view.kept = kept.get(same)
        return list(found.values())

    def _bytes(self, view: View) -> int | None:
        """What all samples of a view take in memory; None where they change when they are met again."""
        if moves_at_random(view.transform):
            return None
        bytes_of = 8 * ("label" in view.parts) + 16 * (view.transform.canvas is not None)
        if view.image is not None and ("image" in view.parts or "mask" in view.parts):
            if view.image.height is None or view.image.width is None:
                return None
            bytes_of += view.image.height * view.image.width * (view.image.channels + ("mask" in view.parts))
        if self.spec.signal is not None and "signal" in view.parts:
            bytes_of += 4 * self.spec.signal.channels * self.spec.signal.length
        return bytes_of * view.order.length

    def _order(self, source: Reader, purpose: str, items: npt.NDArray[np.uint64] | None) -> Order:
        if items is not None:
            return Full(len(items), self.seed, purpose)
        if self.options.shuffle == "window":
            sizes = [shard.samples for shard in source.shards]
            return Windowed(sizes, self.options.window_shards, self.seed, purpose)
        return Full(len(source), self.seed, purpose)

    def _header(self, view: View) -> bytes:
        """The .npy header that the images have in common, if they are stored as arrays of the batch's shape."""
        try:
            shard, place = view.reader.locate(np.zeros(1, np.uint64))
            member = view.reader.read(shard[0], place[0], ("image",))["image"]
            assert view.image is not None
            wanted = view.image.height, view.image.width, view.image.channels
            if member[0] == "npy" and image_shape(member[1], "npy") == wanted:
                return npy_header(member[1])
        except (ValueError, BadSample):
            pass  # the first sample is bad: it will be met, named and counted like any other
        return b""

    # ---- what is where

    def numbers(self, draw: int, rows: range | None = None) -> list[int]:
        """The sample numbers of a draw, of this process's rows or of any others."""
        view = self.views[0]
        picks = view.order(places_of(draw, self.rows if rows is None else rows, self.batch))
        return [int(number) for number in view.numbers(picks)]

    def promises(self) -> list[str]:
        """Sentences on what this order cannot promise."""
        mixed = {
            view.source.dataset.location: view.source.dataset for view in self.views if isinstance(view.order, Windowed)
        }
        return [
            f"`data.shuffle: window` mixes {self.options.window_shards} shards at a time, and {location} was not shuffled "
            "when it was packed: if its shards are sorted, batches are less random than they look"
            for location, dataset in mixed.items()
            if not dataset.manifest.shuffled
        ]

    def key(self, part: str, number: int) -> str:
        """The key of a sample by its number in the dataset that a part is of."""
        return (self.reader if PARTS[part].view == "labelled" else self.other).key(number)

    # ---- reading

    def load(self, draw: int) -> Loaded:
        """A draw as the disk has it: image (B, H, W, C) uint8, label (B,) int64; page-locked for a GPU. Never raises a Failure."""
        loaded = Loaded()
        try:
            for view in self.views:
                if view.kept is None or not view.kept.complete:
                    self._read_ahead(view, draw)
                self._load_view(view, draw, loaded)
        except (Failure, InputError, OSError) as error:
            loaded.faults.append(Fault(-1, str(error)))
        if self.device.type == "cuda":
            loaded.parts = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
                for name, tensor in loaded.parts.items()
            }
        return loaded

    def _load_view(self, view: View, draw: int, loaded: Loaded) -> None:
        places = places_of(draw, self.rows, self.batch)
        picks = view.order(places)
        numbers = view.numbers(picks)
        count = len(numbers)
        image = view.image
        arrays: dict[str, npt.NDArray[Any]] = {}
        rows: npt.NDArray[np.uint8] | None = None
        if "image" in view.parts or "mask" in view.parts:
            if image is None or image.height is None or image.width is None:
                raise Failure(
                    f"{view.source.dataset.location}: its images differ in size; set `data.transform.crop`, or pack them with --size"
                )
            rows = np.empty((count, len(view.header) + image.height * image.width * image.channels), np.uint8)
            arrays["image"] = rows[:, len(view.header) :].reshape(count, image.height, image.width, image.channels)
            if "mask" in view.parts:
                arrays["mask"] = np.empty((count, image.height, image.width), np.uint8)
            if view.transform.canvas is not None:
                arrays["extent"] = np.empty((count, 2), np.int64)
        if "label" in view.parts:
            arrays["label"] = np.empty(count, np.int64)
        if "signal" in view.parts:
            assert self.spec.signal is not None
            arrays["signal"] = np.empty((count, self.spec.signal.channels, self.spec.signal.length), np.float32)
        original = numbers.copy()
        if view.kept is not None and view.kept.take(picks.astype(np.int64), arrays):
            self._hand_over(view, arrays, numbers, loaded)
            return
        drawn = None
        if moves(view.transform):
            drawn = Moves.draw(view.transform, places, self.seed, f"transform/{view.name}")
        shards, locals_ = view.reader.locate(numbers)
        missing = self._straight(view, shards, locals_, rows, arrays)
        for row in sorted(set().union(*missing.values())):
            wanted = [role for role in view.parts if row in missing[role]]
            try:
                self._fill(view, wanted, row, shards[row], locals_[row], arrays, drawn)
            except (BadSample, ValueError) as error:
                loaded.faults.append(self._fault(view, int(numbers[row]), error))
                numbers[row] = self._substitute(view, row, int(picks[row]), arrays, drawn, loaded)
        if view.kept is not None:
            sound = numbers == original
            view.kept.put(picks.astype(np.int64)[sound], {name: array[sound] for name, array in arrays.items()})
        self._hand_over(view, arrays, numbers, loaded)

    def _hand_over(
        self, view: View, arrays: dict[str, npt.NDArray[Any]], numbers: npt.NDArray[Any], loaded: Loaded
    ) -> None:
        for role, part in view.parts.items():
            loaded.parts[part] = torch.from_numpy(arrays[role])
            if role == "image" and "extent" in arrays:
                loaded.parts[part + EXTENT] = torch.from_numpy(arrays["extent"])
        loaded.numbers[view.name] = numbers.tolist()

    def _straight(
        self,
        view: View,
        shards: list[int],
        places: list[int],
        rows: npt.NDArray[np.uint8] | None,
        arrays: dict[str, npt.NDArray[Any]],
    ) -> dict[str, Collection[int]]:
        """Reads labels, and images that are stored as the batch wants them; by role, the rows to be read another way."""
        left: dict[str, Collection[int]] = dict.fromkeys(view.parts, range(len(shards)))
        if "label" in view.parts and self.spec.label is not None:
            unread = view.reader.label_rows(shards, places, arrays["label"])
            beyond = np.flatnonzero(arrays["label"] >= self.spec.label.classes).tolist()
            left["label"] = {*unread, *beyond}
        if rows is not None and view.header:
            missing = set(view.reader.image_rows(shards, places, rows))
            head = rows[:, : len(view.header)]
            if head.tobytes() != view.header * len(rows):  # some are of another shape, or were not read at all
                missing |= set(np.flatnonzero((head != np.frombuffer(view.header, np.uint8)).any(1)).tolist())
            left["image"] = missing
        return left

    def _fault(self, view: View, number: int, error: Exception) -> Fault:
        where = view.source.where(number)
        try:
            name = repr(view.source.key(number))
        except Failure:
            name = str(number)
        return Fault(view.first + number, str(error) if where in str(error) else f"{where}: sample {name} {error}")

    def _substitute(
        self,
        view: View,
        row: int,
        pick: int,
        arrays: dict[str, npt.NDArray[Any]],
        drawn: Moves | None,
        loaded: Loaded,
    ) -> int:
        """The next sound sample by number in the place of a bad one, for whoever meets it, whenever; returns which."""
        tries = min(MAX_SUBSTITUTES, view.order.length)
        for step in range(1, tries):
            number = int(view.numbers(np.array([(pick + step) % view.order.length], np.uint64))[0])
            (shard,), (place,) = view.reader.locate(np.array([number], np.uint64))
            try:
                self._fill(view, view.roles, row, shard, place, arrays, drawn)
                return number
            except (BadSample, ValueError) as error:
                loaded.faults.append(self._fault(view, number, error))
        raise Failure(f"{view.source.dataset.location}: {tries} bad samples one after the other")

    def _fill(
        self,
        view: View,
        roles: Sequence[str],
        row: int,
        shard: int,
        place: int,
        arrays: dict[str, npt.NDArray[Any]],
        drawn: Moves | None,
    ) -> None:
        """One sample into its row; raises BadSample or ValueError saying what is wrong with it."""
        members = view.reader.read(shard, place, roles)
        if "image" in members:
            member, out = members["image"], arrays["image"][row]
            if drawn is not None:
                moved = drawn.apply(view.transform, row, whole_image(member, view.stored))
                if "extent" in arrays:
                    laid(moved, out, GREY)
                    arrays["extent"][row] = moved.shape[:2]
                else:
                    out[:] = moved
            else:
                image_pixels(member[1], member[0], out)
        if "mask" in members:
            member = members["mask"]
            mask = mask_classes(member[1], member[0])
            if drawn is not None:
                mask = drawn.apply(view.transform, row, mask, mask=True)
            if mask.shape != (tuple(arrays["extent"][row]) if "extent" in arrays else arrays["mask"].shape[1:]):
                raise ValueError(f"has a mask of {mask.shape[1]}×{mask.shape[0]} pixels for another image")
            assert self.spec.mask is not None
            refuse_strange(mask, self.spec.mask)
            laid(mask, arrays["mask"][row], 0)
        if "label" in members:
            label = label_number(members["label"][1])
            if self.spec.label is not None and label >= self.spec.label.classes:
                raise ValueError(f"has the label {label}, and there are {self.spec.label.classes} classes")
            arrays["label"][row] = label
        if "signal" in members:
            signal = signal_values(members["signal"][1])
            if signal.shape != arrays["signal"].shape[1:]:
                raise ValueError(f"has shape {signal.shape}, and the dataset says {arrays['signal'].shape[1:]}")
            arrays["signal"][row] = signal

    def _read_ahead(self, view: View, draw: int) -> None:
        """Where shards are read in windows: asks for those of this window and of the next, and lets older ones go."""
        if not isinstance(view.order, Windowed):
            return
        windows = view.order.windows(draw * self.batch, 2)
        with self._window_lock:
            if windows == self._windows.get(view.name):
                return
            self._windows[view.name] = windows
            alike = [other.name for other in self.views if other.source is view.source]
            kept = {shard for name in alike for window in self._windows.get(name, []) for shard in window}
            view.source.read_ahead([shard for window in windows for shard in window], kept)

    # ---- the loop's side

    def _ask(self, draw: int) -> None:
        if draw not in self._pending:
            if self._threads is not None:
                self._pending[draw] = self._threads.submit(self.load, draw)
            else:
                self._pending[draw] = Future()
                self._pending[draw].set_result(self.load(draw))

    def _wait(self, draw: int) -> Loaded:
        began = time.perf_counter()
        self._ask(draw)
        loaded = self._pending[draw].result()
        self.waited += time.perf_counter() - began
        return loaded

    def ready(self, draws: Sequence[int]) -> list[Fault]:
        """Waits for these draws and returns what is wrong with them, each fault once."""
        wanted = [draw for draw in draws if draw not in self._recent]
        began = time.perf_counter()
        for draw in wanted:
            self._ask(draw)
        if self._threads is None:
            self.waited += time.perf_counter() - began
        found = [fault for draw in wanted if draw not in self._told for fault in self._wait(draw).faults]
        self._told = set(draws)
        return found

    def read(self, draw: int) -> list[Batch]:
        """The micro-batches of a draw, on the device; asks for the following draws in the background.

        Raises Failure for a fault that `ready` did not hand on before.
        """
        if draw in self._recent:
            return self._recent[draw]
        last = max([draw + self._ahead, *self._told])
        for old in [known for known in self._pending if not draw <= known <= last]:
            self._pending.pop(old).cancel()
        self._ask(draw)
        if self._threads is not None:
            for ahead in range(draw + 1, draw + self._ahead + 1):
                self._ask(ahead)
        loaded = self._wait(draw)
        del self._pending[draw]
        fatal = [fault for fault in loaded.faults if fault.number < 0 or draw not in self._told]
        if fatal:
            raise Failure(fatal[0].message)
        self._recent[draw] = self._split(draw, loaded)
        while len(self._recent) > self.share.recall:
            self._recent.popitem(last=False)
        return self._recent[draw]

    def _split(self, draw: int, loaded: Loaded) -> list[Batch]:
        parts = {name: tensor.to(self.device, non_blocking=True) for name, tensor in loaded.parts.items()}
        numbers = {}
        for view in self.views:
            for role, part in view.parts.items():
                numbers[part] = loaded.numbers[view.name]
                if role == "image":
                    parts[part] = values(view.transform, parts[part].permute(0, 3, 1, 2))
                elif role == "mask":
                    parts[part] = self._known(parts[part].long(), parts.get(view.parts.get("image", "") + EXTENT))
        return self.share.micro_batches(draw, parts, numbers)

    def _known(self, mask: Tensor, extent: Tensor | None) -> Tensor:
        """Class numbers (B, H, W), `IGNORED` where there are none."""
        assert self.spec.mask is not None
        if self.spec.mask.ignore is not None:
            mask = mask.masked_fill_(mask == self.spec.mask.ignore, IGNORED)
        if extent is not None:
            mask = mask.masked_fill_(~within(extent, mask.shape[1], mask.shape[2]), IGNORED)
        return mask

    def close(self) -> None:
        """Ends the background threads."""
        self.reader.stop()
        self.other.stop()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self.reader.close()
        self.other.close()
