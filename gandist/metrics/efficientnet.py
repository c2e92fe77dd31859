"""EfficientNet-lite0 (Tan and Le 2019, table 1, without squeeze and excitation, with ReLU6): features without a download."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE = 224
# of each stage: kernel, stride of its first block, expansion, channels, blocks
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class _Conv(nn.Conv2d):
    """A convolution without a bias, padded as TensorFlow's SAME: the odd pixel lies right and below, where torch has none."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0  # without a stride both are one, and a padded copy is saved
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        if stride > 1:
            pads = [max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in images.shape[:1:-1]]  # W, H
            images = F.pad(images, [part for pad in pads for part in (pad // 2, pad - pad // 2)])
        return super().forward(images)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Expansion, a depthwise convolution and a linear projection, with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self.expand_conv, self.bn0 = _Conv(inputs, inner, 1), _norm(inner)
        self.depthwise_conv, self.bn1 = _Conv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self.project_conv, self.bn2 = _Conv(inner, outputs, 1), _norm(outputs)
        pairs = (("expand_conv", "bn0"), ("depthwise_conv", "bn1"), ("project_conv", "bn2"))
        self.pairs = pairs if self.expands else pairs[1:]

    def forward(self, images: Tensor) -> Tensor:
        inner = F.relu6(self.bn0(self.expand_conv(images))) if self.expands else images
        inner = F.relu6(self.bn1(self.depthwise_conv(inner)))
        made: Tensor = self.bn2(self.project_conv(inner))
        return images + made if self.adds else made


class EfficientNetLite0(nn.Module):
    """Images (B, 3, 224, 224), as (0 … 255 − 127) / 128, to pooled features (B, 1280) and logits (B, 1000) of ImageNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = _Conv(3, 32, 3, 2), _norm(32)
        blocks, inputs = [], 32
        for kernel, stride, expansion, channels, count in STAGES:
            for number in range(count):
                blocks.append(_Block(inputs, channels, kernel, 1 if number else stride, expansion))
                inputs = channels
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = _Conv(inputs, 1280, 1), _norm(1280)
        self.fc = nn.Linear(1280, 1000)
        self.pairs = (("conv_stem", "bn0"), ("conv_head", "bn1"))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        images = F.relu6(self.bn0(self.conv_stem(images)))
        for block in self.blocks:
            images = block(images)
        pool = F.relu6(self.bn1(self.conv_head(images))).mean((2, 3))
        return pool, self.fc(pool)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes the weights of `efficientnet-lite0-57934424.pth`, whose names begin each part with an underscore.

        Each normalisation goes into the convolution before it, which saves a third of the time; from here on it is for use alone.
        """
        self.load_state_dict({re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in weights.items()})
        self.eval()
        for part in [self, *self.blocks]:
            for conv, norm in part.pairs:
                setattr(part, conv, fuse_conv_bn_eval(getattr(part, conv), getattr(part, norm)))
                setattr(part, norm, nn.Identity())
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
