"""What is added to an adversarial loss: penalties of the discriminator and of the generator, by name in the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from gandist import augment, penalties
from gandist.data.stream import Batch
from gandist.game import Clock
from gandist.losses import feature_matching
from gandist.networks import Judged
from gandist.player import Memory, Player
from gandist.recipe import Section

Weight = Annotated[float, Field(gt=0, le=1e9)]
See = Callable[[Tensor], Tensor]
SHIFT = augment.ConsistencyOptions()
Decay = Annotated[float, Field(gt=0, lt=1)]


class Lazy(Section):
    """A penalty on every `every`-th step, with as many times its weight there (Karras et al. 2020, section 3.1)."""

    weight: Weight
    every: Annotated[int, Field(ge=1, le=10_000)] = 1

    def due(self, clock: Clock) -> float:
        """What the penalty is multiplied by in this step; 0 where it rests."""
        return self.weight * self.every if clock.step % self.every == 0 else 0.0


class Lecam(Section):
    """LeCam regularisation (Tseng et al. 2021); `decay` is that of the averages of the logits, a turn."""

    weight: Weight
    decay: Decay = 0.99


class Consistency(Section):
    """(D(x) − D(T x))² of real images, and of fakes with `fakes` (Zhang et al. 2020; balanced: Zhao et al. 2021)."""

    weight: Weight
    fakes: bool = False


class PathLength(Lazy):
    """Path lengths near their running mean (Karras et al. 2020, section 3.2), for the noise as the latent space."""

    weight: Weight = 2.0
    every: Annotated[int, Field(ge=1, le=10_000)] = 4
    decay: Decay = 0.99


class FeatureMatching(Section):
    """The generator also matches the mean features of a batch (Salimans et al. 2016, section 3.1)."""

    weight: Weight = 1.0
    norm: Literal["l1", "l2"] = "l2"


@dataclass(frozen=True)
class Shown:
    """What the discriminator was shown in its turn, and what it said; `see` is the augmentation of the real rows, `see_fake` of
    the fakes'."""

    batch: Batch
    labels: Tensor | None
    real: Tensor
    fake: Tensor
    see: See
    see_fake: See
    verdict_real: Judged
    verdict_fake: Judged


class Regularisers(Section):
    """Each by its published name; `weight` is γ or λ of its paper."""

    r1: Lazy | None = None
    r2: Lazy | None = None
    gradient_penalty: Lazy | None = None
    dragan: Lazy | None = None
    zero_centred: Lazy | None = None
    lecam: Lecam | None = None
    consistency: Consistency | None = None
    path_length: PathLength | None = None
    feature_matching: FeatureMatching | None = None

    @property
    def slopes(self) -> tuple[str, ...]:
        """Those that take the slope of the discriminator at each row, and bound it as a Wasserstein critic needs."""
        names = ("r1", "r2", "gradient_penalty", "zero_centred", "dragan")
        return tuple(name for name in names if getattr(self, name) is not None)

    def regime(self, clock: Clock) -> tuple[bool, ...]:
        """Which penalties that rest now and then are due."""
        lazy = (self.r1, self.r2, self.gradient_penalty, self.dragan, self.zero_centred, self.path_length)
        return tuple(option is not None and option.due(clock) > 0 for option in lazy)

    def of_discriminator(self, player: Player, shown: Shown, clock: Clock) -> Iterator[tuple[str, Tensor, float]]:
        """Name, value and weight of each penalty that is due.

        Those of gradients are in fp32 throughout, their forward included; those of logits square fp32 copies of them.
        """
        real, fake, batch = shown.real.float(), shown.fake.detach().float(), shown.batch

        def judge(see: See) -> Callable[[Tensor], Tensor]:
            def logits(samples: Tensor) -> Tensor:
                found: Tensor = player.precise(see(samples), shown.labels).logits
                return found

            return logits

        def due(option: Lazy | None) -> float:
            return option.due(clock) if option is not None else 0.0

        def judge_both(samples: Tensor) -> Tensor:
            seen = torch.cat([shown.see(samples[: len(real)]), shown.see_fake(samples[len(real) :])])
            labels = shown.labels.repeat(2) if shown.labels is not None else None
            found: Tensor = player.precise(seen, labels).logits
            return found

        weight_r1, weight_r2 = due(self.r1), due(self.r2)
        if weight_r1 and weight_r2 and not player.sees_batch:
            of_real, of_fake = penalties.r1_and_r2(judge_both, real, fake)
            yield "r1", of_real, weight_r1
            yield "r2", of_fake, weight_r2
            weight_r1 = weight_r2 = 0.0
        if weight_r1:
            yield "r1", penalties.r1(judge(shown.see), real), weight_r1
        if weight_r2:
            yield "r2", penalties.r2(judge(shown.see_fake), fake), weight_r2
        if weight := due(self.gradient_penalty):
            mix = batch.uniform("mix/gradient_penalty")
            seen = shown.see(real), shown.see_fake(fake)
            yield "gradient_penalty", penalties.gradient_penalty(judge(as_it_is), *seen, mix), weight
        if weight := due(self.zero_centred):
            mix = batch.uniform("mix/zero_centred")
            seen = shown.see(real), shown.see_fake(fake)
            yield "zero_centred", penalties.zero_centred(judge(as_it_is), *seen, mix), weight
        if weight := due(self.dragan):
            noise = batch.uniform("noise/dragan", *real.shape[1:])
            mix = batch.uniform("mix/dragan")
            yield "dragan", penalties.dragan(judge(as_it_is), shown.see(real), noise, mix), weight
        if self.lecam is not None:
            mass = player.memory["lecam_mass"].clamp_min(1e-6)
            anchors = player.memory["lecam_real"] / mass, player.memory["lecam_fake"] / mass
            logits = shown.verdict_real.logits.float(), shown.verdict_fake.logits.float()
            yield "lecam", penalties.lecam(*logits, *anchors), self.lecam.weight
            player.observe(lecam_real=logits[0].mean(), lecam_fake=logits[1].mean(), lecam_mass=torch.ones_like(mass))
        if self.consistency is not None:
            yield "consistency", self._consistency(player, shown), self.consistency.weight

    def _consistency(self, player: Player, shown: Shown) -> Tensor:
        assert self.consistency is not None
        found = []
        for name, samples, see, verdict in (
            ("real", shown.real, shown.see, shown.verdict_real),
            ("fake", shown.fake, shown.see_fake, shown.verdict_fake),
        ):
            if name == "real" or self.consistency.fakes:
                source = shown.batch.source(f"augment/consistency/{name}")
                channels, height, width = samples.shape[1:]
                drawn = augment.draw(SHIFT, shown.batch.size, (channels, height, width), source, samples.device)
                moved = augment.apply(see(samples), drawn.rows(shown.batch.rows))
                found.append(penalties.consistency(verdict.logits.float(), player(moved, shown.labels).logits.float()))
        return torch.stack(found).sum()

    def of_generator(
        self, player: Player, verdict: Judged, real: Judged | None, remake: Callable[[Tensor], Tensor], noise: Tensor,
        batch: Batch, clock: Clock,
    ) -> Iterator[tuple[str, Tensor, float]]:  # fmt: skip
        """Name, value and weight of what the generator's loss gains; `remake` makes its samples from noise in fp32."""
        if self.feature_matching is not None:
            assert real is not None
            option = self.feature_matching
            yield "feature_matching", feature_matching(real.features, verdict.features, option.norm), option.weight
        if self.path_length is not None and (weight := self.path_length.due(clock)):
            latents = noise.float().requires_grad_()
            made = remake(latents)
            direction = batch.normal("noise/path_length", *made.shape[1:])
            penalty, length = penalties.path_length(made, latents, direction, player.memory["path_length"])
            player.observe(path_length=length)
            yield "path_length", penalty, weight

    def remembered(self) -> tuple[dict[str, float], dict[str, float]]:
        """What the discriminator and the generator keep for their penalties, as it begins."""
        anchors = ("lecam_real", "lecam_fake", "lecam_mass") if self.lecam is not None else ()
        return dict.fromkeys(anchors, 0.0), {"path_length": 0.0} if self.path_length is not None else {}

    def update(self, memory: Memory, observed: Memory, images: float) -> dict[str, Tensor]:
        """The averages after a turn in which they were observed."""
        decays: dict[str, float] = {}
        if self.lecam is not None:
            decays |= dict.fromkeys(("lecam_real", "lecam_fake", "lecam_mass"), self.lecam.decay)
        if self.path_length is not None:
            decays["path_length"] = self.path_length.decay
        return {n: memory[n].lerp(observed[n], 1 - decay) for n, decay in decays.items() if n in observed}


def as_it_is(samples: Tensor) -> Tensor:
    """No augmentation."""
    return samples
