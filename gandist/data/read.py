"""One positioned read a sample: no tar is parsed while training, and every byte read is compared with its digest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from gandist.data.cache import Cache
from gandist.data.dataset import Dataset, file_digest
from gandist.data.decode import ROLES, Pixels, label_number
from gandist.data.index import ABSENT, ShardIndex, digest, index_path, key_and_suffix
from gandist.data.order import Integers
from gandist.data.tar import BLOCK, MAX_MEMBER, check_sum, walk
from gandist.recipe import Failure, InputError

OPEN_FILES = 64  # of each thread; a thread never closes a file that another one reads
GAP = 4096  # members this near to each other are read at once: a tar puts a header between them
MAX_HEADERS = 1 << 22  # bytes before a sample's first member: its own header, and what gives it a long name
TRIES, PAUSE = 4, 0.1  # for a local file that does not open or read: a network disk may come back

Member = tuple[str, memoryview]  # suffix and bytes


class BadSample(Failure):
    """One sample is damaged; the rest of its shard may be sound."""


class Reader:
    """Samples of a split by number; safe to share between threads.

    Shards are local, or behind a URL: then they are read in ranges, or whole through `shards` where that cache is given.
    `indexes` keeps the indexes of a remote dataset.
    """

    def __init__(
        self, dataset: Dataset, split: str, *, indexes: Cache | None = None, shards: Cache | None = None
    ) -> None:
        dataset.check_sizes(split)
        self.dataset, self.shards = dataset, dataset.shards(split)
        self.store = dataset.shard_store
        self._index_cache, self.cache = indexes, shards
        self.ends = np.cumsum([shard.samples for shard in self.shards]).astype(np.uint64)
        self.starts = self.ends - np.array([shard.samples for shard in self.shards], np.uint64)
        self._indexes: list[ShardIndex | None] = [None] * len(self.shards)
        self._columns: dict[str, list[tuple[memoryview, ...] | None]] = {}  # by role and shard, for whole batches
        self._local = threading.local()
        self._fetched_anew: set[int] = set()
        self._handles: list[dict[int, int]] = []  # of every thread, to be closed in the end
        self._wanted: frozenset[int] | None = None  # shards whose files the cache keeps; handles of others hold disk
        for shard in range(len(self.shards)):
            if self._may_be_stale(shard):
                self._probe(shard)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, number: int) -> str:
        """The shard that a sample lies in, as a path or URL."""
        return self._name(self._locate(number)[0])

    def _name(self, shard: int) -> str:
        """The path or URL of a shard, for messages."""
        return self.store.name(self.shards[shard].name)

    def locate(self, numbers: Integers) -> tuple[list[int], list[int]]:
        """(shards, places in them) of samples."""
        shards = np.searchsorted(self.ends, numbers, side="right")
        return shards.tolist(), (numbers - self.starts[shards]).tolist()

    def _locate(self, number: int) -> tuple[int, int]:
        (shard,), (place,) = self.locate(np.array([number], np.uint64))
        return shard, place

    # ---- indexes

    def _index(self, shard: int) -> ShardIndex:
        """The index of a shard, opened when it is first needed; raises Failure where it is not the shard's."""
        found = self._indexes[shard]
        if found is None:
            name = index_path(Path(self.shards[shard].name)).name
            store = self.dataset.store
            if store.local is not None:
                path = store.local / name
            else:
                assert self._index_cache is not None
                path = self._index_cache.path(name, self.shards[shard].index_bytes)
                if file_digest(path) != self.shards[shard].index_digest:
                    self._index_cache.forget(name)  # the copy may be what is damaged
                    path = self._index_cache.path(name, self.shards[shard].index_bytes)
                if file_digest(path) != self.shards[shard].index_digest:
                    raise Failure(f"{store.name(name)}: is not the index that `dataset.json` names; make it anew")
            found = ShardIndex.open(path)
            if (len(found), found.shard_bytes) != (self.shards[shard].samples, self.shards[shard].bytes):
                raise Failure(f"{store.name(name)}: describes another shard; make it anew with `gandist index`")
            self._indexes[shard] = found
        return found

    def _may_be_stale(self, shard: int) -> bool:
        """Whether a local shard is younger than its index. A copy may be, and so may a shard that was replaced."""
        if self.store.local is None or self.dataset.store.local is None:
            return False
        path = self.store.local / self.shards[shard].name
        index = index_path(self.dataset.store.local / self.shards[shard].name)
        return path.stat().st_mtime_ns > index.stat().st_mtime_ns

    def _probe(self, shard: int) -> None:
        """Reads four samples; raises InputError where none is what the index says. A single one may just be damaged."""
        first, count = int(self.starts[shard]), self.shards[shard].samples
        places = sorted({0, count // 3, 2 * count // 3, count - 1})
        for place in places:
            try:
                self.members(first + place)
            except BadSample:
                continue
            return
        raise InputError(
            f"{self.where(first)}: is younger than its index, and none of {len(places)} samples is what the index says: "
            "the shard was replaced; index it anew, or bring the old one back"
        )

    # ---- bytes

    def _files(self) -> dict[int, int]:
        """The open files of this thread by shard, without those that the cache has let go."""
        files: dict[int, int] | None = self._local.__dict__.get("files")
        if files is None:
            files = self._local.files = {}
            self._handles.append(files)
        wanted = self._wanted
        if self._local.__dict__.get("wanted") is not wanted:
            self._local.wanted = wanted
            for shard in [shard for shard in files if wanted is not None and shard not in wanted]:
                os.close(files.pop(shard))
        return files

    def _file(self, shard: int) -> int:
        files = self._files()
        file = files.get(shard)
        if file is None:
            if len(files) >= OPEN_FILES:
                os.close(files.pop(next(iter(files))))
            known = self.shards[shard]
            if self.cache is not None:
                path = self.cache.path(known.name, known.bytes)
            else:
                assert self.store.local is not None
                path = self.store.local / known.name
            file = files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return file

    def uncached(self) -> Reader:
        """The same samples, read in ranges: for a view that wants a few of each shard, not whole ones."""
        if self.cache is None:
            return self
        other = copy(self)
        other.cache, other._local, other._handles = None, threading.local(), self._handles
        return other

    def _bytes(self, shard: int, start: int, length: int) -> bytes:
        """Bytes of a shard; raises Failure where they cannot be had."""
        name = self.shards[shard].name
        if start + length > self.shards[shard].bytes:  # before memory is taken for it
            raise self._damaged_index(shard)
        if self.store.local is None and self.cache is None:
            return self.store.range(name, start, length)
        for left in reversed(range(TRIES)):
            try:
                data = os.pread(self._file(shard), length, start)
            except OSError as error:
                self._drop(shard)  # a handle gone stale is opened anew
                if left == 0:
                    raise Failure(f"{self._name(shard)}: at byte {start}: cannot be read: {error.strerror}") from None
                time.sleep(PAUSE * 2 ** (TRIES - left))
                continue
            if len(data) != length:
                raise Failure(f"{self._name(shard)}: at byte {start}: cut off: {len(data)} of {length} bytes")
            return data
        raise AssertionError("unreachable")

    def _damaged_index(self, shard: int) -> Failure:
        name = self.dataset.store.name(index_path(Path(self.shards[shard].name)).name)
        return Failure(
            f"{name}: damaged: it points beyond the shard, or to what is not there; make it with `gandist index`"
        )

    def _drop(self, shard: int) -> None:
        file = self._files().pop(shard, None)
        if file is not None:
            os.close(file)

    def read(self, shard: int, place: int, roles: Sequence[str]) -> dict[str, Member]:
        """Members of a sample by role; raises BadSample, naming shard and offset, where a digest does not match."""
        index = self._index(shard)
        for role in roles:
            if role not in index.size:
                raise Failure(f"{self._name(shard)}: its samples have no {role}")
            if (code := index.suffix[role][place]) >= len(index.suffixes) or ROLES[index.suffixes[code]] != role:
                raise self._damaged_index(shard)
        offset = index.offset[place]
        if any(MAX_MEMBER < index.size[role][place] < ABSENT for role in roles):  # before memory is taken for it
            raise self._damaged_index(shard)
        spans = sorted((index.start[role][place], index.size[role][place], role) for role in roles)
        if any(size == ABSENT for _, size, _ in spans):
            raise BadSample(f"{self._name(shard)}: sample {place} lacks one of {', '.join(roles)}")
        found: dict[str, Member] = {}
        first = 0
        while first < len(spans):  # members that lie together are read at once
            last, end = first, sum(spans[first][:2])
            while last + 1 < len(spans) and spans[last + 1][0] <= end + GAP:
                last += 1
                end = max(end, sum(spans[last][:2]))
            begin = spans[first][0]
            data = memoryview(self._bytes(shard, offset + begin, end - begin))
            for start, size, role in spans[first : last + 1]:
                member = data[start - begin : start - begin + size]
                if digest(member) != index.digest[role][place]:
                    if self.cache is not None and shard not in self._fetched_anew:
                        self._fetched_anew.add(shard)  # the copy may be damaged where the shard is sound
                        self._drop(shard)
                        self.cache.forget(self.shards[shard].name)
                        return self.read(shard, place, roles)
                    raise BadSample(
                        f"{self._name(shard)}: at byte {offset + start}: the {role} is damaged: its digest is not the "
                        "one in the index; `gandist verify` checks the whole dataset"
                    )
                found[role] = index.suffixes[index.suffix[role][place]], member
            first = last + 1
        return found

    def members(self, number: int) -> dict[str, Member]:
        """All members of a sample by role; raises BadSample where one is damaged."""
        shard, place = self._locate(number)
        index = self._index(shard)
        present = [role for role in index.roles if index.size[role][place] != ABSENT]
        if not present:
            raise BadSample(f"{self.where(number)}: sample {place} has no members; make the index anew")
        return self.read(shard, place, present)

    def image_rows(self, shards: Sequence[int], places: Sequence[int], rows: Pixels) -> list[int]:
        """Reads images whose bytes are as many as a row straight into `rows` (N, bytes), and compares their digests.

        Returns the rows that it could not fill: those are read, and named if they are bad, by `read`. One call for a batch,
        since at 3 µs a sample every other line of Python shows.
        """
        if self.store.local is None and self.cache is None:
            return [*range(len(rows))]
        left = []
        length, preadv, digest_of = rows.shape[1], os.preadv, xxh3_64_intdigest
        files, columns = self._files(), self._columns_of("image")
        for row, (shard, place, into) in enumerate(zip(shards, places, rows, strict=True)):
            try:
                offset, start, size, digests = columns[shard] or self._open_columns("image", shard)
                if (
                    size[place] != length
                    or preadv(files.get(shard) or self._file(shard), (into,), offset[place] + start[place]) != length
                    or digest_of(into) != digests[place]
                ):
                    left.append(row)
            except (OSError, KeyError, OverflowError, Failure):  # `read` meets it again, and names it
                left.append(row)
        return left

    def label_rows(self, shards: Sequence[int], places: Sequence[int], labels: npt.NDArray[np.int64]) -> list[int]:
        """Reads labels into `labels` (N,) as `image_rows` reads images; returns the rows that it could not fill."""
        if self.store.local is None and self.cache is None:
            return [*range(len(labels))]
        left = []
        files, columns = self._files(), self._columns_of("label")
        for row, (shard, place) in enumerate(zip(shards, places, strict=True)):
            try:
                offset, start, size, digests = columns[shard] or self._open_columns("label", shard)
                length = min(size[place], BLOCK)
                data = os.pread(files.get(shard) or self._file(shard), length, offset[place] + start[place])
                if xxh3_64_intdigest(data) != digests[place]:
                    left.append(row)
                else:
                    labels[row] = label_number(data)
            except (OSError, KeyError, OverflowError, ValueError, Failure):
                left.append(row)
        return left

    def _columns_of(self, role: str) -> list[tuple[memoryview, ...] | None]:
        return self._columns.setdefault(role, [None] * len(self.shards))

    def _open_columns(self, role: str, shard: int) -> tuple[memoryview, ...]:
        index = self._index(shard)
        found = index.offset, index.start[role], index.size[role], index.digest[role]
        self._columns_of(role)[shard] = found
        return found

    def digests(self, role: str) -> npt.NDArray[np.uint64]:
        """The digests (samples,) of a member of every sample, as the indexes have them; 0 where a sample lacks it."""
        found = []
        for shard in range(len(self.shards)):
            index = self._index(shard)
            there = role in index.roles
            found.append(np.frombuffer(index.digest[role], "<u8") if there else np.zeros(len(index), np.uint64))
        return np.concatenate(found)

    def key(self, number: int) -> str:
        """The WebDataset key of a sample, read from its tar header."""
        shard, place = self._locate(number)
        index = self._index(shard)
        offset = index.offset[place]
        starts = [index.start[r][place] for r in index.roles if index.size[r][place] != ABSENT]
        if min(starts) > MAX_HEADERS:
            raise self._damaged_index(shard)
        headers = self._bytes(shard, offset, min(starts))
        try:
            check = partial(check_sum, self._name(shard))
            name = next(walk(self._name(shard), lambda start, size: headers[start : start + size], 1 << 62, check)).name
        except InputError as error:
            raise BadSample(f"{self._name(shard)}: a header from byte {offset} on is damaged: {error}") from None
        parsed = key_and_suffix(name)
        return parsed[0] if parsed else name

    def read_ahead(self, shards: Sequence[int], kept: Collection[int]) -> None:
        """Tells the disk, or the cache, that these shards come next, and that of all only `kept` are still wanted."""
        if self.cache is not None:
            self._wanted = frozenset(kept)
            self.cache.keep({self.shards[s].name for s in kept})
            self.cache.prefetch([(self.shards[s].name, self.shards[s].bytes) for s in shards])
        elif self.store.local is not None and hasattr(os, "posix_fadvise"):
            for shard in shards:
                with suppress(OSError):  # one that is gone is named when it is read
                    os.posix_fadvise(self._file(shard), 0, 0, os.POSIX_FADV_WILLNEED)

    def stop(self) -> None:
        """Breaks off what the caches fetch, so that nobody waits for it any longer."""
        for cache in (self._index_cache, self.cache):
            if cache is not None:
                cache.close()

    def close(self) -> None:
        """Closes every file, of all threads: these must have ended."""
        self.stop()
        for files in self._handles:
            while files:
                os.close(files.popitem()[1])
