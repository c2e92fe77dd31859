"""What a trained segmenter is for: a mask for each image, as a palette PNG of its size, and an overlay to look at."""

from __future__ import annotations

import csv
import io
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from gandist.check import MAX_BATCH
from gandist.data.dataset import write_atomically
from gandist.data.decode import ENCODED, Pixels
from gandist.data.transform import resized
from gandist.game import Segmenting
from gandist.inputs import Asked, Found, images_of, plain
from gandist.palette import bytes_of_palette
from gandist.pictures import overlay, save_png
from gandist.player import Player
from gandist.recipe import InputError, Source, parse, wording
from gandist.restored import restored
from gandist.windows import Answers, InferenceOptions, answered

MAX_PARTS = 8  # of a path that an image's name is
Progress = Callable[[int, int], None]


class Answer(NamedTuple):
    """What the segmenter says of an image: class numbers (H, W), and how sure it is on average, 0 … 1."""

    image: Found
    pixels: Pixels
    mask: Tensor
    probability: float


@dataclass
class MaskPredictor(Asked):
    """The segmenter of a run; raises InputError where its game has none."""

    inference: InferenceOptions | None = None  # that of the run unless given
    player: Player = field(init=False)
    options: InferenceOptions = field(init=False)

    def __post_init__(self) -> None:
        game, players = restored(self.found, self.device)
        if not isinstance(game, Segmenting):
            raise InputError(f"{self.found.folder}: its game, {game.kind}, has no segmenter to predict with")
        self.player, self.options, self.stride = players["segmenter"], self.inference or game.inference, game.stride
        self.transform = self.trained_transform()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes; their numbers where they have no names."""
        mask = self.spec.mask
        assert mask is not None
        return mask.names or tuple(str(number) for number in range(mask.classes))

    def pixels(self, image: Found) -> Pixels:
        """(H, W, C) of an image in its own size; raises ValueError."""
        pixels = self.decoded(image)
        height, width = resized(pixels.shape[0], pixels.shape[1], self.transform.size)
        largest = max(self.options.scales) ** 2 * height * width  # as the network sees it
        needed = round(4 * len(self.names) * (2 * pixels.shape[0] * pixels.shape[1] + largest))
        if needed > MAX_BATCH:
            raise ValueError(
                f"is {pixels.shape[1]}×{pixels.shape[0]}: the probabilities of its pixels are {needed / 2**30:.0f} GiB; shrink it, or answer at smaller "
                "`scales`"
            )
        return pixels

    def answers(self, images: Iterator[Found]) -> Iterator[Answer]:
        """What it says of each image by itself; raises Failure for a damaged one that is not to be passed over."""
        with self.player.evaluating() as module:
            for image in images:
                try:
                    pixels = self.pixels(image)
                    (found,) = answered(
                        Answers(module, self.stride), [pixels], self.transform, self.options, self.device
                    )
                except ValueError as error:
                    self.pass_over(image, error)
                    continue
                sure, mask = found.max(0)
                yield Answer(image._replace(data=b""), pixels, mask.cpu(), float(sure.mean()))


def inference_of(text: str) -> InferenceOptions:
    """Options as YAML; raises InputError."""
    source = Source("--inference")
    values = parse(text, source)
    source.refuse_faults()
    try:
        return InferenceOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--inference: `{'.'.join(map(str, first['loc']))}`: {wording(first)}") from None


def file_of(name: str, taken: set[str]) -> str:
    """A path for the results of an image: its own name without suffix, as far as that is one that every file system has, and no other's.

    A folder has no dot in its name, so that none is called like a file.
    """
    stem, dot, suffix = name.rpartition(".")
    parts = (stem if dot and suffix.lower() in ENCODED else name).replace("\\", "/").split("/")
    parts = [re.sub(r"[^\w. -]", "_", part).strip(". ")[:60] for part in parts[-MAX_PARTS:]]
    *folders, last = [part for part in parts if part] or ["image"]
    stem = "/".join([*(folder.replace(".", "_") for folder in folders), last])
    found, number = stem, 1
    while found.lower() in taken:
        number += 1
        found = f"{stem}_{number}"
    taken.add(found.lower())
    return found


def write_masks(
    predictor: MaskPredictor, inputs: list[str], out: Path, progress: Progress = lambda *_: None
) -> Iterator[str]:
    """Writes `masks/NAME.png`, `overlays/NAME.png` and `predictions.csv` into `out`; tells what was found."""
    names = predictor.names
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["input", "name", "mask", "probability", *(f"share_{name}" for name in names)])
    taken: set[str] = set()
    done, pixels = 0, np.zeros(len(names), np.int64)

    def listed() -> None:
        """What was answered before a damaged image stays listed, as its files stay."""
        if done:
            write_atomically(out / "predictions.csv", text.getvalue().encode(errors="backslashreplace"))

    with ExitStack() as ending:
        ending.callback(listed)
        scratch = ending.enter_context(tempfile.TemporaryDirectory())
        for one in predictor.answers(images_of(inputs, Path(scratch), predictor.split)):
            name = file_of(one.image.name, taken)
            mask = one.mask.to(torch.uint8).numpy()
            write_palette_png(mask, out / "masks" / f"{name}.png")
            save_png(overlay(one.pixels, mask, [plain(name) for name in names]), out / "overlays" / f"{name}.png")
            counts = np.bincount(mask.ravel(), minlength=len(names))
            shares = [f"{count / mask.size:.6g}" for count in counts]
            writer.writerow([one.image.input, one.image.name, f"masks/{name}.png", f"{one.probability:.6g}", *shares])
            pixels += counts
            done += 1
            progress(done, 0)
    if not done:
        raise predictor.refuse_none(inputs)
    yield from predictor.told()
    shares_ = pixels / max(1, pixels.sum())
    yield "pixels by class: " + ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares_, strict=True))
    yield f"{done:,} image{'s' * (done > 1)}: {out / 'masks'}, {out / 'overlays'}, {out / 'predictions.csv'}"


def write_palette_png(mask: Pixels, path: Path) -> None:
    """Writes class numbers (H, W) as a PNG whose palette gives them colours: what `pack` reads as a mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask, "P")
    image.putpalette(bytes_of_palette())
    image.save(path)
