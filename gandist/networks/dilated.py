"""Dilated-8 (Yu and Koltun 2016): VGG-16 whose last pools are dilations, and a module that sees context at growing dilations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from gandist.losses import at_least_fp32
from gandist.networks.segmentation import Fitted, PretrainedOptions, SegmenterOptions
from gandist.tensors import fill

# ImageNet's, of RGB in 0 … 1.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Torchvision's numbers of the convolutions in `features` of its VGG-16, and of the two hidden layers in its `classifier`.
FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
CLASSIFIER = (0, 3)
WIDTH = 64  # of VGG-16


class Normalise(nn.Module):
    """Images (B, 3, H, W) in −1 … 1, less ImageNet's mean and over its deviation, in fp32 or more."""

    def forward(self, images: Tensor) -> Tensor:
        channels = at_least_fp32(images).unbind(1)
        return torch.stack(
            [
                (channel / 2 + (0.5 - mean)) / deviation
                for channel, mean, deviation in zip(channels, MEAN, DEVIATION, strict=True)
            ],
            dim=1,
        )


def _initialise(module: nn.Module) -> None:
    """He et al. 2015, equation 10, and zero biases."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _front(channels: int, classes: int, width: int) -> nn.Sequential:
    """The front end: section 4 of the paper; all of its convolutions but the last are VGG-16's, in its order."""
    layers: list[nn.Module] = []
    inputs = channels
    for stage, (factor, count) in enumerate(((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))):
        dilation = 2 if stage == 4 else 1  # for the fourth pool, which is left out
        for _ in range(count):
            layers += [nn.Conv2d(inputs, factor * width, 3, padding=dilation, dilation=dilation), nn.ReLU()]
            inputs = factor * width
        if stage < 3:
            layers.append(nn.MaxPool2d(2))
    hidden = 64 * width
    layers += [nn.Conv2d(inputs, hidden, 7, padding=12, dilation=4), nn.ReLU(), nn.Dropout(0.5)]
    layers += [nn.Conv2d(hidden, hidden, 1), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Conv2d(hidden, classes, 1)).apply(_initialise)


def _context(classes: int) -> nn.Sequential:
    """The basic context module: table 1 of the paper, which starts as the identity on what is not negative, its equation 4."""
    layers: list[nn.Module] = []
    for dilation in (1, 1, 2, 4, 8, 16, 1):
        layers += [nn.Conv2d(classes, classes, 3, padding=dilation, dilation=dilation), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Conv2d(classes, classes, 1))
    for layer in module:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return module


class _Dilated(nn.Module):
    """Images (B, C, H, W), sides multiples of 8, to logits (B, K, H/8, W/8)."""

    def __init__(self, options: Dilated8, channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = Normalise() if options.weights is not None else nn.Identity()
        self.front = _front(channels, classes, options.width)
        self.context = _context(classes) if options.context else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.context(self.front(self.normalise(images)))
        return logits

    def vgg(self) -> dict[str, Tensor]:
        """The weights that VGG-16 has, by torchvision's names."""
        names = [*(f"features.{number}" for number in FEATURES), *(f"classifier.{number}" for number in CLASSIFIER)]
        *layers, _ = (layer for layer in self.front if isinstance(layer, nn.Conv2d))
        return {
            f"{name}.{part}": parameter
            for name, layer in zip(names, layers, strict=True)
            for part, parameter in layer.named_parameters()
        }


class Dilated8(SegmenterOptions):
    """VGG-16 as a front end with an eighth of the image's resolution, and with `context` the basic context module after it.

    Edges are padded with zeros. `weights` are those of torchvision's VGG-16: all of its convolutions, and its two hidden linear layers
    as convolutions; images are then normalised as it wants them.
    """

    kind: Literal["dilated8"]
    width: Annotated[int, Field(ge=1, le=256)] = (
        WIDTH  # channels of the first convolution, to which all others are in proportion
    )
    context: bool = True
    weights: PretrainedOptions | None = None

    @property
    def stride(self) -> int:
        return 8

    def module(self, channels: int, classes: int) -> nn.Module:
        return _Dilated(self, channels, classes)

    @property
    def pretrained(self) -> PretrainedOptions | None:
        return self.weights

    def start(self, module: nn.Module) -> None:
        if self.weights is None:
            return
        assert isinstance(module, Fitted)
        assert isinstance(module.network, _Dilated)
        into, found = module.network.vgg(), self.weights.read()
        first, second = (f"classifier.{number}.weight" for number in CLASSIFIER)
        for name, side in ((first, 7), (second, 1)):
            if name in found and found[name].ndim == 2 and found[name].shape[1] % side**2 == 0:
                found[name] = rearrange(found[name], "o (i h w) -> o i h w", h=side, w=side)
        fill(into, {name: found[name] for name in into if name in found}, Path(self.weights.path))

    def faults(self, channels: int, height: int, width: int) -> Iterator[str]:
        if self.weights is not None and channels != len(MEAN):
            yield f"`weights` are for images of {len(MEAN)} channels, and the dataset's have {channels}; leave them out"
        if self.weights is not None and self.width != WIDTH:
            yield f"`weights` are for `width` {WIDTH}, not {self.width}; leave one of them out"
