"""Distances between the rows of two matrices, so many at a time that all of them never lie in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 23  # distances held at a time: 64 MiB of float64
TWINS = 1e-12  # of ‖x‖² + ‖y‖²: what is nearer is equal to all the digits of a float32, and its distance is 0


def exact(rows: Tensor) -> Tensor:
    """(N, F) as float64, on the CPU where the device has none (mps)."""
    return (rows.cpu() if rows.device.type == "mps" else rows).detach().double()


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of `rows` whose distances to `columns` others fit into memory."""
    step = max(1, CHUNK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def squared(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² of float64 (N, F) and (M, F) as (N, M), by one matrix product; equal rows are at 0, whatever the rounding."""
    # vector_norm, since x.square() would be a second copy of the features
    norms = torch.linalg.vector_norm(x, dim=1).square()[:, None] + torch.linalg.vector_norm(y, dim=1).square()
    distances = torch.addmm(norms, x, y.T, alpha=-2)
    return distances.masked_fill_(distances <= TWINS * norms, 0.0)
