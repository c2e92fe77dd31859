"""The index of a shard: where each sample lies and what its members hash to, memory-mapped, without pickle.

Layout, little-endian: 8 bytes magic, u64 samples, u64 bytes of the tar, u32 number of suffixes, u32 bytes of the suffix
table, the table as JSON padded to 8 bytes, then arrays: u64 offset per sample; per suffix u64 digest, u32 start (from the
sample's offset) and u32 size per sample. A sample of an image and a label costs 40 bytes.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from gandist.recipe import Failure, InputError

MAGIC = b"gdindex1"
_HEAD = struct.Struct("<8sQQII")
ABSENT = 0xFFFFFFFF  # the size of a member that a sample lacks
MAX_SUFFIXES = 8
MAX_MEMBER = 1 << 28
BLOCK = 512
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]+)")  # webdataset's rule: the key ends at the first dot of the file's name


def index_path(shard: Path) -> Path:
    """Where the index of `shard` lies: beside it."""
    return shard.with_suffix(".idx")


def digest(data: bytes | memoryview) -> int:
    """The 64-bit digest kept per member; it finds damage, while `verify` compares whole shards by BLAKE2b."""
    return xxhash.xxh3_64_intdigest(data)


@dataclass(frozen=True)
class Sample:
    """One sample while a shard is scanned: its key, the offset of its first header, and its members by suffix."""

    key: str
    offset: int
    members: dict[str, tuple[int, bytes]]  # suffix -> (offset of the data, data)


class _Bounded:
    """A file whose reads have a limit: a header of two kilobytes can claim a name, or a member, of fifty gigabytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek, self.name = file.tell, file.seek, file.name

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_MEMBER:
            raise tarfile.ReadError(f"a member or header of {size} bytes; the limit is {MAX_MEMBER}")
        return self._file.read(size)


def scan(shard: Path) -> Iterator[Sample]:
    """Reads a tar once, front to back, and yields its samples.

    Raises InputError, naming shard, offset and rule, for anything but plain files in a complete uncompressed tar whose
    members of one sample lie together.
    """

    def refuse(offset: int, rule: str) -> InputError:
        return InputError(f"{shard}: at byte {offset}: {rule}")

    if shard.is_dir():
        raise InputError(f"{shard}: is a folder; name its shards, such as {shard}/*.tar")
    seen: set[str] = set()
    current: Sample | None = None
    end = 0
    try:
        with shard.open("rb") as raw, tarfile.open(fileobj=_Bounded(raw), mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise refuse(
                        member.offset,
                        f"{member.name!r} is not a plain file; links, devices and sparse files are refused",
                    )
                match = _NAME.fullmatch(member.name)
                if match is None:
                    raise refuse(member.offset, f"{member.name!r} has no suffix; members are named KEY.SUFFIX")
                key, suffix = match[1], match[2].lower()
                stream = tar.extractfile(member)
                assert stream is not None
                data = stream.read()
                if len(data) != member.size:
                    raise refuse(member.offset, f"{member.name!r} is cut off")
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    if key in seen:
                        raise refuse(
                            member.offset, f"the key {key!r} stands twice; the members of a sample must lie together"
                        )
                    seen.add(key)
                    current = Sample(key, member.offset, {})
                if suffix in current.members:
                    raise refuse(member.offset, f"{member.name!r} stands twice")
                current.members[suffix] = (member.offset_data, data)
        if current is not None:
            yield current
    except InputError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{shard}: not a complete uncompressed tar: {error}") from None
    except OSError as error:
        raise InputError(f"{shard}: cannot be read: {error.strerror or error}") from None
    # tarfile takes a damaged header for the end of the archive, and so does plain webdataset: samples vanish in silence.
    with shard.open("rb") as file:
        file.seek(end)
        rest = file.read(1 << 20)
    if len(rest) < 2 * BLOCK or any(rest):
        raise refuse(end, "a tar ends with two empty blocks, and other bytes stand here: it is cut off or damaged")
    if current is None:
        raise InputError(f"{shard}: holds no samples")


@dataclass(frozen=True)
class ShardIndex:
    """Positions of every member of a shard; arrays are (samples,) or (suffixes, samples)."""

    suffixes: tuple[str, ...]
    shard_bytes: int
    offset: npt.NDArray[np.uint64]
    digest: npt.NDArray[np.uint64]
    start: npt.NDArray[np.uint32]
    size: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.offset)

    @classmethod
    def build(cls, samples: list[tuple[int, dict[str, tuple[int, int, int]]]], shard_bytes: int) -> ShardIndex:
        """From (offset, {suffix: (offset of data, size, digest)}) per sample."""
        suffixes = tuple(sorted({suffix for _, members in samples for suffix in members}))
        if len(suffixes) > MAX_SUFFIXES:
            raise InputError(
                f"{len(suffixes)} different suffixes; at most {MAX_SUFFIXES} are indexed: {', '.join(suffixes)}"
            )
        shape = (len(suffixes), len(samples))
        offset = np.array([offset for offset, _ in samples], dtype="<u8")
        digests, start = np.zeros(shape, dtype="<u8"), np.zeros(shape, dtype="<u4")
        size = np.full(shape, ABSENT, dtype="<u4")
        for number, (first, members) in enumerate(samples):
            for suffix, (position, length, value) in members.items():
                if position - first + length >= ABSENT:
                    raise InputError(f"a sample of {length} bytes at byte {first} is too large; the limit is 4 GiB")
                place = suffixes.index(suffix), number
                digests[place], start[place], size[place] = value, position - first, length
        return cls(suffixes, shard_bytes, offset, digests, start, size)

    def to_bytes(self) -> bytes:
        """The file as described at the head of this module; equal indexes give equal bytes."""
        table = json.dumps(self.suffixes).encode()
        table += b" " * (-len(table) % 8)
        head = _HEAD.pack(MAGIC, len(self), self.shard_bytes, len(self.suffixes), len(table))
        return head + table + b"".join(a.tobytes() for a in (self.offset, self.digest, self.start, self.size))

    @classmethod
    def open(cls, path: Path) -> ShardIndex:
        """Memory-maps an index file; raises Failure when it is damaged."""
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            magic, count, shard_bytes, columns, table_bytes = _HEAD.unpack_from(data)
            if magic != MAGIC or columns > MAX_SUFFIXES or table_bytes > 4096:
                raise ValueError("not an index of this version")
            table = json.loads(data[_HEAD.size : _HEAD.size + table_bytes])
            if not isinstance(table, list):
                raise ValueError("its table is not a list")
            suffixes = tuple(map(str, table))
            position = _HEAD.size + table_bytes
            if len(suffixes) != columns or len(data) != position + count * (8 + 16 * columns):
                raise ValueError("its length is not what its head says")
            arrays: list[npt.NDArray[Any]] = []
            for kind, rows in (("<u8", 1), ("<u8", columns), ("<u4", columns), ("<u4", columns)):
                array = np.frombuffer(data, kind, count * rows, position)
                arrays.append(array if len(arrays) == 0 else array.reshape(rows, count))
                position += array.nbytes
        except OSError as error:
            raise Failure(f"{path}: cannot be read: {error.strerror}; make it with `gandist index`") from None
        except (ValueError, RecursionError, struct.error) as error:
            raise Failure(f"{path}: damaged index: {error}; make it anew with `gandist index`") from None
        return cls(suffixes, shard_bytes, *arrays)
