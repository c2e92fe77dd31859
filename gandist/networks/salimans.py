"""The networks of Salimans et al. 2016 for labels that are few, as in the code released with it: MNIST, CIFAR-10, SVHN."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Annotated, ClassVar, Literal

import torch
import torch.distributed as dist
from einops.layers.torch import Rearrange, Reduce
from pydantic import Field, model_validator
from torch import Tensor, nn

from gandist.losses import at_least_fp32, mean_over_ranks
from gandist.networks import DiscriminatorOptions, GeneratorOptions, Shape
from gandist.networks.convolution import Conv2d, ConvTranspose2d
from gandist.networks.mlp import Depth, Fold, Rate, Unfold, Width
from gandist.networks.resampling import Crop, divided
from gandist.networks.starting import MAX_REFERENCE, START, Normed, start_by
from gandist.networks.virtual import VirtualBatchNorm, WithReference

Deviation = Annotated[float, Field(ge=0, le=10)]
Norm = Literal["batch", "virtual"]


class HiddenNoise(nn.Module):
    """Adds N(0, `deviation`²) to each value while training."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        noise = torch.randn(values.shape, device=values.device)  # drawing it in bf16 takes a CPU 1.5 times as long
        return torch.add(values, noise.to(values.dtype), alpha=self.deviation)

    def extra_repr(self) -> str:
        return f"{self.deviation}"


class Squash(nn.Module):
    """tanh in fp32 or more, since bf16 knows few numbers near −1 and 1."""

    def forward(self, values: Tensor) -> Tensor:
        return at_least_fp32(values).tanh()


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation without a gain, by the whole batch of all processes; running statistics for evaluation."""

    of_all_processes = True  # one row of each is a batch
    measures = False  # while one process lets its weights start, there are no others to wait for

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6, affine=False)
        self.shift = nn.Parameter(torch.zeros(channels))

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim in (2, 4), input.shape

    def forward(self, values: Tensor) -> Tensor:
        axes = (-1, *[1] * (values.ndim - 2))
        if self.measures or not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            # Of running statistics for evaluation, or of those of the turn's own batch, as the superclass decides.
            normed: Tensor = super().forward(values)
            return normed + self.shift.view(axes)
        values = values.float()
        others = [axis for axis in range(values.ndim) if axis != 1]
        mean, square = mean_over_ranks(torch.stack([values.mean(others), values.square().mean(others)]))
        variance = (square - mean.square()).clamp_min(0)
        if self.track_running_stats:
            with torch.no_grad():
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.momentum is not None
                count = values.numel() / values.shape[1] * dist.get_world_size()
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked += 1
        scale = torch.rsqrt(variance + self.eps)
        offset = self.shift - mean * scale
        scaled: Tensor = values * scale.view(axes) + offset.view(axes)
        return scaled


class MlpGenerator(GeneratorOptions):
    """Dense layers with batch norm and softplus, and weights of length 1 before a sigmoid: MNIST."""

    kind: Literal["salimans_mlp"]
    width: Width = 500
    depth: Depth = 2
    axes: ClassVar[tuple[int, ...]] = (2, 3)

    @property
    def sees_batch(self) -> str | None:
        return "batch norm"

    def module(self, noise: int, shape: Shape) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs in [noise, *[self.width] * (self.depth - 1)]:
            linear = nn.Linear(inputs, self.width, bias=False)
            nn.init.xavier_uniform_(linear.weight)
            layers += [linear, BatchNorm(self.width), nn.Softplus()]
        last = Normed(nn.Linear(self.width, prod(shape), bias=False), deviation=0.05, learns_gain=True)
        nn.init.xavier_uniform_(last.layer.weight)
        return nn.Sequential(*layers, last, Unfold(shape, "sigmoid"))


class MlpDiscriminator(DiscriminatorOptions):
    """Dense layers with weight normalisation, ReLU, and Gaussian noise before each, for pixels in 0 … 1: MNIST.

    Gains learn in the last layer alone. `input_noise` and `hidden_noise` are standard deviations.
    """

    kind: Literal["salimans_mlp"]
    widths: Annotated[tuple[Width, ...], Field(strict=False, min_length=1, max_length=64)] = (1000, 500, 250, 250, 250)
    input_noise: Deviation = 0.3
    hidden_noise: Deviation = 0.5
    axes: ClassVar[tuple[int, ...]] = (2, 3)

    def trunk(self, shape: Shape) -> tuple[nn.Module, int]:
        blocks: list[nn.Module] = [Fold(unit_range=True)]
        for place, (inputs, outputs) in enumerate(zip([prod(shape), *self.widths], self.widths, strict=False)):
            linear = nn.Linear(inputs, outputs, bias=False)
            noise = self.hidden_noise if place else self.input_noise
            normed = Normed(linear, deviation=0.1, learns_gain=False)
            blocks.append(nn.Sequential(*_noise(noise), normed, nn.ReLU(inplace=True)))
        return nn.Sequential(*blocks), self.widths[-1]

    def faults(self, shape: Shape) -> Iterator[str]:
        yield from [*super().faults(shape), *_no_spectral_norm(self)]

    def outputs(self, features: int, count: int) -> nn.Module:
        last = nn.Linear(features, count, bias=False)
        return nn.Sequential(*_noise(self.hidden_noise), Normed(last, deviation=0.1, learns_gain=True))

    @property
    def start_samples(self) -> int:
        return START


class ConvGenerator(GeneratorOptions):
    """A dense layer and transposed convolutions 5×5 with stride 2, batch norm without gain, ReLU, tanh: CIFAR-10 and SVHN.

    `norm: virtual` is virtual batch normalisation, by a batch of noise that is drawn once.
    """

    kind: Literal["salimans_conv"]
    width: Annotated[int, Field(ge=4, le=8192)] = 512  # channels of 4×4 pixels; halved with each doubling of the size
    norm: Norm = "batch"
    reference: Annotated[int, Field(ge=2, le=MAX_REFERENCE)] = 100  # rows of the batch of virtual batch norm
    smallest: ClassVar[int] = 8

    @model_validator(mode="after")
    def _width_halves(self) -> ConvGenerator:
        if self.width % 4:
            raise ValueError(f"`width` {self.width} is halved twice; use a multiple of 4")
        if self.norm == "batch" and self.reference != 100:
            raise ValueError("`reference` has no effect on `norm: batch`; leave it out")
        return self

    @property
    def sees_batch(self) -> str | None:
        return "norm: batch" if self.norm == "batch" else None

    @property
    def starts(self) -> bool:
        return True

    def build(self, noise: int, shape: Shape, classes: int | None = None) -> nn.Module:
        built = super().build(noise, shape, classes)
        if self.norm == "batch":
            return built
        labels = torch.arange(self.reference) % classes if classes is not None else None
        return WithReference(built, torch.zeros(self.reference, noise), labels)  # `start` draws it

    def module(self, noise: int, shape: Shape) -> nn.Module:
        height, width = divided(shape[1], 8), divided(shape[2], 8)
        first = nn.Linear(noise, self.width * height * width, bias=False)
        nn.init.normal_(first.weight, 0.0, 0.05)
        layers: list[nn.Module] = [
            first,
            self._normed(self.width * height * width),
            nn.ReLU(),
            Rearrange("b (c h w) -> b c h w", h=height, w=width),
        ]
        channels = self.width
        for _ in range(2):
            up = ConvTranspose2d(channels, channels // 2, 5, 2, 2, output_padding=1, bias=False)
            nn.init.normal_(up.weight, 0.0, 0.05)
            layers += [up, self._normed(channels // 2), nn.ReLU()]
            channels //= 2
        last = ConvTranspose2d(channels, shape[0], 5, 2, 2, output_padding=1, bias=False)
        layers += [
            Normed(last, deviation=0.05, learns_gain=True, starts_at=0.1),
            Squash(),
            Crop(shape[1], shape[2]),
        ]
        return nn.Sequential(*layers)

    def _normed(self, channels: int) -> nn.Module:
        return BatchNorm(channels) if self.norm == "batch" else VirtualBatchNorm(channels)

    def start(self, module: nn.Module, samples: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """By noise: the reference batch is its last rows, and the last layer begins with a deviation of 0.1 before its tanh."""
        if isinstance(module, WithReference):
            module.noise.copy_(inputs[0][-self.reference :])
        kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
        start_by(module, *(part[:START] for part in inputs))
        for name, buffer in module.named_buffers():
            buffer.copy_(kept[name])


class ConvDiscriminator(DiscriminatorOptions):
    """Nine convolutions with weight normalisation and leaky ReLU, dropout between them, and a global mean: CIFAR-10 (SVHN: `width: 64`).

    With `input_noise` there is Gaussian noise of that deviation instead of `input_dropout`. Gains learn in the last layer alone.
    """

    kind: Literal["salimans_conv"]
    width: Annotated[int, Field(ge=1, le=4096)] = 96  # channels of the first three; the others have twice as many
    input_dropout: Rate = 0.2
    input_noise: Deviation = 0.0
    hidden_dropout: Rate = 0.5
    smallest: ClassVar[int] = 12

    @model_validator(mode="after")
    def _spoils_once(self) -> ConvDiscriminator:
        if self.input_noise and self.input_dropout:
            raise ValueError("`input_noise` stands in the place of `input_dropout`; set that to 0.0")
        return self

    def trunk(self, shape: Shape) -> tuple[nn.Module, int]:
        def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, pad: int = 0) -> nn.Module:
            conv = Conv2d(inputs, outputs, kernel, stride, pad, bias=False)
            return nn.Sequential(Normed(conv, deviation=0.05, learns_gain=False), nn.LeakyReLU(0.2, inplace=True))

        one, two = self.width, 2 * self.width
        blocks = [
            *(_noise(self.input_noise) if self.input_noise else _dropout(self.input_dropout)),
            layer(shape[0], one, 3, 1, 1), layer(one, one, 3, 1, 1), layer(one, one, 3, 2, 1), *_dropout(self.hidden_dropout),
            layer(one, two, 3, 1, 1), layer(two, two, 3, 1, 1), layer(two, two, 3, 2, 1), *_dropout(self.hidden_dropout),
            layer(two, two, 3), layer(two, two, 1), layer(two, two, 1), Reduce("b c h w -> b c", "mean"),
        ]  # fmt: skip
        return nn.Sequential(*blocks), two

    def faults(self, shape: Shape) -> Iterator[str]:
        yield from [*super().faults(shape), *_no_spectral_norm(self)]

    def outputs(self, features: int, count: int) -> nn.Module:
        last = nn.Linear(features, count, bias=False)
        return Normed(last, deviation=0.05, learns_gain=True, starts_at=0.1)

    @property
    def start_samples(self) -> int:
        return START


def _no_spectral_norm(options: DiscriminatorOptions) -> Iterator[str]:
    if options.spectral_norm:
        yield f"`spectral_norm` has no effect on `{options.kind}`, whose weights have the length of their gains; leave it out"


def _noise(deviation: float) -> list[nn.Module]:
    return [HiddenNoise(deviation)] if deviation else []


def _dropout(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate else []
