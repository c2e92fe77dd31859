"""The gan game: Goodfellow et al. 2014. A generator makes samples, a discriminator tells them from real ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, WrapValidator
from torch import Tensor

from gandist import augment
from gandist.augment import AdaOptions, DiffAugmentOptions
from gandist.data.dataset import Spec
from gandist.data.stream import Batch
from gandist.game import SAMPLES, Clock, Generative, GeneratorSide, Phase, Players, Side
from gandist.games.regularisers import Regularisers, See, Shown, as_it_is
from gandist.games.scores import GeneratorScores, ScoreOptions
from gandist.health import Symptom
from gandist.losses import ADVERSARIAL
from gandist.networks import Conditioning, Judged, classes_of
from gandist.player import EmaOptions, Memory, Player, Remembered
from gandist.recipe import Choice, DataOptions, Section, harmless

Repeat = Annotated[int, Field(ge=1, le=100)]
WINS, VANISHED, COLLAPSED = 0.99, 1000.0, 0.3  # where a row is a symptom


class AveragedGenerator(GeneratorSide):
    """The generator; its average weights make the samples."""

    ema: EmaOptions | None = EmaOptions()


class Gan(Generative):
    """Algorithm 1: `discriminator_steps` of D, each with its own draw and noise, then `generator_steps` of G with fresh noise.

    `order: simultaneous` takes both steps from the old weights, as the code released with the paper does. With
    `fresh_noise: false` G answers for the same fakes that D has just judged.
    """

    kind: Literal["gan"]
    loss: Literal[
        "minimax", "non_saturating", "least_squares", "hinge", "wasserstein", "relativistic", "relativistic_average"
    ] = "non_saturating"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # one-sided: the target of real is 1 less this
    fresh_noise: bool = True
    order: Literal["alternating", "simultaneous"] = "alternating"
    discriminator_steps: Repeat = 1
    generator_steps: Repeat = 1
    conditional: Conditioning | None = None  # on the class: by projection, or by an auxiliary classifier
    classifier_weight: Annotated[float, Field(gt=0)] = 1.0
    augment: (
        Annotated[SerializeAsAny[Section], WrapValidator(Choice("an augmentation", lambda: augment.AUGMENTATIONS))]
        | None
    ) = None
    regularisers: Regularisers = Regularisers()
    scores: Annotated[ScoreOptions, Field(**harmless)] = ScoreOptions()
    generator: AveragedGenerator

    # ---- what it needs

    def parts(self, spec: Spec) -> tuple[str, ...]:
        sample = "signal" if spec.image is None and spec.signal is not None else "image"
        return (sample, "label") if self.conditional else (sample,)

    def faults(self, spec: Spec) -> Iterator[tuple[tuple[str, ...], str]]:
        if spec.image is not None and spec.image.height is None:
            yield (
                ("generator",),
                "the images of `data.path` differ in size, and a generator makes one; set `data.transform.crop`, or pack them with --size",
            )
            return
        shape = spec.shape
        for fault in self.generator.network.faults(shape):
            yield ("generator", "network", "kind"), fault
        for fault in self.discriminator.network.faults(shape):
            yield ("discriminator", "network", "kind"), fault
        if len(shape) == 2 and self.augment is not None:
            yield ("augment",), "turns and colours images, and the dataset has signals; leave it out"
        if len(shape) == 2 and self.regularisers.consistency is not None:
            yield ("regularisers", "consistency"), "moves images, and the dataset has signals; leave it out"
        for place, fault in self.scores.faults(shape):
            yield ("scores", *place), fault
        yield from self._contradictions()

    def _contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Settings without an effect, or against each other."""
        if self.label_smoothing and not ADVERSARIAL[self.loss].smooths:
            yield ("label_smoothing",), f"has no effect on the loss `{self.loss}`, whose targets are no probabilities"
        if self.classifier_weight != 1.0 and self.conditional != "classifier":
            yield ("classifier_weight",), "has no effect without `conditional: classifier`"
        if self.conditional is None and getattr(self.generator.network, "class_embedding", None) is not None:
            yield ("generator", "network", "class_embedding"), "has no effect without `conditional`; leave it out"
        adaptive = isinstance(self.augment, AdaOptions) and self.augment.p is None
        if adaptive and ADVERSARIAL[self.loss].border is None:
            yield (
                ("augment",),
                f"ada reads how often real samples are judged real, which a logit of the loss `{self.loss}` does not say; set `augment.p`",
            )
        if self.generator.ema is not None and self.generator.ema.from_zero:
            yield (
                ("generator", "ema", "from_zero"),
                "is for an average that is tested late; samples of weights near zero are none",
            )
        if not self.scores.average and self.generator.ema is None:
            yield (
                ("scores", "average"),
                "has no effect where the generator keeps no average (`ema: null`); leave it out",
            )
        if self.scores.truncation is not None and self.noise_distribution == "uniform":
            yield ("scores", "truncation"), "uniform noise has no tails to cut off; leave it out"
        if self.discriminator.clip_weights is not None and self.discriminator.network.spectral_norm:
            yield (
                ("discriminator", "clip_weights"),
                "has no effect under `spectral_norm`, which divides by the size of the weights; leave one out",
            )
        if self.generator.clip_weights is not None and getattr(self.generator.network, "spectral_norm", False):
            yield (
                ("generator", "clip_weights"),
                "has no effect under `spectral_norm`, which divides by the size of the weights; leave one out",
            )
        if self.order == "simultaneous" and (self.discriminator_steps > 1 or self.generator_steps > 1):
            yield ("order",), "simultaneous takes one step of each player; leave the numbers of steps out"
        if not self.fresh_noise and (self.discriminator_steps > 1 or self.generator_steps > 1):
            yield ("fresh_noise",), "false needs one step of each player, which share their noise"
        if (seen := self.discriminator.network.sees_batch) is not None:
            for name in self.regularisers.slopes:
                yield (
                    ("regularisers", name),
                    f"takes the slope of each row by itself, and the discriminator's rows see each other (`{seen}`); use "
                    f"{'`norm: none`' if seen.startswith('norm') else 'one without'}, or leave the penalty out",
                )
        if self.regularisers.path_length is not None and (seen := self.generator.network.sees_batch) is not None:
            yield (
                ("regularisers", "path_length"),
                f"takes the slope of each sample by itself, and the generator's see each other (`{seen}`); use "
                "a network without batch norm, or leave the penalty out",
            )
        bounded = (
            self.regularisers.slopes or self.discriminator.clip_weights or self.discriminator.network.spectral_norm
        )
        if self.loss == "wasserstein" and not bounded:
            yield (
                ("loss",),
                "wasserstein needs a critic of bounded slope; add `regularisers: {gradient_penalty: {weight: 10}}`, "
                "`discriminator.clip_weights: 0.01` or `spectral_norm`",
            )

    def sides(self, spec: Spec) -> dict[str, Side]:
        shape, classes = spec.shape, self.classes(spec)
        of_discriminator, of_generator = self.regularisers.remembered()
        if isinstance(self.augment, AdaOptions) and self.augment.p is None:
            of_discriminator |= {"ada_p": self.augment.start, "ada_signs": 0.0, "ada_turns": 0.0}
        judge = partial(self.discriminator.network.build, shape, classes, self.conditional)
        return {
            "generator": Side(
                self.generator,
                partial(self.generator.network.build, self.noise, shape, classes),
                Remembered(of_generator, self.regularisers.update),
            ),
            "discriminator": Side(self.discriminator, judge, Remembered(of_discriminator, self._remember)),
        }

    def _remember(self, memory: Memory, observed: Memory, images: float) -> Memory:
        new = self.regularisers.update(memory, observed, images)
        if isinstance(self.augment, AdaOptions) and "ada_p" in memory:
            signs, turns = memory["ada_signs"] + observed["sign"], memory["ada_turns"] + 1
            full = turns >= self.augment.every
            adjusted = augment.adjusted(memory["ada_p"], signs / turns, images * self.augment.every, self.augment)
            new |= {
                "ada_p": torch.where(full, adjusted, memory["ada_p"]),
                "ada_signs": torch.where(full, torch.zeros_like(signs), signs),
                "ada_turns": torch.where(full, torch.zeros_like(turns), turns),
            }
        return new

    def examples(self, spec: Spec) -> dict[str, tuple[Tensor, ...]]:
        labels = () if self.conditional is None else (torch.zeros(2, dtype=torch.int64),)
        return {
            "generator": (torch.zeros(2, self.noise), *labels),
            "discriminator": (torch.zeros(2, *spec.shape), *labels),
        }

    def classes(self, spec: Spec) -> int | None:
        """The classes that the game is conditioned on; None where it is not."""
        return spec.label.classes if self.conditional is not None and spec.label is not None else None

    def evaluator(self, data: DataOptions, spec: Spec, device: torch.device) -> GeneratorScores:
        return GeneratorScores(self.scores, self, data, spec, spec.shape, device)

    # ---- how it is played

    def phases(self, spec: Spec) -> tuple[Phase, ...]:
        hold = self.order == "simultaneous"
        return (
            Phase(
                "discriminator",
                self.discriminator_loss,
                self.discriminator_steps,
                hold=hold,
                regime=self.regularisers.regime,
            ),
            Phase("generator", self.generator_loss, self.generator_steps, hold=hold, regime=self.regularisers.regime),
        )

    def discriminator_loss(self, players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]:
        discriminator, labels = players["discriminator"], self._labels(batch)
        real, noise = (
            batch["signal" if "signal" in batch.parts else "image"],
            self.fresh_latents(batch, "discriminator"),
        )
        fake = _made(players["generator"], noise, labels)
        see, see_fake = (self._augmentation(discriminator, batch, f"discriminator/{kind}") for kind in ("real", "fake"))
        verdict_real, verdict_fake = judge(discriminator, see(real), see_fake(fake), labels)
        logits_real, logits_fake = verdict_real.logits.float(), verdict_fake.logits.float()
        terms = ADVERSARIAL[self.loss].discriminator(logits_real, logits_fake, self.label_smoothing)
        if verdict_real.classes is not None and labels is not None:
            both = torch.cat([verdict_real.classes, classes_of(verdict_fake)]).float()
            terms["class"] = 2 * self.classifier_weight * F.cross_entropy(both, labels.repeat(2))
        values = {f"loss/discriminator/{name}": term.detach() for name, term in terms.items()}
        shown = Shown(batch, labels, real, fake, see, see_fake, verdict_real, verdict_fake)
        for name, penalty, weight in self.regularisers.of_discriminator(discriminator, shown, clock):
            values[f"penalty/{name}"] = penalty.detach()
            terms[name] = weight * penalty
        border = ADVERSARIAL[self.loss].border
        middle = border(self.label_smoothing) if border is not None else 0.0
        over = logits_real.detach() - middle, logits_fake.detach() - middle
        sign = over[0].sign().mean()
        if "ada_p" in discriminator.memory:
            discriminator.observe(sign=sign)
            values["augment/p"] = discriminator.memory["ada_p"].clone()
        values |= {
            "logits/real": logits_real.detach().mean(),
            "logits/fake": logits_fake.detach().mean(),
        }
        if border is None:
            values["accuracy/pairs"] = (logits_real > logits_fake).float().mean()
        else:
            values |= {
                "accuracy/real": (over[0] > 0).float().mean(),
                "accuracy/fake": (over[1] < 0).float().mean(),
                "sign/real": sign,
            }
        return torch.stack([*terms.values()]).sum(), values

    def generator_loss(self, players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]:
        generator, discriminator, labels = players["generator"], players["discriminator"], self._labels(batch)
        noise = self.fresh_latents(batch, "generator" if self.fresh_noise else "discriminator")
        # Before anything is asked of the discriminator, whose gradients may be on their way.
        made = _made(generator, noise, labels)
        verdict = discriminator(self._augmentation(discriminator, batch, "generator/fake")(made), labels)
        real: Judged | None = None
        if ADVERSARIAL[self.loss].reads_real or self.regularisers.feature_matching is not None:
            sample = batch["signal" if "signal" in batch.parts else "image"]
            real = discriminator(self._augmentation(discriminator, batch, "generator/real")(sample), labels)
        logits_real = real.logits.float() if real is not None else None
        terms = {"adversarial": ADVERSARIAL[self.loss].generator(verdict.logits.float(), logits_real)}
        if verdict.classes is not None and labels is not None:
            terms["class"] = self.classifier_weight * F.cross_entropy(verdict.classes.float(), labels)
        values = {f"loss/generator/{name}": term.detach() for name, term in terms.items()}

        def remake(latents: Tensor) -> Tensor:
            made: Tensor = generator.precise(*([latents] if labels is None else [latents, labels]))
            return made

        for name, penalty, weight in self.regularisers.of_generator(
            generator, verdict, real, remake, noise, batch, clock
        ):
            values[f"penalty/{name}"] = penalty.detach()
            terms[name] = weight * penalty
        return torch.stack([*terms.values()]).sum(), values

    def _labels(self, batch: Batch) -> Tensor | None:
        """The classes of the real rows, which are also asked of the fakes: so both have the distribution of the data."""
        return batch["label"] if self.conditional is not None else None

    def _augmentation(self, discriminator: Player, batch: Batch, purpose: str) -> See:
        """How the discriminator sees rows of this batch; the same turns and colours for them at each call."""
        if self.augment is None:
            return as_it_is
        assert isinstance(self.augment, AdaOptions | DiffAugmentOptions)
        channels, height, width = batch["image"].shape[1:]
        drawn = augment.draw(
            self.augment, batch.size, (channels, height, width), batch.source(f"augment/{purpose}"), batch.device
        )
        p = discriminator.memory.get("ada_p")
        return partial(augment.apply, parameters=drawn.rows(batch.rows), p=None if p is None else p.clone())

    def symptoms(self, row: Mapping[str, float]) -> Iterator[Symptom]:
        right = row.get("accuracy/pairs", min(row.get("accuracy/real", 0.0), row.get("accuracy/fake", 0.0)))
        if right > WINS:
            yield Symptom(
                "discriminator_wins",
                f"the discriminator is right about {right:.1%} of real and fake samples",
                "add `regularisers: {r1: {weight: 1}}` (beside a discriminator without batch norm) or raise its weight, lower the discriminator's learning rate, or with few "
                "data add `augment: {kind: ada}`",
            )
        ratio = row.get("grad_norm/ratio", 1.0)
        if ratio > VANISHED:
            yield Symptom(
                "generator_starves",
                f"the generator's gradient is {ratio:.0f} times smaller than the discriminator's",
                "use the loss `non_saturating` or `relativistic`, and see that the discriminator does not win",
            )
        if row.get("duplicates", 0.0) > COLLAPSED:
            yield Symptom(
                "modes_collapse",
                f"{row['duplicates']:.0%} of the samples have a near twin among {SAMPLES}",
                "try the loss `relativistic` with `regularisers: {r1: {weight: 1}, r2: {weight: 1}}`, "
                "`discriminator.network.minibatch`, or a smaller learning rate",
            )


def judge(discriminator: Player, real: Tensor, fake: Tensor, labels: Tensor | None) -> tuple[Judged, Judged]:
    """Verdicts on both: in one forward, unless its statistics would mix real and fake rows."""
    if discriminator.sees_batch:
        return discriminator(real, labels), discriminator(fake, labels)
    both: Judged = discriminator(torch.cat([real, fake.to(real.dtype)]), None if labels is None else labels.repeat(2))
    count = len(real)
    classes = both.classes
    return (
        Judged(both.logits[:count], both.features[:count], None if classes is None else classes[:count]),
        Judged(both.logits[count:], both.features[count:], None if classes is None else classes[count:]),
    )


def _made(generator: Player, noise: Tensor, labels: Tensor | None) -> Tensor:
    made: Tensor = generator(noise) if labels is None else generator(noise, labels)
    return made
