"""Game: who plays, in which order, for which losses. The clock, the phases, and the entry points that name them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from gandist.data.dataset import Spec
from gandist.data.stream import Batch
from gandist.health import Symptom
from gandist.networks import AnyDiscriminator, AnyGenerator, Classifies
from gandist.networks.noise import BLOCK, SPREAD, Distribution, Noise, Width
from gandist.networks.starting import MAX_REFERENCE, START
from gandist.player import Player, PlayerOptions, Remembered
from gandist.recipe import Choice, DataOptions, Section, installed
from gandist.windows import InferenceOptions

Players = Mapping[str, Player]
SAMPLES = 64  # in the grids that a run draws of itself


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


def unchanging(_: Clock) -> Hashable:
    """A loss that does not read the clock."""
    return None


@dataclass(frozen=True)
class Phase:
    """One player's move: which player, which loss, how often, when; `hold` leaves its weights as they are until the step ends.

    `regime` is what of the clock the loss depends on: while it is the same, a GPU may repeat the move as a graph. A loss that reads
    the clock says what for, and is never repeated otherwise.
    """

    player: str
    loss: Loss
    repeat: int = 1
    when: Callable[[Clock], bool] = always
    hold: bool = False
    regime: Callable[[Clock], Hashable] = unchanging

    def __post_init__(self) -> None:
        assert not (self.hold and self.repeat > 1), "held gradients would be lost to the next repeat"


class Side(NamedTuple):
    """A player before it is built: its options, a builder of its module, which draws its initial weights, and its memory."""

    options: PlayerOptions
    build: Callable[[], nn.Module]
    remembered: Remembered = Remembered()


class Table(NamedTuple):
    """Rows of words and numbers under the names of their columns."""

    columns: tuple[str, ...]
    rows: list[tuple[str | float | None, ...]]


class Panels(NamedTuple):
    """Images (C, H, W) in −1 … 1 of any sizes, each with its caption."""

    images: list[Tensor]
    captions: list[str]


class Evaluation(NamedTuple):
    """Scores by name, the protocol that defines them (only scores of one protocol may be compared), and what else is worth a look."""

    scores: dict[str, float]
    protocol: dict[str, Any]
    curves: dict[str, list[float]] = {}
    tables: dict[str, Table] = {}
    panels: dict[str, Panels] = {}


class Evaluator(Protocol):
    """Prepared once, called at any moment of a run by all processes together; rank 0 gets the evaluation, the others None."""

    def __call__(self, players: Players, /) -> Evaluation | None: ...


class Game(Section):
    """A game's fields are its recipe keys. To the loop it is players, phases and the parts of a batch that it reads."""

    kind: str

    @abstractmethod
    def parts(self, spec: Spec) -> tuple[str, ...]:
        """The parts of a batch that it reads."""

    def parts_named(self, spec: Spec) -> tuple[str, ...]:
        """Those that its recipe may speak of: a baseline has the keys of the game that it is compared with."""
        return self.parts(spec)

    @abstractmethod
    def faults(self, spec: Spec) -> Iterator[tuple[tuple[str, ...], str]]:
        """Where in the recipe this game contradicts the data, and how."""

    @abstractmethod
    def sides(self, spec: Spec) -> dict[str, Side]:
        """The players by name."""

    @abstractmethod
    def phases(self, spec: Spec) -> tuple[Phase, ...]:
        """The moves of one step, in order."""

    @abstractmethod
    def examples(self, spec: Spec) -> dict[str, tuple[Tensor, ...]]:
        """What each player is called with, for two rows of zeros."""

    @property
    def start_samples(self) -> int:
        """How many samples of the data the initial weights depend on."""
        return 0

    @property
    def starts(self) -> bool:
        """Whether initial weights wait for `start`."""
        return self.start_samples > 0

    def start(self, players: Players, spec: Spec, samples: Tensor) -> None:
        """Changes initial weights, on one process, by `start_samples` samples of the first part that it reads."""

    @property
    def held_out(self) -> str | None:
        """The split that it is scored on, where that must not be the one that it learns from."""
        return None

    def symptoms(self, row: Mapping[str, float]) -> Iterator[Symptom]:
        """What a row of the log says is wrong with the game."""
        yield from ()

    @abstractmethod
    def evaluator(self, data: DataOptions, spec: Spec, device: torch.device) -> Evaluator:
        """Makes ready to score players on the data; raises InputError where something that it needs is not there."""

    def seen(self, batch: Batch) -> Mapping[str, Tensor]:
        """The parts of a batch as its players see them, where it does something to them first."""
        return batch.parts

    def refuse_unready(self) -> None:
        """Raises InputError or Failure where a file that a new run starts from is not there."""

    @abstractmethod
    def samples(
        self, players: Players, spec: Spec, count: int, seed: int, some: Callable[[int], Batch]
    ) -> Iterator[Tensor]:
        """Images (B, C, H, W) in −1 … 1 or signals (B, C, L) to look at, the same for the same seed and weights.

        `some` reads so many rows of the data, or fewer where there are fewer, on the CPU.
        """


class GeneratorSide(PlayerOptions):
    """The generator; its average weights, where it keeps them, make the samples."""

    network: AnyGenerator


class DiscriminatorSide(PlayerOptions):
    """The discriminator."""

    network: AnyDiscriminator


class Generative(Game):
    """A game whose player `generator` makes samples from noise, in blocks of `BLOCK` rows, for a player `discriminator`."""

    noise: Width = 100
    noise_distribution: Distribution = "normal"  # both of variance 1
    generator: GeneratorSide
    discriminator: DiscriminatorSide

    @abstractmethod
    def classes(self, spec: Spec) -> int | None:
        """The classes that the generator is conditioned on; None where it is not."""

    def latents(self, block: int, seed: int, device: torch.device, truncation: float | None = None) -> Tensor:
        """The noise (BLOCK, noise) of a block; with `truncation` none of it is larger than that."""
        noise = Noise(width=self.noise, distribution=self.noise_distribution)
        return noise.block(block, seed, device, truncation)

    def fresh_latents(self, batch: Batch, purpose: str) -> Tensor:
        """Noise (B, noise) for the rows of a batch."""
        if self.noise_distribution == "uniform":
            return (2 * batch.uniform(f"noise/{purpose}", self.noise) - 1) * SPREAD
        return batch.normal(f"noise/{purpose}", self.noise)

    @property
    def start_samples(self) -> int:
        return max(self.generator.network.start_samples, self.discriminator.network.start_samples)

    @property
    def starts(self) -> bool:
        return self.generator.network.starts or self.start_samples > 0

    def start(self, players: Players, spec: Spec, samples: Tensor) -> None:
        device = players["generator"].device
        samples = samples.to(device)
        inputs = self.inputs(spec, START + MAX_REFERENCE, device)
        self.generator.network.start(players["generator"].module, samples, inputs)
        asked = len(self.examples(spec)["discriminator"]) > 1
        labels = samples.new_zeros(len(samples), dtype=torch.int64) if asked else None
        self.discriminator.network.start(players["discriminator"].module, samples, labels)

    def inputs(self, spec: Spec, count: int, device: torch.device) -> tuple[Tensor, ...]:
        """What the generator is called with for `count` samples: noise (count, noise) and, where it is conditional, labels."""
        blocks = [self.latents(block, 0, device) for block in range(-(-count // BLOCK))]
        classes = self.classes(spec)
        labels = () if classes is None else (torch.arange(count, device=device) % classes,)
        return torch.cat(blocks)[:count], *labels

    def make(self, module: nn.Module, latents: Tensor, labels: Tensor | None) -> Tensor:
        """Samples (B, *shape) of latents (B, noise)."""
        made: Tensor = module(latents) if labels is None else module(latents, labels)
        return made

    def made(
        self, players: Players, spec: Spec, count: int, seed: int, *, labels: Tensor | None = None,
        truncation: float | None = None, first: int = 0, every: int = 1, average: bool = True,
    ) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
        """The number of its first row and the rows of each block, on the device: of `count` samples, every `every`-th block from
        block `first` on. `labels` (count,) are their classes, which take turns unless given; `average` prefers average weights."""
        generator, classes = players["generator"], self.classes(spec)
        if classes is not None and labels is None:
            labels = torch.arange(count) % classes
        with generator.evaluating(average) as module:
            for block in range(first, -(-count // BLOCK), every):
                rows = range(block * BLOCK, min(count, (block + 1) * BLOCK))
                latents = self.latents(block, seed, generator.device, truncation)
                asked = None
                if labels is not None:
                    asked = torch.zeros(BLOCK, dtype=torch.int64, device=generator.device)
                    asked[: len(rows)] = labels[rows.start : rows.stop]
                yield rows.start, self.make(module, latents, asked)[: len(rows)].float()

    def samples(
        self, players: Players, spec: Spec, count: int, seed: int, some: Callable[[int], Batch] | None = None
    ) -> Iterator[Tensor]:
        for _, made in self.made(players, spec, count, seed):
            yield made.cpu()


class Classifying(Game):
    """A game whose player `discriminator` is a classifier: its verdict on images has class logits, and the logit of being real."""

    @abstractmethod
    def classifies(self) -> Classifies:
        """How that player was built for it."""

    @property
    def tells_fakes(self) -> bool:
        """Whether it learned to tell real images from generated ones."""
        return True


class Segmenting(Game):
    """A game whose player `segmenter` gives logits (B, K, h, w) of the classes of places of images (B, C, H, W)."""

    # Not decisive for a weight, and yet restored with the weights: it says how images are answered.
    inference: Annotated[InferenceOptions, Field(json_schema_extra={"harmless": True, "kept": True})] = (
        InferenceOptions()
    )

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels of the image, in each direction, for one place of the logits."""


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


GAMES = Choice("a game", partial(installed, "gandist.games", "", Game))
