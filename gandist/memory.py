"""The memory that a step takes, found by playing it with tensors that have shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gandist.data.dataset import Spec
from gandist.data.stream import EXTENT, PARTS, Batch, Share
from gandist.game import Clock, Game
from gandist.launcher import choose_precision, told
from gandist.recipe import InputError, Recipe
from gandist.run import make_players
from gandist.steps import moves, play

CPU = torch.device("cpu")
LOOKED_AT = 4096  # steps, for kinds of them that differ
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
KINDS = 8  # that are played


def _copied(tensor: Tensor) -> int:
    """Bytes of the copy that a convolution makes for itself of what lies in neither of the two orders that it knows, as in a second backward."""
    dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return 0 if dense else tensor.numel() * tensor.element_size()


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that were made within it and are still there: now, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, made)
        if func in CONVOLUTIONS:
            self.most = max(self.most, self.now + sum(_copied(one) for one in args if isinstance(one, Tensor)))
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known.add(storage)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def _rows(spec: Spec, share: Share) -> dict[str, Tensor]:
    """The parts of a batch on one process."""
    count, image = len(share.rows), spec.image
    parts: dict[str, Tensor] = {}
    for name in share.parts:
        role = PARTS[name].role
        if role == "label":
            parts[name] = torch.zeros(count, dtype=torch.int64)
            continue
        if role == "signal":
            parts[name] = torch.zeros(count, *spec.shape)
            continue
        assert image is not None
        assert image.height is not None
        assert image.width is not None
        if role == "mask":
            parts[name] = torch.zeros(count, image.height, image.width, dtype=torch.int64)
        else:
            shape = (count, image.channels, image.height, image.width)
            parts[name] = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
            parts[name + EXTENT] = torch.zeros(count, 2, dtype=torch.int64)
    return parts


def _kinds(game: Game, spec: Spec, clock: Clock) -> list[int]:
    """Steps that differ in what is played or in what their losses read of the clock; the first one twice, since it makes moments."""
    phases, found = game.phases(spec), dict[Hashable, int]()
    last = max(0, clock.steps_wanted - 1)
    for step in [*range(min(LOOKED_AT, clock.steps_wanted)), last]:
        at = Clock(clock.batch, clock.images_wanted, step)
        found.setdefault(tuple((place, phase.regime(at)) for place, phase, _ in moves(at, phases)), step)
    steps = [*found.values()]
    return [0, *(steps if len(steps) <= KINDS else [*steps[: KINDS - 1], steps[-1]])]


def memory_in_words(recipe: Recipe, spec: Spec, ranks: int) -> str:
    """The memory of a step on each of so many processes of a machine like this one; raises InputError where they cannot share the batch."""
    if recipe.run.batch % (ranks * recipe.run.accumulate):
        raise InputError(
            f"`run.batch`: {recipe.run.batch} images cannot be split over {ranks} processes with {recipe.run.accumulate} "
            f"micro-batches each; use a multiple of {ranks * recipe.run.accumulate}"
        )
    device = torch.accelerator.current_accelerator() or CPU
    precision, _ = choose_precision(recipe.run.precision, device, told())
    try:
        found = peak_bytes(recipe, spec, ranks, precision)
    except (RuntimeError, NotImplementedError, TypeError) as error:  # a loss that looks at values
        return f"not known: {str(error).splitlines()[0][:200]}"
    return (
        f"{found / 2**20:,.1f} MiB at the worst moment of a step in {precision} on each process, as a CPU computes it; what kernels take for themselves, data that waits "
        "and the program apart"
    )


def peak_bytes(recipe: Recipe, spec: Spec, ranks: int, precision: str) -> int:
    """Bytes of all tensors of one process at the worst moment of a step: weights, moments, averages, activations and the batch.

    What a kernel takes for itself while it runs, what waits in the stream and the program are not among them.
    """
    game = recipe.game
    assert isinstance(game, Game)
    with FakeTensorMode(allow_non_fake_inputs=True), Peak() as peak:
        players = make_players(recipe, spec, CPU, precision)
        # DistributedDataParallel keeps gradients in buckets of its own.
        buckets = [torch.empty(sum(p.numel() for p in one.parameters)) for one in players.values()] if ranks > 1 else []
        share = Share(game.parts(spec), recipe.run.batch, recipe.run.seed, CPU, 0, ranks, recipe.run.accumulate)
        parts, phases = _rows(spec, share), game.phases(spec)
        for step in _kinds(game, spec, Clock(recipe.run.batch, recipe.run.images)):
            clock = Clock(recipe.run.batch, recipe.run.images, step)
            read: dict[int, list[Batch]] = {}
            turns = []
            for move in moves(clock, phases):
                batches = read.setdefault(move.draw, share.micro_batches(move.draw, parts, {}))
                turns.append(play(players, clock, move, batches)[0])
            for turn in turns:
                turn.finish()
                if buckets:
                    turn.player.optimizer.zero_grad()  # they lie in the buckets
    del buckets
    most: int = peak.most
    return most
