"""What a trained run is asked: images of folders, archives, arrays, shards, packed datasets and single files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from gandist import checkpoint
from gandist.data.dataset import NAME, Dataset, Spec
from gandist.data.decode import ENCODED, Pixels, decoded, label_number
from gandist.data.opening import open_reader
from gandist.data.read import BadSample
from gandist.data.sources import Split
from gandist.data.sources.open import open_source
from gandist.data.storage import is_remote
from gandist.data.tar import MAX_MEMBER
from gandist.recipe import DataOptions, Failure, InputError, TransformOptions

Kind = TypeVar("Kind")


class Found(NamedTuple):
    """One image of an input, as it is there; or what is wrong with it."""

    input: str
    name: str
    suffix: str = ""
    data: bytes | memoryview = b""
    label: int | None = None  # among the classes of the input
    names: tuple[str, ...] = ()  # of these classes
    damage: str = ""


@dataclass
class Asked:
    """What a trained run is asked: which images, what becomes of damaged ones, and how those of training looked."""

    found: checkpoint.Checkpoint
    device: torch.device
    skip: bool = False  # damaged images, which are counted then
    split: str | None = None  # of packed datasets and of sources that have some; all unless given
    passed_over: list[str] = field(default_factory=list)

    @property
    def spec(self) -> Spec:
        """The data that the run was trained with."""
        return self.found.state.spec

    def trained_transform(self) -> TransformOptions:
        """What was done to images of training; raises Failure."""
        try:
            section = self.found.state.recipe.get("data", {})
            return TransformOptions.model_validate(section.get("transform", {}))
        except (ValidationError, AttributeError) as error:
            raise Failure(
                f"{self.found.folder}: its recipe is not one of this version: `data.transform`: {error}"
            ) from None

    def decoded(self, image: Found) -> Pixels:
        """(H, W, C) in its own size, with the channels of training; raises ValueError."""
        if image.damage:
            raise ValueError(image.damage)
        wanted = self.spec.image
        assert wanted is not None
        pixels = decoded(image.data, image.suffix, wanted.channels)
        if pixels.shape[2] != wanted.channels:
            if pixels.shape[2] != 1:
                raise ValueError(f"has {pixels.shape[2]} channels, and the run was trained on {wanted.channels}")
            pixels = np.broadcast_to(pixels, (*pixels.shape[:2], wanted.channels))
        return pixels

    def pass_over(self, image: Found, error: ValueError) -> None:
        """Notes a damaged image; raises Failure for one that is not to be passed over."""
        message = f"{image.input}: {image.name!r} {error}"
        if not self.skip:
            raise Failure(f"{message}; mend it, or pass over what is damaged with `--bad skip`") from None
        self.passed_over.append(message)

    def refuse_none(self, inputs: list[str]) -> InputError:
        """The error where no image could be read."""
        first = f": {self.passed_over[0]}" if self.passed_over else ""
        return InputError(f"{', '.join(inputs)}: no image of it can be read{first}")

    def told(self) -> Iterator[str]:
        """What was passed over, for the user."""
        if self.passed_over:
            count = len(self.passed_over)
            yield f"{count} damaged image{'s' * (count > 1)} passed over, the first: {self.passed_over[0]}"


def images_of(inputs: list[str], scratch: Path, split: str | None = None) -> Iterator[Found]:
    """The images of folders, archives, arrays, shards, packed datasets and single files; raises InputError where there are none.

    `split` is the one to take of inputs that have some.
    """
    for place in inputs:
        path = Path(place)
        if not is_remote(place) and path.is_file() and path.suffix[1:].lower() in ENCODED:
            yield _file(path)
        elif (is_remote(place) and not place.endswith((".tar", "}"))) or (
            not is_remote(place) and (path / NAME).exists()
        ):
            yield from _packed(place, split)
        else:
            if path.is_file() and path.suffix.lower() in (".gif", ".tif", ".tiff", ".heic", ".avif"):
                raise InputError(f"{place}: is not read; convert it to one of {', '.join(ENCODED)}")
            source = open_source(place, scratch=scratch)
            for name, found in _asked(place, source.splits, split).items():
                for number in range(found.samples):
                    yield _item(place, found, number, f"{name}/{number}", source.names)


def _asked(place: str, splits: Mapping[str, Kind], split: str | None) -> Mapping[str, Kind]:
    if split is not None and split not in splits:
        raise InputError(f"--split {split}: {place} has {', '.join(splits)}")
    return splits if split is None else {split: splits[split]}


def _file(path: Path) -> Found:
    size = path.stat().st_size
    damage = f"has {size} bytes; the limit is {MAX_MEMBER}" if size > MAX_MEMBER else ""
    return Found(str(path), path.name, path.suffix[1:].lower(), b"" if damage else path.read_bytes(), damage=damage)


def _item(place: str, split: Split, number: int, name: str, names: tuple[str, ...]) -> Found:
    try:
        item = split.read(number)
        image = next((suffix for suffix in item.members if suffix in ENCODED or suffix == "npy"), None)
        if image is None:
            raise InputError(f"{place}: holds no images")
        label = label_number(item.members["cls"]) if "cls" in item.members else None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        return Found(place, name, damage=str(error))
    return Found(place, item.name or name, image, item.members[image], label, names)


def _packed(place: str, only: str | None) -> Iterator[Found]:
    dataset = Dataset(place)
    if dataset.manifest.image is None:
        raise InputError(f"{place}: holds signals, and no images")
    names = dataset.manifest.label.names if dataset.manifest.label is not None else ()
    for split in _asked(place, dataset.manifest.splits, only):
        reader = open_reader(DataOptions(path=place, split=split))
        try:
            for number in range(len(reader)):
                name = f"{split}/{number}"
                try:
                    name = f"{split}/{reader.key(number)}"
                    members = reader.uncached().members(number)
                    label = label_number(members["label"][1]) if "label" in members else None
                    yield Found(place, name, *members["image"], label, names)
                except (BadSample, ValueError, KeyError) as error:
                    yield Found(place, name, damage=str(error))
        finally:
            reader.close()


def plain(name: str) -> str:
    """A stranger's name for a class, as far as every font has its letters."""
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in name)
