"""A dataset: a folder of shards with their indexes, and `dataset.json`, which says what they hold and hash to."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from gandist.data.decode import (
    ENCODED,
    IMAGE_SUFFIXES,
    LABEL_SUFFIX,
    MAX_PIXELS,
    check_encoded,
    image_shape,
    label_number,
)
from gandist.data.index import ShardIndex, digest, index_path, scan
from gandist.recipe import Failure, InputError, Section, suggestion, wording

NAME = "dataset.json"
Count = Annotated[int, Field(ge=1)]
SHARD_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.tar$"
FileName = Annotated[str, Field(pattern=SHARD_NAME)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


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

    classes: Annotated[int, Field(ge=1, le=1_000_000)]
    names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_fit(self) -> LabelSpec:
        if len(self.names) not in (0, self.classes):
            raise ValueError(f"{len(self.names)} names for {self.classes} classes")
        return self


class Shard(Section):
    """One tar beside its index."""

    name: FileName
    samples: Count
    bytes: Count
    digest: Hex
    index_digest: Hex


class Spec(Section):
    """What a game is told of the data."""

    samples: Count
    image: ImageSpec
    label: LabelSpec | None


class Manifest(Section):
    """The contents of `dataset.json`."""

    gandist_dataset: Literal[1] = 1
    source: dict[str, str | int | None]
    image: ImageSpec
    label: LabelSpec | None
    splits: Annotated[dict[str, Annotated[tuple[Shard, ...], Field(min_length=1)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _counts_each_shard_once(self) -> Manifest:
        names = [shard.name for shards in self.splits.values() for shard in shards]
        if len(set(names)) < len(names):
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is named twice; each shard counts once")
        return self


def file_digest(path: Path) -> str:
    """BLAKE2b-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes aside, syncs and renames, so that `path` holds either the old bytes or the new ones."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Dataset:
    """An opened dataset folder; `digest` names its contents to the last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / NAME
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{folder}: no dataset: {path.name} cannot be read ({error.strerror}); make one with "
                f"`gandist pack SOURCE {folder}`, or with `gandist index` from shards that you have"
            ) from None
        try:
            self.manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {wording(first)}") from None
        self.digest = hashlib.blake2b(text, digest_size=32).hexdigest()

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split; raises InputError when there is no such split."""
        splits = self.manifest.splits
        if split not in splits:
            raise InputError(f"{self.folder}: {split!r} is not a split{suggestion(split, splits)}")
        return splits[split]

    def spec(self, split: str) -> Spec:
        """Counts and sizes of a split."""
        samples = sum(shard.samples for shard in self.shards(split))
        return Spec(samples=samples, image=self.manifest.image, label=self.manifest.label)

    def check_sizes(self, split: str) -> None:
        """Refuses, at a cost of two `stat` a shard, shards that are missing or were replaced."""
        for shard in self.shards(split):
            path = self.folder / shard.name
            try:
                found = path.stat().st_size
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; `{NAME}` names it") from None
            if found != shard.bytes:
                raise InputError(
                    f"{path}: {found} bytes, and `{NAME}` says {shard.bytes}: the shard was replaced or cut off"
                )
            if not index_path(path).exists():
                raise InputError(f"{index_path(path)}: missing; make it with `gandist index`")

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> str:
        """Reads every byte; returns the digest of the dataset or raises Failure naming the first damaged file."""
        for split, shards in self.manifest.splits.items():
            self.check_sizes(split)
            for shard in shards:
                path = self.folder / shard.name
                for file, expected in ((path, shard.digest), (index_path(path), shard.index_digest)):
                    found = file_digest(file)
                    if found != expected:
                        raise Failure(
                            f"{file}: damaged: its digest is {found[:16]}…, and `{NAME}` says {expected[:16]}…"
                        )
                progress(shard.samples)
        return self.digest


class Indexer:
    """Indexes shards and learns what they hold; `finish` writes `dataset.json`."""

    def __init__(self, folder: Path, decode: bool = False) -> None:
        self.folder, self.decode = folder, decode  # every encoded image, once, to its end
        self.sizes: set[tuple[int, int]] = set()
        self.channels: set[int] = set()
        self.labels = 0
        self.classes = 0
        self.samples = 0

    def add(self, path: Path, progress: Callable[[int], None] = lambda _: None) -> Shard:
        """Scans one shard, writes its index beside it and returns its record."""
        if not re.fullmatch(SHARD_NAME, path.name):
            raise InputError(
                f"{path}: a shard's name must be letters, digits, '.', '_' and '-', and end with .tar; rename it"
            )
        rows = []
        for sample in scan(path):
            rows.append((sample.offset, {s: (p, len(d), digest(d)) for s, (p, d) in sample.members.items()}))
            images = [suffix for suffix in sample.members if suffix in IMAGE_SUFFIXES]
            if len(images) != 1:
                raise InputError(
                    f"{path}: sample {sample.key!r} has {len(images)} images among its members "
                    f"{', '.join(sample.members)}; one is needed, as one of: {', '.join(IMAGE_SUFFIXES)}"
                )
            try:
                height, width, channels = image_shape(sample.members[images[0]][1], images[0])
                if self.decode and images[0] in ENCODED:
                    check_encoded(sample.members[images[0]][1], images[0])
                if LABEL_SUFFIX in sample.members:
                    self.classes = max(self.classes, 1 + label_number(sample.members[LABEL_SUFFIX][1]))
                    self.labels += 1
            except ValueError as error:
                raise InputError(f"{path}: sample {sample.key!r} {error}") from None
            self.sizes.add((height, width))
            self.channels.add(channels)
            self.samples += 1
            progress(1)
        index = ShardIndex.build(rows, path.stat().st_size)
        write_atomically(index_path(path), index.to_bytes())
        return Shard(
            name=path.name,
            samples=len(rows),
            bytes=index.shard_bytes,
            digest=file_digest(path),
            index_digest=file_digest(index_path(path)),
        )

    def finish(
        self, splits: dict[str, tuple[Shard, ...]], source: dict[str, str | int | None], names: tuple[str, ...] = ()
    ) -> Dataset:
        """Writes `dataset.json` last, so that a folder that has one is complete."""
        if 0 < self.labels < self.samples:
            raise InputError(f"{self.folder}: {self.labels} of {self.samples} samples have a label; all or none must")
        same = len(self.sizes) == 1
        height, width = next(iter(self.sizes)) if same else (None, None)
        if len(self.channels) > 1 and not self.channels <= {1, 3}:
            raise InputError(f"{self.folder}: images with {sorted(self.channels)} channels cannot be mixed")
        names = names if len(names) >= self.classes else ()
        label = LabelSpec(classes=len(names) or self.classes, names=names) if self.labels else None
        manifest = Manifest(
            source=source,
            image=ImageSpec(height=height, width=width, channels=max(self.channels)),
            label=label,
            splits=splits,
        )
        write_atomically(self.folder / NAME, manifest.model_dump_json(indent=1).encode() + b"\n")
        return Dataset(self.folder)
