"""The index of a shard: where each sample lies and what its members hash to, memory-mapped, without pickle.

Layout, little-endian: 8 bytes magic, u64 samples, u64 bytes of the tar, u32 bytes of the table, u32 zero; the table as JSON
padded to 8 bytes (`roles` and `suffixes`); then arrays, each padded to 8 bytes: u64 offset per sample; per role u64 digest;
per role u32 start (from the sample's offset) and u32 size; per role u8 place of its suffix in the table. A sample of an
image and a label costs 42 bytes, one with a mask as well 59.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from gandist.data.decode import ROLES
from gandist.data.tar import Member, mapped, members, refusal
from gandist.recipe import Failure, InputError

MAGIC = b"gdindex2"
_HEAD = struct.Struct("<8sQQII")
ABSENT = 0xFFFFFFFF  # the size of a member that a sample lacks


def index_path(shard: Path) -> Path:
    """Where the index of `shard` lies: beside it."""
    return shard.with_suffix(".idx")


def digest(data: bytes | memoryview) -> int:
    """The 64-bit digest kept per member; it finds damage, while `verify` compares whole shards by BLAKE2b."""
    return xxhash.xxh3_64_intdigest(data)


class Found(NamedTuple):
    """A member that gandist reads: its suffix and where it lies in the tar."""

    suffix: str
    offset: int
    start: int
    size: int


@dataclass(frozen=True)
class Sample:
    """One sample of a tar: its key and its members by role (`image`, `label`, `mask`, `signal`)."""

    key: str
    members: dict[str, Found]

    @property
    def offset(self) -> int:
        """Where its first header begins."""
        return min(member.offset for member in self.members.values())


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """The WebDataset key of a member's name, up to the first dot of the file, and its suffix in small letters; None without one."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot and suffix else None


def group(shard: Path, found: Iterable[Member]) -> list[Sample]:
    """The samples of a tar, in the order of their first members, which may lie apart; raises InputError.

    Members of other suffixes than gandist's own are passed over: they are never read.
    """
    samples: dict[str, Sample] = {}
    stem, cut = "", ""  # names of one sample share all but their suffix, so that few need the expression
    for name, offset, start, size in found:
        if name.startswith(stem) and stem and "/" not in name[len(stem) :]:
            key, suffix = cut, name[len(stem) :].lower()
        else:
            parsed = key_and_suffix(name)
            if parsed is None:
                continue  # a README, say
            key, suffix = parsed
            cut, stem = key, key + "."
        role = ROLES.get(suffix)
        if role is None:
            continue
        sample = samples.get(key)
        if sample is None:
            sample = samples[key] = Sample(key, {})
        elif role in sample.members:
            raise refusal(
                shard,
                offset,
                f"{name!r} is a second {role} of the sample {key!r}"
                + (": a name stands twice" if sample.members[role].suffix == suffix else ""),
            )
        sample.members[role] = Found(suffix, offset, start, size)
    if not samples:
        raise InputError(f"{shard}: holds no samples: no member ends with one of {', '.join(ROLES)}")
    return [*samples.values()]


@dataclass(frozen=True)
class ShardIndex:
    """Positions of the members of a shard by role; views into the file, which give plain integers."""

    suffixes: tuple[str, ...]
    shard_bytes: int
    offset: memoryview
    digest: dict[str, memoryview]
    start: dict[str, memoryview]
    size: dict[str, memoryview]
    suffix: dict[str, memoryview]

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def roles(self) -> tuple[str, ...]:
        """What samples of this shard have."""
        return tuple(self.size)

    @classmethod
    def open(cls, path: Path) -> ShardIndex:
        """Memory-maps an index file; raises Failure when it is damaged."""
        try:
            if not path.is_file():  # a pipe would wait for ever
                raise ValueError("not a plain file")
            with path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            magic, count, shard_bytes, table_bytes, _ = _HEAD.unpack_from(data)
            if magic != MAGIC or not table_bytes <= 8192:
                raise ValueError("not an index of this version")
            table = json.loads(bytes(data[_HEAD.size : _HEAD.size + table_bytes]))
            if not isinstance(table, dict) or table.keys() != {"roles", "suffixes"}:
                raise ValueError("its table is not one of roles and suffixes")
            roles, suffixes = tuple(map(str, table["roles"])), tuple(map(str, table["suffixes"]))
            if not set(roles) <= set(ROLES.values()) or not set(suffixes) <= ROLES.keys():
                raise ValueError("its table names other roles or suffixes than there are")
            place = _HEAD.size + table_bytes
            if len(data) != place + sum(_padded(count * width) for width in _widths(len(roles))):
                raise ValueError("its length is not what its head says")
            views = []
            for width in _widths(len(roles)):
                views.append(data[place : place + count * width].cast(_CODES[width]))
                place += _padded(count * width)
        except OSError as error:
            raise Failure(f"{path}: cannot be read: {error.strerror}; make it with `gandist index`") from None
        except (ValueError, TypeError, RecursionError, struct.error) as error:
            raise Failure(f"{path}: damaged index: {error}; make it anew with `gandist index`") from None
        columns = [
            dict(zip(roles, views[1 + k * len(roles) : 1 + (k + 1) * len(roles)], strict=True)) for k in range(4)
        ]
        return cls(suffixes, shard_bytes, views[0], *columns)


_CODES: dict[int, Literal["Q", "I", "B"]] = {8: "Q", 4: "I", 1: "B"}


def _widths(roles: int) -> list[int]:
    return [8, *[8] * roles, *[4] * roles, *[4] * roles, *[1] * roles]


def _padded(length: int) -> int:
    return length + -length % 8


def index_bytes(shard: Path, samples: list[Sample], data: bytes | memoryview, shard_bytes: int) -> bytes:
    """The index of a shard whose bytes are `data`; equal shards give equal bytes. Raises InputError."""
    roles = sorted({role for sample in samples for role in sample.members})
    suffixes = sorted({member.suffix for sample in samples for member in sample.members.values()})
    count = len(samples)
    offsets = [sample.offset for sample in samples]
    columns: list[np.ndarray] = [np.array(offsets, "<u8")]
    rows = [[sample.members.get(role) for sample in samples] for role in roles]
    place_of = {suffix: place for place, suffix in enumerate(suffixes)}
    columns += [
        np.array([digest(data[m.start : m.start + m.size]) if m else 0 for m in members_], "<u8") for members_ in rows
    ]
    starts = [[m.start - o if m else 0 for m, o in zip(row, offsets, strict=True)] for row in rows]
    if max(map(max, starts), default=0) >= ABSENT:
        raise InputError(f"{shard}: the members of a sample lie more than 4 GiB apart; pack the shard anew")
    columns += [np.array(row, "<u4") for row in starts]
    columns += [np.array([m.size if m else ABSENT for m in row], "<u4") for row in rows]
    columns += [np.array([place_of[m.suffix] if m else 0 for m in row], "u1") for row in rows]
    table = json.dumps({"roles": roles, "suffixes": suffixes}).encode()
    table += b" " * (-len(table) % 8)
    head = _HEAD.pack(MAGIC, count, shard_bytes, len(table), 0)
    return b"".join([head, table, *(c.tobytes() + bytes(-c.nbytes % 8) for c in columns)])


def scan(shard: Path) -> list[Sample]:
    """The samples of a tar, from its headers; raises InputError naming shard, offset and rule."""
    with mapped(shard) as data:
        return group(shard, members(shard, data))
