"""Scenes: garments that cover each other on textured grounds, with the class of every pixel.

Scene `number` is a function of its number alone: the embedded garments, Philox's raw bits, and of arithmetic what IEEE 754
rounds alike on every machine. So waves are parabolas here, and an angle is drawn as the tangent of its half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from gandist.data.sources import Split
from gandist.data.sources.arrays import GARMENTS, embedded_source, npy_bytes, npy_view
from gandist.seeding import derive

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

SIZE = 64
SAMPLES = {"train": 4000, "test": 500}
CLASSES = ("background", *GARMENTS)
WORN = {"train": range(8000), "test": range(8000, 10_000)}  # the embedded garments that the scenes of a split show
_PATCH = 52  # a garment of 28 pixels is at most 28 · 1.4 · (cos 20° + sin 20°) = 50.2 wide
_HALF_TURN = 0.17632698070846498  # tan 10°
_OPAQUE = 32.0  # the grey value from which nothing shines through; above half of it a pixel is the garment's


@dataclass(frozen=True)
class Scene:
    """An image (SIZE, SIZE, 3), its mask (SIZE, SIZE), and the numbers of its embedded garments from back to front."""

    image: Pixels
    mask: Pixels
    garments: tuple[int, ...]

    @property
    def members(self) -> dict[str, bytes]:
        """As arrays: what a PNG's bytes are depends on the library that packs them."""
        return {"npy": npy_bytes(self.image), "mask.npy": npy_bytes(self.mask)}


class _Draws:
    """The random numbers of one scene in turn, from bits that numpy keeps the same in every version."""

    def __init__(self, number: int) -> None:
        self._philox = np.random.Philox(key=derive(0, "generated/fashion-scenes", number))

    def uniform(self, *shape: int) -> Floats:
        """Multiples of 2⁻⁵³ in [0, 1)."""
        bits = self._philox.random_raw(math.prod(shape)) >> np.uint64(11)
        return bits.astype(np.float64).reshape(shape) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        """One number in low … high."""
        return low + (high - low) * float(self.uniform(1)[0])

    def below(self, end: int) -> int:
        """One of 0 … end − 1."""
        return int(self.between(0, end))

    def colour(self) -> Floats:
        """Any hue, from grey to strong, the largest of its values 120 … 255, (3,)."""
        values, brightness = self.uniform(3), self.between(120, 255)
        hue = (values - values.min()) / (values.max() - values.min())
        found: Floats = brightness * (1 - self.between(0, 0.8) * (1 - hue))
        return found

    def grain(self) -> npt.NDArray[np.int64]:
        """Noise of mean 0 and standard deviation 6.5 in −15 … 15, (SIZE, SIZE, 3)."""
        octets = self._philox.random_raw(SIZE * SIZE * 3 // 8).astype("<u8").view(np.uint8).astype(np.int64)
        return ((octets & 15) + (octets >> 4) - 15).reshape(SIZE, SIZE, 3)


@cache
def _embedded() -> Split:
    return embedded_source("fashion-mnist").splits["train"]


def _garment(which: int) -> tuple[Floats, int]:
    """Grey values of an embedded garment in a rim of zeros, (30, 30), and its class."""
    members = _embedded().read(which).members
    return np.pad(npy_view(members["npy"]).astype(np.float64), 1), int(members["cls"])


def _wave(turns: Floats) -> Floats:
    """Like (1 + sin 2πx) / 2, of parabolas."""
    share = turns - np.floor(turns)
    half = np.where(share < 0.5, share, share - 0.5)
    hill = 8 * half * (0.5 - half)
    return 0.5 + np.where(share < 0.5, hill, -hill)


def _smooth(values: Floats, places: Floats) -> Floats:
    """Rows of `values` (N, M) at places along N; between two of them a cubic leads from one to the other."""
    below = np.floor(places).astype(np.int64)
    share = (places - below)[:, None]
    share = share * share * (3 - 2 * share)
    return values[below] + share * (values[below + 1] - values[below])


def _noise(draws: _Draws, size: int, cells: int) -> Floats:
    """Smooth noise in 0 … 1 of about `cells` hills a side, (size, size)."""
    places = (np.arange(size, dtype=np.float64) + 0.5) * (cells / size)
    return _smooth(_smooth(draws.uniform(cells + 1, cells + 1), places).T, places)


def _texture(draws: _Draws, size: int) -> Floats:
    """Cloth, grain or stripes in two colours, (size, size, 3)."""
    y, x = np.ogrid[:size, :size]
    clouds = 0.6 * _noise(draws, size, 2 + draws.below(5)) + 0.4 * _noise(draws, size, 12 + draws.below(16))
    dx, dy = draws.between(-1, 1), draws.between(-1, 1)
    waves = 1 / (draws.between(3, 14) * math.sqrt(dx * dx + dy * dy + 1e-9))  # a pixel, along (dx, dy)
    bend = draws.between(0, 1.5) * clouds
    stripes = _wave((dx * x + dy * y) * waves + bend)
    checks = stripes * _wave((dy * x - dx * y) * waves + bend)
    a, b, c = np.square(draws.uniform(3))
    mixed = (a * clouds + b * stripes + c * checks) / (a + b + c)
    first, second = draws.colour() * draws.between(0.3, 1), draws.colour()
    found: Floats = first + mixed[:, :, None] * (second - first)
    return found


def _ground(draws: _Draws) -> Floats:
    """Two textures with a winding border, soft or hard, (SIZE, SIZE, 3)."""
    one, other = _texture(draws, SIZE), _texture(draws, SIZE)
    height = (_noise(draws, SIZE, 1 + draws.below(4)) - draws.between(0.2, 0.8)) * draws.between(4, 40)
    return one + np.clip(height, 0, 1)[:, :, None] * (other - one)


def _turned(grey: Floats, draws: _Draws) -> Floats:
    """The grey values of a garment at another size, turned and perhaps mirrored, (_PATCH, _PATCH)."""
    scale, tangent = draws.between(0.8, 1.4), draws.between(-_HALF_TURN, _HALF_TURN)
    mirror = 1 if draws.below(2) else -1
    cosine, sine = (1 - tangent * tangent) / (1 + tangent * tangent), 2 * tangent / (1 + tangent * tangent)
    y = (np.arange(_PATCH) - (_PATCH - 1) / 2)[:, None]
    x = y.T
    side = len(grey)
    rows = np.clip((y * cosine - x * sine) / scale + (side - 1) / 2, 0, side - 1.001)
    columns = np.clip((y * sine + x * cosine) * mirror / scale + (side - 1) / 2, 0, side - 1.001)
    top, left = rows.astype(np.int64), columns.astype(np.int64)
    right = columns - left
    upper = grey[top, left] + right * (grey[top, left + 1] - grey[top, left])
    lower = grey[top + 1, left] + right * (grey[top + 1, left + 1] - grey[top + 1, left])
    turned: Floats = upper + (rows - top) * (lower - upper)
    return turned


def scene(number: int) -> Scene:
    """Scene `number`: those of the split train come first, then those of test."""
    worn = WORN["train" if number < SAMPLES["train"] else "test"]
    draws = _Draws(number)
    margin = _PATCH // 2  # so that a garment may reach beyond the image
    inside = np.s_[margin : margin + SIZE, margin : margin + SIZE]
    image = np.pad(_ground(draws), ((margin, margin), (margin, margin), (0, 0)))
    mask = np.zeros(image.shape[:2], np.uint8)
    seen = np.zeros(mask.shape, bool)
    seen[inside] = True
    garments = tuple(worn[draws.below(len(worn))] for _ in range(3 + draws.below(4)))
    for which in garments:
        grey, label = _garment(which)
        grey = _turned(grey, draws)
        solid = grey > _OPAQUE / 2
        while True:  # until at least half of it is inside
            y, x = draws.below(SIZE), draws.below(SIZE)
            there = np.s_[y : y + _PATCH, x : x + _PATCH]
            if 2 * np.count_nonzero(solid & seen[there]) >= np.count_nonzero(solid):
                break
        dye = draws.colour() if draws.below(3) else _texture(draws, _PATCH)
        cloth = dye * (0.5 + grey * (0.7 / 255))[:, :, None]  # as bright as the grounds, so that no threshold finds it
        image[there] += np.minimum(grey / _OPAQUE, 1)[:, :, None] * (cloth - image[there])
        mask[there][solid] = label + 1
    shown = np.clip(np.rint(image[inside] + draws.between(0.3, 1.3) * draws.grain()), 0, 255)
    return Scene(shown.astype(np.uint8), mask[inside], garments)
