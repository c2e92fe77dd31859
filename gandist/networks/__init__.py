"""Networks: one family a file. A family's options are a section of the recipe and build the module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from gandist.data.dataset import ImageSpec
from gandist.recipe import Section


class GeneratorOptions(Section):
    """A generator: (B, noise) in N(0, 1) to (B, C, H, W) in −1 … 1."""

    kind: str
    smallest: ClassVar[int] = 1  # pixels of a side

    @abstractmethod
    def build(self, noise: int, image: ImageSpec) -> nn.Module:
        """The module with its initial weights, drawn from torch's global generator."""

    def faults(self, image: ImageSpec) -> Iterator[str]:
        """Why it cannot make such images."""
        yield from _too_small(self.kind, self.smallest, image)


class DiscriminatorOptions(Section):
    """A discriminator: (B, C, H, W) in −1 … 1 to logits (B,), positive for real."""

    kind: str
    smallest: ClassVar[int] = 1

    @abstractmethod
    def build(self, image: ImageSpec) -> nn.Module:
        """The module with its initial weights, drawn from torch's global generator."""

    def faults(self, image: ImageSpec) -> Iterator[str]:
        """Why it cannot judge such images."""
        yield from _too_small(self.kind, self.smallest, image)


def _too_small(kind: str, smallest: int, image: ImageSpec) -> Iterator[str]:
    if image.height is not None and image.width is not None and min(image.height, image.width) < smallest:
        yield (
            f"`{kind}` needs images of {smallest} pixels a side or more, and the dataset has "
            f"{image.width}×{image.height}; use `mlp`, or pack with --size"
        )
