"""Blocks: parts of a network whose activations may be computed again in the backward, instead of being kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A part that is called with tensors alone, once in each forward of its network."""


def blocks(network: nn.Module) -> list[Block]:
    """Those of a network, none of them within another."""
    return [module for module in network.modules() if isinstance(module, Block)]


def recompute(network: nn.Module) -> None:
    """Activation checkpointing (Chen et al. 2016): each block keeps what it was called with, and computes the rest again when its
    backward is due. The result is the same, bit by bit."""
    for block in blocks(network):
        block.forward = partial(_again, block)


def _again(block: Block, *inputs: Tensor | None) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_contexts, block))


class _First:
    """Around the first forward: its power iterations move the vectors, and a later forward of the same turn will move them on."""

    def __init__(self, block: Block) -> None:
        self.norms = [module for module in block.modules() if isinstance(module, _SpectralNorm)]
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self.kept = [(norm._u.clone(), norm._v.clone()) for norm in self.norms]


class _Again:
    """Around each further one, of which a second backward needs another: it sees what the first saw, and leaves no trace."""

    def __init__(self, block: Block, first: _First) -> None:
        self.first = first
        kinds = nn.modules.batchnorm._BatchNorm
        self.layers = [module for module in block.modules() if isinstance(module, kinds)]
        self.before: list[tuple[nn.Module, str, Any]] = []

    def __enter__(self) -> None:
        for norm, (left, right) in zip(self.first.norms, self.first.kept, strict=True):
            self._put(norm, _u=left, _v=right, training=False)  # without a power iteration
        for layer in self.layers:
            if layer.running_mean is not None and layer.running_var is not None:
                self._put(layer, running_mean=layer.running_mean.clone(), running_var=layer.running_var.clone())
            if layer.num_batches_tracked is not None:
                self._put(layer, num_batches_tracked=layer.num_batches_tracked.clone())

    def __exit__(self, *exception: object) -> None:
        while self.before:
            setattr(*self.before.pop())

    def _put(self, module: nn.Module, **values: Any) -> None:
        for name, value in values.items():
            self.before.append((module, name, getattr(module, name)))
            setattr(module, name, value)


def _contexts(block: Block) -> tuple[_First, _Again]:
    first = _First(block)
    return first, _Again(block, first)
