"""Scores of a generator: features of real and fake samples, compared; the same on any number of processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from gandist.data.dataset import Dataset, Spec
from gandist.data.opening import data_digest
from gandist.data.sources.generated import mixture
from gandist.data.storage import aside
from gandist.game import Evaluation, Evaluator, Generative, Players
from gandist.games.reading import HeldOut, as_the_first_says, gathered, ranks
from gandist.metrics.distribution import DistributionOptions, RealStatistics, score
from gandist.metrics.features import (
    AnyFeatures,
    FeatureNetwork,
    FeatureOptions,
    Features,
    InceptionOptions,
    PixelsOptions,
    SpectrumOptions,
)
from gandist.metrics.modes import coverage
from gandist.metrics.parzen import parzen
from gandist.metrics.protocol import Protocol, installed
from gandist.networks.noise import BLOCK
from gandist.recipe import DataOptions, Failure, InputError, Section
from gandist.seeding import derive
from gandist.tensors import packed, unpacked
from gandist.weights import cache_folder

Samples = Annotated[int, Field(ge=2, le=10_000_000)]
Split = Annotated[str, Field(min_length=1)]
POINT = 16  # values: a signal of no more is a point, which has no spectrum


class ParzenOptions(Section):
    """Log-likelihood under Parzen windows of samples, with Goodfellow et al.'s protocol: σ by the `validation` split."""

    samples: Samples = 10_000
    validation: Split = "validation"
    test: Split = "test"


class ScoreOptions(Section):
    """What is compared with what. `reals: null` is the whole split, at most 50,000.

    `features: null` takes Inception for images, the spectrum for signals, and the values of a point.
    """

    features: AnyFeatures | None = None
    split: Split | None = None  # of the real samples; that of training unless given
    reals: Samples | None = None
    fakes: Samples = 10_000
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    truncation: Annotated[float, Field(gt=0, le=8)] | None = None
    average: bool = True  # false: of the last weights, where the generator keeps an average beside them
    distribution: DistributionOptions = DistributionOptions()
    parzen: ParzenOptions | None = None

    def chosen(self, shape: tuple[int, ...]) -> FeatureOptions:
        """The feature network for samples of a shape."""
        if self.features is not None:
            return self.features
        if len(shape) == 3:
            return InceptionOptions(kind="inception")
        return SpectrumOptions(kind="spectrum") if shape[1] > POINT else PixelsOptions(kind="pixels")

    def faults(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
        """Where the options contradict the data."""
        for fault in self.chosen(shape).faults(shape):
            yield ("features",), fault
        neighbours = max(self.distribution.precision_neighbours, self.distribution.coverage_neighbours)
        classifies, splits = self.chosen(shape).classifies, self.distribution.inception_splits
        fewest = max(neighbours + 1, splits if classifies else 0)
        if min(self.fakes, self.reals or self.fakes) < fewest:
            yield (
                ("fakes",),
                f"with {neighbours} neighbours{f' and {splits} splits' if classifies else ''}, {fewest} reals and fakes are needed",
            )
        if not classifies and splits != DistributionOptions().inception_splits:
            yield (
                ("distribution", "inception_splits"),
                "has no effect on features that come from no classifier; leave it out",
            )
        if self.parzen is not None and self.parzen.validation == self.parzen.test:
            yield (
                ("parzen", "test"),
                f"{self.parzen.test} chooses σ as well; take another split, or pack one with --split",
            )
        if self.parzen is not None and len(shape) != 3:
            yield ("parzen",), "is of images, and the dataset has signals; leave it out"


class GeneratorScores(Evaluator):
    """Prepared once for a run: the feature network, and the real side of the comparison, which a cache keeps by its protocol."""

    def __init__(
        self, options: ScoreOptions, game: Generative, data: DataOptions, spec: Spec, shape: tuple[int, ...],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.options, self.game, self.device, self.spec, self.shape = options, game, device, spec, shape
        self.split = options.split or data.split
        self.part = "image" if len(shape) == 3 else "signal"
        self.held_out = HeldOut(data, self.split, (self.part,), options.seed, device)
        self.data = self.held_out.data
        self.network: FeatureNetwork = options.chosen(shape).build().to(device)
        self.samples = self.held_out.samples(self.split)
        self.reals = options.reals or min(self.samples, 50_000)
        if self.reals > self.samples:
            raise InputError(
                f"`game.scores.reals`: {self.reals} samples are asked of the split `{self.split}`, which has {self.samples}; use at most that"
            )
        self.mixture = self._mixture(shape)
        splits = (options.parzen.validation, options.parzen.test) if options.parzen is not None else ()
        self.parzen_samples = {split: self.held_out.samples(split) for split in splits}
        fewest = min(self.reals, options.fakes, *self.parzen_samples.values())
        if -(-fewest // BLOCK) < ranks()[1]:
            raise InputError(
                f"`game.scores`: {fewest} samples are fewer than a block of {BLOCK} for each of {ranks()[1]} processes; "
                "take more samples, or fewer processes"
            )
        self.weights = self._class_weights()
        self.real: RealStatistics | None = None

    def _mixture(self, shape: tuple[int, ...]) -> tuple[Any, float] | None:
        if len(shape) != 2:
            return None
        source = Dataset(self.data.path).manifest.source
        mixed = source.get("kind") == "generated" and shape[0] * shape[1] == 2
        return mixture(str(source["name"])) if mixed else None

    def _class_weights(self) -> Tensor | None:
        """How many samples the split has of each class, which the fakes are to have in proportion; None without classes."""
        classes = self.game.classes(self.spec)
        if classes is None:
            return None
        counts = Dataset(self.data.path).manifest.counts.get(self.split)
        known = list(counts.labels) if counts is not None and counts.labels else [1] * classes
        return torch.tensor(known, dtype=torch.float64)

    def _labels(self, count: int) -> Tensor | None:
        """In those proportions, and in an order by chance, since scores are also computed of parts of the samples."""
        if self.weights is None:
            return None
        edges = (self.weights / self.weights.sum()).cumsum(0)
        places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        sorted_ones = torch.searchsorted(edges, places).clamp(max=len(edges) - 1)
        source = torch.Generator().manual_seed(derive(self.options.seed, "scores/labels"))
        return sorted_ones[torch.randperm(count, generator=source)]

    def _blocks(self, count: int, split: str) -> Iterator[tuple[int, Tensor]]:
        """The first row and the rows of this process's blocks of `count` real samples."""
        for first, batch in self.held_out.blocks(count, split):
            yield first, batch[self.part][: count - first]

    def _features(self, blocks: Iterator[tuple[int, Tensor]]) -> Features:
        pool, logits, numbers = [], [], []
        for first, rows in blocks:
            found = self.network(rows.contiguous())
            pool.append(found.pool)
            logits += [found.logits] if found.logits is not None else []
            numbers.append(torch.arange(first, first + len(rows)))
        self.held_out.refuse_trouble()
        numbered = torch.cat(numbers)
        return Features(gathered(torch.cat(pool), numbered), gathered(torch.cat(logits), numbered) if logits else None)

    def _real(self) -> RealStatistics:
        if self.real is None:
            known = self._real_protocol()
            path = cache_folder() / "statistics" / f"{hashlib.sha256(known.encode()).hexdigest()}.safetensors"
            rank, _ = ranks()
            found = self._cached(path) if rank == 0 else None
            if not as_the_first_says(found is not None, self.device):
                pool = self._features(self._blocks(self.reals, self.split)).pool
                if rank == 0:
                    found = RealStatistics.of(pool, self._neighbours())
                    _store(path, found)
            self.real = found if found is not None else RealStatistics(*[torch.empty(0)] * 4)  # rank 0 alone compares
        return self.real

    def _neighbours(self) -> int:
        return max(self.options.distribution.precision_neighbours, self.options.distribution.coverage_neighbours)

    def _cached(self, path: Any) -> RealStatistics | None:
        try:
            found = RealStatistics.from_arrays(unpacked(path.read_bytes(), path), self.device)
        except (OSError, Failure, InputError):  # damaged, or not there: it is computed and written anew
            return None
        return found if len(found.pool) == self.reals and found.radii.shape[1] == self._neighbours() else None

    def _real_protocol(self) -> str:
        """All that the real side depends on."""
        transform = self.data.model_dump(mode="json", include={"transform"})
        values = [
            self.network.name, self.network.digest, self.network.resize, data_digest(self.data), self.split, self.reals,
            self.options.seed, self._neighbours(), transform, str(self.device.type), installed()["torch"],
        ]  # fmt: skip
        return json.dumps(values)

    def __call__(self, players: Players) -> Evaluation | None:
        """All ranks call it together; rank 0 gets the scores."""
        real = self._real()
        made: list[Tensor] = []
        keep = max(self.options.parzen.samples if self.options.parzen else 0, self.options.fakes if self.mixture else 0)
        count, numbers = max(self.options.fakes, keep), []

        def fakes() -> Iterator[tuple[int, Tensor]]:
            rank, processes = ranks()
            for first, rows in self.game.made(
                players, self.spec, count, self.options.seed, labels=self._labels(count),
                truncation=self.options.truncation, first=rank, every=processes, average=self.options.average,
            ):  # fmt: skip
                if keep:
                    made.append(rows)
                    numbers.append(torch.arange(first, first + len(rows)))
                yield first, rows

        found = self._features(fakes())
        fake = Features(
            found.pool[: self.options.fakes], None if found.logits is None else found.logits[: self.options.fakes]
        )
        values = gathered(torch.cat(made), torch.cat(numbers)) if keep else torch.empty(0)
        held_out = []
        for split, samples in self.parzen_samples.items():
            blocks = [*self._blocks(samples, split)]
            self.held_out.refuse_trouble()
            order = torch.cat([torch.arange(first, first + len(rows)) for first, rows in blocks])
            held_out.append(gathered(torch.cat([rows for _, rows in blocks]).contiguous(), order))
        if ranks()[0] != 0:
            return None
        scores = score(real, fake, self.options.seed, self.options.distribution).named(self.network.inception)
        if self.mixture is not None:
            centres, deviation = self.mixture
            covered = coverage(
                values[: self.options.fakes].flatten(1).cpu(), torch.as_tensor(centres).float(), float(deviation)
            )
            scores |= {"modes": float(covered.covered), "good": covered.good, "mode_divergence": covered.divergence}
        if self.options.parzen is not None:
            made_ones, validation, test = (
                (part.flatten(1) + 1) / 2 for part in (values[: self.options.parzen.samples], *held_out)
            )
            likelihood = parzen(made_ones, validation, test)
            scores |= {
                "parzen": likelihood.mean, "parzen_standard_error": likelihood.standard_error,
                "parzen_sigma": likelihood.sigma,
            }  # fmt: skip
        curves = {}
        if isinstance(self.options.chosen(self.shape), SpectrumOptions):
            curves = {"spectrum/real": real.mean.tolist(), "spectrum/fake": fake.pool.double().mean(0).tolist()}
        return Evaluation(scores, self._protocol(players, tuple(scores)).model_dump(mode="json"), curves)

    def _protocol(self, players: Players, names: tuple[str, ...]) -> Protocol:
        options = self.options
        unused = set() if self.options.chosen(self.shape).classifies else {"inception_splits"}
        settings: dict[str, Any] = dict(options.distribution.model_dump(exclude=unused))
        if options.parzen is not None:
            settings |= {f"parzen_{name}": value for name, value in options.parzen.model_dump().items()}
        rule = None
        if self.weights is not None:
            rule = (
                "in the proportions of the split" if len(set(self.weights.tolist())) > 1 else "each class equally often"
            )
        return Protocol(
            scores=names,
            features=self.network.name,
            features_digest=self.network.digest,
            resize=self.network.resize,
            dataset=data_digest(self.data),
            transform=json.dumps(self.data.transform.model_dump(mode="json", exclude_defaults=True)),
            precision=str(players["generator"].dtype).removeprefix("torch."),
            split=self.split,
            reals=self.reals,
            fakes=options.fakes,
            seed=options.seed,
            ema=players["generator"].ema is not None and options.average,
            truncation=options.truncation,
            labels=rule,
            settings=settings,
            versions=installed(),
        )


def _store(path: Any, found: RealStatistics) -> None:
    """Keeps what took long; a cache that cannot be written costs time later, and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as file:
            file.write(packed(found.as_arrays()))
    except (OSError, Failure):
        return
