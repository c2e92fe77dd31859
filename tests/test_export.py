"""An exported player computes what its checkpoint does, needs nothing beside its folder, and is refused where it was changed."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from conftest import ENVIRONMENT, ROOT, packed
from torch import Tensor

from gandist import checkpoint, export, load
from gandist import exported as exported_players
from gandist.game import Generative
from gandist.recipe import Failure, InputError
from gandist.restored import restored

MLP = "{kind: mlp, width: 16}"
RESNET = "{kind: resnet, width: 4, attention: 14, spectral_norm: true}"
JUDGE = "{kind: mlp, width: 16, depth: 1, pieces: 2, hidden_dropout: 0.5, minibatch: {kernels: 3, dimensions: 2}}"
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "mlp": (MLP, JUDGE, ("game.noise_distribution=uniform",)),
    "mlp by class": (
        MLP,
        "{kind: mlp, width: 16, spectral_norm: true}",
        ("game.conditional=projection", "game.generator.ema=null"),
    ),
    "dcgan": ("{kind: dcgan, width: 4}", "{kind: dcgan, width: 4, spectral_norm: true}", ()),
    "dcgan by class": ("{kind: dcgan, width: 4}", "{kind: dcgan, width: 4}", ("game.conditional=classifier",)),
    "resnet by class": (RESNET, "{kind: resnet, width: 4, spectral_norm: false}", ("game.conditional=projection",)),
}


@pytest.fixture
def train(gandist: Callable, recipe: Callable) -> Callable[..., Path]:
    """A run folder after a few steps."""

    def run(generator: str = MLP, discriminator: str = MLP, *overrides: str, **options: Any) -> Path:
        path = recipe(generator=generator, discriminator=discriminator, images=48, **options)
        result = gandist("train", path, "run.precision=fp32", *overrides)  # what an exported player computes in
        assert result.code == 0, result.err
        return path.parent / path.stem

    return run


@pytest.fixture
def exported(gandist: Callable, train: Callable, tmp_path: Path) -> Path:
    """The folder of a conditional generator, whose run is gone."""
    run = train(MLP, MLP, "game.conditional=projection")
    assert gandist("export", run, tmp_path / "exported").code == 0
    shutil.rmtree(run)
    return tmp_path / "exported"


def labels(model: exported_players.Exported, rows: int) -> tuple[Tensor, ...]:
    return (torch.arange(rows) % 10,) if model.config.asks_label else ()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_computes_what_the_checkpoint_does_bit_for_bit(
    gandist: Callable, train: Callable, tmp_path: Path, kind: str
) -> None:
    generator, discriminator, overrides = KINDS[kind]
    run = train(generator, discriminator, *overrides)
    found = checkpoint.find(run)
    game, players = restored(found, torch.device("cpu"))
    assert isinstance(game, Generative)
    for player in players:
        result = gandist("export", run, tmp_path / player, "--player", player)
        assert result.code == 0, result.err
    made = load(tmp_path / "generator")
    assert isinstance(made, exported_players.Generator)
    noise = made.noise(100, seed=3)
    assert torch.equal(noise, torch.cat([game.latents(block, 3, noise.device) for block in (0, 1)])[:100])
    noise = noise[:6]
    images = made(noise, *labels(made, 6))
    assert images.shape == (6, 1, 28, 28)
    with players["generator"].evaluating() as average:
        assert torch.equal(images, average(noise, *labels(made, 6)))
    if made.config.average:
        last = players["generator"].module.eval()
        assert not torch.equal(images, last(noise, *labels(made, 6)))
    assert made.config.average == ("game.generator.ema=null" not in overrides)

    judge = load(tmp_path / "discriminator")
    assert isinstance(judge, exported_players.Discriminator)
    judged = judge(images, *labels(judge, 6))
    with players["discriminator"].evaluating() as module:
        expected = module(images, *labels(judge, 6))
    for one, other in zip(judged, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert (judged.classes is not None) == ("classifier" in "".join(overrides))
    for model in (made, judge):
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())
        assert model.config.checkpoint == found.digest
        assert model.config.images == 48


def test_a_folder_is_laid_out_as_the_hub_wants_it(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((exported / "config.json").read_text())
    assert config["label"]["classes"] == len(config["label"]["names"]) == 10
    assert (config["image"], config["range"]) == ({"height": 28, "width": 28, "channels": 1}, [-1.0, 1.0])
    assert (config["network"]["kind"], config["noise"]["width"]) == ("mlp", 8)
    assert str(exported.parent) not in (exported / "config.json").read_text() + (exported / "README.md").read_text()
    _, front, _ = (exported / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["library_name"] == "gandist"
    assert {"gan", "generator", "mlp"} <= {*card["tags"]}
    with safetensors.safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {*file.keys()} == {*load(exported).network.state_dict()}


def test_spectral_norms_are_folded_into_plain_weights(gandist: Callable, train: Callable, tmp_path: Path) -> None:
    run = train("{kind: dcgan, width: 4}", "{kind: dcgan, width: 4, spectral_norm: true}")
    assert gandist("export", run, tmp_path / "out", "--player", "discriminator").code == 0
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert not any("parametrizations" in name for name in tensors)
    largest = torch.linalg.matrix_norm(tensors["head.logit.weight"], ord=2)
    assert largest == pytest.approx(1, abs=0.05)


SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_snippets_of_the_page_and_of_the_cards_run_where_there_is_nothing_but_the_folders(
    gandist: Callable, train: Callable, tmp_path: Path
) -> None:
    run = train()
    place = tmp_path / "elsewhere"
    for folder, player in (("exported", "generator"), ("exported-discriminator", "discriminator")):
        assert gandist("export", run, place / folder, "--player", player).code == 0
    shutil.rmtree(run)
    code = ["import gandist, sys", "assert 'torch' not in sys.modules, 'importing gandist is fast'", *SNIPPETS]
    for folder in sorted(place.iterdir()):
        _, snippet, _ = re.split(r"```python\n|```\n", (folder / "README.md").read_text(), maxsplit=2)
        code += [f"import os; os.chdir({str(folder)!r})", snippet]
    code += ["print(*images.shape, *noise.shape, *logits.shape, images.abs().max().item() <= 1)"]
    assert len(SNIPPETS) == 2
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=place, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert process.stdout.strip() == "16 1 28 28 16 8 16 True", process.stderr


def seal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a config as somebody who knows how its digest is made."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["digest"]
    change(values)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values | {"digest": digest}))


def put(folder: Path, data: bytes) -> None:
    """Other weights, with the digest that they have."""
    (folder / "model.safetensors").write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seal(folder, lambda values: values.update(weights=record))


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return change


def sealed(**values: Any) -> Callable[[Path], None]:
    return lambda folder: seal(folder, lambda config: config.update(values))


def flip(at: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[at] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    return change


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def link_to_a_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


CHANGES: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "a flipped bit of the header": (flip(20), Failure, "damaged"),
    "a flipped bit of a weight": (flip(-5), Failure, "damaged"),
    "a byte more": (lambda f: (f / "model.safetensors").open("ab").write(b"x"), Failure, "not the .* bytes that config.json names"),
    "a byte less": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]), Failure, "not the .* bytes"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), InputError, "cannot be read"),
    "a device": (link_to_a_pipe, InputError, "not a plain file"),
    "no config": (lambda f: (f / "config.json").unlink(), InputError, "config.json: cannot be read: .*gandist export RUN"),
    "another noise": (edit('"normal"', '"uniform"'), InputError, "was edited"),
    "another name of a class": (edit("Trouser", "Anvil"), InputError, "was edited"),
    "an unknown key": (edit('"game"', '"games"'), InputError, "`game"),
    "no JSON": (edit("{", "("), InputError, "not a config"),
    "lists in lists": (lambda f: (f / "config.json").write_text("[" * 100_000), InputError, "not a config"),
    "five megabytes": (lambda f: (f / "config.json").write_bytes(b" " * (5 << 20)), InputError, "too long"),
    "another version": (sealed(gandist_export=2), InputError, "not one that this version"),
    "a network of its own": (sealed(network={"kind": "os.system"}), InputError, "'os.system' is not a generator"),
    "a network of 14 GB": (sealed(network={"kind": "mlp", "width": 60_000}), InputError, "describes a larger network"),
    "noise of 65,536": (sealed(noise={"width": 65536, "distribution": "normal"}), InputError, "describes a larger network"),
    "a million classes": (sealed(label={"classes": 1_000_000}), InputError, "describes a larger network"),
    "no classes": (sealed(label=None), InputError, "come together"),
    "images that it cannot make": (sealed(network={"kind": "signal"}), InputError, "is for signals"),
    "an endless number": (edit('"images": 48', '"images": 1e999'), InputError, "`images`"),
    "a pickle": (lambda f: put(f, pickle.dumps(Bomb()) + bytes(1 << 20)), Failure, "not a safetensors file"),
    "other tensors": (lambda f: put(f, safetensors.torch.save({"x": torch.zeros(1 << 18)})), Failure, "another architecture"),
    "a weight that is no number": (lambda f: put(f, safetensors.torch.save({n: t.log() if t.is_floating_point() else t for n, t in safetensors.torch.load_file(f / "model.safetensors").items()})), Failure, "is not finite"),
    "weights of another shape": (lambda f: put(f, safetensors.torch.save({n: t.flatten() for n, t in safetensors.torch.load_file(f / "model.safetensors").items()})), Failure, "and the network has"),
}  # fmt: skip


def test_a_changed_or_hostile_folder_is_refused_by_rule(exported: Path, tmp_path: Path) -> None:
    load(exported)
    for name, (change, kind, rule) in CHANGES.items():
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(exported, folder)
        change(folder)
        with pytest.raises(kind, match=rule):
            load(folder)
    assert not Path("exploded").exists()


def test_loading_draws_nothing_from_the_generator_of_the_program(exported: Path) -> None:
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    load(exported)
    assert torch.equal(torch.randn(4), expected)


def test_a_wrong_call_says_what_is_taken(exported: Path) -> None:
    generator = load(exported)
    assert isinstance(generator, exported_players.Generator)
    for call, rule in (
        (lambda: generator(generator.noise(2)), "takes labels"),
        (lambda: generator(torch.zeros(2, 9), torch.zeros(2).long()), "takes \\(B, 8\\)"),
        (lambda: generator.noise(0), "1 or more"),
    ):
        with pytest.raises(InputError, match=rule):
            call()
    assert torch.equal(generator.noise(70, seed=1)[:3], generator.noise(3, seed=1))
    assert not torch.equal(generator.noise(3, seed=1), generator.noise(3, seed=2))


def test_a_folder_that_holds_something_is_left_as_it_is(gandist: Callable, train: Callable, tmp_path: Path) -> None:
    run = train()
    before = sorted(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for words, rule in (
        ((run, tmp_path / "mine"), "is there already"),
        ((run, tmp_path / "mine" / "thesis.txt"), "is there already"),
        ((run, tmp_path / "new", "--player", "generatr"), "did you mean `generator`"),
        ((tmp_path / "nowhere", tmp_path / "new"), "does not exist"),
    ):
        result = gandist("export", *words)
        assert (result.code, rule in result.err) == (2, True), result.err
    assert [*(tmp_path / "mine").iterdir()] == [tmp_path / "mine" / "thesis.txt"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(tmp_path / "mine")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert gandist("export", run, tmp_path / "empty").code == 0
    load(tmp_path / "empty")


def test_without_its_packages_onnx_is_refused_before_anything_is_made(
    gandist: Callable, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = gandist("export", run, tmp_path / "out", "--onnx")
    assert result.code == 2
    assert "onnxruntime: `pip install 'gandist[onnx]'`" in result.err
    assert not (tmp_path / "out").exists()


def need_onnx() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="pip install 'gandist[onnx]'")
    return pytest.importorskip("onnxruntime", reason="pip install 'gandist[onnx]'")


GRAPHS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "mlp": ("discriminator", MLP, JUDGE, ("game.conditional=classifier",)),
    "dcgan": ("generator", "{kind: dcgan, width: 2}", MLP, ("game.conditional=classifier",)),
    "resnet": ("generator", "{kind: resnet, width: 2, attention: 14, spectral_norm: true}", MLP, ("game.conditional=projection",)),
    "r3gan": ("generator", "{kind: r3gan, width: 4, blocks: 1, group_size: 2}", MLP, ()),
    "signal": ("generator", "{kind: signal, width: 2}", MLP, ()),
}  # fmt: skip


@pytest.mark.parametrize("kind", GRAPHS)
def test_onnx_computes_what_pytorch_does_for_any_number_of_rows(
    gandist: Callable, train: Callable, tmp_path: Path, kind: str
) -> None:
    onnxruntime = need_onnx()
    player, generator, discriminator, overrides = GRAPHS[kind]
    options: dict[str, Any] = {}
    if kind == "signal":
        np.save(tmp_path / "waves.npy", np.random.default_rng(0).normal(size=(20, 2, 50)).astype(np.float32))
        packed(tmp_path / "waves.npy", tmp_path / "waves")
        options["data"] = tmp_path / "waves"
    run = train(generator, discriminator, *overrides, **options)
    result = gandist("export", run, tmp_path / "out", "--player", player, "--onnx")
    assert result.code == 0, result.err
    differences = [float(found) for found in re.findall(r"differ by at most (\S+) for", result.out)]
    assert len(differences) == 2
    assert max(differences) < 1e-5
    model = load(tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    for rows in (2, 9):
        first = torch.randn(rows, 8) if player == "generator" else torch.rand(rows, *model.config.shape) * 2 - 1
        inputs = [first, *labels(model, rows)]
        names = [one.name for one in session.get_inputs()]
        assert names == ["noise" if player == "generator" else "image", "labels"][: len(inputs)]
        expected = export._tensors(model(*inputs))
        computed = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        for one, other in zip(computed, expected, strict=True):
            assert np.allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)


def test_onnx_that_differs_is_refused_and_nothing_is_left_behind(
    gandist: Callable, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_onnx()
    run = train()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(export, "_TOLERANCE", -1.0)
    result = gandist("export", run, tmp_path / "out", "--onnx")
    assert result.code == 1
    assert "differs from PyTorch by" in result.err
    assert sorted(tmp_path.iterdir()) == before
