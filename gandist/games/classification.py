"""Scores of a classifier: its errors on a split that it never saw, the same on any number of processes."""

from __future__ import annotations

import json
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gandist.data.dataset import Spec
from gandist.data.opening import data_digest
from gandist.game import Evaluation, Evaluator, Players
from gandist.games.reading import HeldOut, gathered, ranks
from gandist.metrics.protocol import Tested, installed
from gandist.recipe import DataOptions, InputError, Section

ROWS = 256  # that are classified at once, whoever does it


class ClassificationOptions(Section):
    """Which split tests the classifier, all of it."""

    split: Annotated[str, Field(min_length=1)] = "test"
    average: bool = True  # false: the last weights, where the discriminator keeps an average beside them


class Classification(Evaluator):
    """Errors of the classifier, prepared once for a run."""

    def __init__(self, options: ClassificationOptions, data: DataOptions, spec: Spec, device: torch.device) -> None:
        self.options, self.device = options, device
        self.reading = HeldOut(data, options.split, ("image", "label"), 0, device)
        try:
            self.samples = self.reading.samples(options.split)
        except InputError as error:
            raise InputError(
                f"`game.scores.split`: {error}; name a split that is there, or pack one with --split"
            ) from None
        if -(-self.samples // ROWS) < ranks()[1]:
            raise InputError(
                f"`game.scores.split`: {self.samples} samples are fewer than {ROWS} for each of {ranks()[1]} processes; use fewer processes"
            )

    def answers(self, players: Players) -> tuple[Tensor, Tensor]:
        """Class probabilities (N, K) and labels (N,) of the whole split in one order, on every process; all call it together."""
        numbers, found, labels = [], [], []
        with players["discriminator"].evaluating(self.options.average) as module:
            for first, batch in self.reading.blocks(self.samples, self.options.split, ROWS):
                count = min(ROWS, self.samples - first)
                verdict = module(batch["image"])
                found.append(verdict.classes.float().softmax(1)[:count])
                labels.append(batch["label"][:count])
                numbers.append(torch.arange(first, first + count))
        self.reading.refuse_trouble()
        numbered = torch.cat(numbers)
        return gathered(torch.cat(found), numbered), gathered(torch.cat(labels), numbered)

    def __call__(self, players: Players) -> Evaluation | None:
        """All ranks call it together; rank 0 gets the scores."""
        probabilities, labels = self.answers(players)
        if ranks()[0] != 0:
            return None
        return Evaluation(scores(probabilities, labels), self._protocol(players).model_dump(mode="json"))

    def _protocol(self, players: Players) -> Tested:
        player, data = players["discriminator"], self.reading.data
        return Tested(
            scores=("errors", "error_rate", "samples", "log_loss"),
            dataset=data_digest(data),
            transform=json.dumps(data.transform.model_dump(mode="json", exclude_defaults=True)),
            split=self.options.split,
            ema=player.ema is not None and self.options.average,
            precision=str(player.dtype).removeprefix("torch."),
            samples=self.samples,
            versions=installed(),
        )


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Errors, their share in 0 … 1, of how many, and the mean −log of the probability of the right class."""
    errors = int((probabilities.argmax(1) != labels).sum())
    right = probabilities.double().gather(1, labels[:, None]).clamp_min(1e-30)
    return {
        "errors": float(errors),
        "error_rate": errors / len(labels),
        "samples": float(len(labels)),
        "log_loss": float(-right.log().mean()),
    }
