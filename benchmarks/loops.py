"""The loops that step.py measures the trainer against: as users write them, and as an expert would."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gandist.networks import Judged
from gandist.player import DTYPES


class Plain:
    """The loop that a user would otherwise write."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, images: Tensor, noise: int, batch: int) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.images, self.noise, self.batch = images, noise, batch
        self.criterion = nn.BCEWithLogitsLoss()
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (discriminator, generator)
        ]
        self.place = 0

    def __call__(self) -> None:
        first = self.place % (len(self.images) - self.batch + 1)
        self.place += self.batch
        real = self.images[first : first + self.batch]
        ones, zeros = torch.ones(self.batch, device=real.device), torch.zeros(self.batch, device=real.device)

        self.discriminator.zero_grad()
        loss_real = self.criterion(self.discriminator(real).logits, ones)
        loss_real.backward()
        fake = self.generator(torch.randn(self.batch, self.noise, device=real.device))
        loss_fake = self.criterion(self.discriminator(fake.detach()).logits, zeros)
        loss_fake.backward()
        self.optimizers[0].step()

        self.generator.zero_grad()
        loss = self.criterion(self.discriminator(fake).logits, ones)
        loss.backward()
        self.optimizers[1].step()


class Tuned:
    """The same by somebody who knows what it costs."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, images: Tensor, noise: int, batch: int, precision: str
    ) -> None:
        self.generator, self.discriminator = (
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for module in (generator, discriminator)
        )
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.noise, self.batch, self.place = noise, batch, 0
        self.cast = partial(torch.autocast, images.device.type, DTYPES[precision], enabled=precision != "fp32")
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
            for m in (discriminator, generator)
        ]
        self.average = [p.detach().clone() for p in generator.parameters()]

    def __call__(self) -> None:
        first = self.place % (len(self.images) - self.batch + 1)
        self.place += self.batch
        real = self.images[first : first + self.batch]

        with torch.no_grad(), self.cast():
            fake = self.generator(torch.randn(self.batch, self.noise, device=real.device))
        self.optimizers[0].zero_grad()
        if any(isinstance(part, nn.BatchNorm2d) for part in self.discriminator.modules()):
            with self.cast():
                accepted, rejected = self.discriminator(real).logits, self.discriminator(fake.to(real.dtype)).logits
        else:
            with self.cast():
                accepted, rejected = self.discriminator(torch.cat([real, fake.to(real.dtype)])).logits.chunk(2)
        loss = F.softplus(-accepted.float()).mean() + F.softplus(rejected.float()).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers[0].step()

        self.optimizers[1].zero_grad()
        self.discriminator.requires_grad_(False)
        with self.cast():
            verdict = self.discriminator(self.generator(torch.randn(self.batch, self.noise, device=real.device))).logits
        F.softplus(-verdict.float()).mean().backward()  # type: ignore[no-untyped-call]
        self.discriminator.requires_grad_(True)
        self.optimizers[1].step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.generator.parameters()], 0.001)


class PlainNormed(nn.Module):
    """W = g θ / ‖θ‖ as it is written."""

    def __init__(self, inputs: int, outputs: int, learns_gain: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(outputs, inputs))
        self.gain = nn.Parameter(torch.ones(outputs), requires_grad=learns_gain)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, values: Tensor) -> Tensor:
        length = torch.sqrt(torch.sum(self.weight**2, dim=1))
        return F.linear(values, self.weight * (self.gain / length)[:, None], self.bias)


class PlainNoise(nn.Module):
    """Gaussian noise."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, values: Tensor) -> Tensor:
        return values + torch.randn_like(values) * self.deviation


class PlainDiscriminator(nn.Module):
    """784-1000-500-250-250-250-10."""

    def __init__(self) -> None:
        super().__init__()
        widths = [784, 1000, 500, 250, 250, 250]
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(pairwise(widths)):
            layers += [PlainNoise(0.5 if place else 0.3), PlainNormed(inputs, outputs, False), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Sequential(PlainNoise(0.5), PlainNormed(250, 10, True))

    def forward(self, images: Tensor) -> Judged:
        features = self.hidden((images.flatten(1) + 1) / 2)
        classes = self.last(features)
        return Judged(torch.logsumexp(classes, 1), features, classes)


class PlainGenerator(nn.Module):
    """100-500-500-784."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(100, 500), nn.BatchNorm1d(500), nn.Softplus(), nn.Linear(500, 500), nn.BatchNorm1d(500),
            nn.Softplus(), PlainNormed(500, 784, True), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        made: Tensor = 2 * self.layers(noise) - 1
        return made.view(-1, 1, 28, 28)


class PlainSemi:
    """The same of the semi game."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, images: Tensor, labels: Tensor, noise: int, batch: int
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.images, self.labels, self.noise, self.batch = images, labels, noise, batch
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=3e-3, betas=(0.5, 0.999)) for m in (discriminator, generator)
        ]
        self.average = [torch.zeros_like(p) for p in discriminator.parameters()]

    def rows(self) -> Tensor:
        """Numbers of some rows."""
        return torch.randint(len(self.images), (self.batch,), device=self.images.device)

    def __call__(self) -> None:
        labelled, device = self.rows(), self.images.device
        self.optimizers[0].zero_grad()
        fake = self.generator(torch.rand(self.batch, self.noise, device=device)).detach()
        supervised = self.discriminator(self.images[labelled])
        real, made = self.discriminator(self.images[self.rows()]), self.discriminator(fake)
        loss = F.cross_entropy(supervised.classes, self.labels[labelled])
        loss = loss + 0.5 * F.softplus(-real.logits).mean() + 0.5 * F.softplus(made.logits).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers[0].step()
        with torch.no_grad():
            for average, parameter in zip(self.average, self.discriminator.parameters(), strict=True):
                average += 1e-4 * (parameter - average)

        self.optimizers[1].zero_grad()
        real = self.discriminator(self.images[self.rows()])
        made = self.discriminator(self.generator(torch.rand(self.batch, self.noise, device=device)))
        loss = (real.features.mean(0) - made.features.mean(0)).square().mean()
        loss.backward()
        self.optimizers[1].step()


class PlainSegment:
    """The same of the segment game."""

    def __init__(
        self, segmenter: nn.Module, adversary: nn.Module, images: Tensor, masks: Tensor, classes: int, batch: int
    ) -> None:
        self.segmenter, self.adversary = segmenter, adversary
        self.images, self.masks, self.classes, self.batch = images, masks, classes, batch
        self.criterion = nn.BCEWithLogitsLoss()
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=1e-4, betas=(0.5, 0.999)) for m in (segmenter, adversary)
        ]
        self.place = 0

    def __call__(self) -> None:
        first = self.place % (len(self.images) - self.batch + 1)
        self.place += self.batch
        images, masks = self.images[first : first + self.batch], self.masks[first : first + self.batch]
        ones, zeros = torch.ones(self.batch, device=images.device), torch.zeros(self.batch, device=images.device)

        self.optimizers[0].zero_grad()
        logits = self.segmenter(images)
        size = logits.shape[2:]
        small = F.interpolate(images, size, mode="bilinear", align_corners=False)
        truth = F.interpolate(masks[:, None].float(), size, mode="nearest")[:, 0].long()
        made = logits.softmax(1)
        loss = F.cross_entropy(logits, truth) + self.criterion(self.adversary(made, small), ones)
        loss.backward()
        self.optimizers[0].step()

        self.optimizers[1].zero_grad()
        right = F.one_hot(truth, self.classes).permute(0, 3, 1, 2).float()
        loss = self.criterion(self.adversary(right, small), ones)
        loss = loss + self.criterion(self.adversary(made.detach(), small), zeros)
        loss.backward()
        self.optimizers[1].step()
