"""Game: who plays, in which order, for which losses. The clock, the phases, and the entry points that name them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from gandist.data.dataset import Spec
from gandist.data.stream import Batch
from gandist.player import Player, PlayerOptions
from gandist.recipe import Choice, InputError, Section

Players = Mapping[str, Player]


class Loss(Protocol):
    """A scalar and detached values to log, from players and a batch; only the phase's own player gets gradients."""

    def __call__(self, players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass
class Clock:
    """Progress: steps, and images at `batch` a step. Everything random or scheduled is a function of it."""

    batch: int
    images_wanted: int
    step: int = 0

    @property
    def images(self) -> int:
        """Images that all steps so far counted."""
        return self.step * self.batch

    @property
    def done(self) -> bool:
        """Whether the images that the recipe asks for have been counted."""
        return self.images >= self.images_wanted

    @property
    def steps_wanted(self) -> int:
        """Steps of the whole run."""
        return -(-self.images_wanted // self.batch)

    def passed(self, period: int | None) -> bool:
        """Whether a multiple of `period` images was reached by the last step; true at the start."""
        return period is not None and (self.step == 0 or self.images // period > (self.images - self.batch) // period)

    def advance(self) -> None:
        """One step further."""
        self.step += 1


def always(_: Clock) -> bool:
    """A phase of every step."""
    return True


@dataclass(frozen=True)
class Phase:
    """One player's move: which player, which loss, how often, when."""

    player: str
    loss: Loss
    repeat: int = 1
    when: Callable[[Clock], bool] = always


class Side(NamedTuple):
    """A player before it is built: its options, and a builder of its module, which draws its initial weights."""

    options: PlayerOptions
    build: Callable[[], nn.Module]


class Game(Section):
    """A game's fields are its recipe keys. To the loop it is players, phases and the parts of a batch that it reads."""

    kind: str
    parts: ClassVar[tuple[str, ...]]

    @abstractmethod
    def faults(self, spec: Spec) -> Iterator[tuple[tuple[str, ...], str]]:
        """Where in the recipe this game contradicts the data, and how."""

    @abstractmethod
    def sides(self, spec: Spec) -> dict[str, Side]:
        """The players by name."""

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The moves of one step, in order."""

    @abstractmethod
    def inputs(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The shape, without the batch axis, of what each player is called with."""

    @abstractmethod
    def samples(self, players: Players, count: int, seed: int) -> Iterator[Tensor]:
        """Images (B, C, H, W) in −1 … 1 to look at, `count` in all, the same for the same seed and weights."""


def draws_each_step(phases: tuple[Phase, ...]) -> int:
    """How many draws a step reads."""
    return 1 + sum(phase.repeat - 1 for phase in phases)


def draws(phases: tuple[Phase, ...], step: int) -> list[list[int]]:
    """The draws that each phase reads in `step`: all share the first, and each further repeat has one of its own."""
    base = step * draws_each_step(phases)
    taken, found = base + 1, []
    for phase in phases:
        found.append([base, *range(taken, taken + phase.repeat - 1)])
        taken += phase.repeat - 1
    return found


def _section(entry: EntryPoint, base: type[Section]) -> type[Section]:
    found = entry.load()
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"entry point {entry.name} = {entry.value}: not a {base.__name__}")
    return found


def _installed(group: str, prefix: str, base: type[Section]) -> dict[str, Callable[[], type[Section]]]:
    return {
        entry.name.removeprefix(prefix): partial(_section, entry, base)
        for entry in entry_points(group=group)
        if entry.name.startswith(prefix)
    }


def network(role: str, base: type[Section]) -> Choice:
    """Networks of a role (`generator`, `discriminator` …) by the name that an installed package gave them."""
    return Choice(f"a {role}", partial(_installed, "gandist.networks", f"{role}.", base))


GAMES = Choice("a game", partial(_installed, "gandist.games", "", Game))
