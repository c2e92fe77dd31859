"""Scores of a segmenter: from one confusion matrix of a whole split at its own resolution, the same on any number of processes."""

from __future__ import annotations

import json
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from pydantic import Field
from torch import Tensor

from gandist.data.dataset import Spec
from gandist.data.opening import data_digest, open_reader
from gandist.data.stream import IGNORED
from gandist.game import Evaluation, Evaluator, Panels, Players, Table
from gandist.games.reading import Stored, WholeSamples, gathered, ranks
from gandist.metrics import segmentation as metrics
from gandist.metrics.protocol import Tested, installed
from gandist.palette import beside
from gandist.recipe import DataOptions, Failure, InputError, Section
from gandist.windows import Answers, InferenceOptions, answered

ROWS = 8  # images of a block, which one process answers
WORST, SHOWN = 8, 512  # images of the panel, and pixels of a side of each


class SegmentationOptions(Section):
    """Which split tests the segmenter, all of it, at the size that its images are stored in."""

    split: Annotated[str, Field(min_length=1)] = "test"
    average: bool = True  # false: the last weights, where the segmenter keeps an average beside them
    train_samples: Annotated[int, Field(ge=0)] = 0  # so many of the run's own split as well: `train/…`
    boundary_tolerance: Annotated[float, Field(gt=0, le=0.05)] = 0.0075  # of the diagonal (Csurka et al. 2013)


class _Found(NamedTuple):
    """Of the samples of a split, in their order: the confusion matrix (K, K), and by image counts (N, 3, K) and boundaries (N, K, 4)."""

    matrix: Tensor
    counts: Tensor
    boundaries: Tensor
    numbers: Tensor


class Segmentation(Evaluator):
    """Scores of the segmenter, prepared once for a run."""

    def __init__(
        self,
        options: SegmentationOptions,
        inference: InferenceOptions,
        stride: int,
        data: DataOptions,
        spec: Spec,
        device: torch.device,
    ) -> None:
        assert spec.mask is not None
        if data.reader != "index":
            raise InputError("`data.reader`: scores want an index; `gandist index` the shards, and name the index")
        self.options, self.inference, self.stride, self.data, self.mask, self.device = (
            options,
            inference,
            stride,
            data,
            spec.mask,
            device,
        )
        self.names = spec.mask.names or tuple(str(number) for number in range(spec.mask.classes))
        try:
            self.held_out = WholeSamples(data, options.split, device)
        except InputError as error:
            raise InputError(
                f"`game.scores.split`: {error}; name a split that is there, or pack one with --split"
            ) from None
        self.trained: WholeSamples | None = None
        if options.train_samples:
            self.trained = WholeSamples(data, data.split, device, data.subset)
            if options.train_samples > len(self.trained.numbers):
                raise InputError(
                    f"`game.scores.train_samples`: {options.train_samples}, and the run learns from {len(self.trained.numbers)}; use fewer"
                )

    def __call__(self, players: Players) -> Evaluation | None:
        """All ranks call it together; rank 0 gets the scores."""
        found = self._read(players, self.held_out, len(self.held_out.numbers))
        trained = None if self.trained is None else self._read(players, self.trained, self.options.train_samples)
        if ranks()[0] != 0:
            return None
        scores = metrics.scores(found.matrix, self.names)
        if not scores:
            raise Failure(
                f"{self.data.path}: no pixel of the split `{self.options.split}` has a class, so that there is nothing to score"
            )
        boundary = metrics.boundary_f(found.boundaries)
        scores |= {"boundary_f": boundary} if boundary is not None else {}
        scores["samples"] = float(len(found.numbers))
        if trained is not None:
            several = metrics.scores(trained.matrix, self.names)
            scores |= {f"train/{name}": value for name, value in several.items() if not name.startswith("iou/")}
        tables = {"images": self._by_image(found), "classes": self._by_class(found.matrix)}
        panels = {"worst": self._worst(players, found)}
        return Evaluation(scores, self._protocol(players, tuple(scores)).model_dump(mode="json"), {}, tables, panels)

    def _answers(self, players: Players, block: list[Stored]) -> list[Tensor]:
        """(H, W) class numbers of each sample."""
        with players["segmenter"].evaluating(self.options.average) as module:
            images = [sample.pixels for sample in block]
            found = answered(Answers(module, self.stride), images, self.data.transform, self.inference, self.device)
        return [one.argmax(0) for one in found]

    def _read(self, players: Players, split: WholeSamples, count: int) -> _Found:
        classes, ignore = self.mask.classes, self.mask.ignore
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        rows = [torch.zeros(0, 7 * classes, dtype=torch.int64, device=self.device)]
        numbers: list[int] = []
        try:
            for block in split.blocks(count, ROWS):
                for sample, answer in zip(block, self._answers(players, block), strict=True):
                    truth = torch.from_numpy(sample.mask.astype("int64")).to(self.device)
                    found = metrics.confusion(truth, answer, classes, ignore)
                    tolerance = self.options.boundary_tolerance
                    borders = metrics.boundary_counts(truth, answer, classes, ignore, tolerance)
                    matrix += found
                    rows.append(torch.cat([metrics.sizes(found).flatten(), borders.flatten()])[None])
                    numbers.append(sample.number)
        except (RuntimeError, ValueError, OSError, MemoryError) as error:  # the others wait where all processes meet
            split.trouble = (
                f"{type(error).__name__}: {error}" if not isinstance(error, Failure | InputError) else str(error)
            )
        split.refuse_trouble()
        if ranks()[1] > 1:
            dist.all_reduce(matrix)
        mine = torch.tensor(numbers, dtype=torch.int64)
        together, places = gathered(torch.cat(rows), mine, False), gathered(mine.to(self.device)[:, None], mine, False)
        counts = rearrange(together[:, : 3 * classes], "n (t k) -> n t k", t=3)
        boundaries = rearrange(together[:, 3 * classes :], "n (k f) -> n k f", f=4)
        return _Found(matrix, counts, boundaries, places[:, 0])

    def _by_image(self, found: _Found) -> Table:
        """Every image by name, the worst first."""
        reader = open_reader(self.held_out.data)
        rows: list[tuple[str | float | None, ...]] = []
        try:
            for number, counts in zip(found.numbers.tolist(), found.counts, strict=True):
                scores = metrics.image_scores(counts)
                both, truth, answer = counts.tolist()
                ious = [i / (t + a - i) if t + a else None for i, t, a in zip(both, truth, answer, strict=True)]
                where = reader.key(number)
                rows.append((where, number, scores.get("mean_iou"), scores.get("pixel_accuracy"), *ious))
        finally:
            reader.close()
        rows.sort(key=lambda row: (row[2] is None, row[2]))
        return Table(("name", "number", "mean_iou", "pixel_accuracy", *(f"iou/{name}" for name in self.names)), rows)

    def _by_class(self, matrix: Tensor) -> Table:
        """Every class: its IoU, its accuracy, and its share of the pixels."""
        scores, total = metrics.scores(matrix, self.names), max(1, int(matrix.sum()))
        rows: list[tuple[str | float | None, ...]] = []
        for place, name in enumerate(self.names):
            there = int(matrix[place].sum())
            accuracy = int(matrix[place, place]) / there if there else None
            rows.append((name, scores.get(f"iou/{name}"), accuracy, there / total))
        return Table(("class", "iou", "accuracy", "share"), rows)

    def _worst(self, players: Players, found: _Found) -> Panels:
        """The images with the lowest mean IoU: image, truth, answer."""
        scored = [
            (metrics.image_scores(counts).get("mean_iou"), int(n))
            for n, counts in zip(found.numbers, found.counts, strict=True)
        ]
        worst = sorted((score, number) for score, number in scored if score is not None)[:WORST]
        reader = open_reader(self.held_out.data)
        images, captions = [], []
        try:
            for score, number in worst:
                sample = self.held_out.sample(reader, number)
                (answer,) = self._answers(players, [sample])
                images.append(panel(sample, answer, self.mask.ignore))
                name = reader.key(number).replace("\n", " ")
                captions.append(f"{name}\nmean IoU {score:.3f}: image, truth, answer")
        finally:
            reader.close()
        return Panels(images, captions)

    def _protocol(self, players: Players, scores: tuple[str, ...]) -> Tested:
        player = players["segmenter"]
        transform = self.data.transform.model_dump(mode="json", exclude_defaults=True)
        return Tested(
            scores=scores,
            dataset=data_digest(self.data),
            transform=json.dumps(
                {name: transform[name] for name in transform if name in ("size", "range", "mean", "std")}
            ),
            split=self.options.split,
            ema=player.ema is not None and self.options.average,
            precision=str(player.dtype).removeprefix("torch."),
            samples=len(self.held_out.numbers),
            settings={
                "inference": json.dumps(self.inference.model_dump(mode="json", exclude_defaults=True)),
                "boundary_tolerance": self.options.boundary_tolerance,
                "train_samples": self.options.train_samples,
            },
            versions=installed(),
        )


def panel(sample: Stored, answer: Tensor, ignore: int | None) -> Tensor:
    """(3, H, 3W) in −1 … 1: the image, its truth, and the answer (H, W); of a large one every so many pixels."""
    every = -(-max(answer.shape) // SHOWN)
    image = torch.from_numpy(sample.pixels[::every, ::every].copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)
    truth = torch.from_numpy(sample.mask[::every, ::every].astype("int64"))[None]
    known = truth if ignore is None else truth.masked_fill(truth == ignore, IGNORED)
    return beside(image, known, answer.cpu()[None, ::every, ::every])[0]
