"""What scores read: every sample of a split once, in blocks that processes take in turns, and what they make of it together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gandist.data.dataset import Dataset
from gandist.data.decode import Pixels, mask_classes
from gandist.data.opening import open_batches, open_reader
from gandist.data.read import Reader
from gandist.data.stream import Batch, Share, choose, refuse_strange, whole_image
from gandist.metrics.distribution import in_order
from gandist.networks.noise import BLOCK
from gandist.recipe import DataOptions, Failure, InputError, SubsetOptions


def ranks() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(rows: Tensor, numbers: Tensor, whole: bool = True) -> Tensor:
    """The rows of all processes in the order of their numbers, on every process; `whole`: these are 0 … N − 1, once each."""
    _, count = ranks()
    if count > 1:
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(count)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        longest = max(int(count) for count in counts)
        found = []
        for part in (rows, numbers.to(rows.device)):
            padded = part.new_zeros(longest, *part.shape[1:])
            padded[: len(part)] = part
            parts = [torch.empty_like(padded) for _ in range(count)]
            dist.all_gather(parts, padded)
            found.append(torch.cat([p[: int(count)] for p, count in zip(parts, counts, strict=True)]))
        rows, numbers = found
    return in_order(rows, numbers) if whole else rows[numbers.argsort().to(rows.device)]


def any_of_them(mine: bool, device: torch.device) -> bool:
    """Whether any process says so."""
    flag = torch.tensor([int(mine)], device=device)
    if ranks()[1] > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def as_the_first_says(mine: bool, device: torch.device) -> bool:
    """What rank 0 says."""
    if ranks()[1] == 1:
        return mine
    flag = torch.tensor([int(mine)], device=device)
    dist.broadcast(flag, 0)
    return bool(flag.item())


class Stored(NamedTuple):
    """A sample as it is stored: pixels (H, W, C) and class numbers (H, W), both uint8."""

    number: int
    pixels: Pixels
    mask: Pixels


class WholeSamples:
    """Images and masks of a split in their own sizes, in blocks that processes take in turns: all, or those of a subset."""

    def __init__(
        self, data: DataOptions, split: str, device: torch.device, subset: SubsetOptions | None = None
    ) -> None:
        self.device = device
        self.data = data.labelled().model_copy(update={"split": split, "shuffle": "full", "subset": subset})
        self.spec = Dataset(data.path).spec(split)
        assert self.spec.samples is not None  # an index has counted them
        self.numbers: Sequence[int] = range(self.spec.samples)
        if subset is not None:
            reader = open_reader(self.data)
            self.numbers = choose(reader, self.data, self.spec.label.classes if self.spec.label else None).tolist()
            reader.close()
        self.trouble = ""  # with this process's data
        self.passed_over: list[str] = []  # damaged samples of the last reading, on this process

    def sample(self, reader: Reader, number: int) -> Stored:
        """One of them; raises BadSample or ValueError."""
        members = reader.uncached().members(number)
        for role in ("image", "mask"):
            if role not in members:
                raise ValueError(f"{reader.where(number)}: sample {number} has no {role}")
        pixels = whole_image(members["image"], self.spec.image)
        mask = mask_classes(members["mask"][1], members["mask"][0])
        if mask.shape != pixels.shape[:2]:
            raise ValueError(f"has a mask of {mask.shape[1]}×{mask.shape[0]} pixels for another image")
        assert self.spec.mask is not None
        refuse_strange(mask, self.spec.mask)
        return Stored(number, pixels, mask)

    def blocks(self, count: int, rows: int) -> Iterator[list[Stored]]:
        """This process's blocks of the first `count` samples, `rows` at a time; the last may have fewer. What is damaged is noted."""
        rank, processes = ranks()
        self.trouble, self.passed_over = "", []
        reader = open_reader(self.data)
        try:
            for first in range(rank * rows, count, processes * rows):
                block = []
                for number in self.numbers[first : min(first + rows, count)]:
                    try:
                        block.append(self.sample(reader, number))
                    except (Failure, ValueError) as error:  # a BadSample is a Failure
                        where = (
                            "" if reader.where(number) in str(error) else f"{reader.where(number)}: sample {number} "
                        )
                        self.passed_over.append(f"{where}{error}")
                yield block
        finally:
            reader.close()

    def refuse_trouble(self) -> None:
        """All processes stop together where one of them had trouble, or where more samples are bad than may be; raises Failure."""
        bad = torch.tensor([len(self.passed_over)], device=self.device)
        if ranks()[1] > 1:
            dist.all_reduce(bad)
        too_many = int(bad) > self.data.quarantine
        if any_of_them(bool(self.trouble), self.device) or too_many:
            mine = self.trouble or (self.passed_over[0] if self.passed_over else "")
            advice = f"; `data.quarantine` {self.data.quarantine} allows no more bad samples" if too_many else ""
            raise Failure((mine or "another process could not score its share of the data") + advice)


class HeldOut:
    """Samples of splits of a dataset, not moved by chance, in an order of the scores' own that `seed` fixes."""

    def __init__(self, data: DataOptions, split: str, parts: Sequence[str], seed: int, device: torch.device) -> None:
        if data.reader != "index":
            raise InputError(
                "`data.reader`: webdataset reads in an order of its own, which no score can be repeated from; "
                "`gandist index` the shards, and name the index"
            )
        changes = {"split": split, "subset": None, "workers": 0, "shuffle": "full", "window_shards": 16}
        self.data = data.labelled().model_copy(update={**changes, "transform": data.transform.still()})
        self.parts, self.seed, self.device = tuple(parts), seed, device
        self.trouble = ""  # with this process's data

    def samples(self, split: str) -> int:
        """How many samples a split has; raises InputError where there is none of that name."""
        samples = Dataset(self.data.path).spec(split).samples
        assert samples is not None  # an index has counted them
        return samples

    def blocks(self, count: int, split: str, rows: int = BLOCK) -> Iterator[tuple[int, Batch]]:
        """The first row and the batch of this process's blocks of `count` samples, `rows` at a time; the last has more rows than it
        should, where `rows` does not divide `count`."""
        rank, processes = ranks()
        options = self.data.model_copy(update={"split": split})
        stream = open_batches(options, Share(self.parts, rows, self.seed, self.device))
        trouble = self.trouble = ""
        try:
            for block in range(rank, -(-count // rows), processes):
                found = stream.ready([block])
                trouble = next((f.message for f in found if f.number < 0 or not self.data.quarantine), "")
                if trouble:
                    break  # and go on to where all processes meet
                (batch,) = stream.read(block)
                yield block * rows, batch
        finally:
            stream.close()
        self.trouble = self.trouble or trouble

    def refuse_trouble(self) -> None:
        """All processes stop together where the data of one was bad; raises Failure."""
        if any_of_them(bool(self.trouble), self.device):
            raise Failure(self.trouble or "another process could not read its share of the data for the scores")
