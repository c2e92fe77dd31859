"""Virtual batch normalisation (Salimans et al. 2016, section 3.5): each row by a fixed reference batch and itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VirtualBatchNorm(nn.Module):
    """Normalises (N + B, C) or (N + B, C, H, W), whose first N rows are the reference, each row by statistics of its own.

    A row has the weight 1 / (N + 1) beside the reference: mean (x̄ + N μ) / (N + 1), and the same of the squares, over the pixels
    of a channel; the deviation is √(1e-5 + E x² − mean²). The rows of the reference use theirs alone. Gains begin as N(1, 0.02²).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reference = 0  # rows; WithReference says how many
        self.gain = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, values: Tensor) -> Tensor:
        assert self.reference, "stands within WithReference"
        count, tail = self.reference, [1] * (values.ndim - 2)
        flat = values.flatten(2).float() if values.ndim > 2 else values.float()[:, :, None]  # (N + B, C, pixels)
        moments = torch.stack([flat.mean(2), flat.square().mean(2)])  # (2, N + B, C)
        of_reference = moments[:, :count].mean(1, keepdim=True)  # (2, 1, C)
        mixed = (moments[:, count:] + count * of_reference) / (count + 1)
        mean, square = torch.cat([of_reference.expand(-1, count, -1), mixed], dim=1)  # (N + B, C) each
        scale = self.gain * torch.rsqrt(1e-5 + square - mean.square())
        offset = self.shift - mean * scale
        normed: Tensor = values * scale.view(*scale.shape, *tail) + offset.view(*offset.shape, *tail)
        return normed


class WithReference(nn.Module):
    """A module of rows that sends a fixed batch ahead of each batch, for the virtual batch norm in it.

    The batch is noise (N, noise) and, where the module takes them, labels (N,).
    """

    noise: Tensor
    labels: Tensor
    keeps_buffers = True  # no turn changes them: there is nothing for ranks to agree on

    def __init__(self, module: nn.Module, noise: Tensor, labels: Tensor | None = None) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("noise", noise)
        if labels is not None:
            self.register_buffer("labels", labels)
        for layer in module.modules():
            if isinstance(layer, VirtualBatchNorm):
                layer.reference = len(noise)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        rows = [torch.cat([self.noise.to(noise.dtype), noise])]
        if labels is not None:
            rows.append(torch.cat([self.labels, labels]))
        made: Tensor = self.module(*rows)
        return made[len(self.noise) :]
