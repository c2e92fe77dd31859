"""Fully connected networks, as in Goodfellow et al. 2014, for images of any size and signals of any length."""

from __future__ import annotations

from math import prod
from typing import Annotated, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from gandist.losses import at_least_fp32
from gandist.networks import DiscriminatorOptions, GeneratorOptions, Shape

Width = Annotated[int, Field(ge=1, le=65536)]
Depth = Annotated[int, Field(ge=1, le=64)]
Rate = Annotated[float, Field(ge=0, lt=1)]
HalfWidth = Annotated[float, Field(gt=0)]


class Maxout(nn.Module):
    """The largest of `pieces` linear functions (Goodfellow et al. 2013)."""

    def __init__(self, inputs: int, width: int, pieces: int) -> None:
        super().__init__()
        self.pieces, self.linear = pieces, nn.Linear(inputs, width * pieces)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = rearrange(self.linear(values), "b (p w) -> b p w", p=self.pieces).amax(1)
        return found


class Unfold(nn.Module):
    """(B, prod(shape)) to (B, *shape) in −1 … 1, or without bounds where the output is linear; in fp32 or more.

    Near −1, where dark pixels lie, bf16 knows multiples of 1/256 alone: with such samples the semi game on MNIST was lost to the
    discriminator in its second epoch (feature matching 20 to 78, and 2.7 with these lines in fp32; 2.3 all in fp32).
    """

    def __init__(self, shape: Shape, output: str) -> None:
        super().__init__()
        self.shape, self.output = shape, output

    def forward(self, values: Tensor) -> Tensor:
        values = at_least_fp32(values)
        if self.output == "sigmoid":
            values = 2 * values.sigmoid() - 1
        return (values.tanh() if self.output == "tanh" else values).reshape(-1, *self.shape)


class Fold(nn.Module):
    """(B, *shape) to (B, prod(shape)), from −1 … 1 to 0 … 1 where the network is one of pixels in that range."""

    def __init__(self, unit_range: bool) -> None:
        super().__init__()
        self.unit_range = unit_range

    def forward(self, sample: Tensor) -> Tensor:
        values = sample.flatten(1)
        return (values + 1) / 2 if self.unit_range else values


def _spread(module: nn.Module, half_width: float | None) -> None:
    """Uniform weights within ± `half_width` and zero biases, where torch's own are not wanted."""
    for layer in module.modules() if half_width is not None else ():
        if isinstance(layer, nn.Linear):
            assert half_width is not None
            nn.init.uniform_(layer.weight, -half_width, half_width)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Generator(GeneratorOptions):
    """Linear layers with ReLU; `output` is `tanh` for images and `linear` for signals unless given.

    `weights` are drawn within ± that number. `marginal_bias` starts at the mean pixels of the data (papers of 2014; the bias of
    the last layer is their logit), which needs `output: sigmoid`.
    """

    kind: Literal["mlp"]
    width: Width = 1200
    depth: Depth = 2
    output: Literal["tanh", "sigmoid", "linear"] | None = None
    weights: HalfWidth | None = None
    marginal_bias: bool = False
    axes: ClassVar[tuple[int, ...]] = (2, 3)

    def module(self, noise: int, shape: Shape) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs in [noise, *[self.width] * (self.depth - 1)]:
            layers += [nn.Linear(inputs, self.width), nn.ReLU()]
        output = self.output or ("tanh" if len(shape) == 3 else "linear")
        built = nn.Sequential(*layers, nn.Linear(self.width, prod(shape)), Unfold(shape, output))
        _spread(built, self.weights)
        return built

    @model_validator(mode="after")
    def _bias_is_a_logit(self) -> Generator:
        if self.marginal_bias and self.output != "sigmoid":
            raise ValueError(
                "`marginal_bias` is a logit, which only `output: sigmoid` takes back; set that, or leave it out"
            )
        return self

    @property
    def start_samples(self) -> int:
        return 10_000 if self.marginal_bias else 0

    def start(self, module: nn.Module, samples: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """Pixels of 0 or 1 alone get a bias within ± logit(1e-7)."""
        means = ((samples.double().mean(0).flatten() + 1) / 2).clamp(1e-7, 1 - 1e-7)
        last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
        with torch.no_grad():
            last.bias.copy_(torch.logit(means))


class Discriminator(DiscriminatorOptions):
    """Linear layers with leaky ReLU, or with maxout of `pieces`; `unit_range` hands on pixels in 0 … 1.

    Dropout keeps sums by scaling up what stays, and is on while the generator learns as well, as in Goodfellow et al. 2014.
    """

    kind: Literal["mlp"]
    width: Width = 512
    depth: Depth = 2
    pieces: Annotated[int, Field(ge=1, le=64)] = 1
    input_dropout: Rate = 0.0
    hidden_dropout: Rate = 0.0
    unit_range: bool = False
    weights: HalfWidth | None = None
    axes: ClassVar[tuple[int, ...]] = (2, 3)

    def trunk(self, shape: Shape) -> tuple[nn.Module, int]:
        layers: list[nn.Module] = [Fold(self.unit_range), *_dropout(self.input_dropout)]
        for inputs in [prod(shape), *[self.width] * (self.depth - 1)]:
            if self.pieces == 1:
                layers += [nn.Linear(inputs, self.width), nn.LeakyReLU(0.2)]
            else:
                layers.append(Maxout(inputs, self.width, self.pieces))
            layers += _dropout(self.hidden_dropout)
        built = nn.Sequential(*layers)
        _spread(built, self.weights)
        return built, self.width

    def initialise(self, head: nn.Module) -> None:
        _spread(head, self.weights)


def _dropout(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate else []
