"""What a recipe would do, computed without memory for it: parameters, arithmetic, bytes, steps and data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from gandist.data.dataset import Spec
from gandist.data.opening import data_spec
from gandist.data.stream import PARTS
from gandist.game import Game
from gandist.recipe import Recipe


@dataclass(frozen=True)
class Side:
    """One player: its size, and the arithmetic of one row."""

    parameters: int
    forward_flops: int
    state_bytes: int  # weights, gradients, two moments of Adam, and the EMA where there is one


def sides(recipe: Recipe, spec: Spec) -> dict[str, Side]:
    """Players by name, built and run on the meta device, which computes shapes alone."""
    assert isinstance(recipe.game, Game)
    found = {}
    for name, side in recipe.game.sides(spec).items():
        with torch.device("meta"):
            module = side.build()
            examples = recipe.game.examples(spec)[name]  # of two rows, since batch statistics want more than one
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*examples)
        parameters = sum(p.numel() for p in module.parameters())
        copies = 4 + (side.options.ema is not None)
        found[name] = Side(parameters, counter.get_total_flops() // 2, 4 * copies * parameters)
    return found


def data_in_words(recipe: Recipe, spec: Spec, steps: int) -> Iterator[str]:
    """How often each sample is seen, labelled and unlabelled ones apart where the game reads both."""
    assert isinstance(recipe.game, Game)
    seen = steps * recipe.run.batch
    unlabelled = [part for part in recipe.game.parts(spec) if PARTS[part].view != "labelled"]
    kind = "labelled samples" if unlabelled else "samples"
    yield (
        f"{spec.samples:,} {kind}, each seen {seen / spec.samples:,.1f} times"
        if spec.samples
        else "samples that nobody counted"
    )
    source = recipe.data.unlabelled() or recipe.data.model_copy(update={"subset": None})
    whole = data_spec(source, True).samples if unlabelled else None
    if whole:
        times = "" if len(unlabelled) == 1 else " by each player"
        yield f"{whole:,} unlabelled samples, each seen {seen / whole:,.1f} times{times}"
