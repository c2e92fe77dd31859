"""A U-Net (Ronneberger et al. 2015) of residual blocks (He et al. 2016) with a view of the whole image, for learning from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gandist.networks.blocks import Block
from gandist.networks.resampling import DoubleSmoothly
from gandist.networks.segmentation import SegmenterOptions

Width = Annotated[int, Field(ge=1, le=1024)]
_doubled = DoubleSmoothly()


class _Block(Block):
    """x + f(x), f two 3×3 convolutions with batch norm; a training row leaves f out with probability `drop` (Huang et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, drop: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.norm2.weight)  # the block is the identity at first
        self.drop = drop
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            pooled = nn.AvgPool2d(stride) if stride != 1 else nn.Identity()
            self.skip = nn.Sequential(pooled, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(features)))))
        if self.training and self.drop:
            kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= self.drop
            branch = branch * (kept / (1 - self.drop)).to(branch.dtype)
        return F.relu(self.skip(features) + branch)


def _parts(side: int, parts: int, like: Tensor) -> Tensor:
    """(parts, side): the means over so many parts of a side, which overlap where it cannot be divided."""
    places = torch.arange(side, device=like.device)
    part = torch.arange(parts, device=like.device)[:, None]
    within = (places >= part * side // parts) & (places < -((part + 1) * -side // parts))
    return within.to(like.dtype) / within.sum(1, keepdim=True).to(like.dtype)


def _spread(parts: int, side: int, like: Tensor) -> Tensor:
    """(side, parts): bilinear interpolation from the middles of the parts."""
    eye = torch.eye(parts, dtype=torch.float32, device=like.device)[None]
    return F.interpolate(eye, side, mode="linear")[0].T.to(like.dtype)


class _Context(nn.Module):
    """Adds what the whole map holds on average, and what lies at 2, 3 and 6 parts a side of it (Zhao et al. 2017).

    As products of matrices: the backward of torch's own pooling and interpolation adds up in no fixed order on CUDA.
    """

    def __init__(self, channels: int, parts: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        super().__init__()
        inner = max(1, channels // len(parts))
        self.parts = parts
        self.views = nn.ModuleList(nn.Conv2d(channels, inner, 1) for _ in parts)
        self.mix = nn.Sequential(
            nn.Conv2d(channels + inner * len(parts), channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[2:]
        seen = []
        for view, parts in zip(self.views, self.parts, strict=True):
            pooled = _parts(height, parts, features) @ features @ _parts(width, parts, features).T
            found = F.relu(view(pooled))
            seen.append(_spread(parts, height, found) @ found @ _spread(parts, width, found).T)
        mixed: Tensor = self.mix(torch.cat([features, *seen], 1))
        return mixed


class _Unet(nn.Module):
    """Images (B, C, H, W) to logits (B, K, H/2, W/2)."""

    def __init__(self, options: Unet, channels: int, classes: int) -> None:
        super().__init__()
        widths = [options.width * factor for factor in (1, 2, 4, 8, 8)][: len(options.blocks)]
        total = sum(options.blocks)
        drops = iter([options.drop_path * block / max(1, total - 1) for block in range(total)])
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, options.blocks, strict=True)):
            blocks = []
            for block in range(count):
                blocks.append(_Block(inputs, width, 2 if stage and not block else 1, next(drops)))
                inputs = width
            self.stages.append(nn.Sequential(*blocks))
        self.context = _Context(widths[-1])
        self.laterals = nn.ModuleList(nn.Conv2d(width, options.decoder, 1) for width in widths)
        self.merges = nn.ModuleList(_Block(options.decoder, options.decoder, 1, 0.0) for _ in widths[1:])
        self.dropout = nn.Dropout2d(options.dropout)
        self.last = nn.Conv2d(options.decoder, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        features, levels = self.stem(images), []
        for stage in self.stages:
            features = stage(features)
            levels.append(features)
        levels[-1] = self.context(levels[-1])
        *sides, made = (lateral(level) for lateral, level in zip(self.laterals, levels, strict=True))
        for side, merge in zip(reversed(sides), self.merges, strict=True):
            made = merge(side + _doubled(made))
        logits: Tensor = self.last(self.dropout(made))
        return logits


class Unet(SegmenterOptions):
    """Down to a half, and with each further entry of `blocks` to half of that, so many residual blocks at each size; up again by
    bilinear doubling, adding what was there on the way down; logits at half the size of the image."""

    kind: Literal["unet"]
    width: Width = 48  # channels at half the size; 2, 4, 8 and 8 times as many below
    blocks: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(strict=False, min_length=2, max_length=5)] = (
        1, 2, 2, 2,
    )  # fmt: skip
    decoder: Width = 96  # channels on the way up
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of whole channels before the last layer
    drop_path: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # chance that a row leaves out the deepest block; less before it
    )

    @property
    def stride(self) -> int:
        return 2

    @property
    def multiple(self) -> int:
        return int(2 ** len(self.blocks))

    def module(self, channels: int, classes: int) -> nn.Module:
        return _Unet(self, channels, classes)

    def faults(self, channels: int, height: int, width: int) -> Iterator[str]:
        if min(height, width) < self.multiple:
            yield f"`unet` of {len(self.blocks)} sizes needs images of {self.multiple} pixels a side or more, and these have {width}×{height}"
