"""Order is arithmetic: which sample stands at which place of an endless shuffled sequence, computed and never stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gandist.seeding import derive

Integers = npt.NDArray[np.uint64]

BLOCK = 4096  # items computed at once: for a batch of 64 alone, numpy's cost per call is most of the time
ROUNDS = 8  # four, as elsewhere, fail a serial correlation test at 50,000 and 60,000 items (z = 13 and 22)


def _mix(values: Integers) -> Integers:
    """splitmix64's finaliser (Steele, Lea and Flood 2014); multiplication wraps at 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A keyed bijection of 0 … length-1: a balanced Feistel network with cycle walking (Black and Rogaway 2002).

    Costs no memory and about 0.2 µs an item at any length; the domain is less than 4 × length, so few cycles are walked.
    """

    def __init__(self, length: int, seed: int, purpose: str, *counters: int) -> None:
        assert length > 0
        self.length = length
        half = max(1, ((length - 1).bit_length() + 1) // 2)
        self._shift, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        self._keys = [np.uint64(derive(seed, purpose, *counters, number)) for number in range(ROUNDS)]

    def _encrypt(self, values: Integers) -> Integers:
        left, right = values >> self._shift, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._shift) | right

    def __call__(self, places: Integers) -> Integers:
        """The items at `places`, each in 0 … length-1."""
        items = self._encrypt(places)
        outside = np.flatnonzero(items >= self.length)
        while outside.size:
            items[outside] = self._encrypt(items[outside])
            outside = outside[items[outside] >= self.length]
        return items


class Order(Protocol):
    """The samples at places of an endless sequence that has each of `length` samples once an epoch."""

    @property
    def length(self) -> int:
        """Samples of an epoch."""

    def __call__(self, places: Integers) -> Integers:
        """The sample numbers at `places`, which may lie in several epochs."""


def _by_epoch(places: Integers, length: int) -> list[tuple[int, npt.NDArray[np.bool_], Integers]]:
    """(epoch, which of `places` lie in it, their places within it); `places` rise."""
    epochs, inside = np.divmod(places, np.uint64(length))
    return [(int(epoch), here := epochs == epoch, inside[here]) for epoch in np.unique(epochs)]


@lru_cache(maxsize=64)
def _block(length: int, seed: int, purpose: str, counters: tuple[int, ...], number: int) -> Integers:
    """Items at the places of one block of a permutation, kept since the next batch wants the same block."""
    places = np.arange(number * BLOCK, min((number + 1) * BLOCK, length), dtype=np.uint64)
    items = Permutation(length, seed, purpose, *counters)(places)
    items.flags.writeable = False
    return items


def _items(places: Integers, length: int, seed: int, purpose: str, *counters: int) -> Integers:
    """Items of a permutation at places that rise and lie near each other."""
    first, last = int(places[0]) // BLOCK, int(places[-1]) // BLOCK
    if first == last:
        found: Integers = _block(length, seed, purpose, counters, first)[places - np.uint64(first * BLOCK)]
        return found
    blocks = (places // np.uint64(BLOCK)).astype(np.int64)
    items = np.empty_like(places)
    for number in np.unique(blocks).tolist():
        here = blocks == number
        items[here] = _block(length, seed, purpose, counters, number)[places[here] - np.uint64(number * BLOCK)]
    return items


@dataclass(frozen=True)
class Full:
    """A new permutation of all samples each epoch: for disks that read anywhere at the same pace."""

    length: int
    seed: int
    purpose: str = "order"

    def __call__(self, places: Integers) -> Integers:
        """The sample numbers at `places`."""
        epoch, last = int(places[0]) // self.length, int(places[-1]) // self.length
        if epoch == last:  # an epoch seldom ends within a batch
            return _items(places - np.uint64(epoch * self.length), self.length, self.seed, self.purpose, epoch)
        items = np.empty_like(places)
        for epoch, here, inside in _by_epoch(places, self.length):
            items[here] = _items(inside, self.length, self.seed, self.purpose, epoch)
        return items


class Windowed:
    """Shards in a new order each epoch, `window` of them mixed at a time: for stores that read whole files best.

    Within a window every sample may stand anywhere; no sample leaves its window. As random as `Full` where the shards were
    shuffled when they were packed, and no better than the window where they are sorted.
    """

    def __init__(self, sizes: Sequence[int], window: int, seed: int, purpose: str = "order") -> None:
        self.sizes = np.asarray(sizes, np.uint64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.length, self.window, self.seed, self.purpose = int(self.sizes.sum()), window, seed, purpose
        self._epochs: dict[int, tuple[Integers, Integers, Integers]] = {}

    def _epoch(self, epoch: int) -> tuple[Integers, Integers, Integers]:
        """The shards in the order of an epoch, where each ends, and where each window ends."""
        found = self._epochs.get(epoch)
        if found is None:
            shards = Permutation(len(self.sizes), self.seed, f"{self.purpose}/shards", epoch)(
                np.arange(len(self.sizes), dtype=np.uint64)
            )
            ends = np.cumsum(self.sizes[shards])
            window_ends = ends[[*range(self.window - 1, len(ends) - 1, self.window), len(ends) - 1]]
            found = shards, ends, window_ends
            near = {known: value for known, value in self._epochs.items() if abs(known - epoch) <= 1}
            self._epochs = {**near, epoch: found}  # bound whole: threads may do it twice, and change none in use
        return found

    def __call__(self, places: Integers) -> Integers:
        """The sample numbers at `places`."""
        items = np.empty_like(places)
        for epoch, here, inside in _by_epoch(places, self.length):
            shards, ends, window_ends = self._epoch(epoch)
            windows = np.searchsorted(window_ends, inside, side="right")
            found = np.empty_like(inside)
            for number in np.unique(windows).tolist():
                begin = window_ends[number - 1] if number else np.uint64(0)
                among = windows == number
                length = int(window_ends[number] - begin)
                mixed = _items(inside[among] - begin, length, self.seed, f"{self.purpose}/window", epoch, number)
                place = mixed + begin
                shard = np.searchsorted(ends, place, side="right")
                found[among] = place - (ends[shard] - self.sizes[shards[shard]]) + self.starts[shards[shard]]
            items[here] = found
        return items

    def windows(self, place: int, count: int) -> list[list[int]]:
        """The shards of the window that `place` lies in and of those after it, `count` windows in all."""
        found = []
        for _ in range(count):
            epoch, inside = divmod(place, self.length)
            shards, _, window_ends = self._epoch(epoch)
            number = int(np.searchsorted(window_ends, inside, side="right"))
            found.append([int(s) for s in shards[number * self.window : (number + 1) * self.window]])
            place = epoch * self.length + int(window_ends[number])
        return found


def places_of(draw: int, rows: range, batch: int) -> Integers:
    """The places of `rows` of global batch `draw`; batches run across the end of an epoch, so that nothing is dropped."""
    return np.arange(draw * batch + rows.start, draw * batch + rows.stop, dtype=np.uint64)


def uniform(places: Integers, seed: int, purpose: str) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each place: of the same place always the same, whoever asks."""
    bits = _mix(_mix(places + np.uint64(derive(seed, purpose))) + np.uint64(derive(seed, purpose, 1)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
