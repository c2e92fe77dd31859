"""What a segmenter and its adversary are: options that build modules, by the names that installed packages give them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch.nn.functional as F
from pydantic import SerializeAsAny, WrapValidator
from torch import Tensor, nn

from gandist.recipe import Choice, Section, installed
from gandist.tensors import unpacked
from gandist.weights import Digest, File, verified


class Fitted(nn.Module):
    """Images (B, C, H, W) of any size to logits (B, K, ⌈H/stride⌉, ⌈W/stride⌉), of a network whose sides are multiples of `multiple`.

    What is missing at the right and at the bottom repeats the border.
    """

    def __init__(self, network: nn.Module, multiple: int, stride: int) -> None:
        super().__init__()
        assert multiple % stride == 0, (multiple, stride)
        self.network, self.multiple, self.stride = network, multiple, stride

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        missing = -width % self.multiple, -height % self.multiple
        whole = F.pad(images, (0, missing[0], 0, missing[1]), mode="replicate") if any(missing) else images
        logits: Tensor = self.network(whole)
        return logits[:, :, : -(-height // self.stride), : -(-width // self.stride)]


class PretrainedOptions(Section):
    """Weights to start from: a safetensors file with the names of the network, known by its SHA-256."""

    path: File
    sha256: Digest

    def read(self) -> dict[str, Tensor]:
        """Its tensors; raises InputError for another file than the digest names, Failure for one that is damaged."""
        return unpacked(verified(Path(self.path), self.sha256), Path(self.path))


class SegmenterOptions(Section):
    """A segmenter: images (B, C, H, W) in −1 … 1 to class logits (B, K, ⌈H/stride⌉, ⌈W/stride⌉)."""

    kind: str

    @property
    def stride(self) -> int:
        """Pixels of the image, in each direction, for one place of the logits."""
        return 1

    @property
    def multiple(self) -> int:
        """What the sides of an image must be multiples of for `module`."""
        return self.stride

    def build(self, channels: int, classes: int) -> nn.Module:
        """The module with its initial weights, drawn from torch's global generator; it takes images of any size."""
        return Fitted(self.module(channels, classes), self.multiple, self.stride)

    @abstractmethod
    def module(self, channels: int, classes: int) -> nn.Module:
        """Images (B, channels, H, W), sides multiples of `multiple`, to logits (B, classes, H/stride, W/stride)."""

    @property
    def pretrained(self) -> PretrainedOptions | None:
        """Weights of a file to start from."""
        return None

    def start(self, module: nn.Module) -> None:
        """Fills what `build` gave with the weights of `pretrained`; raises InputError or Failure."""

    def faults(self, channels: int, height: int, width: int) -> Iterator[str]:
        """Why it cannot be built, or cannot learn from images of this size."""
        yield from ()


class AdversaryOptions(Section):
    """An adversary: label maps (B, maps, h, w) and, where it reads them, images (B, C, h, w), to logits (B,), or (B, h', w') of places."""

    kind: str

    @property
    def reads_image(self) -> bool:
        """Whether the module takes the image beside the label map."""
        return False

    @abstractmethod
    def build(self, maps: int, channels: int) -> nn.Module:
        """The module with its initial weights, drawn from torch's global generator; `channels` are those of the image."""

    @property
    def smallest(self) -> int:
        """Of the sides of a label map."""
        return 1

    def places(self, side: int, count: int) -> tuple[float, float]:
        """Where the middle of the first of `count` places lies that judge a label map `side` long, and how far apart they are, in its pixels
        from the middle of its first one; they divide it evenly unless a network says otherwise.
        """
        step = side / count
        return (step - 1) / 2, step


def _choice(role: str, base: type[Section]) -> Choice:
    return Choice(f"a network of this role ({role})", partial(installed, "gandist.networks", f"{role}.", base))


AnySegmenter = Annotated[SerializeAsAny[SegmenterOptions], WrapValidator(_choice("segmenter", SegmenterOptions))]
AnyAdversary = Annotated[SerializeAsAny[AdversaryOptions], WrapValidator(_choice("adversary", AdversaryOptions))]
