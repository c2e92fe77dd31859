"""Generated: samples made by a formula, for teaching, tests and the scores that need to know the distribution.

Sample `number` is a function of its number alone: Philox's raw bits, and of arithmetic what IEEE 754 rounds alike on every
machine (+ − × ÷ √). The exponential and the logarithm are series here, since those of libm and numpy differ in their last bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gandist.data.decode import LABEL_SUFFIX
from gandist.data.sources import Item, Source, Split
from gandist.data.sources.arrays import signal_members
from gandist.data.sources.scenes import CLASSES, SAMPLES, scene
from gandist.recipe import InputError, suggestion
from gandist.seeding import derive

Floats = npt.NDArray[np.float64]
Value = TypeVar("Value", float, Floats)

LENGTH, RATE = 1024, 8000  # values of a waveform, and of a second
PEAK = 0.9
OPEN_STRINGS = {"E2": 82.41, "A2": 110.00, "D3": 146.83, "G3": 196.00, "B3": 246.94, "E4": 329.63}  # Hz
_BLOCK = math.isqrt(LENGTH)  # a power of two, and so is LENGTH
_LN_2 = 0.6931471805599453
_PROBES = 8  # items whose bytes go into a digest, so that another formula, or a machine that rounds otherwise, shows


@dataclass(frozen=True)
class Formula:
    """Samples by number (the bytes of their members), how many go into each split, its version, and the classes' names."""

    sample: Callable[[int], dict[str, bytes]]
    splits: dict[str, int]
    version: int
    names: tuple[str, ...] = ()


def mixture(name: str) -> tuple[Floats, float]:
    """The centres (M, 2) of a mixture of equally likely Gaussians, by label, and the standard deviation that all have.

    `grid-25`: −4, −2, 0, 2, 4 by the same, 0.05 (Srivastava et al. 2017, VEEGAN). `ring-8`: eight on a circle of radius 2,
    counted anticlockwise from (2, 0), 0.02 (Metz et al. 2017, Unrolled GANs). Raises InputError for another name.
    """
    if name not in _MIXTURES:
        raise InputError(f"{name}: no mixture of Gaussians in the plane{suggestion(name, _MIXTURES)}")
    centres, deviation = _MIXTURES[name]
    return np.array(centres), deviation


_H = math.sqrt(2)
_MIXTURES = {
    "grid-25": ([(x, y) for x in (-4.0, -2.0, 0.0, 2.0, 4.0) for y in (-4.0, -2.0, 0.0, 2.0, 4.0)], 0.05),
    "ring-8": ([(2.0, 0.0), (_H, _H), (0.0, 2.0), (-_H, _H), (-2.0, 0.0), (-_H, -_H), (0.0, -2.0), (_H, -_H)], 0.02),
}


@dataclass(frozen=True)
class String:
    """A plucked stiff string with damping: mode n = 1, 2, … sounds at n·f0·√(1 + B·n²) Hz and decays at γ0 + γ2·n² a second.

    The modes below half the sampling rate are added up: y(t) = Σ a_n exp(−γ_n t) sin(2π f_n t), a_n ∝ sin(nπp) / n² for a pluck
    at the share p of the length (Fletcher and Rossing, The Physics of Musical Instruments, chapter 2). So moves a heavy bridge:
    its speed is the integral of the force n·a_n·cos(2π f_n t) that the string released at rest puts on it.
    """

    label: int  # the place in OPEN_STRINGS
    f0: float  # Hz; within 2 % of the open string
    pluck: float  # p, 0.1 … 0.5
    stiffness: float  # B, 2e-5 … 2e-4
    damping: float  # γ0, 2 … 20 a second
    damping_growth: float  # γ2, 0.01 … 0.1 a second

    @property
    def modes(self) -> Floats:
        """The numbers n of the modes that are heard, (M,)."""
        n = np.arange(1, RATE // 2 // int(self.f0) + 2, dtype=np.float64)
        return n[self._pitches(n) < RATE / 2]

    def _pitches(self, n: Floats) -> Floats:
        return n * self.f0 * np.sqrt(1 + self.stiffness * n * n)

    @property
    def frequencies(self) -> Floats:
        """f_n in Hz, (M,)."""
        return self._pitches(self.modes)

    @property
    def dampings(self) -> Floats:
        """γ_n a second, (M,)."""
        return self.damping + self.damping_growth * self.modes**2

    @property
    def amplitudes(self) -> Floats:
        """a_n up to a common factor, (M,)."""
        turns = self.modes * self.pluck / 2
        return _exp(0 * turns, 2 * math.pi * (turns - np.rint(turns)))[1] / self.modes**2

    def waveform(self) -> Floats:
        """The first 0.128 s, (LENGTH,), with its peak at ±PEAK."""
        step = _exp(-self.dampings / RATE, 2 * math.pi * self.frequencies / RATE)
        *fine, block = _powers(step)
        *coarse, _ = _powers(block)
        total = np.zeros((_BLOCK, _BLOCK))
        # Mode by mode, since `sum` and `einsum` add in an order of their own.
        for amplitude, re, im, fine_re, fine_im in zip(
            self.amplitudes, *(part.T[:, :, None] for part in coarse), *(part.T for part in fine), strict=True
        ):
            total += amplitude * (re * fine_im + im * fine_re)
        found: Floats = total.ravel() * (PEAK / np.abs(total).max())
        return found


def string(number: int) -> String:
    """The string of sample `number`: which of the six, and each property drawn evenly from its range."""
    which, *shares = _uniforms("strings", number, 6)
    label = int(which * len(OPEN_STRINGS))
    f0, pluck, stiffness, damping, growth = (
        low + (high - low) * share
        for (low, high), share in zip(
            [(0.98, 1.02), (0.1, 0.5), (2e-5, 2e-4), (2, 20), (0.01, 0.1)], shares, strict=True
        )
    )
    return String(label, f0 * [*OPEN_STRINGS.values()][label], pluck, stiffness, damping, growth)


def _uniforms(name: str, number: int, count: int) -> list[float]:
    """Multiples of 2⁻⁵³ in [0, 1), from bits that numpy keeps the same in every version, as it does not its distributions."""
    raw = np.random.Philox(key=derive(0, f"generated/{name}", number)).random_raw(count)
    return [int(bits >> np.uint64(11)) * 2.0**-53 for bits in raw]


def _exp(real: Value, imaginary: Value) -> tuple[Value, Value]:
    """Real and imaginary part of e^(real + i·imaginary), of which the modulus is at most about π."""
    x, y = real / 16, imaginary / 16
    re, im = 0 * x + 1, 0 * y
    for n in range(11, 0, -1):  # the twelfth term is below 1e-17
        re, im = 1 + (x * re - y * im) / n, (x * im + y * re) / n
    for _ in range(4):
        re, im = re * re - im * im, 2 * re * im
    return re, im


def _powers(factor: tuple[Floats, Floats]) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
    """Powers 0 … _BLOCK−1 of complex numbers (M,), as real and imaginary parts (_BLOCK, M), and power _BLOCK."""
    x, y = factor
    re, im = np.ones((_BLOCK, len(x))), np.zeros((_BLOCK, len(x)))
    k = 1
    while k < _BLOCK:  # powers 0 … k−1 times power k are powers k … 2k−1
        re[k : 2 * k], im[k : 2 * k] = re[:k] * x - im[:k] * y, re[:k] * y + im[:k] * x
        x, y, k = x * x - y * y, 2 * x * y, 2 * k
    return re, im, (x, y)


def _log(x: float) -> float:
    """The natural logarithm, as 2·artanh((m − 1) / (m + 1)) of the mantissa m in ½ … 1."""
    mantissa, exponent = math.frexp(x)
    ratio = (mantissa - 1) / (mantissa + 1)
    series = 0.0
    for n in range(33, 0, -2):  # ratio² is at most 1/9
        series = series * ratio * ratio + 1 / n
    return exponent * _LN_2 + 2 * ratio * series


def _normals(first: float, second: float) -> tuple[float, float]:
    """Two independent numbers of N(0, 1) from two uniform ones (Box and Muller 1958)."""
    radius = math.sqrt(-2 * _log(1 - first))
    cosine, sine = _exp(0.0, 2 * math.pi * (second - 0.5))
    return radius * cosine, radius * sine


def _members(signal: Floats, label: int) -> dict[str, bytes]:
    return {**signal_members(signal), LABEL_SUFFIX: str(label).encode()}


def _of_mixture(name: str) -> Callable[[int], dict[str, bytes]]:
    centres, deviation = _MIXTURES[name]

    def sample(number: int) -> dict[str, bytes]:
        which, *shares = _uniforms(name, number, 3)
        label = int(which * len(centres))
        found = [
            [centre + deviation * normal] for centre, normal in zip(centres[label], _normals(*shares), strict=True)
        ]
        return _members(np.array(found), label)

    return sample


def _gaussian(number: int) -> dict[str, bytes]:
    return signal_members(np.array([[_normals(*_uniforms("gaussian", number, 2))[0]]]))


def _plucked(number: int) -> dict[str, bytes]:
    drawn = string(number)
    return _members(drawn.waveform()[None], drawn.label)


GENERATED = {
    "grid-25": Formula(_of_mixture("grid-25"), {"train": 20_000}, 1),
    "ring-8": Formula(_of_mixture("ring-8"), {"train": 20_000}, 1),
    "gaussian": Formula(_gaussian, {"train": 20_000}, 1),  # N(0, 1)
    "strings": Formula(_plucked, {"train": 9000, "test": 1000}, 1, tuple(OPEN_STRINGS)),
    "fashion-scenes": Formula(lambda number: scene(number).members, SAMPLES, 1, CLASSES),
}


def generated_source(name: str) -> Source:
    """The samples of a formula; the splits follow each other by number."""
    if name not in GENERATED:
        raise InputError(f"generated:{name}: no such formula{suggestion(name, GENERATED)}")
    formula = GENERATED[name]
    splits, first = {}, 0
    for split, samples in formula.splits.items():
        splits[split] = _split(name, formula, first, samples)
        first += samples
    return Source({"kind": "generated", "name": name, "version": formula.version}, splits, formula.names)


def _split(name: str, formula: Formula, first: int, samples: int) -> Split:
    def read(number: int) -> Item:
        assert 0 <= number < samples
        return Item("", formula.sample(first + number))

    digest = hashlib.blake2b(f"{name}/{formula.version}/{first}/{samples}".encode(), digest_size=16)
    for number in range(_PROBES):
        for data in read(number).members.values():
            digest.update(data)
    return Split(samples, read, digest.hexdigest())
