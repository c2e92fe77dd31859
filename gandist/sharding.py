"""Sharding: a player too large for one device, its weights spread over all processes (FSDP2; Zhao et al. 2023)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from gandist.networks.blocks import blocks

_reduce_scatter: Callable[[Tensor, Tensor], Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# Heads squeeze their logits, and no loss writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


@dataclass(frozen=True)
class Sharding:
    """How weights are spread: `by_block` frees those of a block once it has been computed with, and gathers them again for its backward."""

    by_block: bool = True
    activation_checkpointing: bool = False


class Weights:
    """The weights of one module, all of them on this process."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.whole = module, True
        self.rows = dict(module.named_parameters())  # by name, what this process keeps of them

    def begin(self) -> None:
        """A turn begins."""

    def gather(self) -> None:
        """Every process has all weights, until `spread`; all call it together."""

    def spread(self) -> None:
        """Every process has its rows alone."""

    def require_gradients(self, required: bool) -> None:
        """Thaws or freezes."""
        for weight in self.rows.values():
            weight.requires_grad_(required)

    def reduce(self, now: bool) -> None:
        """Whether the coming backward hands out the gradients, or keeps them for a later one of the same turn."""

    def collect(self) -> None:
        """Gives each row its gradient."""

    def gradients(self) -> list[Tensor]:
        """Those of the rows that have one."""
        return [rows.grad for rows in self.rows.values() if rows.grad is not None]

    def norm(self) -> Tensor:
        """That of the gradients of all weights."""
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients())))
        return norm

    def total(self, of: Callable[[Iterable[str]], Tensor]) -> Tensor:
        """What `of` sums over the weights of these names, for all weights."""
        return of(self.rows)

    def complete(self, name: str, rows: Tensor) -> Tensor:
        """All rows of what has the shape of a weight; all call it together."""
        return rows

    def take(self, rows: Tensor, complete: Tensor) -> None:
        """Keeps its rows of what rank 0 has as a whole; all call it together."""
        share(complete)


def share(tensor: Tensor) -> None:
    """Gives every process what rank 0 has."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)


class Shards(Weights):
    """Each process keeps its share of the rows of the weights.

    Called, the module gathers what it computes with, block by block, and its backward hands each process the mean gradient of its rows.
    `gather` keeps the whole module on every process, until `spread`: processes may then call it unevenly, and what takes a gradient of a
    gradient finds the weights where they were.
    """

    def __init__(self, module: nn.Module, device: torch.device, sharding: Sharding) -> None:
        self.by_block = sharding.by_block
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.rank, self.ranks, self.device = dist.get_rank(), dist.get_world_size(), device
        scalars = {p for p in module.parameters() if p.ndim == 0}  # have no rows: each process keeps them
        for scalar in scalars:
            scalar.data = scalar.data.to(device)
        self._parts: list[FSDPModule] = []
        for part in [*blocks(module), module]:
            fully_shard(part, mesh=self.mesh, reshard_after_forward=self.by_block, ignored_params=scalars)
            assert isinstance(part, FSDPModule)
            self._parts.append(part)
        self._root = self._parts[-1]
        super().__init__(module)
        self.whole, self._weights = False, self.rows
        # What this process keeps, as plain tensors on the same memory: optimizers and averages need to know no more.
        self.rows = {name: nn.Parameter(_mine(w)) if isinstance(w, DTensor) else w for name, w in self._weights.items()}

    def begin(self) -> None:
        if not self.by_block:
            self.gather()

    def gather(self) -> None:
        if not self.whole:
            self._keep_whole(True)
            for part in self._parts:
                part.unshard()

    def spread(self) -> None:
        for part in self._parts:
            part.reshard()
        self._keep_whole(False)

    def _keep_whole(self, whole: bool) -> None:
        self.whole = whole
        self._root.set_reshard_after_forward(self.by_block and not whole)
        self._root.set_reshard_after_backward(not whole)
        self._root.set_requires_gradient_sync(not whole)

    def require_gradients(self, required: bool) -> None:
        self.spread()  # the next forward asks again whether they need gradients
        for weight in self._weights.values():
            weight.requires_grad_(required)

    def reduce(self, now: bool) -> None:
        self._root.set_requires_gradient_sync(now and not self.whole)

    def collect(self) -> None:
        for weight, rows in zip(self.module.parameters(), self.rows.values(), strict=True):
            gradient, weight.grad = weight.grad, None
            if isinstance(gradient, DTensor):
                rows.grad = _mine(gradient)
            elif gradient is not None and weight is rows:
                dist.all_reduce(gradient)
                rows.grad = gradient.div_(self.ranks)
            elif gradient is not None:
                rows.grad = self._rows_of_mean(gradient)[: len(rows)]

    def _rows_of_mean(self, gradient: Tensor) -> Tensor:
        """The rows of this process, and what they are padded with."""
        share = -(-len(gradient) // self.ranks)
        padded = gradient.new_zeros(share * self.ranks, *gradient.shape[1:])
        padded[: len(gradient)] = gradient
        mine = padded.new_empty(share, *gradient.shape[1:])
        _reduce_scatter(mine, padded)
        return mine.div_(self.ranks)

    def norm(self) -> Tensor:
        def squares(names: Iterable[str]) -> Tensor:
            here = [gradient for name in names if (gradient := self.rows[name].grad) is not None]
            return torch.stack([*torch._foreach_norm(here), torch.zeros((), device=self.device)]).square().sum()

        return self.total(squares).sqrt()

    def total(self, of: Callable[[Iterable[str]], Tensor]) -> Tensor:
        total = of(name for name, rows in self.rows.items() if rows.ndim or self.rank == 0)
        dist.all_reduce(total)
        return total

    def complete(self, name: str, rows: Tensor) -> Tensor:
        """On the CPU of rank 0, and without values elsewhere."""
        weight = self._weights[name]
        if not isinstance(weight, DTensor):
            return rows
        shape, stride = weight.shape, weight.stride()
        found = DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        full: Tensor = found.full_tensor()
        return full.cpu() if self.rank == 0 else full.to("meta")

    def take(self, rows: Tensor, complete: Tensor) -> None:
        if rows.ndim == 0:
            share(complete)
            return
        whole = complete.to(self.device) if self.rank == 0 else torch.empty_like(complete, device=self.device)
        share(whole)
        first = self.rank * -(-len(whole) // self.ranks)
        rows.copy_(whole[first : first + len(rows)])


@torch.no_grad()
def _mine(weight: DTensor) -> Tensor:
    rows: Tensor = weight.to_local()
    return rows


def whole(weight: Tensor) -> Tensor:
    """A weight of a module that is sharded, or not; all processes call it together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
