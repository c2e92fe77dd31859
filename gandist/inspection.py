"""What the players are shown: sample keys by draw and process, and a contact sheet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from gandist.data.dataset import Dataset
from gandist.data.stream import Stream
from gandist.log import grid, save_png
from gandist.recipe import InputError, Recipe

SHOWN = 64


def inspect(recipe: Recipe, draws: str, world_size: int, out: Path) -> Iterator[str]:
    """Lines of keys for draws `A:B` over `world_size` processes; writes the first images as a picture to `out`."""
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", draws)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"--draws {draws!r}: must be A:B with A less than B, such as 0:4")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: must end with .png")
    if recipe.run.batch % (world_size * recipe.run.accumulate):
        raise InputError(
            f"`run.batch`: {recipe.run.batch} images cannot be split over {world_size} processes; use a multiple of {world_size * recipe.run.accumulate}"
        )
    dataset = Dataset(Path(recipe.data.path))
    shown: list[torch.Tensor] = []
    stream = Stream(
        dataset,
        recipe.data.split,
        parts=("image",),
        batch=recipe.run.batch,
        seed=recipe.run.seed,
        device=torch.device("cpu"),
        workers=recipe.data.workers,
    )
    share = recipe.run.batch // world_size
    try:
        for draw in range(int(match[1]), int(match[2])):
            for rank in range(world_size):
                keys = [stream.reader.key(n) for n in stream.numbers(draw, range(rank * share, (rank + 1) * share))]
                yield f"draw {draw} rank {rank}: {' '.join(keys)}"
            if sum(map(len, shown)) < SHOWN:
                shown.append(stream.read(draw)[0]["image"])
        save_png(grid(torch.cat(shown)[:SHOWN]), out)
        yield f"contact sheet: {out}"
    finally:
        stream.close()
