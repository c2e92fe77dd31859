"""Tables: CSV files that name images, masks or signals by their paths, with labels and splits, or hold signals themselves."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path

from gandist.data.decode import ENCODED
from gandist.data.sources import Source
from gandist.data.sources.signals import LABELS, csv_lines, csv_rows, csv_signals
from gandist.data.sources.trees import ARRAYS, SPLITS, Row, Tree, read_file, suffix_of, tree_split
from gandist.recipe import InputError

PATHS = ("path", "file", "filename", "image")


def csv_source(path: Path) -> Source:
    """A CSV file of paths, told by its header, or else of signals; raises InputError."""
    try:
        lines = csv_lines(path.read_bytes())
        rows = list(csv_rows(lines)) if _names_paths(lines) else []
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    return _paths(path, rows) if rows else csv_signals(path, lines)


def _names_paths(lines: list[str]) -> bool:
    return any(_small(cell) in PATHS for cell in next(csv_rows(lines), (0, [""]))[1])


def _small(cell: str) -> str:
    return cell.strip().lower()


def _paths(path: Path, rows: list[tuple[int, list[str]]]) -> Source:
    header = [_small(cell) for cell in rows[0][1]]

    def column(*names: str) -> int | None:
        found = [place for place, name in enumerate(header) if name in names]
        if len(found) > 1:
            raise InputError(f"{path}: {len(found)} columns named {' or '.join(names)}; rename all but one")
        return found[0] if found else None

    file_at, mask_at = column(*PATHS), column("mask")
    label_at, split_at = column(*LABELS), column("split")
    assert file_at is not None
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise InputError(f"{path}: row {number} has {len(row)} cells, and the header has {len(header)}")
    if not rows[1:]:
        raise InputError(f"{path}: has a header and no rows")
    cells = [] if label_at is None else [(number, row[label_at].strip()) for number, row in rows[1:]]
    labels, names = _classes(path, cells)
    size_of = _inside(path)
    sizes: dict[str, int] = {}
    splits: dict[str, list[Row]] = {}
    for place, (number, row) in enumerate(rows[1:]):
        where = f"{path}: row {number}"
        for at, suffixes in ((file_at, (*ENCODED, *ARRAYS)), (mask_at, ("png",))):
            if at is None:
                continue
            if suffix_of(row[at]) not in suffixes:
                raise InputError(f"{where}: {row[at]!r} does not end with one of {', '.join(suffixes)}")
            try:
                sizes[row[at]] = size_of(row[at])
            except ValueError as error:
                raise InputError(f"{where}: {row[at]!r} {error}") from None
        split = "train" if split_at is None else SPLITS.get(_small(row[split_at]))
        if split is None:
            raise InputError(f"{where}: the split is {row[split_at or 0]!r}; known: {', '.join(SPLITS)}")
        mask = None if mask_at is None else row[mask_at]
        splits.setdefault(split, []).append(Row(row[file_at], row[file_at], mask, labels[place] if labels else None))
    tree = Tree(str(path), "csv", sizes, lambda name: read_file(path.parent / name, sizes[name]))
    return Source({"kind": "csv"}, {name: tree_split(tree, splits[name]) for name in sorted(splits)}, names)


def _classes(path: Path, cells: list[tuple[int, str]]) -> tuple[list[int], tuple[str, ...]]:
    """The class number of each row and the names of the classes: whole numbers are numbers, other words are names."""
    empty = next((number for number, text in cells if not text or not text.isprintable()), None)
    if empty is not None:
        raise InputError(f"{path}: row {empty} has no label that can be read; every row needs one")
    if all(re.fullmatch(r"-?[0-9]{1,9}", text) for _, text in cells):
        negative = next((number for number, text in cells if int(text) < 0), None)
        if negative is not None:
            raise InputError(f"{path}: row {negative} has a negative label; whole numbers from 0 are needed")
        return [int(text) for _, text in cells], ()
    names = sorted({text for _, text in cells})
    number_of = {name: number for number, name in enumerate(names)}
    return [number_of[text] for _, text in cells], tuple(names)


def _inside(table: Path) -> Callable[[str], int]:
    """A function that gives the size of a file in the table's folder; it raises ValueError for what leads out of it."""
    folder = table.parent
    root = os.path.realpath(folder)

    def check(path: str) -> None:
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise ValueError("leads out of the CSV's folder through a link")

    @cache  # realpath looks at every folder on the way, and a folder holds many files
    def check_folder(name: str) -> None:
        check(os.path.join(folder, name))

    def size(name: str) -> int:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError("leads out of the CSV's folder; paths are relative to it and stay inside")
        path = os.path.join(folder, name)
        check_folder(os.path.dirname(name))
        if os.path.islink(path):
            check(path)
        try:
            found = os.stat(path)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is not a plain file")
        return found.st_size

    return size
