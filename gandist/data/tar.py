"""Tars of strangers: where each plain file lies, found by reading headers alone and at several times tarfile's pace.

What a tar could do beyond holding plain files (links, devices, holes, claims of terabytes, an end that is none) is
refused with shard, offset and rule. Nothing is extracted, and no name is used as a path.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gandist.recipe import InputError

BLOCK = 512
MAX_MEMBERS = 500_000  # of one tar; a shard is megabytes, not an archive of everything
MAX_MEMBER = 1 << 28
MAX_NAME = 4096
_MAX_HEADER = 1 << 20  # of a PAX header or a long name
_MAX_TAIL = 1 << 20  # tar pads to its blocking factor, which is 10 KiB unless asked for more
_EMPTY = bytes(BLOCK)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")
_KINDS = {49: "a hard link", 50: "a symbolic link", 51: "a device", 52: "a device", 54: "a pipe", 83: "a sparse file"}


class Member(NamedTuple):
    """One plain file of a tar: its name, where its first header begins, and where its bytes lie."""

    name: str
    offset: int
    start: int
    size: int


def refusal(tar: Path | str, offset: int, rule: str) -> InputError:
    """The error that names shard, offset and rule."""
    return InputError(f"{tar}: at byte {offset}: {rule}")


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file without reading them; raises InputError where there are none."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is not a plain file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name its shards, such as {path}/*.tar")
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:  # what mmap says of no bytes
        raise InputError(f"{path}: is empty; a tar has at least two blocks") from None
    with data:
        yield data


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("a negative number")
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits.isdigit():  # int() would take underscores and signs as well
        raise ValueError(f"{field!r} is not a number")
    return int(digits, 8)


def _pax(data: bytes) -> dict[str, str]:
    """The records of a PAX header: `LENGTH KEY=VALUE\\n`."""
    records = {}
    place = 0
    while place < len(data):
        length, space, _ = data[place : place + 20].partition(b" ")
        if not space or not length.isdigit() or not 5 <= int(length) <= len(data) - place:
            raise ValueError("a PAX record without its length")
        record = data[place + len(length) + 1 : place + int(length)]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or record[-1:] != b"\n":
            raise ValueError("a PAX record without a value")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        place += int(length)
    return records


def _check_sums(tar: Path | str, data: mmap.mmap, headers: list[int], sums: list[int]) -> None:
    """Compares the checksums of all headers at once; one by one they cost more than all the rest of the scan."""
    octets = np.frombuffer(data, np.uint8)
    blocks = octets[: len(octets) // BLOCK * BLOCK].reshape(-1, BLOCK)
    for first in range(0, len(headers), 4096):
        places = np.array(headers[first : first + 4096], np.int64)
        rows = blocks[places // BLOCK]
        found = rows.sum(1, dtype=np.int64) - rows[:, 148:156].sum(1, dtype=np.int64) + 8 * 32
        wrong = np.flatnonzero(found != np.array(sums[first : first + 4096]))
        if wrong.size:
            del octets, blocks  # an mmap with views cannot be closed
            raise refusal(tar, int(places[wrong[0]]), "not a tar header: its checksum does not match; it is damaged")
    del octets, blocks


def members(tar: Path | str, data: mmap.mmap) -> list[Member]:
    """The plain files of a tar in order; raises InputError for anything but plain files and folders in a complete one."""
    headers: list[int] = []
    sums: list[int] = []

    def note(place: int, _: bytes, total: int) -> None:
        headers.append(place)
        sums.append(total)

    found = [*walk(tar, lambda start, size: data[start : start + size], len(data), note)]
    _check_sums(tar, data, headers, sums)
    return found


def check_sum(tar: Path | str, place: int, header: bytes, total: int) -> None:
    """Raises InputError where a header is damaged."""
    if sum(header) - sum(header[148:156]) + 8 * 32 != total:
        raise refusal(tar, place, "not a tar header: its checksum does not match; it is damaged")


def walk(
    tar: Path | str, fetch: Callable[[int, int], bytes], end: int, note: Callable[[int, bytes, int], None]
) -> Iterator[Member]:
    """The plain files of a tar in order, as far as it has been read.

    `fetch(start, size)` gives bytes, always further on; `note` gets each header with its place and its checksum.
    """
    count = headers = 0
    place, first = 0, -1
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = fetch(place, BLOCK)
        if header == _EMPTY:
            break
        if place == 0 and header.startswith(_COMPRESSED):
            raise refusal(tar, place, "not an uncompressed tar; unpack it, and keep its shards as plain .tar")
        if len(header) < BLOCK:
            raise refusal(tar, place, "a tar ends with two empty blocks, and this one is cut off")
        if first < 0:
            first = place
        try:
            size = _number(header[124:136])
            note(place, header, _number(header[148:156]))
        except ValueError as error:
            raise refusal(tar, place, f"not a complete uncompressed tar: {error}") from None
        headers += 1
        if headers > 2 * MAX_MEMBERS:
            raise refusal(tar, place, f"more than {MAX_MEMBERS:,} members; pack them into several shards")
        kind = header[156]
        start = place + BLOCK
        if kind in (48, 0, 55):  # plain files, of today and of old; 55 is one laid out in a row
            if long_size is not None:
                size = long_size
            name = long_name
            if name is None:
                stem = header[: header.index(0) if 0 in header[:100] else 100]
                if header[257:263] == b"ustar\0" and header[345]:
                    stem = header[345:500].partition(b"\0")[0] + b"/" + stem
                name = stem.decode("utf-8", "surrogateescape")
            if start + size > end:
                raise refusal(tar, place, f"{name!r} is cut off: {size} bytes, and the file ends before them")
            if size > MAX_MEMBER:
                raise refusal(tar, place, f"{name!r} has {size} bytes; the limit is {MAX_MEMBER}")
            if len(name) > MAX_NAME:
                raise refusal(tar, place, f"a name of {len(name)} characters; the limit is {MAX_NAME}")
            if kind or not name.endswith("/"):  # an old tar writes a folder as a file with a slash
                yield Member(name, first, start, size)
                count += 1
                if count > MAX_MEMBERS:
                    raise refusal(tar, place, f"more than {MAX_MEMBERS:,} members; pack them into several shards")
            long_name, long_size, first = None, None, -1
        elif kind == 53:  # a folder
            long_name, long_size, first, size = None, None, -1, 0
        elif kind in (120, 103, 76, 75):  # PAX for one member, PAX for all, GNU's long name and long link
            if size > _MAX_HEADER:
                raise refusal(tar, place, f"a header of {size} bytes; the limit is {_MAX_HEADER}")
            if start + size > end:
                raise refusal(tar, place, "a header is cut off")
            if kind == 76:
                long_name = fetch(start, size).partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind != 75:
                try:
                    records = _pax(fetch(start, size))
                    if any(key.startswith("GNU.sparse") for key in records):
                        raise ValueError("a sparse file; links, devices and sparse files are refused")
                    if kind == 120:
                        long_name = records.get("path", long_name)
                        if "size" in records:
                            if not records["size"].isdigit():
                                raise ValueError(f"a size of {records['size'][:20]!r}")
                            long_size = int(records["size"][:20])
                    elif "path" in records or "size" in records:
                        raise ValueError("one name or size for all members")
                except ValueError as error:
                    raise refusal(tar, place, str(error)) from None
        else:
            what = _KINDS.get(kind, f"of the unknown type {chr(kind)!r}")
            name = long_name or header[:100].partition(b"\0")[0].decode("utf-8", "replace")
            raise refusal(
                tar, place, f"{name!r} is {what}, not a plain file; links, devices and sparse files are refused"
            )
        place = start + -(-size // BLOCK) * BLOCK
    tail = fetch(place, _MAX_TAIL + 1)
    if first >= 0 or not 2 * BLOCK <= len(tail) <= _MAX_TAIL or tail.count(0) != len(tail):
        # tarfile and webdataset take a damaged header for the end of the archive: samples vanish in silence.
        raise refusal(
            tar, place, "a tar ends with two empty blocks, and other bytes stand here: it is cut off or damaged"
        )
