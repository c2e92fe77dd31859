"""Trees: folders, and tar and zip archives of folders, of images, images with masks, or signals; nothing is unpacked."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gandist.data.decode import ENCODED, LABEL_SUFFIX, SIGNAL_SUFFIX
from gandist.data.sources import Item, Source, Split
from gandist.data.sources.arrays import (
    DAMAGE,
    HEAD,
    Array,
    check_shape,
    check_zip,
    image_members,
    npy_view,
    refuse_pickle,
    signal_members,
)
from gandist.data.sources.signals import csv_lines, numbers
from gandist.data.tar import MAX_MEMBER, Member
from gandist.recipe import InputError

KNOWN = (
    "IDX files (plain or .gz), .npy and .npz files, CIFAR in binary, CSV files of paths or numbers, WebDataset shards, "
    "and folders of images (also in a .tar or .zip), whose subfolders become classes, or are images and their masks"
)
SPLITS = {"train": "train", "training": "train", "test": "test", "val": "validation", "validation": "validation"}
_UNREAD = ("tif", "tiff", "gif", "heic", "heif", "avif", "jp2", "jxl", "ppm", "pgm", "tga", "psd", "svg")
ARRAYS = ("npy", "csv")
_WANTED = {*ENCODED, *ARRAYS, *_UNREAD}
_ROLES = {
    **dict.fromkeys(("images", "image", "img", "jpegimages"), "image"),
    **dict.fromkeys(("masks", "mask", "labels", "annotations", "segmentationclass"), "mask"),
}
_PROBES = 8  # files whose bytes go into a digest: signals all have the same size


def suffix_of(name: str) -> str:
    """What stands behind the last dot of a file's name, in small letters."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()


@dataclass(frozen=True)
class Tree:
    """Files below one root by their paths there, in order; `fetch` gives the bytes of one."""

    where: str
    kind: str
    sizes: dict[str, int]
    fetch: Callable[[str], bytes]

    def read(self, name: str) -> bytes:
        """The bytes of a file; raises ValueError where they are not what was there when the tree was opened."""
        if self.sizes[name] > MAX_MEMBER:
            raise ValueError(f"has {self.sizes[name]} bytes; the limit is {MAX_MEMBER}")
        try:
            data = self.fetch(name)
        except DAMAGE as error:
            raise ValueError(f"cannot be read: {error}") from None
        if len(data) != self.sizes[name]:
            raise ValueError("has changed since it was opened")
        return data


class Row(NamedTuple):
    """One item of a tree: what it is called, its file, its mask's file and its class number, where it has them."""

    name: str
    file: str
    mask: str | None = None
    label: int | None = None


def folder_tree(folder: Path) -> Tree:
    """The files of a folder, those behind links to files included."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None

    sizes, prefix = {}, len(os.path.join(folder, ""))
    for base, _, files in os.walk(folder, onerror=refuse):
        for file in files:
            path = os.path.join(base, file)
            if not _wanted(file):
                continue
            try:
                found = os.stat(path)
            except OSError as error:
                raise InputError(f"{path!r}: cannot be read: {error.strerror}; it may be a link to nothing") from None
            if stat.S_ISREG(found.st_mode):
                sizes[path[prefix:]] = found.st_size

    return Tree(str(folder), "folder", _sorted(sizes), lambda name: read_file(folder / name, sizes[name]))


def read_file(path: Path, size: int) -> bytes:
    """The bytes of a file that had `size` of them; one more where it has grown, however far."""
    with path.open("rb") as file:
        return file.read(size + 1)


def _wanted(name: str) -> bool:
    # ._NAME is what macOS keeps beside NAME in archives and on foreign disks; it is no image whatever its suffix says.
    return suffix_of(name) in _WANTED and not name.rpartition("/")[2].startswith("._")


def _sorted(sizes: dict[str, int]) -> dict[str, int]:
    return {name: sizes[name] for name in sorted(sizes)}


def _in_archive(where: Path, names: Iterable[str]) -> Iterator[str]:
    """The names in an archive as paths below its root; raises InputError where one leads out of it or stands twice."""
    seen = set()
    for name in names:
        path = "/".join(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{where}: {name!r} leads out of the archive; pack it anew from inside the folder")
        if path in seen:
            raise InputError(f"{where}: {name!r} stands twice; pack the archive anew")
        seen.add(path)
        yield path


def tar_tree(path: Path, found: list[Member]) -> Tree:
    """The plain files of an uncompressed tar, read where they lie."""
    places = dict(zip(_in_archive(path, (member.name for member in found)), found, strict=True))
    refuse_pickle(path, {name.rpartition("/")[2] for name in places})

    def fetch(name: str) -> bytes:
        with path.open("rb") as file:
            return os.pread(file.fileno(), places[name].size, places[name].start)

    return Tree(str(path), "tar", _sorted({n: m.size for n, m in places.items() if _wanted(n)}), fetch)


def zip_tree(path: Path) -> Tree:
    """The files of a zip archive; raises InputError for bombs, passwords and links."""
    try:
        archive = zipfile.ZipFile(path)
        check_zip(path, archive)
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"{path}: not a zip archive: {error}") from None
    entries = [e for e in archive.infolist() if not e.is_dir() and not e.filename.startswith("__MACOSX/")]
    for entry in entries:
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise InputError(f"{path}: {entry.filename!r} is not a plain file; links and devices are refused")
    places = dict(zip(_in_archive(path, (entry.filename for entry in entries)), entries, strict=True))
    refuse_pickle(path, {name.rpartition("/")[2] for name in places})

    def fetch(name: str) -> bytes:
        with archive.open(places[name]) as file:
            return file.read(places[name].file_size + 1)  # without a size it unfolds all, whatever the head says

    return Tree(str(path), "zip", _sorted({n: e.file_size for n, e in places.items() if _wanted(n)}), fetch)


def _members(tree: Tree, name: str) -> dict[str, bytes]:
    """The image or signal that a file holds; raises ValueError."""
    data = tree.read(name)
    if suffix_of(name) in ENCODED:
        return {suffix_of(name): data}
    values: Array
    if suffix_of(name) == "csv":
        values = numbers(csv_lines(data))[1].T
        values = values.T if values.shape[1] == 1 else values  # one row is one channel, as one column is
    else:
        values = npy_view(data)
    return image_members(values) if values.dtype == np.uint8 else signal_members(values)


def tree_split(tree: Tree, rows: list[Row]) -> Split:
    """The split of a tree that consists of `rows`; signals must all have the shape of the first."""
    first, head = rows[0].file, b""
    try:
        arrays = suffix_of(first) in ARRAYS
        signals = arrays and SIGNAL_SUFFIX in (members := _members(tree, first))
        head = members[SIGNAL_SUFFIX][:HEAD] if signals else b""
    except ValueError as error:
        raise InputError(f"{tree.where}: {first} {error}") from None

    def read(number: int) -> Item:
        row = rows[number]
        try:
            members = _members(tree, row.file)
            if (SIGNAL_SUFFIX in members) != signals:
                raise ValueError(
                    f"and the first, {first}, are not both images or signals; a source is one or the other"
                )
            if signals:
                check_shape(row.file, members[SIGNAL_SUFFIX], first, head)
            if row.mask is not None:
                members["mask.png"] = tree.read(row.mask)
        except ValueError as error:
            raise ValueError(f"({row.file}) {error}") from None
        if row.label is not None:
            members[LABEL_SUFFIX] = str(row.label).encode()
        return Item(row.name, members)

    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        for name in (row.file, row.mask):
            if name is not None:
                digest.update(os.fsencode(name) + f"\0{tree.sizes[name]}\0".encode())
        digest.update(f"{row.label}\0".encode())
    for number in sorted({len(rows) * probe // _PROBES for probe in range(_PROBES)}):
        try:
            digest.update(tree.read(rows[number].file))
        except ValueError as error:
            digest.update(str(error).encode())  # whoever reads the item will say it
    return Split(len(rows), read, digest.hexdigest())


def tree_source(tree: Tree) -> Source:
    """Understands a tree: images with masks, class folders or loose images, below train, val and test or not."""
    unread = [name for name in tree.sizes if suffix_of(name) in _UNREAD]
    if unread:
        raise InputError(
            f"{tree.where}: {len(unread)} images, such as {unread[0]}, are in a format that is not read; "
            f"convert them to one of {', '.join(ENCODED)}, or take them out"
        )
    files = [name for name in tree.sizes if suffix_of(name) in ENCODED] or list(tree.sizes)
    if not files:
        raise InputError(f"{tree.where}: no images in it; known: {KNOWN}, with the suffixes {', '.join(ENCODED)}")
    tops = {name.partition("/")[0] if "/" in name else "" for name in files}
    top = f"{min(tops)}/" if len(tops) == 1 and "" not in tops and not tops <= SPLITS.keys() else ""
    for root in sorted({"", top}):
        paired = _paired(tree, files, root)
        if paired is not None:
            return Source({"kind": f"{tree.kind} of images and masks"}, paired)
    rows, classes = _classed(tree, files, top if tree.kind != "folder" else "")
    return Source({"kind": tree.kind}, {name: tree_split(tree, found) for name, found in rows.items()}, classes)


def _refuse_two_of_one(tree: Tree, tops: set[str]) -> None:
    if len(tops) > len({SPLITS.get(top, top) for top in tops}):
        raise InputError(
            f"{tree.where}: {', '.join(sorted(tops))}: two of these are one split; merge them or rename one"
        )


def _classed(tree: Tree, files: list[str], root: str) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """The rows of each split, and the names of the classes, which are the folders."""
    parts = {name: name[len(root) :].split("/") for name in files}
    tops = {path[0] for path in parts.values() if len(path) > 1}
    _refuse_two_of_one(tree, tops)
    divided = bool(tops) and tops <= SPLITS.keys()
    below = 1 if divided else 0
    found = {path[below] for path in parts.values() if len(path) > below + 1}
    loose = [name for name, path in parts.items() if len(path) <= below or (found and len(path) == below + 1)]
    if loose:
        beside = sorted(found or tops)
        raise InputError(
            f"{tree.where}: {len(loose)} images (such as {parts[loose[0]][-1]}) lie beside the class folders "
            f"{', '.join(beside[:5])}; put every image into a class folder, or all into one folder"
        )
    classes = sorted(found)
    for name in classes:
        if not name.isprintable():  # a name in another encoding comes as lone surrogates
            raise InputError(f"{tree.where}: the class folder {name!r} has no name in UTF-8; rename it")
    number_of = {name: number for number, name in enumerate(classes)}
    rows: dict[str, list[Row]] = {SPLITS[top]: [] for top in sorted(tops)} if divided else {"train": []}
    for name, path in parts.items():
        label = number_of[path[below]] if classes else None
        rows[SPLITS[path[0]] if divided else "train"].append(Row("/".join(path[below:]), name, None, label))
    return rows, tuple(classes)


def _place(path: list[str]) -> tuple[str, str, list[str]] | None:
    """(split's folder or "", role's folder, what is below) of a file among images and masks; None where it is neither."""
    if len(path) > 2 and path[0] in SPLITS and path[1].lower() in _ROLES:
        return path[0], path[1], path[2:]
    if len(path) > 1 and path[0].lower() in _ROLES:
        split = path[1] if len(path) > 2 and path[1] in SPLITS else ""
        return split, path[0], path[2 if split else 1 :]
    return None


def _paired(tree: Tree, files: list[str], root: str) -> dict[str, Split] | None:
    """Splits of images with the masks of the same stem; None where there are no two such folders."""
    found: dict[str, dict[tuple[str, str], tuple[str, str]]] = {"image": {}, "mask": {}}
    folders: set[tuple[str, str]] = set()
    others = []
    doubled = []
    for name in files:
        place = _place(name[len(root) :].split("/")) if name.startswith(root) else None
        if place is None:
            others.append(name)
            continue
        split, folder, rest = place
        folders.add((split, folder))
        called = "/".join(rest)
        key = SPLITS.get(split, split), called.rpartition(".")[0]
        if key in found[_ROLES[folder.lower()]]:
            doubled.append(name)
        found[_ROLES[folder.lower()]][key] = called, name
    images, masks = found["image"], found["mask"]
    if masks and not images and not others:
        raise InputError(
            f"{tree.where}: {len(masks)} masks, and no images; put them into a folder images beside that of the masks"
        )
    if not images or not masks:
        return None
    for role in ("image", "mask"):
        named = sorted({folder for _, folder in folders if _ROLES[folder.lower()] == role})
        if len(named) > 1:
            raise InputError(f"{tree.where}: {' and '.join(named)} are both folders of {role}s; take all but one out")
    _refuse_two_of_one(tree, {split for split, _ in folders})
    if others:
        raise InputError(
            f"{tree.where}: {len(others)} images, such as {others[0]}, lie beside the folders of images and masks; take them out"
        )
    if doubled:
        raise InputError(
            f"{tree.where}: {doubled[0]}: a second file with this stem; an image has one mask, and one file"
        )
    strange = [name for _, name in masks.values() if suffix_of(name) != "png"]
    if strange:
        raise InputError(f"{tree.where}: {strange[0]} is no PNG; masks are PNG files whose values are class numbers")
    lonely = [images[key][1] for key in images if key not in masks]
    widowed = [masks[key][1] for key in masks if key not in images]
    if lonely or widowed:
        raise InputError(
            f"{tree.where}: {len(images)} images and {len(masks)} masks, of which "
            + (f"{len(lonely)} images have no mask, such as {lonely[0]}" if lonely else "")
            + (" and " if lonely and widowed else "")
            + (f"{len(widowed)} masks have no image, such as {widowed[0]}" if widowed else "")
            + "; an image and its mask have the same name but for the suffix; images without masks can be a dataset of their own, which a "
            "recipe names as `data.unlabelled_path`"
        )
    splits = sorted({split for split, _ in images})
    if "" in splits and len(splits) > 1:
        raise InputError(
            f"{tree.where}: some images lie in {', '.join(splits[1:])} and some beside; divide all or none"
        )
    rows: dict[str, list[Row]] = {}
    for (split, stem), (called, name) in images.items():
        rows.setdefault(split or "train", []).append(Row(called, name, masks[split, stem][1]))
    return {name: tree_split(tree, rows[name]) for name in sorted(rows)}
