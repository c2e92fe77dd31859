"""A game and its players as a checkpoint holds them, for whatever a trained run is for."""

from __future__ import annotations

import torch

from gandist import checkpoint
from gandist.check import missing_parts
from gandist.game import GAMES, Game
from gandist.player import Player
from gandist.recipe import Failure
from gandist.tensors import NO_FILE


def restored(found: checkpoint.Checkpoint, device: torch.device) -> tuple[Game, dict[str, Player]]:
    """The game and its players with the weights of a checkpoint; needs no dataset."""
    try:
        game = GAMES.pick(found.state.recipe.get("game")).model_validate(found.state.recipe.get("game"))
    except ValueError as error:
        raise Failure(f"{found.folder}: its recipe is not one of this version: {error}") from None
    assert isinstance(game, Game)
    for _, fault in [*missing_parts(game, found.state.spec)] or game.faults(found.state.spec):
        raise Failure(f"{found.folder}: its recipe contradicts its data: {fault}")
    players = {}
    for name, side in game.sides(found.state.spec).items():
        with torch.device("meta"):  # a checkpoint cannot ask for more memory than its own file has
            needed = sum(p.numel() * p.element_size() for p in side.build().parameters())
        if needed > found.files.get(f"{name}.safetensors", NO_FILE).bytes:
            raise Failure(f"{found.folder}: its recipe describes a larger {name} than the one it holds")
        player = players[name] = Player(
            name,
            side.build(),
            side.options,
            device=device,
            precision=found.state.precision,
            remembered=side.remembered,
        )
        for part, tensors in player.tensors().items():
            if part in ("", "ema"):
                found.restore(f"{name}.{part}" if part else name, tensors)
    return game, players
