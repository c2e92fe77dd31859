"""Sources: images, masks and signals as users have them, understood as numbered items that can be read in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One sample of a source: its path there ("" where it has none) and the bytes of its members by suffix.

    An image stands under `png jpg jpeg webp bmp` (the file untouched) or `npy` (uint8, (H, W, C)), a class number under `cls`,
    a mask under `mask.png` or `mask.npy`, a signal under `signal.npy` (float32, (C, L)).
    """

    name: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Split:
    """One split of a source: how many items, one of them by number, and what tells this source from another.

    `read` raises ValueError that says what is wrong with the item.
    """

    samples: int
    read: Callable[[int], Item]
    digest: str


@dataclass(frozen=True)
class Source:
    """A source that has been understood: what `dataset.json` is to say of it, its splits, and the names of its classes."""

    record: dict[str, str | int | None]
    splits: dict[str, Split]
    names: tuple[str, ...] = ()
