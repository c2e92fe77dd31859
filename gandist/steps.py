"""Steps of the clock: computed as they are written, or recorded once as CUDA graphs and replayed.

A small network keeps a GPU waiting for Python, which hands over one kernel after the other. A graph is handed over at once. Only what
Python decides stands still in it, so that it is recorded for one regime: the phases whose turn it is, and what of the clock their losses
depend on. All else is memory whose place stays: batches are copied into it, rates are set in it, and each source of random numbers is
seeded for its position before every replay. A replayed step is the step, bit by bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from gandist.data.stream import Batch
from gandist.game import Clock, Phase, Players, draws, unchanging
from gandist.player import Player, Turn, in_capture
from gandist.run import Run
from gandist.seeding import derive

WARM_UP = 3  # steps of a regime before it is recorded: kernels are chosen, and memory is found
REGIMES = 16  # that are remembered


def reseed(seed: int, device: torch.device) -> None:
    """What `torch.manual_seed` does, for the CPU and one device alone: it also writes down a traceback for every kind of device
    that is not there, 0.3 ms each."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ].manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


class Move(NamedTuple):
    """A phase and one of its repeats: its place among the phases, and the draw that it reads."""

    place: int
    phase: Phase
    draw: int


def moves(clock: Clock, phases: tuple[Phase, ...]) -> list[Move]:
    """What is played in this step, in order."""
    numbered = enumerate(zip(phases, draws(phases, clock.step), strict=True))
    return [Move(place, phase, draw) for place, (phase, numbers) in numbered if phase.when(clock) for draw in numbers]


def seed(run: Run, move: Move) -> None:
    """Seeds what its networks draw in their hidden layers."""
    reseed(derive(run.recipe.run.seed, f"hidden/{move.place}", move.draw, run.world.rank), run.world.device)


def play(players: Players, clock: Clock, move: Move, batches: list[Batch]) -> tuple[Turn, list[dict[str, Tensor]]]:
    """A player's turn, and what it measured of each micro-batch."""
    measured = []
    share = clock.batch / move.phase.repeat
    with players[move.phase.player].turn(clock.images, share, len(batches), move.phase.hold) as turn:
        for batch in turn.accumulate(batches):
            loss, values = move.phase.loss(players, batch, clock)
            turn.backward(loss)
            measured.append(values)
    return turn, measured


def step(run: Run, todo: list[Move], read: Callable[[Move], list[Batch]]) -> None:
    """One step of the clock: each move with its own draw."""
    turns = []
    for move in todo:
        seed(run, move)
        turn, measured = play(run.players, run.clock, move, read(move))
        for values in measured:
            run.meter.add(values)
        turns.append(turn)
    for turn in turns:
        turn.finish()
        run.meter.add({f"grad_norm/{turn.player.name}": turn.norm})


def plain_step(run: Run) -> None:
    """One step of the clock as it is written."""
    step(run, moves(run.clock, run.phases), lambda move: run.stream.read(move.draw))


# ---- as graphs


class Unknown(Exception):
    """What a recording asked for and no step before it did."""


@dataclass
class Sources:
    """The sources of random numbers of a step, by the order in which it asks for them."""

    seed: int
    device: torch.device
    first: int = 0  # draw of the step
    move: int = 0
    asked: int = 0
    generators: list[torch.Generator] = field(default_factory=list)
    uses: list[tuple[int, int, str]] = field(default_factory=list)  # move, draw − first, purpose

    def begin(self, first: int) -> None:
        """A step whose first draw is `first` begins."""
        self.first, self.asked = first, 0

    def take(self, place: int, purpose: str) -> torch.Generator:
        """The next source."""
        number, use = self.asked, (self.move, place, purpose)
        self.asked += 1
        if in_capture(self.device):
            if self.uses[number : number + 1] != [use]:
                raise Unknown(f"random numbers for {purpose!r}, which no step before it drew at that point")
            return self.generators[number]
        if number == len(self.generators):
            self.generators.append(torch.Generator(self.device))
            self.uses.append(use)
        self.uses[number] = use
        return self._seeded(number)

    def _seeded(self, number: int) -> torch.Generator:
        _, place, purpose = self.uses[number]
        return self.generators[number].manual_seed(derive(self.seed, purpose, self.first + place))

    def reseed(self, first: int) -> None:
        """Seeds all for the step whose first draw is `first`."""
        self.first = first
        for number in range(len(self.generators)):
            self._seeded(number)

    def of(self, move: int) -> list[torch.Generator]:
        """Those that a move of the step takes."""
        return [g for g, (user, _, _) in zip(self.generators, self.uses, strict=True) if user == move]


@dataclass(frozen=True)
class Fixed(Batch):
    """Rows whose memory and whose sources of random numbers have a place of their own."""

    sources: Sources | None = None
    place: int = 0  # its draw, from the first of the step

    def source(self, purpose: str) -> torch.Generator:
        assert self.sources is not None
        return self.sources.take(self.place, purpose)


class Recorded(NamedTuple):
    """A graph: of a move, or of the end of a turn that was held; and what it measures, as one vector."""

    graph: torch.cuda.CUDAGraph
    move: Move | None
    player: Player
    share: float  # of the images of a step
    names: tuple[str, ...]
    measured: Tensor
    counts: int


@dataclass
class Regime:
    """Steps that are alike but for the numbers that they compute with."""

    sources: Sources
    seen: int = 0
    recorded: list[Recorded] = field(default_factory=list)


class Unread:
    """In the place of the clock, for a loss that said that it does not read it."""

    def __getattr__(self, name: str) -> Any:
        raise Unknown(f"the clock's `{name}`, without a `regime` of its phase")


class Stepper:
    """Plays steps: as graphs where it can. `why_not` is the reason where it cannot."""

    def __init__(self, run: Run) -> None:
        self.run, self.device = run, run.world.device
        self.why_not = refusal(run)
        self.on_gpu = self.device.type == "cuda"
        self._regimes: OrderedDict[Hashable, Regime] = OrderedDict()
        self._slots: dict[int, list[dict[str, Tensor]]] = {}  # batches, by their draw from the first of the step
        self._before: torch.cuda.Stream | None = None  # the stream that it found
        if self.why_not is not None:
            run.note_graphs(None, self.why_not)
        elif self.on_gpu:
            self._pool = torch.cuda.graph_pool_handle()
            self._before = torch.cuda.current_stream(self.device)
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            torch.cuda.set_stream(self._stream)  # where recordings are made; all before them is warmed up there too

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives back the stream that it found."""
        if self._before is not None:
            self._before.wait_stream(self._stream)
            torch.cuda.set_stream(self._before)

    def __call__(self) -> None:
        """One step of the clock."""
        if not self.on_gpu or self.why_not is not None:
            plain_step(self.run)
            return
        phases = self.run.phases
        todo = moves(self.run.clock, phases)
        first = draws(phases, self.run.clock.step)[0][0]
        regime = self._regime(self._key(todo, first))
        if not regime.recorded and regime.seen >= WARM_UP:
            try:
                self._record(regime, todo, first)
            except (Unknown, RuntimeError) as error:
                self._give_up(f"{type(error).__name__}: {error}".splitlines()[0])
                plain_step(self.run)
                return
        if regime.recorded:
            self._replay(regime, todo, first)
        else:
            self._warm_up(regime, todo, first)

    def _key(self, todo: list[Move], first: int) -> Hashable:
        clock, players = self.run.clock, self.run.players
        return tuple(
            (move.place, move.draw - first, move.phase.regime(clock), players[move.phase.player].regime(clock.images))
            for move in todo
        )

    def _regime(self, key: Hashable) -> Regime:
        if key not in self._regimes:
            while len(self._regimes) >= REGIMES:  # a rule that changes in every step would fill all memory
                self._regimes.popitem(last=False)
            self._regimes[key] = Regime(Sources(self.run.recipe.run.seed, self.device))
        self._regimes.move_to_end(key)
        return self._regimes[key]

    def _batches(self, regime: Regime, todo: list[Move], first: int) -> dict[int, list[Batch]]:
        """The batches of all moves, copied to their places."""
        found: dict[int, list[Batch]] = {}
        for draw in dict.fromkeys(move.draw for move in todo):
            fresh = self.run.stream.read(draw)
            place = draw - first
            if place not in self._slots:
                self._slots[place] = [{n: torch.empty_like(part) for n, part in batch.parts.items()} for batch in fresh]
            slot = self._slots[place]
            for batch, parts in zip(fresh, slot, strict=True):
                torch._foreach_copy_([*parts.values()], [batch.parts[name] for name in parts])
            found[draw] = [
                Fixed(
                    parts, draw, batch.rows, batch.size, batch.seed, batch.device, batch.numbers,
                    sources=regime.sources, place=place,
                )
                for batch, parts in zip(fresh, slot, strict=True)
            ]  # fmt: skip
        return found

    def _warm_up(self, regime: Regime, todo: list[Move], first: int) -> None:
        """The step as it is written, on the memory of the graph."""
        batches = self._batches(regime, todo, first)
        regime.seen += 1
        regime.sources.begin(first)

        def read(move: Move) -> list[Batch]:
            regime.sources.move = todo.index(move)
            return batches[move.draw]

        step(self.run, todo, read)

    def _record(self, regime: Regime, todo: list[Move], first: int) -> None:
        """Records the step; nothing is computed."""
        run = self.run
        batches = self._batches(regime, todo, first)
        regime.sources.begin(first)
        recorded: list[Recorded] = []
        held: list[tuple[Move, Turn]] = []
        for number, move in enumerate(todo):
            regime.sources.move = number
            guarded = move if move.phase.regime is not unchanging else move._replace(phase=_unread(move.phase))
            seed(run, move)
            with self._recording(regime.sources.of(number)) as graph:
                turn, measured = play(run.players, run.clock, guarded, batches[move.draw])
                sums = {name: torch.stack([v[name].detach().float() for v in measured]).sum(0) for name in measured[0]}
                if turn.finished:
                    sums[f"grad_norm/{turn.player.name}"] = turn.norm.float() * len(measured)
                else:
                    held.append((move, turn))
                vector = torch.stack([*sums.values()]) if sums else torch.zeros(0, device=self.device)
            share = run.clock.batch / move.phase.repeat
            recorded.append(Recorded(graph, move, turn.player, share, (*sums,), vector, len(measured)))
        for move, turn in held:
            with self._recording([]) as graph:
                turn.finish()
                vector = turn.norm.float()[None]
            name = f"grad_norm/{turn.player.name}"
            recorded.append(Recorded(graph, None, turn.player, run.clock.batch / move.phase.repeat, (name,), vector, 1))
        regime.recorded = recorded
        run.note_graphs(len(recorded))

    def _recording(self, generators: list[torch.Generator]) -> _Recording:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        return _Recording(graph, self._pool, self._stream)

    def _replay(self, regime: Regime, todo: list[Move], first: int) -> None:
        """The step, from its recording."""
        run = self.run
        self._batches(regime, todo, first)
        regime.sources.reseed(first)
        current = iter(todo)
        for one in regime.recorded:
            if one.move is not None:
                seed(run, next(current))
            one.player.schedule(run.clock.images, one.share)
            one.graph.replay()
            run.meter.add_vector(one.names, one.measured, one.counts)

    def _give_up(self, reason: str) -> None:
        self.why_not = reason
        self._regimes.clear()
        self._slots.clear()
        # A recording that CUDA broke off leaves the device's own source waiting for its end.
        fresh = torch.Generator(self.device)
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
        self.run.note_graphs(None, reason)


class _Recording:
    """What is called within becomes part of the graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
        self.graph = graph
        # Other threads may go on asking for memory meanwhile: those of the stream lock pages for batches.
        self._context = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")

    def __enter__(self) -> torch.cuda.CUDAGraph:
        self._context.__enter__()
        return self.graph

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._context.__exit__(kind, error, trace)
        except RuntimeError as ended:  # what broke the recording says more than that it cannot be ended
            raise (error or ended) from None


def _unread(phase: Phase) -> Phase:
    """A phase whose loss gets no clock."""
    return replace(phase, loss=lambda players, batch, clock: phase.loss(players, batch, Unread()))  # type: ignore[arg-type]


def refusal(run: Run) -> str | None:
    """Why steps of this run are not recorded as graphs; None where they are, or where there is no GPU to do it on."""
    if run.world.device.type != "cuda":
        return None
    if not run.recipe.run.graphs:
        return "`run.graphs` is false"
    if run.world.ranks > 1:
        return f"{run.world.ranks} processes reduce their gradients while they are computed"
    if any(player.options.activation_checkpointing for player in run.players.values()):
        return "activation checkpointing sets random numbers back"
    if run.world.precision == "fp16":
        return "the scale of fp16's losses changes with what they are"
    return None
