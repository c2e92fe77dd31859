"""Player: one side of a game, sole owner of its weights, its gradients, its optimizer, its schedule and its EMA."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gandist.recipe import Section

Item = TypeVar("Item")
Rate = Annotated[float, Field(ge=0, lt=1)]
Images = Annotated[int, Field(ge=1)]

# Otherwise every forward sends rank 0's statistics and overwrites the other ranks' own. torch 2.13 renamed the switch.
_KEEP_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AdamOptions(Section):
    """Adam (Kingma and Ba 2015); β1 0.5 is DCGAN's."""

    kind: Literal["adam"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    beta1: Rate = 0.5
    beta2: Rate = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8


class ScheduleOptions(Section):
    """The learning rate as a function of images: up over `warmup_images`, then down to `final` at `until_images`."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_images: Annotated[int, Field(ge=0)] = 0
    until_images: Images | None = None
    final: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the learning rate

    @model_validator(mode="after")
    def _has_an_end(self) -> ScheduleOptions:
        if self.kind == "constant" and (self.until_images is not None or self.final):
            raise ValueError(
                "`until_images` and `final` have no effect on a `constant` schedule; use `linear` or `cosine`"
            )
        if self.kind != "constant" and self.until_images is None:
            raise ValueError(f"a `{self.kind}` schedule needs `until_images`, where it reaches `final`")
        if self.until_images is not None and self.until_images <= self.warmup_images:
            raise ValueError(f"`until_images` {self.until_images} must lie beyond `warmup_images` {self.warmup_images}")
        return self

    def factor(self, images: int) -> float:
        """What the learning rate is multiplied by after `images` images."""
        warm = min(1.0, (images + 1) / self.warmup_images) if self.warmup_images else 1.0
        if self.until_images is None:
            return warm
        span = self.until_images - self.warmup_images
        passed = min(1.0, max(0.0, (images - self.warmup_images) / span))
        shape = 1 - passed if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * passed))
        return warm * (self.final + (1 - self.final) * shape)


class EmaOptions(Section):
    """Exponential moving average of the weights, by half-life in images (Karras et al. 2024, section 3.1, the usual form).

    `ramp_up` bounds the half-life by that share of the images seen, so that the first weights are forgotten soon.
    """

    half_life_images: Images = 10_000
    ramp_up: Annotated[float, Field(gt=0)] | None = 0.05

    def decay(self, images: float, batch: float) -> float:
        """The share of the average that stays when a step of `batch` images ends at `images`."""
        half_life = float(self.half_life_images)
        if self.ramp_up is not None:
            half_life = min(half_life, images * self.ramp_up)
        return float(0.5 ** (batch / max(half_life, 1e-8)))


class PlayerOptions(Section):
    """What every player has beside its network."""

    optimizer: AdamOptions = AdamOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema: EmaOptions | None = None


class Player:
    """One network that learns. Called, it computes: with gradients of its weights in its own turn, frozen in others'.

    In another player's turn the bare module is called, with weights that need no gradient and with running statistics
    that stand still; in its own turn the module is called through DistributedDataParallel, which reduces each
    gradient once, in the turn's only synchronised backward.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        options: PlayerOptions,
        *,
        device: torch.device,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        self.name, self.options, self.device = name, options, device
        self.module = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module.train()
        self.dtype = DTYPES[precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.ema = copy.deepcopy(self.module).eval().requires_grad_(False) if options.ema else None
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.wrapped = (
            DistributedDataParallel(self.module, gradient_as_bucket_view=True, **_KEEP_BUFFERS)
            if self.ranks > 1
            else self.module
        )
        self.parameters = list(self.module.parameters())
        self._statistics = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._buffers = [b for b in self.module.buffers() if b.is_floating_point()]
        self._kept: list[Tensor] = []  # the statistics as they were before the turn
        self.sees_batch = bool(self._statistics)  # its output for one row depends on the other rows
        adam = options.optimizer
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, fused=True
        )
        for (
            parameter
        ) in self.parameters:  # what Adam would make at its first step: here, so that a checkpoint can fill it
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.skipped = torch.zeros((), device=device)  # turns without a step, for gradients that were not finite
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.learning_rate = 0.0  # of the last turn
        self.moving = False
        self._freeze()

    def __call__(self, *inputs: Tensor) -> Any:
        # One autocast context a forward: its cache of cast weights would outlive the optimizer's step otherwise.
        with self.autocast():
            return (self.wrapped if self.moving else self.module)(*inputs)

    def autocast(self) -> torch.autocast:
        """The precision that this player computes in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _freeze(self) -> None:
        self.moving = False
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        for layer in self._statistics:
            layer.track_running_stats = False  # in training mode: normalise by the batch, and remember nothing

    def _thaw(self) -> None:
        self.moving = True
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for layer in self._statistics:
            layer.track_running_stats = True

    @contextmanager
    def turn(self, images: int, batch: float, micro_batches: int = 1) -> Iterator[Turn]:
        """This player's move: thaw, accumulate gradients, then guard, clip, step, average and freeze.

        images: the clock before this step.  batch: images of the clock that this turn stands for, a step's share of repeats.
        """
        turn = Turn(self, micro_batches)
        self.optimizer.zero_grad(set_to_none=True)
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._thaw()
        try:
            yield turn
        finally:
            self._freeze()
        assert turn.left == 0, f"{self.name}: {turn.left} of {micro_batches} micro-batches had no backward"
        self.learning_rate = self.options.optimizer.learning_rate * self.options.schedule.factor(images)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        turn.norm, bad = self._step()
        self._agree_on_statistics(bad)
        self._average(images + batch, batch)

    @torch.no_grad()
    def _step(self) -> tuple[Tensor, Tensor]:
        """Steps unless a gradient is not finite; returns the norm before clipping, and 1 where it did not step.

        The device is never waited for.
        """
        self.scaler.unscale_(self.optimizer) if self.scaler.is_enabled() else None
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        bad = (~torch.isfinite(norm)).float()
        if self.options.clip_norm is not None:
            torch._foreach_mul_(gradients, (self.options.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # Fused optimizers leave weights and moments alone where found_inf is 1, without the host looking at it.
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        self.skipped += bad
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * bad
        return norm, bad

    @torch.no_grad()
    def _agree_on_statistics(self, bad: Tensor) -> None:
        """Means the running statistics over ranks, which saw different rows, so that all ranks stay bitwise equal.

        Where the turn did not step they go back to what they were, since what spoiled the gradient is in them too.
        """
        if self.ranks > 1 and self._buffers:
            flat = torch.cat([buffer.flatten() for buffer in self._buffers])
            dist.all_reduce(flat)
            flat /= self.ranks
            parts = torch.split(flat, [buffer.numel() for buffer in self._buffers])
            torch._foreach_copy_(self._buffers, [p.view_as(b) for p, b in zip(parts, self._buffers, strict=True)])
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(bad.bool(), kept, buffer))

    @torch.no_grad()
    def _average(self, images: float, batch: float) -> None:
        if self.ema is None or self.options.ema is None:
            return
        weight = 1 - self.options.ema.decay(images, batch)
        averages, values = list(self.ema.parameters()), list(self.module.parameters())
        for average, value in zip(self.ema.buffers(), self.module.buffers(), strict=True):
            if value.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, weight)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The module to judge or to use: the EMA where there is one, in evaluation mode, without gradients."""
        module = self.ema if self.ema is not None else self.module
        training = module.training
        module.eval()
        for layer in self._statistics:
            layer.track_running_stats = True  # evaluation reads the running statistics of the module itself
        try:
            with torch.no_grad(), self.autocast():
                yield module
        finally:
            module.train(training)
            self._freeze()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds, by file and name, as references: weights, EMA and the optimizer's moments."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        moments = {
            f"{names[id(parameter)]}/{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        found = {"": dict(self.module.state_dict()), "optimizer": moments}
        if self.ema is not None:
            found["ema"] = dict(self.ema.state_dict())
        return found

    def restart_average(self) -> None:
        """The average begins again from the weights."""
        if self.ema is not None:
            self.ema.load_state_dict(self.module.state_dict())

    def numbers(self) -> dict[str, Any]:
        """The part of the state that is no tensor: the loss scaler's five numbers, where there is one."""
        return dict(self.scaler.state_dict())

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Restores what `numbers` gave."""
        if numbers:
            self.scaler.load_state_dict(numbers)


class Turn:
    """What a player may do in its turn: one backward for each micro-batch, the last of which reduces over the ranks."""

    def __init__(self, player: Player, micro_batches: int) -> None:
        self.player, self.micro_batches, self.left = player, micro_batches, micro_batches
        self.norm = torch.zeros(())

    def accumulate(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yields the micro-batches; all forwards and backwards but the last one's stay local."""
        for batch in batches:
            wrapped = self.player.wrapped
            local = self.left > 1 and isinstance(wrapped, DistributedDataParallel)
            left = self.left
            with wrapped.no_sync() if local else nullcontext():
                yield batch
            assert self.left == left - 1, f"{self.player.name}: a micro-batch needs exactly one backward"

    def backward(self, loss: Tensor) -> None:
        """The gradient of `loss`, a mean over the rows of one micro-batch."""
        self.left -= 1
        self.player.scaler.scale(loss / self.micro_batches).backward()  # type: ignore[no-untyped-call]
