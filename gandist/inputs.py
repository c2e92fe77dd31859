"""What a trained run is asked about: images of folders, archives, arrays, shards, packed datasets and single files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from gandist.data.dataset import NAME, Dataset
from gandist.data.decode import ENCODED, label_number
from gandist.data.opening import open_reader
from gandist.data.read import BadSample
from gandist.data.sources import Split
from gandist.data.sources.open import open_source
from gandist.data.storage import is_remote
from gandist.data.tar import MAX_MEMBER
from gandist.recipe import DataOptions, InputError

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
