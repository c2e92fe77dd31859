"""What the launcher was told and what it did: processes, device, precision, and the agreement to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy

from gandist.cores import keep_memory, launched, share_cores
from gandist.recipe import InputError
from gandist.sharding import Sharding

Precision = Literal["fp32", "bf16", "fp16"]

_PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_PRECISIONS: dict[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


def ranks() -> int:
    """How many processes the launcher started, read from its environment before any of them has joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _launch_words(line: list[str], names: list[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a command line, whichever of its spellings it is."""
    for place, name in enumerate(names):
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return line[place + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and names[place + 1 : place + 2] == ["launch"]:
            return line[place + 2 :]
    return None


def told() -> dict[str, Any]:
    """What the user set for `mixed_precision` and `num_processes`, on `accelerate launch` or in its config file.

    Accelerate hands its default `no` on as if it had been chosen, so the command line of the launcher is read instead.
    """
    for process in psutil.Process().parents():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        names = [Path(word).name for word in line]
        words = _launch_words(line, names)
        if words is None:
            continue
        arguments = vars(launch_command_parser().parse_known_args(words)[0])
        settings: dict[str, Any] = {}
        file = Path(arguments["config_file"] or default_config_file)
        if file.is_file() and not arguments["cpu"]:
            loaded = yaml.safe_load(file.read_text()) or {}
            settings = {"mixed_precision": loaded.get("mixed_precision"), "num_processes": loaded.get("num_processes")}
        for name in ("mixed_precision", "num_processes"):
            settings[name] = arguments[name] if arguments[name] is not None else settings.get(name)
        return {name: value for name, value in settings.items() if value is not None}
    return {}


def bf16_in_hardware(device: torch.device) -> bool:
    """Whether bf16 products are computed by the device itself; emulated ones took 45 times as long as fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def choose_precision(wanted: str, device: torch.device, settings: dict[str, Any]) -> tuple[Precision, str]:
    """The precision and the reason; raises InputError where recipe and launcher contradict each other."""
    chosen = str(settings.get("mixed_precision", os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))).lower()
    if chosen not in _PRECISIONS:
        raise InputError(f"accelerate's mixed_precision {chosen!r} is not served; use one of {', '.join(_PRECISIONS)}")
    explicit = "mixed_precision" in settings or chosen != "no"
    if wanted != "auto":
        if explicit and _PRECISIONS[chosen] != wanted:
            raise InputError(
                f"`run.precision`: {wanted} contradicts mixed_precision {chosen!r} given to accelerate; "
                "leave one of them out, or write `auto`"
            )
        return wanted, "as the recipe says"  # type: ignore[return-value]
    if explicit:
        return _PRECISIONS[chosen], f"as accelerate was told (mixed_precision {chosen})"
    if bf16_in_hardware(device):
        return "bf16", "the hardware computes in bf16"
    return "fp32", "the hardware does not compute in bf16"


def refuse_plugins() -> None:
    """Raises InputError for what Accelerate was told to use and gandist does not serve."""
    for variable, name in _PLUGINS.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate was told to use {name}, which gandist does not serve; use `--multi_gpu` (DDP), or `--use_fsdp --fsdp_version 2`"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if backend.upper() != "NO":
        raise InputError(
            f"accelerate was told to use the dynamo backend {backend}, which gandist does not serve; leave it out"
        )


def wanted_sharding() -> Sharding | None:
    """What `accelerate launch` was told of FSDP, read by Accelerate's own plugin; raises InputError for what is not served."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(f"accelerate was told to use FSDP {version}; gandist serves FSDP2: add `--fsdp_version 2`")
    try:
        plugin = FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise InputError(f"accelerate was told to use FSDP, and its settings are refused: {error}") from None
    device, blocks = "all is kept on the device", "networks name their own blocks"
    whole = "`--fsdp_reshard_after_forward` says what is kept whole"
    unserved = {
        "offload_params": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), device),
        "activation_checkpointing_offload": (plugin.activation_checkpointing_offload, device),
        "auto_wrap_policy": (os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper() != "NO_WRAP", blocks),
        "ignored_modules": (plugin.ignored_modules is not None, blocks),
        "sharding_strategy": (os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD") not in ("FULL_SHARD", "1"), whole),
        "forward_prefetch": (
            os.environ.get("FSDP_FORWARD_PREFETCH", "false").lower() == "true",
            "FSDP2 orders what it gathers",
        ),
    }
    for name, (told, reason) in unserved.items():
        if told:
            raise InputError(
                f"accelerate was told `--fsdp_{name}`, which gandist does not serve: {reason}; leave it out"
            )
    return Sharding(bool(plugin.reshard_after_forward), bool(plugin.activation_checkpointing))


@dataclass(frozen=True)
class World:
    """All processes of a run, as one of them sees them."""

    device: torch.device
    rank: int
    ranks: int
    precision: Precision
    reason: str
    control: Any = None  # a gloo group for decisions, so that no decision waits for a GPU
    sharding: Sharding | None = None

    @classmethod
    def join(cls, precision: str, accumulate: int = 1) -> World:
        """Joins the processes that the launcher started; raises InputError where it did not do as told."""
        refuse_plugins()
        sharding = wanted_sharding()  # before Accelerate reads the same
        settings = told()
        accumulation = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
        if accumulation not in (1, accumulate):
            raise InputError(
                f"`run.accumulate`: {accumulate} contradicts accelerate's gradient accumulation of {accumulation}"
            )
        _stop_when_the_launcher_dies()
        share_cores()
        keep_memory()
        # Without `cpu=True` a machine without accelerator gets separate single processes, and nobody says so.
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")
        count = accelerator.num_processes
        expected = max(ranks(), int(settings.get("num_processes", 1)))
        if count != expected:
            raise InputError(
                f"accelerate was told to start {expected} processes, and {count} runs; "
                "on a machine without GPU, too, that takes `accelerate launch --multi_gpu --num_processes N` (not --cpu)"
            )
        chosen, reason = choose_precision(precision, accelerator.device, settings)
        if sharding is not None and chosen == "fp16":
            raise InputError(
                "fp16 is not served beside FSDP, where each process would scale its losses on its own; use bf16 or fp32"
            )
        control = dist.new_group(backend="gloo") if count > 1 else None
        sharding = sharding if count > 1 else None  # one process has all rows
        return cls(accelerator.device, accelerator.process_index, count, chosen, reason, control, sharding)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def lead(self, act: Callable[[], int]) -> int:
        """Rank 0 acts; every rank gets its number, or ends with it, the others without a word of their own."""
        error: Exception | None = None
        answer = torch.zeros(2, dtype=torch.int64)
        if self.leads:
            try:
                answer[1] = act()
            except Exception as caught:  # noqa: BLE001 - raised again below, once the other ranks know
                error = caught
                answer[0] = 2 if isinstance(caught, InputError) else 1
        if self.ranks > 1:
            dist.broadcast(answer, 0, group=self.control)
        if error is not None:
            raise error
        if answer[0]:
            raise SystemExit(int(answer[0]))
        return int(answer[1])

    def any(self, *here: bool) -> list[bool]:
        """Of each, whether it holds on any rank."""
        flags = torch.tensor([int(flag) for flag in here])
        if self.ranks > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in flags]

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in the order of the ranks."""
        if self.ranks == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(lengths, torch.tensor([len(text.encode())]), group=self.control)
        longest = max(1, *(int(length) for length in lengths))
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.ranks)]
        dist.all_gather(padded, torch.nn.functional.pad(data, (0, longest - len(data))), group=self.control)
        return [bytes(p[: int(n)].tolist()).decode() for p, n in zip(padded, lengths, strict=True)]

    def agree(self, what: str, mine: int) -> None:
        """Raises InputError on every rank unless all have the same number, a digest of `what`."""
        first = torch.tensor(mine)
        if self.ranks > 1:
            dist.broadcast(first, 0, group=self.control)
        differs = int(first) != mine
        if self.any(differs)[0]:
            here = f"rank {self.rank} differs from rank 0" if differs else "another rank differs from this one"
            raise InputError(
                f"the processes do not have the same {what}: {here}; start all with the same recipe and data"
            )

    def leave(self) -> None:
        """Ends the process group, where there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Stop:
    """A request to stop. The handlers set a flag and do nothing else; the ranks agree on it between two steps.

    SIGTERM and SIGUSR1 are what clusters send before they take a machine away; the first Ctrl-C counts as well.
    """

    def __init__(self, world: World) -> None:
        self.world, self.requested = world, False
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._note_once)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _note_once(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, trouble: bool = False) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any has trouble; all ranks get the same answers."""
        stopping, troubled = self.world.any(self.requested, trouble)
        if stopping:
            self.requested = True  # and never False: a request that came meanwhile would be lost
        return stopping, troubled

    def close(self) -> None:
        """Gives the signals back; on the way out after a request they are ignored instead.

        A second request must not turn 75 into a death by signal, and the interpreter takes handlers down, but not SIG_IGN.
        """
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_IGN if self.requested else handler)


def _stop_when_the_launcher_dies() -> None:
    """Linux: a launcher that is killed takes its ranks along by SIGTERM, so that they save instead of living on alone."""
    if sys.platform == "linux" and os.getppid() in [process.pid for process in launched()]:
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM)
