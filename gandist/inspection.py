"""What the players are shown: sample keys by draw and process, and a contact sheet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from gandist.data.dataset import Dataset
from gandist.data.opening import open_batches
from gandist.data.stream import PARTS, Batch, Share, Stream
from gandist.game import Game
from gandist.palette import beside
from gandist.pictures import save_png, sheet, shown, unit_range
from gandist.recipe import Failure, InputError, Recipe


def inspect(recipe: Recipe, draws: str, world_size: int, out: Path) -> Iterator[str]:
    """Lines of keys for draws `A:B` over `world_size` processes; writes the first images as a picture to `out`.

    Every process's own stream is read, as in training, with all the parts that the game reads and the data has.
    """
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", draws)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"--draws {draws!r}: must be A:B with A less than B, such as 0:4")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: must end with .png")
    if recipe.run.batch % (world_size * recipe.run.accumulate):
        raise InputError(
            f"`run.batch`: {recipe.run.batch} images cannot be split over {world_size} processes; use a multiple of {world_size * recipe.run.accumulate}"
        )
    if recipe.data.reader != "index":
        raise InputError("`data.reader`: webdataset has no keys to tell beforehand; `inspect` needs the index reader")
    assert isinstance(recipe.game, Game)
    stored = Dataset(recipe.data.path).spec(recipe.data.split)
    parts = {*recipe.game.parts(stored), *(role for role in stored.roles if PARTS[role].role == role)}
    run, cpu = recipe.run, torch.device("cpu")
    shares = [Share(sorted(parts), run.batch, run.seed, cpu, rank=rank, ranks=world_size) for rank in range(world_size)]
    streams = [cast(Stream, open_batches(recipe.data, share)) for share in shares]
    seen: list[Tensor] = []
    wanted = shown(streams[0].spec)
    try:
        for draw in range(int(match[1]), int(match[2])):
            for rank, stream in enumerate(streams):
                for fault in stream.ready([draw]):
                    if fault.number < 0 or not recipe.data.quarantine:
                        raise Failure(fault.message)
                    yield f"bad sample {fault.number}, whose place another takes: {fault.message}"
                for batch in stream.read(draw):
                    for view, (part, numbers) in _views(batch).items():
                        keys = " ".join(stream.key(part, number) for number in numbers)
                        yield f"draw {draw} rank {rank}{view}: {keys}"
                    if sum(map(len, seen)) < wanted:
                        seen.append(looked_at(recipe.game.seen(batch)))
        save_png(sheet(torch.cat(seen)[:wanted]), out)
        yield f"contact sheet: {out}"
    finally:
        for stream in streams:
            stream.close()


def _views(batch: Batch) -> dict[str, tuple[str, list[int]]]:
    """A part and its sample numbers by view; the first one needs no name."""
    found: dict[str, tuple[str, list[int]]] = {}
    for part, numbers in batch.numbers.items():
        view = PARTS[part].view
        found["" if view == "labelled" else f" {view}"] = part, [*numbers]
    return found


def looked_at(parts: Mapping[str, Tensor]) -> Tensor:
    """Samples as a sheet shows them: images in −1 … 1, beside their masks in colours where they have any, or signals."""
    if "signal" in parts:
        return parts["signal"]
    images = unit_range(parts["image"] if "image" in parts else parts["unlabelled"])
    return beside(images, parts["mask"]) if "mask" in parts else images
