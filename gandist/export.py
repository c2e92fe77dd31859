"""A trained player outside its run: safetensors, JSON and a card, as the Hugging Face hub lays them out; ONNX; and the way back."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import stat
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

import safetensors.torch
import torch
import yaml
from pydantic import Field, SerializeAsAny, ValidationError, WrapValidator, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gandist import checkpoint
from gandist.checkpoint import FileRecord
from gandist.data.dataset import Hex, ImageSpec, LabelSpec, SignalSpec, write_atomically
from gandist.game import BLOCK, Game, Side, network
from gandist.networks import Conditioning, DiscriminatorOptions, GeneratorOptions, Judged, Shape
from gandist.recipe import Failure, InputError, Section, TransformOptions, suggestion, wording
from gandist.sample import restored
from gandist.seeding import derive

CONFIG, WEIGHTS, CARD, ONNX = "config.json", "model.safetensors", "README.md", "model.onnx"
_MAX_CONFIG = 4 << 20
_MAX_ONNX = 2**31 - 2**24  # a protobuf ends at 2 GiB, and the graph stands beside the weights
_ROWS = 1, 5  # of the batches that ONNX is compared in; neither is the one that it was traced with
_TOLERANCE = 1e-3
_HASH = "digest"
Options = TypeVar("Options", GeneratorOptions, DiscriminatorOptions)


class Noise(Section):
    """What a generator takes: rows of `width` numbers of variance 1."""

    width: Annotated[int, Field(ge=1, le=65536)]
    distribution: Literal["normal", "uniform"]


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
        if (self.conditional is None) != (self.label is None):
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
    network: Annotated[SerializeAsAny[GeneratorOptions], WrapValidator(network("generator", GeneratorOptions))]
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
    network: Annotated[
        SerializeAsAny[DiscriminatorOptions], WrapValidator(network("discriminator", DiscriminatorOptions))
    ]

    @property
    def asks_label(self) -> bool:
        """Whether it is called with labels: an auxiliary classifier names the class itself."""
        return self.conditional == "projection"

    def build(self) -> nn.Module:
        """The network with initial weights, and with plain ones where it was trained under a spectral norm."""
        return _unnormed(self.network).build(self.shape, self.classes, self.conditional)


def _labels(config: GeneratorConfig | DiscriminatorConfig, labels: Tensor | None) -> tuple[Tensor, ...]:
    if config.asks_label != (labels is not None):
        asked = f"takes labels (B,) in 0 … {(config.classes or 0) - 1}" if config.asks_label else "takes no labels"
        raise InputError(f"this {config.player} {asked}; call it with {'both' if config.asks_label else 'one tensor'}")
    return () if labels is None else (labels,)


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
        blocks = []
        for block in range(-(-count // BLOCK)):
            source = torch.Generator().manual_seed(derive(seed, "samples", block * BLOCK))
            wanted: dict[str, Any] = {"generator": source, "device": "cpu", "dtype": torch.float32}
            if self.config.noise.distribution == "uniform":
                blocks.append((2 * torch.rand(BLOCK, self.config.noise.width, **wanted) - 1) * 3**0.5)
            else:
                blocks.append(torch.randn(BLOCK, self.config.noise.width, **wanted))
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
        built = _folded(config.build())
    _fill(built, data, folder / WEIGHTS)
    # As a player holds it: another layout is other kernels, with other roundings.
    built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = Generator(config, built) if isinstance(config, GeneratorConfig) else Discriminator(config, built)
    return model.eval().requires_grad_(False)


def _open(path: Path, most: int) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # through links: the hub's cache consists of them
            raise InputError(f"{path}: not a plain file")
        with path.open("rb") as file:
            return file.read(most + 1)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; make the folder with `gandist export RUN {path.parent}`"
        ) from None


def _digest(values: dict[str, Any]) -> str:
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
        seal, kind = values.pop(_HASH, None), values.get("player")
        sealed = _digest(values)
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
        raise InputError(f"{path}: was edited: its `{_HASH}` is not that of its other values; export the run anew")
    for fault in config.network.faults(config.shape):
        raise InputError(f"{path}: `network`: {fault}")
    with torch.device("meta"):  # a config cannot ask for more memory than the weights have
        needed = sum(tensor.numel() * tensor.element_size() for tensor in _folded(config.build()).state_dict().values())
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


def _fill(module: nn.Module, data: bytes, path: Path) -> None:
    """Copies the tensors of a file into a module, which must have exactly these; raises Failure."""
    checkpoint.check_header(path, data)
    try:
        found = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise Failure(f"{path}: not a safetensors file: {error}") from None
    into = module.state_dict()
    for name in sorted(found.keys() ^ into.keys()):
        raise Failure(f"{path}: `{name}` is only in {'the file' if name in found else 'the network'}: not its weights")
    with torch.no_grad():
        for name, tensor in into.items():
            if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
                raise Failure(
                    f"{path}: `{name}` is {found[name].dtype} {tuple(found[name].shape)}, and the network has "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(found[name]).all()):
                raise Failure(f"{path}: `{name}` is not finite")
            tensor.copy_(found[name])


def _folded(module: nn.Module) -> nn.Module:
    """The module, with the plain weights that its parametrisations (spectral norms) give in evaluation mode."""
    module.eval()
    for part in [*module.modules()]:
        if parametrize.is_parametrized(part):
            for name in [*cast(nn.ModuleDict, part.parametrizations)]:
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
    return module


class Written(NamedTuple):
    """What an export wrote, and how far ONNX is from PyTorch by rows of the batch."""

    config: GeneratorConfig | DiscriminatorConfig
    files: list[str]
    parameters: int
    differences: dict[int, float]


def export(found: checkpoint.Checkpoint, out: Path, player: str = "generator", onnx: bool = False) -> Written:
    """Writes a player of a checkpoint into `out`, which must be new or empty, and reads it back before it stands there.

    Raises InputError where the player or `out` is not one, Failure where what was written computes something else; then `out` is
    as it was.
    """
    if onnx:
        _need_onnx()
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is there already; name a new folder, or an empty one")
    game, players = restored(found, torch.device("cpu"))
    if player not in players:
        raise InputError(f"--player {player!r}: not a player of {found.folder}{suggestion(player, [*players])}")
    module = players[player].ema or players[player].module.eval()
    source = torch.Generator().manual_seed(0)
    examples = [
        torch.randn(example.shape, generator=source) if example.is_floating_point() else example
        for example in game.examples(found.state.spec)[player]
    ]
    with torch.no_grad():
        expected = _tensors(module(*examples))
    tensors = {name: tensor.detach().contiguous() for name, tensor in _folded(module).state_dict().items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Failure(f"{found.folder}: `{name}` of the {player} is not finite once its spectral norm is folded in")
    weights = safetensors.torch.save(tensors, {"format": "pt"})
    config = _config(found, game, game.sides(found.state.spec)[player], player, _record(weights))
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}.{uuid.uuid4().hex}.tmp"
    aside.mkdir()
    try:
        write_atomically(aside / WEIGHTS, weights)
        _write_config(aside, config)
        model, differences = load(aside), {}
        with torch.no_grad():
            pairs = zip(_tensors(model.network(*examples)), expected, strict=True)
            if not all(torch.allclose(again, before, rtol=1e-5, atol=1e-6) for again, before in pairs):
                raise Failure(f"{found.folder}: the {player} read back from {WEIGHTS} computes something else")
        if onnx:
            differences = _write_onnx(model, aside / ONNX)
            config = config.model_copy(update={"onnx": _record((aside / ONNX).read_bytes())})
            _write_config(aside, config)
        parameters = sum(weight.numel() for weight in model.parameters())
        write_atomically(aside / CARD, _card(config, game, parameters).encode())
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Written(config, sorted(path.name for path in out.iterdir()), parameters, differences)


def _record(data: bytes) -> FileRecord:
    return FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _write_config(folder: Path, config: Config) -> None:
    values = {name: value for name, value in config.model_dump(mode="json").items() if value is not None}
    text = json.dumps(values | {_HASH: _digest(values)}, indent=1, ensure_ascii=False)
    write_atomically(folder / CONFIG, f"{text}\n".encode())


def _config(
    found: checkpoint.Checkpoint, game: Game, side: Side, player: str, weights: FileRecord
) -> GeneratorConfig | DiscriminatorConfig:
    """What a player is, from its game; raises InputError where it is neither a generator nor a discriminator."""
    spec, options = found.state.spec, getattr(side.options, "network", None)
    try:
        transform = TransformOptions.model_validate(found.state.recipe["data"]["transform"])
    except (KeyError, TypeError, ValueError):
        raise Failure(f"{found.folder}: its recipe is not one of this version: `data.transform`") from None
    conditional = getattr(game, "conditional", None)
    values: dict[str, Any] = {
        "game": game.kind,
        "image": spec.image,
        "signal": spec.signal if spec.image is None else None,
        "range": transform.range if spec.image is not None and transform.mean is None else None,
        "conditional": conditional,
        "label": spec.label if conditional is not None else None,
        "average": side.options.ema is not None,
        "images": found.state.images,
        "checkpoint": found.digest,
        "weights": weights,
        "versions": found.state.versions,
        "network": options,
    }
    if isinstance(options, GeneratorOptions):
        noise = Noise(
            width=game.examples(spec)[player][0].shape[1],
            distribution=getattr(game, "noise_distribution", "normal"),
        )
        return GeneratorConfig(**values, noise=noise)
    if isinstance(options, DiscriminatorOptions):
        return DiscriminatorConfig(**values)
    raise InputError(f"--player {player!r}: neither a generator nor a discriminator, and nothing else can be exported")


def _tensors(made: Tensor | Judged) -> tuple[Tensor, ...]:
    """What a player computes: samples, or logits (B,) and, of an auxiliary classifier, class logits (B, K)."""
    if isinstance(made, Tensor):
        return (made,)
    return (made.logits,) if made.classes is None else (made.logits, made.classes)


def _card(config: GeneratorConfig | DiscriminatorConfig, game: Game, parameters: int) -> str:
    """The README of a folder, with the hub's metadata; names of classes are strangers' text and stay in the config."""
    generates, size = isinstance(config, GeneratorConfig), ", ".join(map(str, config.shape))
    front: dict[str, Any] = {
        "library_name": "gandist",
        "license": "unknown",
        "tags": ["gandist", "gan", "pytorch", config.player, config.network.kind]
        + ["onnx"] * (config.onnx is not None),
    }
    if generates and config.sample == "image" and config.classes is None:
        front["pipeline_tag"] = "unconditional-image-generation"
    asked = (
        f", of {config.classes} classes by number (`label` in config.json has their names)" if config.classes else ""
    )
    spans = f" in {config.range[0]:g} … {config.range[1]:g}" if config.range is not None else ""
    labels = f"labels = torch.arange(16) % {config.classes}"
    code = ["import gandist", "import torch", "", f'{config.player} = gandist.load(".")  # the folder of this file']
    if isinstance(config, GeneratorConfig):
        code.append(f"noise = generator.noise(16, seed=0)  # (16, {config.noise.width}), {config.noise.distribution}")
        call = f"{config.sample}s = generator(noise{', labels' * config.asks_label})  # (16, {size})"
    else:
        code.append(f"{config.sample}s = torch.zeros(16, {size})  # yours{spans.replace('…', 'to')}")
        call = f"logits = discriminator({config.sample}s{', labels' * config.asks_label}).logits  # (16,), positive for real"
    code += [labels] * config.asks_label + [call]
    if "torch." not in "".join(code):
        code.remove("import torch")
    # What it was measured with is no part of how it came about, and may name files of this machine.
    recipe = game.model_dump(mode="json", exclude_defaults=True, exclude={"scores"})
    training = yaml.safe_dump({"game": recipe}, sort_keys=False, allow_unicode=True)
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            f"# A {config.player} of {config.sample}s ({size}), trained with gandist",
            f"A `{config.network.kind}` network of {parameters:,} parameters for {config.sample}s of shape ({size}){spans}{asked}: "
            f"{'the average of its weights' if config.average else 'its weights'} after {config.images:,} images.",
            "",
            "## Use",
            "```python",
            *code,
            "```",
            "`pip install gandist` gives `gandist.load`, which checks the weights against `config.json` and unpickles nothing.",
            *(["`model.onnx` computes the same in other runtimes."] if config.onnx is not None else []),
            "",
            "## Training",
            f"With gandist {config.versions.get('gandist', '')}, whose defaults stand where this says nothing:",
            "```yaml",
            training.rstrip(),
            "```",
            "",
            "## Licence",
            "The licence of the data that it was trained on is unknown to gandist, and so is its own: name both before you publish it.",
            "",
        ]
    )


# ---- ONNX


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--onnx needs {', '.join(missing)}: `pip install 'gandist[onnx]'`, or leave it out")


class _Plain(nn.Module):
    """A player that gives tensors alone, as a graph does."""

    def __init__(self, player: nn.Module) -> None:
        super().__init__()
        self.player = player

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _tensors(self.player(*inputs))


def _inputs(model: Exported, rows: int) -> dict[str, Tensor]:
    """Random inputs of a player by name."""
    config = model.config
    if isinstance(model, Generator):
        inputs = {"noise": model.noise(rows, seed=rows)}
    else:
        source = torch.Generator().manual_seed(derive(rows, "export"))
        inputs = {config.sample: 2 * torch.rand(rows, *config.shape, generator=source) - 1}
    if config.asks_label:
        inputs["labels"] = torch.arange(rows) % (config.classes or 1)
    return inputs


def _write_onnx(model: Exported, path: Path) -> dict[int, float]:
    """Writes a player as one ONNX file with any number of rows; the largest differences from PyTorch by rows of the batch.

    Differences are those of values up to 1, and relative to the largest value beyond. Raises Failure above 1e-3.
    """
    import onnxruntime  # type: ignore[import-untyped, import-not-found, unused-ignore]

    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    if size > _MAX_ONNX:
        raise InputError(f"--onnx: {size / 2**30:.1f} GiB of weights, and an ONNX file ends at 2 GiB; leave it out")
    plain, inputs, rows = _Plain(model).eval(), _inputs(model, 2), torch.export.Dim("batch")
    with torch.no_grad(), _silence():
        outputs = [model.config.sample] if isinstance(model, Generator) else ["logits", "classes"]
        try:
            program = torch.onnx.export(
                plain,
                tuple(inputs.values()),
                input_names=[*inputs],
                output_names=outputs[: len(plain(*inputs.values()))],
                dynamic_shapes=(tuple({0: rows} for _ in inputs),),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            kind = model.config.network.kind
            raise Failure(
                f"--onnx: torch cannot write `{kind}` as ONNX: {str(error).strip().splitlines()[0]}"
            ) from None
        assert program is not None
        program.save(str(path), external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    differences = {}
    for count in _ROWS:
        inputs = _inputs(model, count)
        with torch.no_grad():
            expected = plain(*inputs.values())
        computed = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        differences[count] = max(
            float((torch.from_numpy(one) - other).abs().max() / other.abs().max().clamp(min=1))
            for one, other in zip(computed, expected, strict=True)
        )
        if not differences[count] <= _TOLERANCE:
            raise Failure(
                f"--onnx: for {count} rows it differs from PyTorch by {differences[count]:.1e}, more than {_TOLERANCE:g}; "
                "nothing was written"
            )
    return differences


@contextmanager
def _silence() -> Iterator[None]:
    """Without what torch's exporter says of packages that nobody asked for and of its own deprecations."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
