"""Sharding: a player too large for one device, its weights spread over all processes (FSDP2; Zhao et al. 2023)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from gandist.networks.blocks import blocks


@dataclass(frozen=True)
class Sharding:
    """How weights are spread: `by_block` frees those of a block once it has been computed with, also in its player's own turn."""

    by_block: bool = True
    activation_checkpointing: bool = False


class Weights:
    """The weights of one module, all of them on this process."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.whole = module, True
        self.rows = dict(module.named_parameters())  # by name, what this process keeps of them

    def average(self, module: nn.Module) -> Weights:
        """Those of a module of the same kind, kept in the same way, as the weights are now."""
        return Weights(module)

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

    def full(self, name: str) -> Tensor:
        """All rows of a weight; all call it together."""
        return self.rows[name]

    def complete(self, name: str, rows: Tensor) -> Tensor:
        """All rows of what has the shape of a weight, to be written to a file, or read from one; all call it together."""
        return rows

    def take(self, rows: Tensor, complete: Tensor) -> None:
        """Keeps its rows of what rank 0 has as a whole; all call it together."""
        from_first(complete)


def from_first(tensor: Tensor) -> None:
    """Gives every process what rank 0 has."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)


class _Spread(Weights):
    """Each process keeps its share of the rows of the weights, as plain tensors: optimizers and averages need to know no more."""

    def __init__(self, module: nn.Module, device: torch.device, shapes: dict[str, torch.Size]) -> None:
        super().__init__(module)
        self.device, self.whole, self.shapes = device, False, shapes
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(device.type, (self.ranks,))

    def _share(self, count: int) -> int:
        """How many of so many rows each process has, but for the last ones."""
        return -(-count // self.ranks)

    def total(self, of: Callable[[Iterable[str]], Tensor]) -> Tensor:
        total = of(name for name, rows in self.rows.items() if rows.ndim or self.rank == 0)
        dist.all_reduce(total)
        return total

    def full(self, name: str) -> Tensor:
        return self._full(name, self.rows[name].detach())

    def _full(self, name: str, rows: Tensor) -> Tensor:
        shape = self.shapes[name]
        if not shape:
            return rows
        stride = torch.empty(shape, device="meta").stride()
        found = DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        full: Tensor = found.full_tensor()
        return full

    def complete(self, name: str, rows: Tensor) -> Tensor:
        """On the CPU of rank 0, and without values elsewhere."""
        full = self._full(name, rows)
        return full.cpu() if self.rank == 0 else full.to("meta")

    def take(self, rows: Tensor, complete: Tensor) -> None:
        full = complete.to(self.device) if self.rank == 0 else torch.empty_like(complete, device=self.device)
        from_first(full)
        first = self.rank * self._share(len(full))
        rows.copy_(full[first : first + len(rows)])


class Shards(_Spread):
    """The weights of a module that learns.

    Called, it gathers what it computes with, block by block, and its backward hands each process the mean gradient of its rows. Whole, it
    may be called unevenly, and what takes a gradient of a gradient finds the weights where they were; its gradients wait for `collect`.
    """

    def __init__(self, module: nn.Module, device: torch.device, sharding: Sharding) -> None:
        # Heads squeeze their logits, and no loss writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        super().__init__(module, device, {name: weight.shape for name, weight in module.named_parameters()})
        self.by_block = sharding.by_block
        scalars = {weight for weight in self.rows.values() if not weight.ndim}  # have no rows: each process keeps them
        for scalar in scalars:
            scalar.data = scalar.data.to(device)
        self._parts: list[FSDPModule] = []
        for part in [*blocks(module), module]:
            fully_shard(part, mesh=self.mesh, reshard_after_forward=True, ignored_params=scalars)
            assert isinstance(part, FSDPModule)
            self._parts.append(part)
        self._root = self._parts[-1]
        self._weights = dict(module.named_parameters())
        self.rows = {name: nn.Parameter(_mine(w)) if isinstance(w, DTensor) else w for name, w in self._weights.items()}

    def average(self, module: nn.Module) -> Weights:
        return _Averages(module, self)

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
        self._root.set_reshard_after_forward(not whole)
        self._root.set_reshard_after_backward(not whole)
        self._root.set_requires_gradient_sync(not whole)

    def require_gradients(self, required: bool) -> None:
        self.spread()  # the next forward asks again whether they need gradients
        for weight in self._weights.values():
            weight.requires_grad_(required)

    def collect(self) -> None:
        for (name, weight), here in zip(self._weights.items(), self.module.parameters(), strict=True):
            rows = self.rows[name]
            if isinstance(weight, DTensor):
                if weight.grad is not None:  # of backwards before it was whole
                    rows.grad, weight.grad = _mine(cast(DTensor, weight.grad)), None
                if here is not weight and here.grad is not None:
                    mean = self._rows_of_mean(here.grad)[: len(rows)]
                    rows.grad, here.grad = mean if rows.grad is None else rows.grad + mean, None
            elif rows.grad is not None:
                dist.all_reduce(rows.grad)
                rows.grad /= self.ranks

    def _rows_of_mean(self, gradient: Tensor) -> Tensor:
        """The rows of this process, and what they are padded with."""
        count = self._share(len(gradient))
        padded = gradient.new_zeros(count * self.ranks, *gradient.shape[1:])
        padded[: len(gradient)] = gradient
        mine = padded.new_empty(count, *gradient.shape[1:])
        # torch 2.13 renamed it.
        (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(mine, padded)
        return mine.div_(self.ranks)

    def norm(self) -> Tensor:
        def squares(names: Iterable[str]) -> Tensor:
            here = [gradient for name in names if (gradient := self.rows[name].grad) is not None]
            return torch.stack([*torch._foreach_norm(here), torch.zeros((), device=self.device)]).square().sum()

        return self.total(squares).sqrt()


class _Averages(_Spread):
    """The weights of a module that is only ever used as a whole: between uses it has none."""

    def __init__(self, module: nn.Module, of: Shards) -> None:
        super().__init__(module, of.device, of.shapes)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(of.device)
        self._weights = self.rows
        self.rows = {name: nn.Parameter(rows.detach().clone(), False) for name, rows in of.rows.items()}
        self.spread()

    def gather(self) -> None:
        self.whole = True
        for name, weight in self._weights.items():
            weight.data = self.full(name)

    def spread(self) -> None:
        self.whole = False
        for weight in self._weights.values():
            weight.data = torch.empty(0, device=self.device)


@torch.no_grad()
def _mine(weight: DTensor) -> Tensor:
    rows: Tensor = weight.to_local()
    return rows
