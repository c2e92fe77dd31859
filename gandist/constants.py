"""Tensors that never change, made once for each device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

Given = ParamSpec("Given")


def made_once(make: Callable[Given, Tensor]) -> Callable[Given, Tensor]:
    """A function that keeps what it made for the same arguments: a copy to a device waits for it, and while a graph is recorded there can be none.

    It has values even where a step is played without any (memory.py), since later steps use it too.
    """

    @cache
    @wraps(make)
    def kept(*arguments: Given.args, **named: Given.kwargs) -> Tensor:
        with unset_fake_temporarily():
            return make(*arguments, **named)

    return cast(Callable[Given, Tensor], kept)


@made_once
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers (N,) on a device."""
    return torch.tensor(values, device=device)
