"""A trained player outside its run, as `gandist export` wrote it: read without running code that its folder names."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gandist.data.dataset import Hex, ImageSpec, LabelSpec, SignalSpec
from gandist.networks import (
    AnyDiscriminator,
    AnyGenerator,
    Classifies,
    Conditioning,
    DiscriminatorOptions,
    GeneratorOptions,
    Judged,
    Shape,
)
from gandist.networks.noise import BLOCK, Noise
from gandist.networks.starting import Normed
from gandist.recipe import Failure, InputError, Section, wording
from gandist.tensors import FileRecord, fill, unpacked

CONFIG, WEIGHTS, SEAL = "config.json", "model.safetensors", "digest"
_MAX_CONFIG = 4 << 20
Options = TypeVar("Options", GeneratorOptions, DiscriminatorOptions)


class Config(Section):
    """The contents of `config.json`, its own digest apart: what the weights mean, and where they come from."""

    gandist_export: Literal[1] = 1
    game: Annotated[str, Field(max_length=100)]
    player: Literal["generator", "discriminator"]
    image: ImageSpec | None = None
    signal: SignalSpec | None = None
    range: tuple[float, float] | None = None  # of the values of the data; None where no range was asked for
    conditional: Conditioning | None = None
    label: LabelSpec | None = None  # the classes that it is conditioned on
    average: bool  # of the weights, or the last ones
    images: Annotated[int, Field(ge=0, lt=2**62)]  # that it was trained on
    checkpoint: Hex
    weights: FileRecord
    onnx: FileRecord | None = None
    versions: dict[str, str]  # that trained it

    @model_validator(mode="after")
    def _describes_one_kind_of_sample(self) -> Config:
        if (self.image is None) == (self.signal is None):
            raise ValueError("holds either `image` or `signal`")
        if self.image is not None and None in (self.image.height, self.image.width):
            raise ValueError("`image` needs a height and a width")
        if self.conditional is not None and self.label is None:
            raise ValueError("`conditional` and `label` come together")
        return self

    @property
    def sample(self) -> str:
        """`image` or `signal`."""
        return "image" if self.image is not None else "signal"

    @property
    def shape(self) -> Shape:
        """(C, H, W) of an image or (C, L) of a signal."""
        if self.signal is not None:
            return self.signal.channels, self.signal.length
        assert self.image is not None
        assert self.image.height is not None
        assert self.image.width is not None
        return self.image.channels, self.image.height, self.image.width

    @property
    def classes(self) -> int | None:
        """The classes that it is conditioned on; None where it is not."""
        return self.label.classes if self.label is not None else None


def _unnormed(network: Options) -> Options:
    """The network without its spectral norm, which is folded into its weights."""
    return network.model_copy(update={"spectral_norm": False}) if getattr(network, "spectral_norm", False) else network


class GeneratorConfig(Config):
    """Of a generator."""

    player: Literal["generator"] = "generator"
    network: AnyGenerator
    noise: Noise

    @property
    def asks_label(self) -> bool:
        """Whether it is called with labels."""
        return self.classes is not None

    def build(self) -> nn.Module:
        """The network with initial weights, and with plain ones where it was trained under a spectral norm."""
        return _unnormed(self.network).build(self.noise.width, self.shape, self.classes)


class DiscriminatorConfig(Config):
    """Of a discriminator."""

    player: Literal["discriminator"] = "discriminator"
    network: AnyDiscriminator
    classifies: Classifies | None = None  # a classifier of the classes of `label`, as the game `semi` has it

    @model_validator(mode="after")
    def _has_classes_to_tell(self) -> DiscriminatorConfig:
        if (self.label is not None) != (self.conditional is not None or self.classifies is not None):
            raise ValueError("`label` comes with `conditional` or `classifies`")
        if self.conditional is not None and self.classifies is not None:
            raise ValueError("`conditional` and `classifies` contradict each other")
        return self

    @property
    def asks_label(self) -> bool:
        """Whether it is called with labels: an auxiliary classifier names the class itself."""
        return self.conditional == "projection"

    def build(self) -> nn.Module:
        """The network with initial weights, and with plain ones where it was trained under a spectral norm."""
        network = _unnormed(self.network)
        if self.classifies is not None:
            assert self.classes is not None
            return network.build_classifier(self.shape, self.classes, self.classifies)
        return network.build(self.shape, self.classes, self.conditional)


def _labels(config: GeneratorConfig | DiscriminatorConfig, labels: Tensor | None) -> tuple[Tensor, ...]:
    if config.asks_label != (labels is not None):
        asked = f"takes labels (B,) in 0 … {(config.classes or 0) - 1}" if config.asks_label else "takes no labels"
        raise InputError(f"this {config.player} {asked}; call it with {'both' if config.asks_label else 'one tensor'}")
    if labels is None:
        return ()
    if torch.compiler.is_compiling():  # a graph has no branches for values
        return (labels,)
    if (
        labels.dtype != torch.int64
        or labels.ndim != 1
        or bool(((labels < 0) | (labels >= (config.classes or 0))).any())
    ):
        raise InputError(f"labels must be whole numbers (B,) in 0 … {(config.classes or 0) - 1}, int64")
    return (labels,)


class Generator(nn.Module):
    """A trained generator: noise (B, noise) and, where it is conditional, labels (B,), to samples (B, *shape), images in −1 … 1."""

    def __init__(self, config: GeneratorConfig, network: nn.Module) -> None:
        super().__init__()
        self.config, self.network = config, network

    def noise(self, count: int, seed: int = 0) -> Tensor:
        """(count, noise) as it was trained with, where its weights are; drawn on the CPU, so that every device gets the same.

        These are the rows that `gandist sample --seed` takes on a CPU.
        """
        if count < 1:
            raise InputError(f"noise for {count} samples: ask for 1 or more")
        blocks = [self.config.noise.block(n, seed, torch.device("cpu")) for n in range(-(-count // BLOCK))]
        return torch.cat(blocks)[:count].to(next(self.parameters()))

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        width = self.config.noise.width
        if noise.ndim != 2 or noise.shape[1] != width:
            raise InputError(f"noise of shape {tuple(noise.shape)}: this generator takes (B, {width}); see `noise()`")
        made: Tensor = self.network(noise, *_labels(self.config, labels))
        return made


class Discriminator(nn.Module):
    """A trained discriminator: samples (B, *shape) and, where it judges by projection, labels (B,), to `Judged`."""

    def __init__(self, config: DiscriminatorConfig, network: nn.Module) -> None:
        super().__init__()
        self.config, self.network = config, network

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Judged:
        if samples.shape[1:] != self.config.shape:
            shape = ", ".join(map(str, self.config.shape))
            raise InputError(f"samples of shape {tuple(samples.shape)}: this discriminator takes (B, {shape})")
        judged: Judged = self.network(samples, *_labels(self.config, labels))
        return judged


Exported = Generator | Discriminator


def load(folder: str | Path) -> Exported:
    """The player of a folder that `gandist export` wrote: in evaluation mode, without gradients of its weights, on the CPU.

    Raises InputError where there is none or its config is not to be trusted, and Failure where its weights are damaged. Runs no
    code that the folder names and takes no memory beyond the size of its files.
    """
    folder = Path(folder)
    config = _read_config(folder)
    data = _read(folder / WEIGHTS, config.weights)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # its initial weights are nobody's business
        built = folded(config.build())
    fill(built.state_dict(), unpacked(data, folder / WEIGHTS), folder / WEIGHTS)
    # As a player holds it: another layout is other kernels, with other roundings.
    built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = Generator(config, built) if isinstance(config, GeneratorConfig) else Discriminator(config, built)
    return model.eval().requires_grad_(False)


def _open(path: Path, most: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # through links: the hub's cache consists of them
            raise InputError(f"{path}: not a plain file")
        with path.open("rb") as file:
            return file.read(min(most, status.st_size) + 1)  # a config may say any number
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{path}: cannot be read: {reason}; make the folder with `gandist export RUN {path.parent}`"
        ) from None


def digest(values: dict[str, Any]) -> str:
    """SHA-256 of a config's values, in the one way to write them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read_config(folder: Path) -> GeneratorConfig | DiscriminatorConfig:
    """The config of a folder, whose network is not larger than its weights; raises InputError."""
    path = folder / CONFIG
    raw = _open(path, _MAX_CONFIG)
    if len(raw) > _MAX_CONFIG:
        raise InputError(f"{path}: is too long for a config; the limit is {_MAX_CONFIG} bytes")
    try:
        values = json.loads(raw)
        if not isinstance(values, dict):
            raise ValueError("must be a mapping")
        seal, kind = values.pop(SEAL, None), values.get("player")
        sealed = digest(values)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a config: {error}") from None
    if values.get("gandist_export") != 1:
        raise InputError(f"{path}: not one that this version of gandist wrote; export the run anew")
    config_class = DiscriminatorConfig if kind == "discriminator" else GeneratorConfig
    try:
        config = config_class.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {wording(first)}") from None
    if seal != sealed:
        raise InputError(f"{path}: was edited: its `{SEAL}` is not that of its other values; export the run anew")
    for fault in config.network.faults(config.shape):
        raise InputError(f"{path}: `network`: {fault}")
    with torch.device("meta"):  # a config cannot ask for more memory than the weights have
        needed = sum(tensor.numel() * tensor.element_size() for tensor in folded(config.build()).state_dict().values())
    if needed > config.weights.bytes:
        raise InputError(f"{path}: describes a larger network than the {config.weights.bytes:,} bytes of {WEIGHTS}")
    return config


def _read(path: Path, record: FileRecord) -> bytes:
    data = _open(path, record.bytes)
    if len(data) != record.bytes:
        raise Failure(f"{path}: not the {record.bytes:,} bytes that {CONFIG} names")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise Failure(f"{path}: damaged: its SHA-256 is not the one in {CONFIG}")
    return data


def folded(module: nn.Module) -> nn.Module:
    """The module, with the plain weights that its spectral norms and its weight norms give in evaluation mode."""
    module.eval()
    for part in [*module.modules()]:
        for name, child in [*part.named_children()]:
            if isinstance(child, Normed):
                setattr(part, name, child.plain())
    for part in [*module.modules()]:
        if parametrize.is_parametrized(part):
            for name in [*cast(nn.ModuleDict, part.parametrizations)]:
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
    return module
