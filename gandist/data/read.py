"""One positioned read a sample: no tar is parsed while training, and every byte read is compared with its digest."""

from __future__ import annotations

import os
import tarfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gandist.data.dataset import Dataset
from gandist.data.index import ABSENT, ShardIndex, digest, index_path
from gandist.recipe import Failure

OPEN_FILES = 64  # of each thread; a thread never closes a file that another one reads


class Reader:
    """Samples of a split by number; safe to share between threads."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        dataset.check_sizes(split)
        self.shards = dataset.shards(split)
        self.paths = [dataset.folder / shard.name for shard in self.shards]
        self.indexes = [ShardIndex.open(index_path(path)) for path in self.paths]
        for path, shard, index in zip(self.paths, self.shards, self.indexes, strict=True):
            if (len(index), index.shard_bytes) != (shard.samples, shard.bytes):
                raise Failure(f"{index_path(path)}: describes another shard; make it anew with `gandist index`")
        self._ends = np.cumsum([len(index) for index in self.indexes])
        self._local = threading.local()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _file(self, shard: int) -> BinaryIO:
        files: OrderedDict[int, BinaryIO] = self._local.__dict__.setdefault("files", OrderedDict())
        if shard in files:
            files.move_to_end(shard)
        else:
            if len(files) >= OPEN_FILES:
                files.popitem(last=False)[1].close()
            files[shard] = self.paths[shard].open("rb", buffering=0)
        return files[shard]

    def _locate(self, number: int) -> tuple[int, int]:
        """(shard, place in it) of a sample."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - (int(self._ends[shard - 1]) if shard else 0)

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        if offset + length > self.shards[shard].bytes:  # before memory is taken for it
            raise Failure(f"{index_path(self.paths[shard])}: damaged: it points beyond the shard; make it anew")
        try:
            data = os.pread(self._file(shard).fileno(), length, offset)
        except OSError as error:
            raise Failure(f"{self.paths[shard]}: at byte {offset}: cannot be read: {error.strerror}") from None
        if len(data) != length:
            raise Failure(f"{self.paths[shard]}: at byte {offset}: cut off: {len(data)} of {length} bytes")
        return data

    def members(self, number: int) -> dict[str, memoryview]:
        """The members of a sample by suffix; raises Failure with shard and offset where a digest does not match."""
        shard, place = self._locate(number)
        index = self.indexes[shard]
        sizes = index.size[:, place]
        present = [column for column, size in enumerate(sizes) if size != ABSENT]
        starts = index.start[:, place]
        if not present:
            raise Failure(f"{index_path(self.paths[shard])}: damaged: sample {place} has no members; make it anew")
        first = min(int(starts[column]) for column in present)
        last = max(int(starts[column]) + int(sizes[column]) for column in present)
        offset = int(index.offset[place])
        data = memoryview(self._read(shard, offset + first, last - first))
        found = {}
        for column in present:
            begin = int(starts[column]) - first
            member = data[begin : begin + int(sizes[column])]
            if digest(member) != index.digest[column, place]:
                raise Failure(
                    f"{self.paths[shard]}: at byte {offset + first + begin}: the `{index.suffixes[column]}` member is damaged; "
                    "`gandist verify` checks the whole dataset"
                )
            found[index.suffixes[column]] = member
        return found

    def key(self, number: int) -> str:
        """The WebDataset key of a sample, read from its tar header."""
        shard, place = self._locate(number)
        index = self.indexes[shard]
        offset = int(index.offset[place])
        length = int(
            min(
                start for start, size in zip(index.start[:, place], index.size[:, place], strict=True) if size != ABSENT
            )
        )
        header = self._read(shard, offset, length)
        name = tarfile.TarInfo.frombuf(header[-512:], "utf-8", "replace").name
        folder, slash, file = name.rpartition("/")
        return folder + slash + file.split(".", 1)[0]

    def where(self, number: int) -> Path:
        """The shard that a sample lies in."""
        return self.paths[self._locate(number)[0]]
