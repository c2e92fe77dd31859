"""Residual networks for images of 16 pixels a side or more: SNGAN (Miyato et al. 2018), with self-attention SAGAN (Zhang et al. 2019).

`width` 64 gives the published channels: for 32 pixels those of SNGAN's table 4, for 128 those of its table 5; `init: orthogonal` is
BigGAN's (Brock et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import sqrt
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from pydantic import Field
from torch import Tensor, nn

from gandist.networks import DiscriminatorOptions, GeneratorOptions, Shape, amount
from gandist.networks.blocks import Block
from gandist.networks.convolution import Conv2d
from gandist.networks.heads import normalise_spectra
from gandist.networks.resampling import Crop, divided, double, halve, halvings

Width = Annotated[int, Field(ge=1, le=1024)]
Init = Literal["xavier", "orthogonal"]
Attention = Annotated[int, Field(ge=2, le=128)]  # at 128 one sample has a GiB of weights already


class ClassNorm(nn.Module):
    """Batch norm, with a gain and a bias for each class where there are classes (Dumoulin et al. 2017)."""

    def __init__(self, channels: int, classes: int | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=classes is None)
        if classes is not None:  # not nn.Embedding, which a spectral norm would scale down to almost nothing
            self.gain = nn.Parameter(torch.ones(classes, channels))
            self.bias = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, features: Tensor, labels: Tensor | None) -> Tensor:
        assert (labels is None) == self.norm.affine
        normed: Tensor = self.norm(features)
        if labels is None:
            return normed
        gain, bias = (F.embedding(labels, rows).to(normed.dtype) for rows in (self.gain, self.bias))
        return torch.addcmul(bias[:, :, None, None], normed, gain[:, :, None, None])


class SharedNorm(nn.Module):
    """Batch norm whose gain and bias are linear functions of a condition (B, inputs), near 1 and 0 at first (Brock et al. 2019, BigGAN)."""

    def __init__(self, channels: int, inputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.bias = (nn.Linear(inputs, channels, bias=False) for _ in range(2))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        gain, bias = (to(condition)[:, :, None, None] for to in (self.gain, self.bias))
        return torch.addcmul(bias, self.norm(features).to(bias.dtype), 1 + gain)


class SelfAttention(nn.Module):
    """x + γ v(Σᵢ softmaxᵢ(⟨f(xᵢ), g(xⱼ)⟩) h(xᵢ)), with γ = 0 at first (Zhang et al. 2019, equations 1 to 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.f, self.g, self.h = (nn.Conv2d(channels, inner, 1, bias=False) for _ in range(3))
        self.v = nn.Conv2d(inner, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        keys, queries, values = (rearrange(to(features), "b c h w -> b (h w) c") for to in (self.f, self.g, self.h))
        weights = torch.softmax(queries @ keys.mT, dim=2)  # (B, H W of the query, H W of the key)
        attended = rearrange(weights @ values, "b (h w) c -> b c h w", h=features.shape[2])
        seen: Tensor = self.v(attended)
        return features + self.gamma * seen


class _Up(Block):
    """(B, C, H, W) to (B, C', 2H, 2W); no bias, since a batch norm follows that takes away what is constant."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module], attention: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.skip = Conv2d(inputs, outputs, 1, bias=False)
        self.attention = SelfAttention(outputs) if attention else nn.Identity()

    def forward(self, features: Tensor, condition: Tensor | None) -> Tensor:
        branch = self.conv1(double(F.relu(self.norm1(features, condition))))
        branch = self.conv2(F.relu(self.norm2(branch, condition)))
        # The 1×1 convolution before the doubling is the same function for a quarter of the arithmetic.
        made: Tensor = self.attention(double(self.skip(features)) + branch)
        return made


class _Down(Block):
    """(B, C, H, W) to (B, C', ⌈H/2⌉, ⌈W/2⌉), or to the same size; the first of a network takes the image as it is."""

    def __init__(self, inputs: int, outputs: int, *, first: bool, halving: bool, attention: bool) -> None:
        super().__init__()
        hidden = outputs if first else inputs
        self.first, self.halving = first, halving
        self.conv1 = Conv2d(inputs, hidden, 3, padding=1)
        self.conv2 = Conv2d(hidden, outputs, 3, padding=1)
        self.skip = Conv2d(inputs, outputs, 1) if halving or inputs != outputs else nn.Identity()
        self.attention = SelfAttention(outputs) if attention else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        branch = self.conv1(features if self.first else F.relu(features))
        branch = self.conv2(F.relu(branch))
        if self.halving:  # for the skip before its 1×1 convolution: the same function for a quarter of the arithmetic
            features, branch = halve(features), halve(branch)
        judged: Tensor = self.attention(self.skip(features) + branch)
        return judged


class _Generator(nn.Module):
    """Noise (B, noise) and, where there are classes, labels (B,), to images (B, C, H, W) in −1 … 1."""

    def __init__(self, options: Generator, noise: int, shape: Shape, classes: int | None) -> None:
        super().__init__()
        stages = halvings(shape)
        height, width = (divided(side, 2**stages) for side in shape[1:])
        channels = [4 * options.width] * (stages + 1)
        if min(shape[1:]) > 32:
            channels = [options.width * min(16, 2 ** (stages - stage)) for stage in range(stages + 1)]
        # BigGAN's way hands each block a part of the noise beside the class, and the first layer what is left.
        shared = options.class_embedding if classes is not None else None
        self.parts = [noise]
        if shared is not None and classes is not None:
            self.parts = [len(part) for part in torch.arange(noise).tensor_split(stages + 1)]
            self.embedding = nn.Embedding(classes, shared)
        self.first = nn.Sequential(
            nn.Linear(self.parts[0], channels[0] * height * width), Rearrange("b (c h w) -> b c h w", h=height, w=width)
        )
        attentive = [size == options.attention for size in options.maps(shape)]
        self.blocks = nn.ModuleList(
            _Up(
                inputs,
                outputs,
                partial(ClassNorm, classes=classes) if shared is None else partial(SharedNorm, inputs=shared + part),
                attention,
            )
            for inputs, outputs, attention, part in zip(
                channels, channels[1:], attentive, self.parts[1:] or [0] * stages, strict=False
            )
        )
        self.norm = nn.BatchNorm2d(channels[-1])
        self.last = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels[-1], shape[0], 3, padding=1), Crop(*shape[1:]), nn.Tanh()
        )

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        first, *others = torch.split(noise, self.parts, dim=1)
        features = self.first(first)
        for number, block in enumerate(self.blocks):
            condition = labels
            if others:
                assert labels is not None
                condition = torch.cat([self.embedding(labels), others[number]], dim=1)
            features = block(features, condition)
        made: Tensor = self.last(self.norm(features))
        return made


def _initialise(module: nn.Module, init: Init) -> None:
    """Zero biases and Xavier weights, √2 times as large in residual branches (as SNGAN was released), or orthogonal ones."""
    blocks = [block for block in module.modules() if isinstance(block, _Up | _Down)]
    branches = {id(layer) for block in blocks for layer in (block.conv1, block.conv2)}
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
            if init == "orthogonal":
                nn.init.orthogonal_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight, gain=sqrt(2) if id(layer) in branches else 1.0)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _attention_faults(options: Generator | Discriminator, shape: Shape) -> Iterator[str]:
    maps = options.maps(shape)
    if options.attention is not None and options.attention not in maps:
        yield (
            f"`attention` {options.attention}: for {amount(shape)} there are maps of {', '.join(map(str, maps))} pixels; "
            "use one of these, or leave it out"
        )


class Generator(GeneratorOptions):
    """Residual blocks that double the size, with batch norm, of the class where there are classes; tanh at the end.

    The norms have a gain and a bias of each class, or with `class_embedding` linear functions of one embedding of so many numbers and of
    a part of the noise for each block (BigGAN).

    Up to 32 pixels (the smaller side) all maps have 4·`width` channels; beyond, they double from `width` at each halving, to at
    most 16·`width`.
    """

    kind: Literal["resnet"]
    width: Width = 64
    attention: Attention | None = None  # pixels of the smaller side of the map that gets self-attention
    init: Init = "xavier"
    spectral_norm: bool = False
    class_embedding: Annotated[int, Field(ge=1, le=4096)] | None = None
    smallest: ClassVar[int] = 16

    @property
    def sees_batch(self) -> str | None:
        return "kind: resnet"  # batch norm, always

    def build(self, noise: int, shape: Shape, classes: int | None = None) -> nn.Module:
        generator = _Generator(self, noise, shape, classes)
        _initialise(generator, self.init)
        if self.spectral_norm:
            normalise_spectra(generator)
        return generator

    def module(self, noise: int, shape: Shape) -> nn.Module:
        return self.build(noise, shape)

    def maps(self, shape: Shape) -> list[int]:
        """The smaller side of what each block makes."""
        stages = halvings(shape)
        return [divided(min(shape[1:]), 2**stages) * 2**stage for stage in range(1, stages + 1)]

    def faults(self, shape: Shape) -> Iterator[str]:
        yield from [*super().faults(shape)] or _attention_faults(self, shape)


class Discriminator(DiscriminatorOptions):
    """Residual blocks that halve the size by means, ReLU, and sums over the pixels.

    Up to 32 pixels (the smaller side) there are two such blocks and two that keep the size, all of 2·`width` channels; beyond, the
    first has `width` and each further one twice as many, to at most 16·`width`, and the last keeps the size.
    """

    kind: Literal["resnet"]
    spectral_norm: bool = True
    width: Width = 64
    attention: Attention | None = None  # pixels of the smaller side of the map that gets self-attention
    init: Init = "xavier"
    smallest: ClassVar[int] = 16

    def trunk(self, shape: Shape) -> tuple[nn.Module, int]:
        maps = self.maps(shape)
        channels = [2 * self.width] * 4
        if min(shape[1:]) > 32:
            channels = [self.width * min(16, 2**stage) for stage in range(len(maps) + 1)]
        blocks = [
            _Down(
                inputs,
                outputs,
                first=stage == 0,
                halving=stage < len(maps),
                attention=stage < len(maps) and maps[stage] == self.attention,
            )
            for stage, (inputs, outputs) in enumerate(zip([shape[0], *channels], channels, strict=False))
        ]
        trunk = nn.Sequential(*blocks, nn.ReLU(), Reduce("b c h w -> b c", "sum"))
        _initialise(trunk, self.init)
        return trunk, channels[-1]

    def initialise(self, head: nn.Module) -> None:
        _initialise(head, self.init)

    def maps(self, shape: Shape) -> list[int]:
        """The smaller side of what each block makes that halves it."""
        smaller = min(shape[1:])
        stages = 2 if smaller <= 32 else halvings(shape)
        return [divided(smaller, 2**stage) for stage in range(1, stages + 1)]

    def faults(self, shape: Shape) -> Iterator[str]:
        yield from [*super().faults(shape)] or _attention_faults(self, shape)
