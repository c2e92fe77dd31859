"""Player: one side of a game, sole owner of its weights, its gradients, its optimizer, its schedule and its EMA."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from pydantic import Field, SerializeAsAny, WrapValidator, model_validator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

from gandist import penalties
from gandist.networks.blocks import recompute
from gandist.optimizers import OPTIMIZERS, AdamOptions, Images, OptimizerOptions, ScheduleOptions
from gandist.recipe import Choice, Section, harmless
from gandist.sharding import Sharding, Shards, Weights, from_first

Item = TypeVar("Item")

# Otherwise every forward sends rank 0's statistics and overwrites the other ranks' own. torch 2.13 renamed the switch.
_KEEP_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EmaOptions(Section):
    """Exponential moving average of the weights, by half-life in images (Karras et al. 2024, section 3.1, the usual form).

    `ramp_up` bounds the half-life by that share of the images seen, so that the first weights are forgotten soon. `from_zero`
    begins with weights of zero instead, as the code released with Salimans et al. 2016 does, and forgets nothing sooner.
    """

    half_life_images: Images = 10_000
    ramp_up: Annotated[float, Field(gt=0)] | None = 0.05
    from_zero: bool = False

    @model_validator(mode="after")
    def _zero_is_no_weight(self) -> EmaOptions:
        if self.from_zero and self.ramp_up is not None:
            raise ValueError(
                "`from_zero` needs `ramp_up: null`: with a ramp the first average is the weights themselves"
            )
        return self

    def decay(self, images: float, batch: float) -> float:
        """The share of the average that stays when a step of `batch` images ends at `images`."""
        half_life = float(self.half_life_images)
        if self.ramp_up is not None:
            half_life = min(half_life, images * self.ramp_up)
        return float(0.5 ** (batch / max(half_life, 1e-8)))


class PlayerOptions(Section):
    """What every player has beside its network."""

    optimizer: Annotated[
        SerializeAsAny[OptimizerOptions], WrapValidator(Choice("an optimizer", lambda: OPTIMIZERS, "adam"))
    ] = AdamOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    clip_weights: Annotated[float, Field(gt=0)] | None = None  # of a Wasserstein critic (Arjovsky et al. 2017)
    historical_averaging: Annotated[float, Field(gt=0)] | None = None  # weight of ‖θ − mean of all θ before‖²
    ema: EmaOptions | None = None
    activation_checkpointing: Annotated[bool, Field(**harmless)] = (
        False  # less memory for a second forward of each block
    )


Memory = Mapping[str, Tensor]


class Remembered(NamedTuple):
    """Numbers that a player keeps between its turns: how they begin, and how they follow from what it observed in a turn.

    `update(memory, observed, images)` gets the means of all `observe`d values over micro-batches and ranks, and the images
    that the turn stands for; the same on every rank, so that ranks stay equal.
    """

    initial: Mapping[str, float] = {}
    update: Callable[[Memory, Memory, float], Memory] = lambda memory, observed, images: memory


def in_capture(device: torch.device) -> bool:
    """Whether what is called now is recorded for a CUDA graph, and not computed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _spectral_norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The spectral norms of a module, each with the name of the weight that it divides."""
    return [
        (f"{name}.parametrizations.{weight}.original".removeprefix("."), norm)
        for name, part in module.named_modules()
        if parametrize.is_parametrized(part)
        for weight, several in cast(nn.ModuleDict, part.parametrizations).items()
        for norm in cast(nn.ModuleList, several)
        if isinstance(norm, parametrizations._SpectralNorm)
    ]


def _placed(module: nn.Module, device: torch.device) -> nn.Module:
    """On the device, channels last; as it is where its tensors have no values (memory.py)."""
    if any(isinstance(parameter, FakeTensor) for parameter in module.parameters()):
        return module  # which torch cannot move
    placed: nn.Module = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def _twin(module: nn.Module, empty: bool) -> nn.Module:
    """The same with memory of its own, or none. Tensors are cloned, which those without values can be too, and not copied by their bytes."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.new_empty(0) if empty else p.detach().clone()) for p in module.parameters()
    }
    return copy.deepcopy(module, memo | {id(buffer): buffer.clone() for buffer in module.buffers()})


def _compiled(module: nn.Module) -> nn.Module:
    """By torch.compile, for shapes as they come, with the random numbers of the network as it is written.

    Its caches on disk are pickles, so they stay off: each start compiles anew.
    """
    options: dict[str, Any] = {"fallback_random": True, "fx_graph_cache": False}
    return cast(nn.Module, torch.compile(module, dynamic=False, options=options))


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
        remembered: Remembered = Remembered(),  # noqa: B008 - an immutable tuple
        compiled: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        assert sharding is None or not compiled, f"{name}: torch.compile is not served beside FSDP"
        self.name, self.options, self.device = name, options, device
        # What is too large for a device is placed in parts.
        self.module = _placed(module, device) if sharding is None else module
        self.module.train()
        self.dtype = DTYPES[precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        # Without weights of its own where they are spread: its module gets them when it is used.
        self.ema = _twin(self.module, empty=sharding is not None).eval().requires_grad_(False) if options.ema else None
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        if options.activation_checkpointing or (sharding is not None and sharding.activation_checkpointing):
            recompute(self.module)
        self.weights = Weights(self.module) if sharding is None else Shards(self.module, device, sharding)
        self.averages = self.weights.average(self.ema) if self.ema is not None else None
        self.compiled = compiled
        self.computed = _compiled(self.module) if compiled else self.module
        self.wrapped = (
            DistributedDataParallel(self.computed, gradient_as_bucket_view=True, **_KEEP_BUFFERS)
            if self.ranks > 1 and sharding is None
            else self.computed
        )
        # A turn that has ended, and whose gradients are still on their way.
        self._reducing: list[dist.Work] = []
        self._ended: Turn | None = None
        self.reduced_bytes = 0  # of gradients, since the start
        if isinstance(self.wrapped, DistributedDataParallel):
            self.wrapped.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))  # torch reads annotations
        self._begin_average()
        self.parameters = [*self.weights.rows.values()]  # what the optimizer moves
        self._statistics = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._spectral = [m for m in self.module.modules() if isinstance(m, parametrizations._SpectralNorm)]
        self._averaged_norms = _spectral_norms(self.ema) if self.ema is not None else []
        changing = (m for m in self.module.modules() if not getattr(m, "keeps_buffers", False))
        self._buffers = [b for m in changing for b in m.buffers(recurse=False) if b.is_floating_point()]
        self._kept: list[Tensor] = []  # the statistics as they were before the turn
        # Whether its output for one row depends on the other rows.
        self.sees_batch = bool(self._statistics) or any(getattr(m, "sees_batch", False) for m in self.module.modules())
        self.optimizer = options.optimizer.build(self.parameters)
        self._update = remembered.update
        self._memory = {name: torch.tensor(float(value), device=device) for name, value in remembered.initial.items()}
        self._observed: dict[str, list[Tensor]] = {}
        self.history: dict[str, Tensor] = {}  # the mean of all earlier weights, for historical averaging
        if options.historical_averaging is not None:
            self.history = {name: p.detach().clone() for name, p in self.weights.rows.items()}
            self.history["steps"] = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)  # turns without a step, for gradients that were not finite
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.learning_rate = 0.0  # of the last turn
        # What changes with the clock. A GPU has it in its own memory, where a graph that is replayed finds it.
        self._pace: dict[str, float | Tensor] = {"rate": 0.0, "weight": 0.0}
        self._set: dict[str, float] = {}
        if device.type == "cuda":
            self._pace = {name: torch.zeros((), device=device) for name in self._pace}
        self.moving = False
        self._freeze()

    def __call__(self, *inputs: Tensor | None) -> Any:
        self.settle()
        # One autocast context a forward: its cache of cast weights would outlive the optimizer's step otherwise.
        with self.autocast():
            return (self.wrapped if self.moving else self.computed)(*inputs)

    def precise(self, *inputs: Tensor | None) -> Any:
        """What `__call__` gives, computed in fp32 whatever the precision: a penalty squares gradients, which bf16 cannot hold.

        And as it is written: the backward of what was compiled has no backward of its own.
        """
        self.settle()
        if self.moving:
            self.weights.gather()  # a gradient of a gradient finds the weights where they were
        written = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with torch.autocast(self.device.type, enabled=False), written:
            return (self.wrapped if self.moving else self.computed)(*inputs)

    def _reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """What DistributedDataParallel does with gradients that are ready, but that it goes on at once: `settle` waits for them."""
        gradients = bucket.buffer().div_(self.ranks)
        self.reduced_bytes += gradients.numel() * gradients.element_size()
        work = dist.all_reduce(gradients, async_op=True)
        assert work is not None
        self._reducing.append(work)
        begun: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[self.device] if self.device.type == "cuda" else None
        )
        begun.set_result(gradients)
        return begun

    def wait(self) -> None:
        """Until the gradients of the last turn are those of all processes."""
        while self._reducing:
            self._reducing.pop(0).wait()

    def settle(self) -> None:
        """Ends a turn whose gradients are still being reduced. Whoever asks for the player's weights or numbers comes here first, so that
        what does not depend on them is computed meanwhile."""
        ended, self._ended = self._ended, None
        if ended is not None:
            ended.finish()

    @property
    def memory(self) -> dict[str, Tensor]:
        """Numbers that are kept between turns, by name."""
        self.settle()
        return self._memory

    def observe(self, **values: Tensor) -> None:
        """Notes numbers of this turn, by name, for the player's memory; the same names on every rank."""
        assert self.moving, f"{self.name}: observes in its own turn alone"
        for name, value in values.items():
            self._observed.setdefault(name, []).append(value.detach().float())

    def autocast(self) -> torch.autocast:
        """The precision that this player computes in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _freeze(self) -> None:
        self.moving = False
        self.weights.require_gradients(False)
        self._hold_still()

    def _hold_still(self) -> None:
        for layer in self._statistics:
            layer.track_running_stats = False  # in training mode: normalise by the batch, and remember nothing
        for norm in self._spectral:
            norm.eval()  # no power iteration in others' turns

    def _thaw(self) -> None:
        self.moving = True
        self.weights.require_gradients(True)
        self.weights.begin()
        for layer in self._statistics:
            layer.track_running_stats = True
        for norm in self._spectral:
            norm.train()

    @contextmanager
    def turn(self, images: int, batch: float, micro_batches: int = 1, hold: bool = False) -> Iterator[Turn]:
        """This player's move: thaw, accumulate gradients, then guard, clip, step, average and freeze.

        images: the clock before this step.  batch: images of the clock that this turn stands for, a step's share of repeats.
        hold: the weights wait for `Turn.finish`, so that another player answers the old ones.
        """
        self.settle()
        turn = Turn(self, images, batch, micro_batches)
        self.optimizer.zero_grad(set_to_none=True)
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._observed = {}
        self._thaw()
        try:
            yield turn
            self.weights.collect()
        finally:
            self._freeze()
        assert turn.left == 0, f"{self.name}: {turn.left} of {micro_batches} micro-batches had no backward"
        if self._reducing and not hold:
            self._ended = turn
        elif not hold:
            turn.finish()

    def finish(self, images: int, batch: float) -> Tensor:
        """The second half of a turn, from gradients to weights; the norm of the gradients."""
        if not in_capture(self.device):
            self.schedule(images, batch)
        norm, bad = self._step(images)
        self._agree_on_statistics(bad)
        self._remember(bad, batch)
        self._average()
        return norm

    def schedule(self, images: int, batch: float) -> None:
        """Sets what changes with the clock, for the next `finish`: the learning rate, and how much the average takes of the weights."""
        self.learning_rate = self.options.optimizer.learning_rate * self.options.schedule.factor(images)
        weight = 0.0 if self.options.ema is None else 1 - self.options.ema.decay(images + batch, batch)
        for name, value in (("rate", self.learning_rate), ("weight", weight)):
            kept = self._pace[name]
            if not isinstance(kept, Tensor):
                self._pace[name] = value
            elif self._set.get(name) != value:  # a constant is not written again
                self._set[name] = value
                kept.fill_(value)

    def regime(self, images: int) -> Hashable:
        """What of the clock its step depends on beside that: while it is the same, so is the step."""
        return self.options.optimizer.regime(images)

    @torch.no_grad()
    def _step(self, images: int) -> tuple[Tensor, Tensor]:
        """Steps unless a gradient is not finite; returns the norm before clipping, and 1 where it did not step.

        The device is never waited for.
        """
        self.wait()
        self.weights.spread()  # who called it since the turn has ended may have left it whole
        self.scaler.unscale_(self.optimizer) if self.scaler.is_enabled() else None
        self._pull_to_history()
        gradients, norm = self.weights.gradients(), self.weights.norm()
        bad = (~torch.isfinite(norm)).float()
        self._note_history(bad)
        if self.options.clip_norm is not None:
            torch._foreach_mul_(gradients, (self.options.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.options.optimizer.adjust(self.optimizer, gradients, self._pace["rate"], images)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # Fused optimizers leave weights and moments alone where found_inf is 1, without the host looking at it.
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        if self.options.clip_weights is not None:
            penalties.clip_weights_(self.parameters, self.options.clip_weights)
        self.skipped += bad
        self.skipped_in_a_row.add_(1).mul_(bad)
        return norm, bad

    @torch.no_grad()
    def distance_to_history(self) -> Tensor:
        """Σ ‖θ − θ̄‖² of all weights."""

        def distance(names: Iterable[str]) -> Tensor:
            pairs = [(self.weights.rows[name], self.history[name]) for name in names]
            return penalties.distance_to_history([now for now, _ in pairs], [mean for _, mean in pairs])

        return self.weights.total(distance)

    @torch.no_grad()
    def _pull_to_history(self) -> None:
        """Adds the gradient of w ‖θ − θ̄‖², θ̄ the mean of the weights at all earlier steps (Salimans et al. 2016, section 3.3).

        It needs no data, so that it is added to the reduced gradient and costs no second backward.
        """
        if self.options.historical_averaging is None:
            return
        for name, parameter in self.weights.rows.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - self.history[name], alpha=2 * self.options.historical_averaging)

    @torch.no_grad()
    def _note_history(self, bad: Tensor) -> None:
        """Takes the weights into the mean before they step; those of a turn that does not step stand for the next turn."""
        if self.options.historical_averaging is None:
            return
        steps = self.history["steps"].add_(1 - bad)
        for name, parameter in self.weights.rows.items():
            self.history[name].add_((parameter - self.history[name]) * (1 - bad) / steps.clamp_min(1))

    @torch.no_grad()
    def _remember(self, bad: Tensor, images: float) -> None:
        """Brings the memory up to date with what all ranks observed; a turn that did not step leaves no trace."""
        if not self._observed:
            return
        names = sorted(self._observed)
        means = torch.stack([torch.stack(self._observed[name]).mean() for name in names])
        if self.ranks > 1:
            dist.all_reduce(means)
            means /= self.ranks
        for name, new in self._update(self._memory, dict(zip(names, means, strict=True)), images).items():
            self._memory[name].copy_(torch.where(bad.bool(), self._memory[name], new))

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
    def _average(self) -> None:
        if self.ema is None or self.averages is None:
            return
        averages: list[Tensor] = [*self.averages.rows.values()]
        values: list[Tensor] = [*self.parameters]
        for average, value in zip(self.ema.buffers(), self.module.buffers(), strict=True):
            if value.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        weight = self._pace["weight"]
        if isinstance(weight, Tensor):  # a lerp of many takes no weight from the device
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(averages, steps)
        else:
            torch._foreach_lerp_(averages, values, weight)
        for name, norm in self._averaged_norms:
            norm.train()(self.averages.full(name))  # a power iteration, which makes the mean of unit vectors one again
            norm.eval()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every process has all weights, the average's too, so that each may use them as it likes; all call it together."""
        self.settle()
        several = [weights for weights in (self.weights, self.averages) if weights is not None]
        for weights in several:
            weights.gather()
        try:
            yield
        finally:
            for weights in several:
                weights.spread()

    @contextmanager
    def evaluating(self, average: bool = True) -> Iterator[nn.Module]:
        """The module to judge or to use: the EMA where there is one and `average` is true, in evaluation mode, without gradients."""
        self.settle()
        assert self.weights.whole, f"{self.name}: one process uses it, and all have to have `gathered` it"
        module = self.ema if self.ema is not None and average and self._average_has_begun() else self.module
        training = module.training
        module.eval()
        for layer in self._statistics:
            layer.track_running_stats = True  # evaluation reads the running statistics of the module itself
        try:
            with torch.no_grad(), self.autocast():
                yield module
        finally:
            module.train(training)
            self._hold_still()

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """All that this process keeps of what a checkpoint holds, by part and name."""
        self.settle()
        names = {id(p): name for name, p in self.weights.rows.items()}
        moments = {
            f"{names[id(parameter)]}/{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        found = {"": self.module.state_dict() | self.weights.rows, "optimizer": moments}
        if self.ema is not None and self.averages is not None:
            found["ema"] = self.ema.state_dict() | self.averages.rows
        for part, kept in {"memory": self.memory, "history": self.history}.items():
            if kept:
                found[part] = kept
        return {part: {name: tensor.detach() for name, tensor in tensors.items()} for part, tensors in found.items()}

    def _weight_of(self, part: str, name: str, tensor: Tensor) -> str | None:
        """The weight that a tensor has the rows of."""
        weight = name.rpartition("/")[0] if part == "optimizer" else name
        return weight if weight in self.weights.rows and tensor.ndim else None

    @torch.no_grad()
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds, by part and name: weights, EMA and the optimizer's moments.

        As references; of weights that are spread over the processes, which must all call it, as copies with values on rank 0 alone.
        """
        found = self._state()
        for part, tensors in found.items():
            for name, tensor in tensors.items():
                if (weight := self._weight_of(part, name, tensor)) is not None:
                    tensors[name] = self.weights.complete(weight, tensor)
        return found

    @torch.no_grad()
    def take(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Has on every process what rank 0 has in some or all of what `tensors` gave, and may have written to; all call it together."""
        state = self._state()
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                if self._weight_of(part, name, tensor) is not None:
                    self.weights.take(state[part][name], tensor)
                else:
                    from_first(tensor)

    @torch.no_grad()
    def _begin_average(self) -> None:
        if self.averages is not None and self.options.ema is not None and self.options.ema.from_zero:
            torch._foreach_zero_([*self.averages.rows.values()])

    def _average_has_begun(self) -> bool:
        """Whether an average from zero has had its first step; what weights of zero compute is nothing."""
        from_zero = self.options.ema is not None and self.options.ema.from_zero
        return not from_zero or (self.ema is not None and any(bool(p.any()) for p in self.ema.parameters()))

    @torch.no_grad()
    def restart_average(self) -> None:
        """The average and the history begin again from the weights."""
        if self.ema is not None and self.averages is not None:
            torch._foreach_copy_([*self.averages.rows.values()], [*self.weights.rows.values()])
            for average, value in zip(self.ema.buffers(), self.module.buffers(), strict=True):
                average.copy_(value)
            self._begin_average()
        for name, kept in self.history.items():
            kept.copy_(self.weights.rows[name] if name != "steps" else torch.zeros_like(kept))

    def numbers(self) -> dict[str, Any]:
        """The part of the state that is no tensor: the loss scaler's five numbers, where there is one."""
        return dict(self.scaler.state_dict())

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Restores what `numbers` gave."""
        if numbers:
            self.scaler.load_state_dict(numbers)


class Turn:
    """What a player may do in its turn: one backward for each micro-batch, the last of which reduces over the ranks."""

    def __init__(self, player: Player, images: int, batch: float, micro_batches: int) -> None:
        self.player, self.micro_batches, self.left = player, micro_batches, micro_batches
        self.images, self.batch = images, batch
        self.norm = torch.zeros(())
        self.finished = False

    def accumulate(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yields the micro-batches; all forwards and backwards but the last one's stay local."""
        for batch in batches:
            wrapped, left = self.player.wrapped, self.left
            with wrapped.no_sync() if left > 1 and isinstance(wrapped, DistributedDataParallel) else nullcontext():
                yield batch
            assert self.left == left - 1, f"{self.player.name}: a micro-batch needs exactly one backward"

    def backward(self, loss: Tensor) -> None:
        """The gradient of `loss`, a mean over the rows of one micro-batch."""
        self.left -= 1
        self.player.scaler.scale(loss / self.micro_batches).backward()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Moves the weights, once."""
        if not self.finished:
            self.norm, self.finished = self.player.finish(self.images, self.batch), True
