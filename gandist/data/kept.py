"""Samples in memory, once they were read."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


class Kept:
    """Rows of samples that were read before, in memory, in the order in which they came; one that was bad is not among them.

    In the order of the samples each would touch a page of its own, and where pages are huge the first few would take all the memory.
    """

    def __init__(self, samples: int) -> None:
        self._slots = np.full(samples, -1, np.int64)  # by place in an order
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._count = 0
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether all of them are there."""
        return self._count == len(self._slots)

    def take(self, picks: npt.NDArray[np.int64], into: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Copies the rows of these samples, if all are there."""
        slots = self._slots[picks]
        if (slots < 0).any():
            return False
        for name, array in into.items():
            # "raise" would fill a buffer first; no slot is beyond the rows, so that nothing is clipped.
            np.take(self._arrays[name], slots, 0, array, "clip")
        return True

    def put(self, picks: npt.NDArray[np.int64], rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keeps rows that are not there yet."""
        with self._lock:
            _, first = np.unique(picks, return_index=True)
            new = first[self._slots[picks[first]] < 0]
            slots = np.arange(self._count, self._count + len(new))
            for name, array in rows.items():
                if name not in self._arrays:
                    self._arrays[name] = np.empty((len(self._slots), *array.shape[1:]), array.dtype)
                self._arrays[name][slots] = array[new]
            self._slots[picks[new]] = slots  # from here on other threads may take them
            self._count += len(new)
