"""What a trained generator is for: images from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gandist import checkpoint
from gandist.game import GAMES, Game
from gandist.log import grid, save_png
from gandist.player import Player
from gandist.recipe import Failure


def restored(found: checkpoint.Checkpoint, device: torch.device) -> tuple[Game, dict[str, Player]]:
    """The game and its players with the weights of a checkpoint; needs no dataset."""
    try:
        game = GAMES.pick(found.state.recipe.get("game")).model_validate(found.state.recipe.get("game"))
    except ValueError as error:
        raise Failure(f"{found.folder}: its recipe is not one of this version: {error}") from None
    assert isinstance(game, Game)
    for _, fault in game.faults(found.state.spec):
        raise Failure(f"{found.folder}: its recipe contradicts its data: {fault}")
    players = {}
    for name, side in game.sides(found.state.spec).items():
        with torch.device("meta"):  # a checkpoint cannot ask for more memory than its own file has
            needed = sum(p.numel() * p.element_size() for p in side.build().parameters())
        if needed > found.files.get(f"{name}.safetensors", checkpoint.NO_FILE).bytes:
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


def sample(found: checkpoint.Checkpoint, count: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Images (B, C, H, W) in −1 … 1 of the average generator, `count` in all, the same for the same seed and checkpoint."""
    game, players = restored(found, device)
    return game.samples(players, found.state.spec, count, seed)


def write_images(batches: Iterator[Tensor], out: Path, single: bool) -> list[Path]:
    """Writes one grid, or each image as a PNG of its own size while the next ones are made."""
    if not single:
        path = out / "grid.png"
        save_png(grid(torch.cat([*batches])), path)
        return [path]
    paths: list[Path] = []
    for batch in batches:
        for image in batch:
            paths.append(out / f"{len(paths):06d}.png")
            save_png(grid(image[None], magnify=False), paths[-1])
    return paths
