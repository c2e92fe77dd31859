"""A game and its players as a checkpoint holds them, for whatever a trained run is for."""

from __future__ import annotations

import torch
from pydantic import ValidationError

from gandist import checkpoint
from gandist.check import missing_parts
from gandist.game import GAMES, Game
from gandist.player import Player
from gandist.recipe import Failure, wording
from gandist.tensors import NO_FILE


def restored(found: checkpoint.Checkpoint, device: torch.device) -> tuple[Game, dict[str, Player]]:
    """The game and its players with the weights of a checkpoint; needs no dataset."""
    try:
        chosen, values = GAMES.pick(found.state.recipe.get("game")), found.state.recipe["game"]
        # What cannot change a weight, such as the scores, may name files that are gone, and is none of the players' business.
        known = {name for name, field in chosen.model_fields.items() if field.json_schema_extra != {"harmless": True}}
        unknown = values.keys() - chosen.model_fields.keys()
        game = chosen.model_validate({name: value for name, value in values.items() if name in known | unknown})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(("game", *map(str, first["loc"])))
        raise Failure(f"{found.folder}: its recipe is not one of this version: `{place}`: {wording(first)}") from None
    except ValueError as error:
        raise Failure(f"{found.folder}: its recipe is not one of this version: `game`: {error}") from None
    assert isinstance(game, Game)
    for where, fault in [*missing_parts(game, found.state.spec)] or game.faults(found.state.spec):
        if where[0] in known:
            raise Failure(f"{found.folder}: its recipe contradicts its data: {fault}")
    players = {}
    for name, side in game.sides(found.state.spec).items():
        with torch.device("meta"):  # a checkpoint cannot ask for more memory than its own file has
            needed = sum(p.numel() * p.element_size() for p in side.build().state_dict().values())
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
