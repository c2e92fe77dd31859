"""Signals: CSV files of numbers, one signal a row."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gandist.data.sources import Source
from gandist.data.sources.arrays import array_split, signal_members
from gandist.recipe import InputError

LABELS = ("label", "class", "target")


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def csv_lines(data: bytes) -> list[str]:
    """The lines of a CSV file in UTF-8; raises ValueError."""
    return io.StringIO(data.decode("utf-8-sig"), newline="").readlines()


def csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file with their numbers, counted from 1; raises ValueError."""
    try:
        yield from ((number, row) for number, row in enumerate(csv.reader(lines), 1) if row)
    except csv.Error as error:
        raise ValueError(f"is not a CSV file: {error}") from None


def numbers(lines: list[str]) -> tuple[list[str], npt.NDArray[np.float64]]:
    """The header of a CSV file of numbers, in small letters, empty where it has none, and its values (rows, columns).

    Raises ValueError naming the row, counted from 1 with the header, as spreadsheets show it.
    """
    first = next(csv_rows(lines), (0, []))
    header = [] if all(_number(cell) is not None for cell in first[1]) else [cell.strip().lower() for cell in first[1]]
    body = lines[first[0] :] if header else lines
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's word for a file without rows, which is refused below
            values = np.loadtxt(body, np.float64, comments=None, delimiter=",", quotechar='"', ndmin=2)
    except ValueError as error:
        raise ValueError(_fault(lines, bool(header)) or f"is not a table of numbers: {error}") from None
    if not values.size or (header and values.shape[1] != len(header)):
        raise ValueError(f"has no rows of {len(header)} numbers below its header" if header else "has no rows")
    with np.errstate(over="ignore"):
        if not np.isfinite(values.astype(np.float32)).all():
            raise ValueError(_fault(lines, bool(header)) or "holds NaN or infinity")
    return header, values


def _fault(lines: list[str], header: bool) -> str:
    """The first row that is no row of finite numbers, or ""."""
    width = 0
    for place, (number, row) in enumerate(csv_rows(lines)):
        width = width or len(row)
        if len(row) != width:
            return f"row {number} has {len(row)} cells, and the first has {width}"
        for cell in row if place or not header else ():
            value = _number(cell)
            if value is None:
                return f"row {number} holds {cell[:40]!r}, which is not a number"
            if not abs(value) <= np.finfo(np.float32).max:
                return f"row {number} holds {cell[:40]!r}, which is NaN, infinity or too large for float32"
    return ""


def csv_signals(path: Path, lines: list[str]) -> Source:
    """Signals of one channel, one a row, with their class numbers where a column `label` gives them."""
    try:
        header, values = numbers(lines)
    except ValueError as error:
        raise InputError(
            f"{path}: {error}; a CSV file holds numbers alone, or paths in a column named path, file, filename or image"
        ) from None
    column = next((header.index(name) for name in LABELS if name in header), None)
    labels = None
    if column is not None:
        found = values[:, column]
        wrong = np.flatnonzero((found < 0) | (found != np.floor(found)) | (found >= 1 << 31))
        if wrong.size:
            raise InputError(
                f"{path}: the label {found[wrong[0]]:g} of signal {int(wrong[0])} is not a whole number from 0"
            )
        labels = found.astype(np.int64)
        values = np.delete(values, column, axis=1)
    if not values.shape[1]:
        raise InputError(f"{path}: has labels and no values")
    return Source({"kind": "csv"}, {"train": array_split([values.astype("<f4")], labels, signal_members)})
