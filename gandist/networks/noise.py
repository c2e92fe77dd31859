"""The noise that a generator makes samples of, as a function of seed and number: so they are the same for any number of processes."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from gandist.recipe import Section
from gandist.seeding import derive

BLOCK = 64  # samples that are made at once, whoever makes them
SPREAD = math.sqrt(3)  # uniform noise within ±√3 has variance 1
Width = Annotated[int, Field(ge=1, le=65536)]
Distribution = Literal["normal", "uniform"]


class Noise(Section):
    """Rows of `width` numbers of variance 1."""

    width: Width
    distribution: Distribution

    def block(self, number: int, seed: int, device: torch.device, truncation: float | None = None) -> Tensor:
        """The noise (BLOCK, width) of samples `number` · BLOCK and on; with `truncation` none of it is larger than that."""
        source = torch.Generator(device).manual_seed(derive(seed, "samples", number * BLOCK))
        if self.distribution == "uniform":
            return (2 * torch.rand(BLOCK, self.width, generator=source, device=device) - 1) * SPREAD
        if truncation is None:
            return torch.randn(BLOCK, self.width, generator=source, device=device)
        # By the inverse of the normal distribution: one draw a number, whatever the truncation.
        edge = torch.special.ndtr(torch.tensor(truncation, dtype=torch.float64)).item()
        drawn = torch.rand(BLOCK, self.width, generator=source, device=device, dtype=torch.float64)
        noise: Tensor = torch.special.ndtri(1 - edge + drawn * (2 * edge - 1)).float()
        return noise
