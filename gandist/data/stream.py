"""Stream: the data as a function of the draw number; its only state is an integer, and it belongs to the clock."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gandist.data import order
from gandist.data.dataset import Dataset
from gandist.data.decode import IMAGE_SUFFIXES, LABEL_SUFFIX, image_pixels, label_number
from gandist.data.read import Reader
from gandist.recipe import Failure
from gandist.seeding import derive

PARTS = ("image", "label")


@dataclass(frozen=True)
class Batch:
    """The rows of a global batch that this process works on, on its device.

    image: (B, C, H, W) float in -1 … 1, channels last in memory.  label: (B,) int64.
    """

    parts: dict[str, Tensor]
    draw: int
    rows: range  # of the global batch
    size: int  # of the global batch
    seed: int
    device: torch.device

    def __getitem__(self, part: str) -> Tensor:
        return self.parts[part]

    def normal(self, purpose: str, width: int) -> Tensor:
        """(B, width) of N(0, 1): these rows of the noise of the global batch, so that any process count draws the same."""
        generator = torch.Generator(self.device).manual_seed(derive(self.seed, purpose, self.draw))
        noise = torch.randn(self.size, width, generator=generator, device=self.device)
        return noise[self.rows.start : self.rows.stop]


class Stream:
    """Batches by draw number. While one draw trains, the next ones are read and decoded by background threads."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        parts: Sequence[str],
        batch: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        workers: int = 2,
        recall: int = 1,
    ) -> None:
        assert set(parts) <= set(PARTS), parts
        assert batch % (ranks * accumulate) == 0, (batch, ranks, accumulate)
        self.reader = Reader(dataset, split)
        self.spec = dataset.spec(split)
        self.parts, self.batch, self.seed, self.device = tuple(parts), batch, seed, device
        share = batch // ranks
        self.rows = range(rank * share, (rank + 1) * share)
        self.micro = share // accumulate
        self.waited = 0.0  # seconds that training stood still for data
        self._ahead = max(2, workers)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="stream")
        self._pending: dict[int, Future[dict[str, Tensor]]] = {}
        self._recent: OrderedDict[int, list[Batch]] = OrderedDict()
        self._recall = recall  # draws that may be read again without a second load: those of one step

    def numbers(self, draw: int, rows: range | None = None) -> list[int]:
        """The sample numbers of a draw, of this process's rows or of any others."""
        rows = self.rows if rows is None else rows
        found = order.samples(draw, rows, batch=self.batch, length=len(self.reader), seed=self.seed)
        return [int(number) for number in found]

    def load(self, draw: int) -> dict[str, Tensor]:
        """The parts of a draw as the disk has them: image (B, H, W, C) uint8, label (B,) int64; in page-locked memory for a GPU."""
        numbers = self.numbers(draw)
        shape = (self.spec.image.height or 0, self.spec.image.width or 0, self.spec.image.channels)
        images = np.empty((len(numbers), *shape), np.uint8) if "image" in self.parts else None
        labels = np.empty(len(numbers), np.int64) if "label" in self.parts else None
        for row, number in enumerate(numbers):
            members = self.reader.members(number)
            try:
                if images is not None:
                    suffix = next(suffix for suffix in members if suffix in IMAGE_SUFFIXES)
                    image_pixels(members[suffix], suffix, images[row])
                if labels is not None:
                    labels[row] = label_number(members[LABEL_SUFFIX])
            except ValueError as error:
                raise Failure(f"{self.reader.where(number)}: sample {self.reader.key(number)!r} {error}") from None
        arrays = {"image": images, "label": labels}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
        if self.device.type == "cuda":
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors

    def read(self, draw: int) -> list[Batch]:
        """The micro-batches of a draw, on the device; asks for the following draws in the background."""
        if draw in self._recent:
            return self._recent[draw]
        for old in [known for known in self._pending if not draw <= known <= draw + self._ahead]:
            self._pending.pop(old).cancel()
        for ahead in range(draw, draw + self._ahead + 1):
            if ahead not in self._pending:
                self._pending[ahead] = self._threads.submit(self.load, ahead)
        began = time.perf_counter()
        loaded = self._pending.pop(draw).result()
        self.waited += time.perf_counter() - began
        self._recent[draw] = self._split(draw, loaded)
        while len(self._recent) > self._recall:
            self._recent.popitem(last=False)
        return self._recent[draw]

    def _split(self, draw: int, loaded: dict[str, Tensor]) -> list[Batch]:
        parts = {name: tensor.to(self.device, non_blocking=True) for name, tensor in loaded.items()}
        if "image" in parts:
            parts["image"] = parts["image"].permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        batches = []
        for begin in range(0, len(self.rows), self.micro):
            rows = range(self.rows.start + begin, self.rows.start + begin + self.micro)
            here = {name: tensor[begin : begin + self.micro] for name, tensor in parts.items()}
            batches.append(Batch(here, draw, rows, self.batch, self.seed, self.device))
        return batches

    def close(self) -> None:
        """Ends the background threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)
