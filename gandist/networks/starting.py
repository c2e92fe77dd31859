"""Initial weights that depend on data: layers that measure their first batch (Salimans and Kingma 2016, section 3)."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START = 500  # samples that are measured
MAX_REFERENCE = 1024  # rows of the fixed batch of virtual batch norm, which come after them
MAX_VALUES = 1 << 23  # of them together: 500 of 3×32×32 are well below, and of 3×256×256 it is 42


class Measuring(nn.Module):
    """A layer that sets scale and bias by what its first batch makes of its other weights."""

    measures = False

    @abstractmethod
    def measure(self, inputs: Tensor) -> Tensor:
        """The output for a batch, after scale and bias were set by it."""


def start_by(module: nn.Module, *inputs: Tensor) -> None:
    """Lets every measuring layer of a module set itself by one batch, each one after those before it, with hidden noise on.

    One process does so alone: layers that look at the rows of all processes look at its own while `measures` is true.
    """
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "measures")]
    training = module.training
    module.train()
    for layer in layers:
        layer.measures = True
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for layer in layers:
            layer.measures = False
        module.train(training)


class Normed(Measuring):
    """A linear layer or a convolution whose weights have the length of its gain: W = g θ / ‖θ‖ for each output.

    θ is drawn from N(0, `deviation`²). The first batch gives each output the mean 0 and the standard deviation `starts_at`. A gain that
    does not learn is a buffer, so that the first batch alone sets it.
    """

    gain: Tensor
    keeps_buffers = True  # no turn changes them: there is nothing for ranks to agree on

    def __init__(
        self, layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, *, deviation: float, learns_gain: bool, starts_at: float = 1.0
    ) -> None:  # fmt: skip
        super().__init__()
        assert layer.bias is None, "the bias stands behind the gain"
        nn.init.normal_(layer.weight, 0.0, deviation)
        self.layer, self.starts_at = layer, starts_at
        self.axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0  # of the outputs, in θ
        outputs = layer.weight.shape[self.axis]
        self.bias = nn.Parameter(torch.zeros(outputs))
        shape = [outputs if axis == self.axis else 1 for axis in range(layer.weight.ndim)]
        if learns_gain:
            self.gain = nn.Parameter(torch.ones(shape))
        else:
            self.register_buffer("gain", torch.ones(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.measure(inputs) if self.measures else self._apply_weight(inputs, self.bias)

    def _apply_weight(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        weight = torch._weight_norm(
            self.layer.weight, self.gain, self.axis
        )  # one kernel, as in torch's parametrisation
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(inputs, weight, bias)
        if isinstance(layer, nn.Conv2d):
            convolved: Tensor = layer._conv_forward(inputs, weight, bias)
            return convolved
        return F.conv_transpose2d(inputs, weight, bias, layer.stride, layer.padding, layer.output_padding)  # type: ignore[arg-type]

    def measure(self, inputs: Tensor) -> Tensor:
        outputs = self._apply_weight(inputs, None).float().movedim(1, -1)  # (B, …, outputs)
        rows = outputs.flatten(0, -2)
        factor = self.starts_at / rows.std(0, correction=0).clamp_min(1e-8)
        self.gain.mul_(factor.view_as(self.gain))
        with torch.no_grad():
            self.bias.copy_(-rows.mean(0) * factor)
        started: Tensor = (outputs * factor + self.bias).movedim(-1, 1)
        return started

    def plain(self) -> nn.Module:
        """The layer without its gain: with the weights and the bias that it has now."""
        layer = copy.deepcopy(self.layer)
        with torch.no_grad():
            layer.weight = nn.Parameter(torch._weight_norm(self.layer.weight, self.gain, self.axis))
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer
