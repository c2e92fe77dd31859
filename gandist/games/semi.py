"""The semi game: Salimans et al. 2016. A discriminator that is a classifier learns from few labels, and a generator keeps it honest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gandist.data.dataset import Spec
from gandist.data.stream import Batch
from gandist.game import Classifying, Clock, DiscriminatorSide, Generative, Phase, Players, Side
from gandist.games.classification import Classification, ClassificationOptions
from gandist.health import Symptom
from gandist.losses import ADVERSARIAL, conditional_entropy, divergence, feature_matching, pseudo_labels, pull_away
from gandist.networks import Classifies, Judged, classes_of
from gandist.networks.noise import Distribution
from gandist.player import EmaOptions, Player, in_capture
from gandist.recipe import DataOptions, Section, harmless

Weight = Annotated[float, Field(gt=0, le=1e9)]
CLASSIFY = ADVERSARIAL["non_saturating"].discriminator
WINS = 0.99


class AveragedDiscriminator(DiscriminatorSide):
    """The discriminator, whose average is the classifier that is tested."""

    ema: EmaOptions | None = EmaOptions()


class FeatureMatching(Section):
    """‖E f(x) − E f(G(z))‖ over the batch of all processes (section 3.1), as `l2` (mean square) or `l1` (mean absolute difference).

    f is what the trunk of the discriminator gives, or, with `layer`, what so many of its parts before its last give.
    """

    weight: Weight = 1.0
    norm: Literal["l1", "l2"] = "l2"
    layer: Annotated[int, Field(ge=0, le=64)] = 0


class PseudoLabels(Section):
    """Unlabelled rows of which the classifier is surer than `threshold` count as labelled (Lee 2013), from `from_images` on."""

    weight: Weight = 1.0
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.95
    from_images: Annotated[int, Field(ge=0)] = 0


class VirtualAdversarial(Section):
    """Virtual adversarial training (Miyato et al. 2018) on unlabelled rows: KL(p(x) ‖ p(x + r)) for the worst r of length `radius`.

    r is found by `iterations` of the power method with steps of `probe`, in fp32 and under the hidden noise of the row itself.
    """

    weight: Weight = 1.0
    radius: Annotated[float, Field(gt=0, le=1e4)] = 2.0
    probe: Annotated[float, Field(gt=0, le=10)] = 0.1
    iterations: Annotated[int, Field(ge=1, le=10)] = 1


class Semi(Generative, Classifying):
    """Each step: D on labelled, unlabelled and generated rows, then G on features of another order of the unlabelled ones.

    With `supervised_only` D learns from the labelled rows alone: what the same labels give without the game. All other keys may stay
    as they are then, without effect, and unlabelled rows start its weights as before: so the baseline is the recipe with one switch.
    """

    kind: Literal["semi"]
    fake_class: Literal["zero", "learned"] = "zero"  # the logit of K + 1: fixed, or an output with a softmax over all
    unlabelled_weight: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # one-sided: the target of unlabelled rows is 1 less it
    feature_matching: FeatureMatching | None = FeatureMatching()
    adversarial: Literal["minimax", "non_saturating"] | None = None  # what the generator's loss has of the other games'
    conditional: bool = False  # the generator is told a class, and its samples should be of it
    pull_away: Weight | None = None  # BadGAN's generator: features of its samples away from each other
    conditional_entropy: Weight | None = None  # BadGAN's discriminator: sure of each unlabelled row
    virtual_adversarial: VirtualAdversarial | None = None
    pseudo_labels: PseudoLabels | None = None
    supervised_only: bool = False
    noise_distribution: Distribution = "uniform"  # both of variance 1
    generator_steps: Annotated[int, Field(ge=1, le=100)] = 1
    scores: Annotated[ClassificationOptions, Field(**harmless)] = ClassificationOptions()
    discriminator: AveragedDiscriminator

    # ---- what it needs

    def parts(self, spec: Spec) -> tuple[str, ...]:
        return ("unlabelled", *(() if self.supervised_only else ("unlabelled_again",)), "image", "label")

    def faults(self, spec: Spec) -> Iterator[tuple[tuple[str, ...], str]]:
        if spec.image is None or spec.image.height is None:
            yield (
                ("generator",),
                "the images of `data.path` differ in size, and a generator makes one; set `data.transform.crop`, or pack them with --size",
            )
            return
        assert spec.label is not None
        if spec.label.classes < 2:
            yield ("kind",), f"semi tells classes apart, and the dataset has {spec.label.classes}"
        for fault in self.generator.network.faults(spec.shape):
            yield ("generator", "network", "kind"), fault
        for fault in self.discriminator.network.faults(spec.shape):
            yield ("discriminator", "network", "kind"), fault
        if self.feature_matching is None and self.adversarial is None:
            yield ("adversarial",), "without `feature_matching` the generator needs one, `minimax` or `non_saturating`"
        if self.feature_matching is not None and self.feature_matching.layer:
            with torch.device("meta"):
                trunk, _ = self.discriminator.network.trunk(spec.shape)
            parts = len(trunk) if isinstance(trunk, torch.nn.Sequential) else 1
            if self.feature_matching.layer >= parts:
                yield (
                    ("feature_matching", "layer"),
                    f"{self.feature_matching.layer} lies before the first of the {parts} parts of the discriminator; use at most {parts - 1}",
                )
        if self.generator.ema is not None and self.generator.ema.from_zero:
            yield (
                ("generator", "ema", "from_zero"),
                "is for an average that is tested late; samples of weights near zero are none",
            )
        if not self.scores.average and self.discriminator.ema is None:
            yield (
                ("scores", "average"),
                "has no effect where the discriminator keeps no average (`ema: null`); leave it out",
            )
        if self.virtual_adversarial is not None and (seen := self.discriminator.network.sees_batch) is not None:
            yield (
                ("virtual_adversarial",),
                f"moves each row by itself, and the discriminator's rows see each other (`{seen}`); leave one out",
            )
        for name, network in (("generator", self.generator), ("discriminator", self.discriminator)):
            if network.clip_weights is not None and getattr(network.network, "spectral_norm", False):
                yield (
                    (name, "clip_weights"),
                    "has no effect under `spectral_norm`, which divides by the size of the weights; leave one out",
                )
        if not self.conditional and getattr(self.generator.network, "class_embedding", None) is not None:
            yield ("generator", "network", "class_embedding"), "has no effect without `conditional`; leave it out"

    def sides(self, spec: Spec) -> dict[str, Side]:
        assert spec.label is not None
        judge = partial(self.discriminator.network.build_classifier, spec.shape, spec.label.classes, self.classifies())
        make = partial(self.generator.network.build, self.noise, spec.shape, self.classes(spec))
        return {"generator": Side(self.generator, make), "discriminator": Side(self.discriminator, judge)}

    def examples(self, spec: Spec) -> dict[str, tuple[Tensor, ...]]:
        labels = (torch.zeros(2, dtype=torch.int64),) if self.conditional else ()
        return {
            "generator": (torch.zeros(2, self.noise), *labels),
            "discriminator": (torch.zeros(2, *spec.shape),),
        }

    def classifies(self) -> Classifies:
        layer = self.feature_matching.layer if self.feature_matching is not None else 0
        return Classifies(fake_class=self.fake_class == "learned", layer=layer)

    @property
    def held_out(self) -> str | None:
        return self.scores.split

    @property
    def tells_fakes(self) -> bool:
        return not self.supervised_only

    def classes(self, spec: Spec) -> int | None:
        """The classes that the generator is conditioned on; None where it is not."""
        return spec.label.classes if self.conditional and spec.label is not None else None

    def evaluator(self, data: DataOptions, spec: Spec, device: torch.device) -> Classification:
        return Classification(self.scores, data, spec, device)

    # ---- how it is played

    def phases(self, spec: Spec) -> tuple[Phase, ...]:
        if self.supervised_only:
            return (Phase("discriminator", self.supervised_loss),)
        return (
            Phase("discriminator", self.discriminator_loss, regime=self._regime),
            Phase("generator", self.generator_loss, repeat=self.generator_steps),
        )

    def _regime(self, clock: Clock) -> bool:
        """Whether pseudo-labels count."""
        return self.pseudo_labels is not None and clock.images >= self.pseudo_labels.from_images

    def supervised_loss(self, players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]:
        """−E log p(y | x) of the labelled rows alone."""
        verdict, labels = players["discriminator"](batch["image"]), batch["label"]
        loss = self._supervised(verdict, labels)
        return loss, {
            "loss/discriminator/supervised": loss.detach(),
            "accuracy/labelled": (classes_of(verdict).argmax(1) == labels).float().mean(),
        }

    def discriminator_loss(self, players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]:
        """−E log p(y | x, y ≤ K) − ½ E log D(x) − ½ E log(1 − D(G(z))): section 5 with the halves of the released code."""
        discriminator, labels, unlabelled = players["discriminator"], batch["label"], batch["unlabelled"]
        fake = self._made(players["generator"], batch, "discriminator")[0]
        labelled, real, made = judge(discriminator, batch["image"], unlabelled, fake)
        half = self.unlabelled_weight / 2
        unsupervised = CLASSIFY(real.logits, made.logits, self.label_smoothing)
        terms = {
            "supervised": self._supervised(labelled, labels),
            "unlabelled": half * unsupervised["real"],
            "fake": half * unsupervised["fake"],
        }
        if self.conditional_entropy is not None:
            terms["conditional_entropy"] = self.conditional_entropy * conditional_entropy(classes_of(real))
        if self.pseudo_labels is not None and self._regime(clock):
            option = self.pseudo_labels
            terms["pseudo_labels"] = option.weight * pseudo_labels(classes_of(real), option.threshold)
        if self.virtual_adversarial is not None:
            noise = batch.normal("noise/virtual_adversarial", *unlabelled.shape[1:])
            terms["virtual_adversarial"] = self.virtual_adversarial.weight * virtual_adversarial(
                discriminator, unlabelled.float(), noise, self.virtual_adversarial
            )
        values = {f"loss/discriminator/{name}": term.detach() for name, term in terms.items()}
        values |= {
            "logits/real": real.logits.detach().mean(),
            "logits/fake": made.logits.detach().mean(),
            "accuracy/labelled": (classes_of(labelled).argmax(1) == labels).float().mean(),
            "accuracy/real": (real.logits > 0).float().mean(),
            "accuracy/fake": (made.logits < 0).float().mean(),
        }
        return torch.stack([*terms.values()]).sum(), values

    def generator_loss(self, players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Feature matching with the other order of the unlabelled rows, unless the recipe says otherwise."""
        discriminator = players["discriminator"]
        fake, asked = self._made(players["generator"], batch, "generator")
        real: Judged | None = None
        if (
            self.feature_matching is not None
        ):  # in one forward: the discriminator's weights are normalised and cast once
            real, made = judge(discriminator, batch["unlabelled_again"], fake)
        else:
            made = discriminator(fake)
        terms: dict[str, Tensor] = {}
        if real is not None and self.feature_matching is not None:
            option = self.feature_matching
            terms["feature_matching"] = option.weight * feature_matching(real.features, made.features, option.norm)
        if self.adversarial is not None:
            terms["adversarial"] = ADVERSARIAL[self.adversarial].generator(made.logits, None)
        if self.pull_away is not None:
            terms["pull_away"] = self.pull_away * pull_away(made.features)
        if asked is not None:
            terms["class"] = F.cross_entropy(classes_of(made), asked)
        values = {f"loss/generator/{name}": term.detach() for name, term in terms.items()}
        return torch.stack([*terms.values()]).sum(), values

    def _supervised(self, verdict: Judged, labels: Tensor) -> Tensor:
        """With a learned fake class the softmax is over all K + 1: log p(y) = log p(y | y ≤ K) + log D."""
        loss = F.cross_entropy(classes_of(verdict), labels)
        return loss + F.softplus(-verdict.logits).mean() if self.fake_class == "learned" else loss

    def _made(self, generator: Player, batch: Batch, phase: str) -> tuple[Tensor, Tensor | None]:
        """Samples of fresh noise, and the classes that they were asked to be."""
        noise = self.fresh_latents(batch, phase)
        asked = batch["label"] if self.conditional else None  # labelled rows cycle through all classes alike
        return generator(noise) if asked is None else generator(noise, asked), asked

    def symptoms(self, row: Mapping[str, float]) -> Iterator[Symptom]:
        right = min(row.get("accuracy/real", 0.0), row.get("accuracy/fake", 0.0))
        if right > WINS:
            yield Symptom(
                "discriminator_wins",
                f"the discriminator is right about {right:.1%} of unlabelled and generated rows, which teach it nothing then",
                "raise the noise or the dropout of the discriminator, or the generator's learning rate",
            )
        if row.get("accuracy/fake", 1.0) < 1 - WINS:
            yield Symptom(
                "generator_wins",
                "the discriminator takes nearly all generated rows for real",
                "use `feature_matching`, or raise the discriminator's learning rate",
            )


def judge(discriminator: Player, *samples: Tensor) -> list[Judged]:
    """A verdict on each batch of equally many rows: in one forward, unless its statistics would mix them."""
    if discriminator.sees_batch:
        return [discriminator(part) for part in samples]
    all_of_them: Judged = discriminator(torch.cat([part.to(samples[0].dtype) for part in samples]))
    count = len(samples)
    pieces = [part.chunk(count) for part in (all_of_them.logits, all_of_them.features, classes_of(all_of_them))]
    return [Judged(*(piece[place] for piece in pieces)) for place in range(count)]


def virtual_adversarial(player: Player, rows: Tensor, noise: Tensor, options: VirtualAdversarial) -> Tensor:
    """KL(p(x) ‖ p(x + r)) for the r of length `radius` that raises it most: Miyato et al. 2018, equations 5 to 10.

    Both sides see the same hidden noise, which would differ by more than r does otherwise.
    """
    device = rows.device
    on_gpu = device.type == "cuda"
    if in_capture(device):
        raise RuntimeError("virtual adversarial training sets random numbers back, which a graph cannot")
    state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()

    def classes(samples: Tensor) -> Tensor:
        torch.cuda.set_rng_state(state, device) if on_gpu else torch.set_rng_state(state)
        return classes_of(player.precise(samples))

    def unit(directions: Tensor) -> Tensor:
        return F.normalize(directions.flatten(1), dim=1).view_as(directions)

    with torch.no_grad():
        clean = classes(rows)
    direction = unit(noise)
    for _ in range(options.iterations):
        moved = (options.probe * direction).requires_grad_()
        (slope,) = torch.autograd.grad(divergence(clean, classes(rows + moved)), moved)
        direction = unit(slope)
    return divergence(clean, classes(rows + options.radius * direction))
