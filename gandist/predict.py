"""What a trained classifier is for: classes of images, how sure it is of them, and which look like none that it knows."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from gandist.check import MAX_BATCH
from gandist.data.dataset import write_atomically
from gandist.data.decode import Pixels
from gandist.data.transform import Moves, moves, values
from gandist.game import Classifying
from gandist.inputs import Asked, Found, images_of, plain
from gandist.networks import amount, classes_of
from gandist.networks.noise import BLOCK
from gandist.pictures import captioned, save_png
from gandist.player import Player
from gandist.recipe import Failure, InputError, TransformOptions
from gandist.restored import restored

SHOWN = 64  # images of a sheet
Progress = Callable[[int, int], None]


class Prediction(NamedTuple):
    """What the classifier says of one image: probabilities (K,) of the classes, if it is real, and that it is no real image."""

    input: str
    name: str
    label: int | None  # where the input knows it
    probabilities: list[float]
    fake: float

    @property
    def answer(self) -> int:
        """The likeliest class."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    @property
    def probability(self) -> float:
        """That of the likeliest class."""
        return self.probabilities[self.answer]


@dataclass
class Predictor(Asked):
    """The classifier of a run; raises InputError where its game has none."""

    unknown: set[str] = field(default_factory=set)  # classes of the inputs that the run does not have
    fitted: int = 0  # images that were cut and resized to the size of training
    player: Player = field(init=False)

    def __post_init__(self) -> None:
        game, players = restored(self.found, self.device)
        if not isinstance(game, Classifying):
            raise InputError(f"{self.found.folder}: its game, {game.kind}, has no classifier to predict with")
        self.player, self.tells_fakes = players["discriminator"], game.tells_fakes
        self.transform = self.trained_transform().still()
        needed = BLOCK * prod(self.spec.shape) * 4
        if needed > MAX_BATCH:
            raise Failure(
                f"{self.found.folder}: {BLOCK} images of its size, {amount(self.spec.shape)}, are {needed / 2**30:.0f} GiB"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes; their numbers where they have no names."""
        label = self.spec.label
        assert label is not None
        return label.names or tuple(str(number) for number in range(label.classes))

    def pixels(self, image: Found) -> Pixels:
        """(H, W, C) as in training, of the size of training; raises ValueError."""
        wanted = self.spec.image
        assert wanted is not None
        assert wanted.height is not None
        assert wanted.width is not None
        pixels = self.decoded(image)
        if moves(self.transform):
            with suppress(ValueError):  # smaller than the crop of training: it is resized below
                still = Moves.draw(self.transform, np.zeros(1, np.uint64), 0, "predict")
                pixels = still.apply(self.transform, 0, pixels)
        if pixels.shape[:2] != (wanted.height, wanted.width):
            if wanted.channels not in (1, 3):
                raise ValueError(
                    f"is {pixels.shape[1]}×{pixels.shape[0]}, and the run was trained on {wanted.width}×{wanted.height}"
                )
            picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if wanted.channels == 1 else pixels))
            fitted = np.asarray(ImageOps.fit(picture, (wanted.width, wanted.height), Image.Resampling.LANCZOS))
            pixels = fitted[:, :, None] if wanted.channels == 1 else fitted
            self.fitted += 1
        return pixels

    def blocks(self, images: Iterator[Found]) -> Iterator[tuple[list[Found], Tensor]]:
        """Images with their values (B, C, H, W), in blocks; raises Failure for a damaged one that is not to be passed over."""
        kept: list[Found] = []
        rows: list[Pixels] = []
        for image in images:
            try:
                rows.append(self.pixels(image))
            except ValueError as error:
                self.pass_over(image, error)
                continue
            kept.append(image._replace(data=b""))
            if len(kept) == BLOCK:
                yield kept, self._values(rows)
                kept, rows = [], []
        if kept:
            yield kept, self._values(rows)

    def _values(self, rows: list[Pixels]) -> Tensor:
        stacked = rearrange(torch.from_numpy(np.stack(rows)), "b h w c -> b c h w")
        return values(TransformOptions(), stacked)

    def predictions(self, blocks: Iterator[tuple[list[Found], Tensor]]) -> Iterator[tuple[Prediction, Tensor]]:
        """What it says of each image, and the image. Each forward has `BLOCK` rows, so that an answer is the same in any company."""
        with self.player.evaluating() as module:
            for images, samples in blocks:
                whole = samples.new_zeros(BLOCK, *samples.shape[1:])
                whole[: len(samples)] = samples
                verdict = module(whole.to(self.device, memory_format=torch.channels_last))
                probabilities = classes_of(verdict).float().softmax(1).cpu().tolist()
                fakes = torch.sigmoid(-verdict.logits.float()).cpu().tolist()  # 1 − D(x)
                for row, (image, sample) in enumerate(zip(images, samples, strict=True)):
                    label = self.label(image)
                    # A view would keep its whole block.
                    yield Prediction(image.input, image.name, label, probabilities[row], fakes[row]), sample.clone()

    def label(self, image: Found) -> int | None:
        """The label of an image among the classes of training: by name where its input names classes, else by number."""
        if image.label is None:
            return None
        if image.names:
            name = image.names[image.label] if image.label < len(image.names) else None
            if name not in self.names:
                self.unknown.add(str(name))
            return self.names.index(name) if name in self.names else None
        return image.label if image.label < len(self.names) else None


def write_predictions(
    predictor: Predictor, inputs: list[str], out: Path, progress: Progress = lambda *_: None
) -> Iterator[str]:
    """Writes `predictions.csv` and sheets of the least certain and of the likeliest fakes into `out`; tells what was found."""
    names = predictor.names
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["input", "name", "class", "class_name", "probability", "fake", "label", *(f"p_{name}" for name in names)]
    )
    unsure: list[tuple[float, Prediction, Tensor]] = []
    unlike: list[tuple[float, Prediction, Tensor]] = []
    done = wrong = labelled = 0
    counts = [0] * len(names)
    with tempfile.TemporaryDirectory() as scratch:
        for one, sample in predictor.predictions(predictor.blocks(images_of(inputs, Path(scratch), predictor.split))):
            known = "" if one.label is None else str(one.label)
            numbers = [f"{one.probability:.6g}", f"{one.fake:.6g}" if predictor.tells_fakes else ""]
            row = [one.input, one.name, str(one.answer), names[one.answer], *numbers, known]
            writer.writerow([*row, *(f"{p:.6g}" for p in one.probabilities)])
            done += 1
            counts[one.answer] += 1
            if one.label is not None:
                labelled, wrong = labelled + 1, wrong + (one.label != one.answer)
            for kept, key in ((unsure, one.probability), (unlike, -one.fake)):
                kept.append((key, one, sample))
                if len(kept) >= 4 * SHOWN:
                    kept.sort(key=lambda entry: entry[0])
                    del kept[SHOWN:]
            progress(done, 0)
    if not done:
        raise predictor.refuse_none(inputs)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "predictions.csv", text.getvalue().encode(errors="backslashreplace"))
    sheets = {"least_certain": unsure} | ({"likeliest_fakes": unlike} if predictor.tells_fakes else {})
    for name, kept in sheets.items():
        kept.sort(key=lambda entry: entry[0])
        shown = kept[:SHOWN]
        captions = [f"{plain(names[one.answer])} {one.probability:.2f}" for _, one, _ in shown]
        if predictor.tells_fakes:
            captions = [f"{text}\nfake {one.fake:.2f}" for text, (_, one, _) in zip(captions, shown, strict=True)]
        save_png(captioned(torch.stack([sample for *_, sample in shown]), captions), out / f"{name}.png")
    yield from predictor.told()
    if predictor.fitted:
        image = predictor.spec.image
        assert image is not None
        few = "image was" if predictor.fitted == 1 else "images were"
        yield f"{predictor.fitted:,} {few} cut to the shape of training and resized to {image.width}×{image.height}"
    yield "by class: " + ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
    if predictor.unknown:
        yield f"the run has no class {', '.join(map(plain, sorted(predictor.unknown)[:10]))}: such images have no label here"
    if labelled:
        yield f"{wrong:,} of {labelled:,} labels differ ({wrong / labelled:.2%})"
    files = ["predictions.csv", *(f"{name}.png" for name in sheets)]
    yield f"{done:,} image{'s' * (done > 1)}: {', '.join(str(out / name) for name in files)}"
