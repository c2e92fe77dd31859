"""A trained player to be used outside its run: safetensors, JSON and a card, as the Hugging Face hub lays them out; ONNX."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from gandist import checkpoint
from gandist.data.dataset import write_atomically
from gandist.exported import (
    CONFIG,
    SEAL,
    WEIGHTS,
    Config,
    DiscriminatorConfig,
    Exported,
    Generator,
    GeneratorConfig,
    digest,
    folded,
    load,
)
from gandist.game import Classifying, Game, Generative, Segmenting, Side
from gandist.networks import DiscriminatorOptions, GeneratorOptions, Judged
from gandist.networks.noise import Noise
from gandist.recipe import Failure, InputError, TransformOptions, suggestion
from gandist.restored import restored
from gandist.seeding import derive
from gandist.tensors import FileRecord, packed, record

CARD, ONNX = "README.md", "model.onnx"
_MAX_ONNX = 2**31 - 2**24  # a protobuf ends at 2 GiB, and the graph stands beside the weights
_ROWS = 1, 5  # of the batches that ONNX is compared in; neither is the one that it was traced with
_TOLERANCE = 1e-3


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
    out = checkpoint.outside(out.resolve())
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is there already; name a new folder, or an empty one")
    game, players = restored(found, torch.device("cpu"))
    if isinstance(game, Segmenting):
        raise InputError(
            f"{found.folder}: players of the game {game.kind} are not exported yet; `gandist predict` uses the segmenter, whose "
            f"weights are {'segmenter.ema' if players['segmenter'].ema is not None else 'segmenter'}.safetensors"
        )
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
    tensors = folded(module).state_dict()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Failure(f"{found.folder}: `{name}` of the {player} is not finite once its spectral norm is folded in")
    weights = packed(tensors, {"format": "pt"})
    config = _config(found, game, game.sides(found.state.spec)[player], player, record(weights))
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
            config = config.model_copy(update={"onnx": record((aside / ONNX).read_bytes())})
            _write_config(aside, config)
        parameters = sum(weight.numel() for weight in model.parameters())
        write_atomically(aside / CARD, _card(config, game, parameters).encode())
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Written(config, sorted(path.name for path in out.iterdir()), parameters, differences)


def _write_config(folder: Path, config: Config) -> None:
    values = {name: value for name, value in config.model_dump(mode="json").items() if value is not None}
    text = json.dumps(values | {SEAL: digest(values)}, indent=1, ensure_ascii=False)
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
    recognises = isinstance(game, Classifying) and isinstance(options, DiscriminatorOptions)
    conditional = getattr(game, "conditional", None) if not isinstance(game, Classifying) else None
    asked = isinstance(game, Generative) and isinstance(options, GeneratorOptions) and game.classes(spec) is not None
    values: dict[str, Any] = {
        "game": game.kind,
        "image": spec.image,
        "signal": spec.signal if spec.image is None else None,
        "range": transform.range if spec.image is not None and transform.mean is None else None,
        "conditional": conditional,
        "label": spec.label if conditional is not None or recognises or asked else None,
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
        if isinstance(game, Classifying):
            values["classifies"] = game.classifies()
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
        if config.classifies is not None:
            call = f"verdict = discriminator({config.sample}s)\nprobabilities = verdict.classes.softmax(1)  # (16, {config.classes})\nfake = 1 - verdict.logits.sigmoid()  # (16,)"
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
