"""A dataset: shards with their indexes, and `dataset.json`, which says what they hold and hash to."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from gandist.data.decode import MAX_CHANNELS, MAX_PIXELS, MAX_SIGNAL
from gandist.data.index import ShardIndex, index_path
from gandist.data.storage import Store, refuse_secrets
from gandist.data.tar import MAX_MEMBERS
from gandist.recipe import NO_NUL, Failure, InputError, Section, suggestion, wording

NAME = "dataset.json"
MAX_MANIFEST = 1 << 25
MAX_CLASSES = 1_000_000
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
SHARD_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.tar$"
FileName = Annotated[str, Field(pattern=SHARD_NAME)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Names = tuple[str, ...]
_Edge = Annotated[int, Field(ge=1, le=MAX_PIXELS)]
PixelSize = tuple[_Edge, _Edge]  # height and width


class ImageSpec(Section):
    """The size of the images in pixels; height and width are None where they differ."""

    height: Count | None
    width: Count | None
    channels: Annotated[int, Field(ge=1, le=16)]

    @model_validator(mode="after")
    def _is_bounded(self) -> ImageSpec:
        if (self.height or 1) * (self.width or 1) > MAX_PIXELS:
            raise ValueError(f"{self.width}×{self.height} pixels are too many; the limit is {MAX_PIXELS}")
        return self


class LabelSpec(Section):
    """Classes 0 … classes-1; `names` is empty where nobody gave any."""

    classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    names: Names = ()

    @model_validator(mode="after")
    def _names_fit(self) -> LabelSpec:
        if len(self.names) not in (0, self.classes):
            raise ValueError(f"{len(self.names)} names for {self.classes} classes")
        return self


class MaskSpec(Section):
    """Classes 0 … classes-1 of pixels; `ignore` is the value of pixels that have none."""

    classes: Annotated[int, Field(ge=1, le=256)]
    ignore: Annotated[int, Field(ge=0, le=255)] | None = 255
    names: Names = ()

    @model_validator(mode="after")
    def _names_fit(self) -> MaskSpec:
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(f"two classes are called {twice[0]!r}; scores are told apart by name")
        if len(self.names) not in (0, self.classes):
            raise ValueError(f"{len(self.names)} names for {self.classes} classes")
        return self


class SignalSpec(Section):
    """1-D signals: (channels, length) values each."""

    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
    length: Count

    @model_validator(mode="after")
    def _is_bounded(self) -> SignalSpec:
        if self.channels * self.length > MAX_SIGNAL:
            raise ValueError(f"{self.channels}×{self.length} values are too many; the limit is {MAX_SIGNAL}")
        return self


class Shard(Section):
    """One tar and its index."""

    name: FileName
    samples: Annotated[int, Field(ge=1, le=MAX_MEMBERS)]
    bytes: Annotated[int, Field(ge=1, lt=2**48)]
    digest: Hex
    index_bytes: Count
    index_digest: Hex


class Spec(Section):
    """What a game is told of the data; `samples` is None, and pixels and sizes are (), where nobody counted them."""

    samples: Count | None
    image: ImageSpec | None
    label: LabelSpec | None
    mask: MaskSpec | None = None
    signal: SignalSpec | None = None
    mask_pixels: tuple[Natural, ...] = ()  # as in `Counts`
    mask_present: tuple[Natural, ...] = ()
    sizes: tuple[PixelSize, ...] = ()

    @property
    def canvas(self) -> PixelSize | None:
        """The smallest canvas that holds every image of the split, where that is known."""
        return (max(height for height, _ in self.sizes), max(width for _, width in self.sizes)) if self.sizes else None

    @property
    def roles(self) -> tuple[str, ...]:
        """The members that every sample has."""
        return tuple(role for role in ("image", "label", "mask", "signal") if getattr(self, role) is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image, or else (C, L) of a signal, for data whose samples are of one size."""
        if self.image is None:
            assert self.signal is not None
            return self.signal.channels, self.signal.length
        assert self.image.height is not None
        assert self.image.width is not None
        return self.image.channels, self.image.height, self.image.width


class Counts(Section):
    """What a split holds by class: samples by label, pixels by mask class, and files left out because they are damaged.

    `mask_present` are the pixels, but for ignored ones, of the images in which a class occurs: `mask_pixels` over these is the
    frequency whose median weighs the classes in Eigen and Fergus (2015). `sizes` are, of images that differ in size, those by which
    a transform is judged: `outer_sizes`.
    """

    labels: tuple[Natural, ...] = ()
    mask_pixels: tuple[Natural, ...] = ()
    mask_present: tuple[Natural, ...] = ()
    ignored_pixels: Natural = 0
    skipped: Natural = 0
    sizes: Annotated[tuple[PixelSize, ...], Field(max_length=5)] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_not_counted(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So a dataset without masks, or of one size, has the digest that it had before these were counted.
        found: dict[str, Any] = dump(self)
        return {name: value for name, value in found.items() if name not in ("mask_present", "sizes") or value}


def outer_sizes(sizes: Iterable[PixelSize]) -> tuple[PixelSize, ...]:
    """Of several sizes those that a transform refuses where it refuses any: the highest, the widest, the two that are most so in
    proportion, which are the largest once the shorter side is given, and that of the shortest side.
    """
    found = sorted(set(sizes))
    if len(found) < 2:
        return tuple(found)
    ways: tuple[Callable[[PixelSize], float], ...] = (
        lambda size: size[0],
        lambda size: size[1],
        lambda size: size[0] / size[1],
        lambda size: size[1] / size[0],
        lambda size: -min(size),
    )
    return tuple(sorted({max(found, key=way) for way in ways}))


class Manifest(Section):
    """The contents of `dataset.json`."""

    gandist_dataset: Literal[2] = 2
    source: dict[str, str | int | None]
    image: ImageSpec | None
    label: LabelSpec | None
    mask: MaskSpec | None = None
    signal: SignalSpec | None = None
    shards_at: Annotated[str, Field(min_length=1, pattern=NO_NUL)] | None = None  # where the tars lie, if not here
    splits: Annotated[dict[str, Annotated[tuple[Shard, ...], Field(min_length=1)]], Field(min_length=1)]
    counts: dict[str, Counts] = {}

    @model_validator(mode="after")
    def _counts_each_shard_once(self) -> Manifest:
        names = [shard.name for shards in self.splits.values() for shard in shards]
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{name} is named twice; each shard counts once")
        return self

    @model_validator(mode="after")
    def _counts_are_of_its_classes(self) -> Manifest:
        for split, counts in self.counts.items():
            for found in (counts.mask_pixels, counts.mask_present):
                if found and (self.mask is None or len(found) != self.mask.classes):
                    classes = self.mask.classes if self.mask is not None else 0
                    raise ValueError(
                        f"the split {split} counts pixels of {len(found)} classes, and masks have {classes}"
                    )
        return self

    @model_validator(mode="after")
    def _holds_something(self) -> Manifest:
        if self.image is None and self.signal is None:
            raise ValueError("neither images nor signals")
        return self

    @property
    def shuffled(self) -> bool:
        """Whether the samples were shuffled before they were written."""
        return self.source.get("shuffle") is not None


def file_digest(path: Path) -> str:
    """BLAKE2b-256 of a file in hexadecimal."""
    if not path.is_file():
        raise Failure(f"{path}: is not a plain file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes aside, syncs and renames, so that `path` holds either the old bytes or the new ones.

    The name aside is unique: processes that write the same file at once write the same bytes.
    """
    handle, aside = tempfile.mkstemp(suffix=".tmp", prefix=path.name, dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(handle, 0o644)
    os.replace(aside, path)


class Dataset:
    """An opened dataset, in a local folder or behind a URL; `digest` names its contents to the last byte."""

    def __init__(self, location: str | Path) -> None:
        self.store = Store.at(str(location))
        self.location = self.store.location
        try:
            text = self.store.read(NAME, MAX_MANIFEST)
        except (InputError, Failure) as error:
            raise InputError(
                f"{location}: no dataset: {error}; make one with "
                f"`gandist pack SOURCE {location}`, or with `gandist index` from shards that you have"
            ) from None
        try:
            self.manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            if first["loc"] == ("gandist_dataset",):
                raise InputError(
                    f"{self.store.name(NAME)}: is of another version of gandist; pack or index it anew"
                ) from None
            raise InputError(
                f"{self.store.name(NAME)}: `{'.'.join(map(str, first['loc']))}`: {wording(first)}"
            ) from None
        self.digest = hashlib.blake2b(text, digest_size=32).hexdigest()
        apart = self.manifest.shards_at
        if apart is not None:
            refuse_secrets(apart, f"`{NAME}` says where the shards lie")
            if self.store.local is None:  # what a stranger publishes must not send anybody's credentials elsewhere
                raise InputError(f"{self.store.name(NAME)}: `shards_at`: the shards of a remote dataset lie beside it")
        self.shard_store = Store.at(apart) if apart is not None else self.store

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split; raises InputError when there is no such split."""
        splits = self.manifest.splits
        if split not in splits:
            raise InputError(f"{self.location}: {split!r} is not a split{suggestion(split, splits)}")
        return splits[split]

    def spec(self, split: str) -> Spec:
        """Counts and sizes of a split as it is stored."""
        m = self.manifest
        samples = sum(shard.samples for shard in self.shards(split))
        counts = m.counts.get(split, Counts())
        return Spec(
            samples=samples,
            image=m.image,
            label=m.label,
            mask=m.mask,
            signal=m.signal,
            mask_pixels=counts.mask_pixels,
            mask_present=counts.mask_present,
            sizes=counts.sizes,
        )

    def check_sizes(self, split: str) -> None:
        """Refuses, at a cost of two `stat` a shard, local shards that are missing or were replaced; raises InputError."""
        for shard in self.shards(split):
            if self.shard_store.local is not None:
                path = self.shard_store.local / shard.name
                try:
                    found = path.stat().st_size
                except OSError as error:
                    raise InputError(f"{path}: {error.strerror}; `{NAME}` names it") from None
                if found != shard.bytes:
                    raise InputError(
                        f"{path}: {found} bytes, and `{NAME}` says {shard.bytes}: the shard was replaced or cut off"
                    )
            if self.store.local is not None and not index_path(self.store.local / shard.name).exists():
                raise InputError(f"{index_path(self.store.local / shard.name)}: missing; make it with `gandist index`")

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> str:
        """Reads every byte; returns the digest of the dataset or raises Failure naming the first damaged file."""
        with tempfile.TemporaryDirectory() as aside:
            for split, shards in self.manifest.splits.items():
                self.check_sizes(split)
                for shard in shards:
                    for store, name, expected in (
                        (self.shard_store, shard.name, shard.digest),
                        (self.store, index_path(Path(shard.name)).name, shard.index_digest),
                    ):
                        path = store.local / name if store.local is not None else Path(aside) / name
                        if store.local is None:
                            store.fetch(name, path)
                        found = file_digest(path)
                        if found != expected:
                            raise Failure(
                                f"{store.name(name)}: damaged: its digest is {found[:16]}…, and `{NAME}` says {expected[:16]}…"
                            )
                        if name != shard.name:
                            index = ShardIndex.open(path)
                            if (len(index), index.shard_bytes) != (shard.samples, shard.bytes):
                                raise Failure(f"{store.name(name)}: describes another shard than `{NAME}` does")
                        if store.local is None:
                            path.unlink()
                    progress(shard.samples)
        return self.digest
