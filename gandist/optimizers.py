"""Rules that turn gradients into steps, and the course of their rate."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gandist.recipe import Section

Rate = Annotated[float, Field(ge=0, lt=1)]
Images = Annotated[int, Field(ge=1)]


class OptimizerOptions(Section):
    """A rule that turns gradients into steps; fused, so that it leaves weights alone where `found_inf` is 1."""

    kind: str
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4

    @abstractmethod
    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer with the whole of its state, which a checkpoint can then fill."""

    def adjust(
        self, optimizer: torch.optim.Optimizer, gradients: list[Tensor], learning_rate: float | Tensor, images: int
    ) -> None:
        """Sets what changes with time, before the step that follows `images` images; a rate on the device is read there."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

    def regime(self, images: int) -> Hashable:
        """What beside the rate changes with time."""
        return None


class _DampedAdam(torch.optim.Adam):
    """Adam that divides by √(v̂ + ε) instead of √v̂ + ε.

    v̂ + ε is the second moment of gradients whose squares are each larger by ε: v ← β2 v + (1 − β2)(g² + ε), divided by 1 − β2ᵗ.
    So ε (1 − β2) / β2 is added to v before torch's own fused step, and nothing where that one will not step.
    """

    def __init__(self, parameters: list[nn.Parameter], *, damping: float, **options: Any) -> None:
        super().__init__(parameters, eps=1e-30, **options)
        self.damping = damping

    def step(self, closure: Any = None) -> Any:
        found: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            moments = [self.state[p]["exp_avg_sq"] for p in group["params"] if p.grad is not None]
            extra = self.damping * (1 - group["betas"][1]) / group["betas"][1]
            if found is None:
                torch._foreach_add_(moments, extra)
            else:  # by its full name, since the short one takes a tensor of one number for a number, and waits for it
                torch.ops.aten._foreach_add_.Tensor(moments, extra * (1 - found))
        return super().step(closure)


def decaying(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of layers, and what is left: biases, gains and other vectors, which no weight decay should pull to 0."""
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]


class AdamOptions(OptimizerOptions):
    """Adam (Kingma and Ba 2015); β1 0.5 is DCGAN's. With `weight_decay` AdamW (Loshchilov and Hutter 2019): θ ← (1 − η λ) θ in each step.

    `eps_inside_root` divides by √(v̂ + eps) instead of √v̂ + eps, as the code released with Salimans et al. 2016 does: gradients far below
    √eps then hardly move a weight.
    """

    kind: Literal["adam"] = "adam"
    beta1: Rate = 0.5
    beta2: Rate = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    eps_inside_root: bool = False
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0

    @model_validator(mode="after")
    def _has_a_second_moment(self) -> AdamOptions:
        if self.eps_inside_root and self.weight_decay:
            raise ValueError("`weight_decay` has no place beside `eps_inside_root`; leave one out")
        if self.eps_inside_root and self.beta2 == 0:
            raise ValueError("`eps_inside_root` needs a `beta2` above 0; raise it, or leave `eps_inside_root` out")
        return self

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        shared: dict[str, Any] = {"lr": self.learning_rate, "betas": (self.beta1, self.beta2), "fused": True}
        shared["capturable"] = parameters[0].device.type == "cuda"
        optimizer: torch.optim.Optimizer
        if self.eps_inside_root:
            optimizer = _DampedAdam(parameters, damping=self.eps, **shared)
        elif self.weight_decay:
            groups = zip(decaying(parameters), (self.weight_decay, 0.0), strict=True)
            several = [{"params": group, "weight_decay": decay} for group, decay in groups if group]
            optimizer = torch.optim.AdamW(several, eps=self.eps, **shared)
        else:
            optimizer = torch.optim.Adam(parameters, eps=self.eps, **shared)
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer


class SgdOptions(OptimizerOptions):
    """Gradient descent with momentum in its velocity form, v ← μ v − η g and θ ← θ + v, as in Goodfellow et al. 2014.

    torch multiplies the whole velocity by the rate of the moment instead, which differs once the rate changes; here the gradient
    is multiplied beforehand. μ goes from `momentum` to `final_momentum` at `momentum_images`, linearly. `weight_decay` λ adds λ θ to the
    gradients of the weights of layers.
    """

    kind: Literal["sgd"]
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    momentum: Rate = 0.5
    final_momentum: Rate | None = None
    momentum_images: Images | None = None
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0

    @model_validator(mode="after")
    def _ramp_is_whole(self) -> SgdOptions:
        if (self.final_momentum is None) != (self.momentum_images is None):
            raise ValueError("`final_momentum` and `momentum_images` come together")
        if self.final_momentum == self.momentum:
            raise ValueError(
                "`final_momentum` has no effect where it is `momentum`; leave both it and `momentum_images` out"
            )
        return self

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=self.momentum, fused=True)
        if self.momentum or self.final_momentum is not None:
            for parameter in parameters:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return optimizer

    def adjust(
        self, optimizer: torch.optim.Optimizer, gradients: list[Tensor], learning_rate: float | Tensor, images: int
    ) -> None:
        if self.weight_decay:
            moved = [p for group in optimizer.param_groups for p in decaying(group["params"])[0] if p.grad is not None]
            pulled = [p.grad for p in moved if p.grad is not None]
            torch._foreach_add_(pulled, [p.detach() for p in moved], alpha=self.weight_decay)
        torch._foreach_mul_(gradients, learning_rate)
        if self.final_momentum is not None:
            momentum = max(self.regime(images), 1e-30)  # at 0 torch would not note the velocity for the steps to come
            for group in optimizer.param_groups:
                group["momentum"] = momentum

    def regime(self, images: int) -> float:
        """The momentum."""
        if self.final_momentum is None or self.momentum_images is None:
            return self.momentum
        return self.momentum + (self.final_momentum - self.momentum) * min(1.0, images / self.momentum_images)


OPTIMIZERS: dict[str, Callable[[], type[Section]]] = {"adam": lambda: AdamOptions, "sgd": lambda: SgdOptions}


class ScheduleOptions(Section):
    """The learning rate as a function of images: up over `warmup_images`, then down to `final` at `until_images`.

    It stays where it is until `from_images`. `exponential` halves it every `half_life_images` and stops at `final`. `poly` is
    (1 − t)^`power`, as segmenters are trained (Chen et al. 2018, DeepLab).
    """

    kind: Literal["constant", "linear", "cosine", "poly", "exponential"] = "constant"
    warmup_images: Annotated[int, Field(ge=0)] = 0
    from_images: Annotated[int, Field(ge=0)] = 0
    until_images: Images | None = None
    half_life_images: Images | None = None
    final: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the learning rate
    power: Annotated[float, Field(gt=0, le=10)] = 0.9  # of a `poly` schedule

    @model_validator(mode="after")
    def _has_an_end(self) -> ScheduleOptions:
        if self.kind == "constant" and (self.until_images is not None or self.final):
            raise ValueError(
                "`until_images` and `final` have no effect on a `constant` schedule; use `linear` or `cosine`"
            )
        if self.kind != "constant" and self.final == 1:
            raise ValueError(
                f"a `{self.kind}` schedule down to a `final` of 1 has no effect; use a smaller one, or `constant`"
            )
        if (self.kind == "exponential") != (self.half_life_images is not None):
            raise ValueError("`half_life_images` and an `exponential` schedule come together")
        if self.kind == "exponential" and self.until_images is not None:
            raise ValueError("`until_images` has no effect on an `exponential` schedule; leave it out")
        if self.kind != "poly" and self.power != 0.9:
            raise ValueError(f"`power` has no effect on a `{self.kind}` schedule; use `poly`")
        if self.kind in ("linear", "cosine", "poly") and self.until_images is None:
            raise ValueError(f"a `{self.kind}` schedule needs `until_images`, where it reaches `final`")
        if self.until_images is not None and self.until_images <= self.warmup_images:
            raise ValueError(f"`until_images` {self.until_images} must lie beyond `warmup_images` {self.warmup_images}")
        if self.from_images and self.until_images is None:
            raise ValueError("`from_images` has no effect without `until_images`, where the rate reaches `final`")
        if self.until_images is not None and self.until_images <= self.from_images:
            raise ValueError(f"`until_images` {self.until_images} must lie beyond `from_images` {self.from_images}")
        if 0 < self.from_images <= self.warmup_images:
            raise ValueError(f"`from_images` has no effect before `warmup_images` {self.warmup_images} are over")
        return self

    def factor(self, images: int) -> float:
        """What the learning rate is multiplied by after `images` images."""
        warm = min(1.0, (images + 1) / self.warmup_images) if self.warmup_images else 1.0
        if self.half_life_images is not None:
            return warm * max(self.final, float(0.5 ** (images / self.half_life_images)))
        if self.until_images is None:
            return warm
        begin = max(self.warmup_images, self.from_images)
        passed = min(1.0, max(0.0, (images - begin) / (self.until_images - begin)))
        shape = {
            "linear": 1 - passed,
            "poly": float((1 - passed) ** self.power),
            "cosine": 0.5 * (1 + math.cos(math.pi * passed)),
        }[self.kind]
        return warm * (self.final + (1 - self.final) * shape)
