"""The adversaries of Luc et al. 2016: two branches for the Stanford Background dataset (figure 1), four fields of view for PASCAL VOC."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from einops.layers.torch import Reduce
from torch import Tensor, nn

from gandist.losses import at_least_fp32
from gandist.networks.segmentation import AdversaryOptions

Output = Literal["mean", "places"]
Layer = tuple[int, int] | Literal["pool"]  # the kernel and the channels of a convolution, or maxima of 2×2


def receptive_field(module: nn.Module) -> int:
    """Pixels, in each direction, that one place of the output of a chain of convolutions and pools depends on."""
    field = step = 1
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            kernel, stride, dilation = (
                value if isinstance(value, int) else int(value[0])
                for value in (layer.kernel_size, layer.stride, layer.dilation)
            )
            field += (kernel - 1) * dilation * step
            step *= stride
    return field


class _AtLeastFp32(nn.Module):
    """A mean of logits is no more exact than they are summed."""

    def forward(self, values: Tensor) -> Tensor:
        return at_least_fp32(values)


def _judged(output: Output) -> list[nn.Module]:
    """Logits (B, 1, h', w') to (B,), or to (B, h', w') as they are."""
    pattern = "b 1 h w -> b" if output == "mean" else "b 1 h w -> b h w"
    return [_AtLeastFp32(), Reduce(pattern, "mean")]


def _chain(inputs: int, layers: list[Layer]) -> nn.Sequential:
    """Convolutions that keep the size, with ReLU after each but a last one of one channel."""
    parts: list[nn.Module] = []
    for layer in layers:
        if layer == "pool":
            parts.append(nn.MaxPool2d(2))
        else:
            kernel, outputs = layer
            parts += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)]
            parts += [nn.ReLU()] if outputs > 1 else []
            inputs = outputs
    return nn.Sequential(*parts)


def _initialise(module: nn.Module) -> None:
    """He et al. 2015, equation 10, with zero biases: torch's own would leave 1/500 of a logit after seven layers of ReLU."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class _TwoBranch(nn.Module):
    """Label maps (B, maps, h, w) and images (B, C, h, w) to logits (B,)."""

    def __init__(self, maps: int, channels: int) -> None:
        super().__init__()
        self.labels = _chain(maps, [(5, 64)])
        self.image = _chain(channels, [(5, 16), (5, 64)])
        layers: list[Layer] = [(3, 128), "pool", (3, 256), "pool", (3, 512), (3, 1)]
        self.judge = nn.Sequential(_chain(128, layers), *_judged("mean"))

    def forward(self, labels: Tensor, images: Tensor) -> Tensor:
        logits: Tensor = self.judge(torch.cat([self.labels(labels), self.image(images)], dim=1))
        return logits


class TwoBranch(AdversaryOptions):
    """Image and label map, each by convolutions of its own, then both together: figure 1; the mean logit of all places.

    The two outputs of the paper are one here, since a softmax over two logits is the sigmoid of their difference.
    """

    kind: Literal["two_branch"]

    @property
    def reads_image(self) -> bool:
        return True

    @property
    def smallest(self) -> int:
        return 4  # two pools

    def build(self, maps: int, channels: int) -> nn.Module:
        return _TwoBranch(maps, channels).apply(_initialise)


class FieldOfView(AdversaryOptions):
    """Convolutions over the label map alone, with ReLU and two pools; `light` has about a third of the weights.

    `output` is the mean logit of all places, or each place's own.
    """

    light: bool = False
    output: Output = "mean"

    @property
    def smallest(self) -> int:
        return 4  # two pools

    def places(self, side: int, count: int) -> tuple[float, float]:
        return 1.5, 4.0

    @abstractmethod
    def layers(self) -> list[Layer]:
        """From the label map to one logit a place."""

    def build(self, maps: int, channels: int) -> nn.Module:
        return nn.Sequential(_chain(maps, self.layers()), *_judged(self.output)).apply(_initialise)


class LargeFov(FieldOfView):
    """Each place sees 34×34 pixels of the label map."""

    kind: Literal["large_fov"]

    def layers(self) -> list[Layer]:
        middle, last = (128, 256) if self.light else (256, 512)
        return [(3, 96), (3, 128), (3, 128), "pool", (3, middle), (3, middle), "pool", (3, last), (3, 1)]


class SmallFov(FieldOfView):
    """Each place sees 18×18 pixels of the label map."""

    kind: Literal["small_fov"]

    def layers(self) -> list[Layer]:
        middle, last = (128, 256) if self.light else (256, 512)
        return [(3, 96), (1, 128), "pool", (3, middle), (1, middle), "pool", (3, last), (1, 1)]
