"""What a recipe would do, computed without memory for it: parameters, arithmetic, bytes, steps and data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from gandist.data.dataset import Spec
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
