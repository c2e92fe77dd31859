"""The gan game: Goodfellow et al. 2014. A generator makes images, a discriminator tells them from real ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, WrapValidator
from torch import Tensor

from gandist.data.dataset import Spec
from gandist.data.stream import Batch
from gandist.game import Clock, Game, Phase, Players, Side, network
from gandist.losses import ADVERSARIAL
from gandist.networks import DiscriminatorOptions, GeneratorOptions
from gandist.player import EmaOptions, Player, PlayerOptions
from gandist.seeding import derive

Repeat = Annotated[int, Field(ge=1, le=100)]


class GeneratorSide(PlayerOptions):
    """The generator; its average weights make the samples."""

    network: Annotated[SerializeAsAny[GeneratorOptions], WrapValidator(network("generator", GeneratorOptions))]
    ema: EmaOptions | None = EmaOptions()


class DiscriminatorSide(PlayerOptions):
    """The discriminator."""

    network: Annotated[
        SerializeAsAny[DiscriminatorOptions], WrapValidator(network("discriminator", DiscriminatorOptions))
    ]


class Gan(Game):
    """Algorithm 1: `discriminator_steps` steps of D, each with its own draw and noise, then one of G with fresh noise."""

    kind: Literal["gan"]
    loss: Literal["non_saturating", "minimax"] = "non_saturating"
    noise: Annotated[int, Field(ge=1, le=65536)] = 100
    discriminator_steps: Repeat = 1
    generator: GeneratorSide
    discriminator: DiscriminatorSide
    parts: ClassVar[tuple[str, ...]] = ("image",)

    def faults(self, spec: Spec) -> Iterator[tuple[tuple[str, ...], str]]:
        assert spec.image is not None  # the parts of this game have been checked
        if spec.image.height is None:
            yield (
                ("generator",),
                "the images of `data.path` differ in size, and a generator makes one; set `data.transform.crop`, or pack them with --size",
            )
        for fault in self.generator.network.faults(spec.image):
            yield ("generator", "network", "kind"), fault
        for fault in self.discriminator.network.faults(spec.image):
            yield ("discriminator", "network", "kind"), fault

    def sides(self, spec: Spec) -> dict[str, Side]:
        assert spec.image is not None
        return {
            "generator": Side(self.generator, partial(self.generator.network.build, self.noise, spec.image)),
            "discriminator": Side(self.discriminator, partial(self.discriminator.network.build, spec.image)),
        }

    def inputs(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        image = spec.image
        assert image is not None
        assert image.height is not None
        assert image.width is not None
        return {"generator": (self.noise,), "discriminator": (image.channels, image.height, image.width)}

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("discriminator", self.discriminator_loss, repeat=self.discriminator_steps),
            Phase("generator", self.generator_loss),
        )

    def discriminator_loss(self, players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]:
        fake = players["generator"](batch.normal("noise/discriminator", self.noise))
        real, fake = judge(players["discriminator"], batch["image"], fake)
        terms = ADVERSARIAL[self.loss].discriminator(real, fake)
        values = {f"loss/discriminator/{name}": term.detach() for name, term in terms.items()}
        values |= {"logits/real": real.detach().mean(), "logits/fake": fake.detach().mean()}
        return torch.stack([*terms.values()]).sum(), values

    def generator_loss(self, players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]:
        fake = players["generator"](batch.normal("noise/generator", self.noise))
        loss = ADVERSARIAL[self.loss].generator(players["discriminator"](fake))
        return loss, {"loss/generator/adversarial": loss.detach()}

    def samples(self, players: Players, count: int, seed: int) -> Iterator[Tensor]:
        generator = players["generator"]
        with generator.evaluating() as module:
            for first in range(0, count, 64):
                rows = min(64, count - first)
                source = torch.Generator(generator.device).manual_seed(derive(seed, "samples", first))
                noise = torch.randn(64, self.noise, generator=source, device=generator.device)
                yield module(noise)[:rows].float().cpu()


def judge(discriminator: Player, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B,) of both: in one forward, unless its statistics would mix real and fake rows."""
    if discriminator.sees_batch:
        return discriminator(real), discriminator(fake)
    logits_real, logits_fake = discriminator(torch.cat([real, fake.to(real.dtype)])).split([len(real), len(fake)])
    return logits_real, logits_fake
