"""What a stranger's checkpoint, evaluation or exported folder may not do, and what a clumsy user must not lose."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gandist import checkpoint, load
from gandist.recipe import Failure, InputError
from gandist.tensors import unpacked

FEW = ["game.scores.features={kind: pixels, size: 7}", "game.scores.fakes=64", "game.scores.reals=64"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def trained(gandist: Callable, recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A run folder after two steps."""
    monkeypatch.setenv("GANDIST_CACHE", str(cache))
    assert gandist("train", recipe(images=32), "game.conditional=projection").code == 0
    return tmp_path / "run"


def rewrite(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the recipe in a checkpoint, with a manifest that agrees: what a stranger would send."""
    (folder,) = checkpoint.folders(run / "checkpoints")
    state = json.loads((folder / "state.json").read_text())
    change(state["recipe"]["game"])
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Features(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_a_program_that_a_checkpoint_names_runs_only_where_the_user_names_it(
    gandist: Callable, trained: Path, tmp_path: Path
) -> None:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Features()), file)
    (tmp_path / "program.pt").write_bytes(file.getvalue())
    named = {
        "kind": "torchscript",
        "path": str(tmp_path / "program.pt"),
        "sha256": hashlib.sha256(file.getvalue()).hexdigest(),
    }
    rewrite(trained, lambda game: game["scores"].update(features=named))
    for overrides in ([], ["game.scores.features.size=28"], [f"game.scores.features.path={named['path']}"]):
        result = gandist("evaluate", trained, *FEW[1:], *overrides)
        assert result.code == 2, result.err
        assert "asks for a TorchScript program" in result.err
    whole = "game.scores.features={" + ", ".join(f"{key}: {value}" for key, value in named.items()) + "}"
    assert gandist("evaluate", trained, *FEW[1:], whole).code == 0
    assert gandist("evaluate", trained, *FEW).code == 0


def test_scores_that_name_files_which_are_gone_keep_nobody_from_the_weights(
    gandist: Callable, trained: Path, tmp_path: Path
) -> None:
    gone = {"kind": "exported", "path": str(tmp_path / "gone")}
    rewrite(trained, lambda game: game["scores"].update(features=gone))
    assert gandist("sample", trained, "--count", 4).code == 0
    assert gandist("export", trained, tmp_path / "exported").code == 0
    refused = gandist("evaluate", trained, *FEW[1:])
    assert refused.code == 2
    assert f"the recipe of {checkpoint.find(trained).folder}" in refused.err
    assert "recipe.yaml" not in refused.err
    assert gandist("evaluate", trained, *FEW).code == 0
    rewrite(trained, lambda game: game["scores"].update(features={"kind": "of another version"}))
    assert gandist("sample", trained, "--count", 4).code == 0


@pytest.mark.parametrize("game", ["x", [], None, {"kind": "gan", "loss": 3}])
def test_a_recipe_that_is_none_is_named_in_one_sentence(gandist: Callable, trained: Path, game: Any) -> None:
    (folder,) = checkpoint.folders(trained / "checkpoints")
    state = json.loads((folder / "state.json").read_text())
    state["recipe"]["game"] = game
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for verb in (["sample", trained], ["export", trained, trained.parent / "out"], ["evaluate", trained]):
        result = gandist(*verb)
        assert result.code in (1, 2)
        assert "Traceback" not in result.err
        assert "pydantic" not in result.err
        assert str(folder) in result.err


def test_no_verb_writes_into_a_checkpoint(gandist: Callable, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.find(trained).folder
    before = sorted(path.name for path in folder.iterdir())
    for verb in (
        ["sample", trained, "--out", folder / "here"],
        ["export", trained, folder / "exported"],
        ["evaluate", trained, *FEW, "--out", folder],
    ):
        result = gandist(*verb)
        assert result.code == 2, result.err
        assert "lies in the checkpoint" in result.err
    monkeypatch.chdir(folder)
    assert gandist("sample", ".", "--count", 4).code == 0
    assert gandist("evaluate", ".", *FEW).code == 0
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (trained / "samples" / f"{folder.name}_seed_0" / "grid.png").exists()
    assert checkpoint.find(trained).folder.samefile(folder)


def test_a_picture_that_is_there_is_not_written_over(gandist: Callable, trained: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "grid.png").write_text("precious")
    result = gandist("sample", trained, "--count", 4, "--out", mine)
    assert result.code == 2
    assert "holds grid.png already" in result.err
    assert (mine / "grid.png").read_text() == "precious"
    for more in ([], ["--class", "3"], ["--class", "5", "--truncation", "0.5"]):
        assert gandist("sample", trained, "--count", 4, *more).code == 0
    assert len([*(trained / "samples").glob("images_*_seed_0*")]) == 3


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("game.augment={kind: diffaugment, p: 0.3}", "augment.p"),
        ("game.scores.features={kind: pixels, sise: 3}", "scores.features.sise"),
    ],
)
def test_an_unknown_key_of_an_optional_choice_is_named(
    gandist: Callable, recipe: Callable, override: str, key: str
) -> None:
    result = gandist("describe", recipe(), override)
    assert result.code == 2
    assert f"`game.{key}`: unknown key" in result.err


def test_pixels_whose_covariance_would_not_fit_are_refused(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    import numpy as np
    from conftest import packed

    np.save(tmp_path / "large.npy", np.zeros((16, 160, 160, 1), np.uint8))
    packed(tmp_path / "large.npy", tmp_path / "large")
    path = recipe(data=tmp_path / "large")
    result = gandist("describe", path, "game.scores.features={kind: pixels}")
    assert result.code == 2
    assert "25,600 values a sample" in result.err
    assert gandist("describe", path, "game.scores.features={kind: pixels, size: 16}").code == 0
    same = "game.scores={features: {kind: pixels, size: 16}, parzen: {validation: train, test: train}}"
    assert "chooses σ as well" in gandist("describe", path, same).err


def test_players_larger_than_all_memory_are_refused_before_anything_is_written(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    result = gandist("train", recipe(), "game.generator.network={kind: mlp, width: 65536, depth: 64}")
    assert result.code == 2
    assert "`game.generator.network`: its weights, gradients and moments are" in result.err
    assert not (tmp_path / "run").exists()


EVALUATIONS: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "an endless number": b'{"scores": {"fd": 1' + b"0" * 400 + b'}, "protocol": {}}',
    "no scores": b'{"scores": {}, "protocol": {}}',
    "a word": b'{"scores": {"fd": "nan"}, "protocol": {}}',
    "too long": b" " * (5 << 20),
}


@pytest.mark.parametrize("kind", [*EVALUATIONS, "a pipe", "other names"])
def test_what_is_no_evaluation_is_refused_before_anything_is_computed(
    gandist: Callable, trained: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "before.json"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "other names":
        assert gandist("evaluate", trained, *FEW).code == 0
        (written,) = (trained / "evaluations").glob("*.json")
        values = json.loads(written.read_text())
        values["scores"] = {"fd": 1.0}
        path.write_text(json.dumps(values))
        shutil.rmtree(trained / "evaluations")
    else:
        path.write_bytes(EVALUATIONS[kind])
    result = gandist("evaluate", trained, *FEW, "--against", path)
    assert result.code == 2
    assert "is no evaluation" in result.err
    assert "pydantic" not in result.err
    assert not (trained / "evaluations").exists()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E8M0", "F4", "X"])
def test_numbers_that_no_file_of_ours_holds_are_refused(dtype: str) -> None:
    header = json.dumps({"w": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}).encode()
    with pytest.raises(Failure, match=r"^w\.safetensors: "):
        unpacked(len(header).to_bytes(8, "little") + header + bytes(8), Path("w.safetensors"))


def test_a_loaded_player_refuses_what_it_cannot_take(gandist: Callable, trained: Path, tmp_path: Path) -> None:
    assert gandist("export", trained, tmp_path / "out").code == 0
    generator = load(tmp_path / "out")
    for labels in (torch.tensor([0, 10]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.zeros(2, 1).long()):
        with pytest.raises(InputError, match="whole numbers"):
            generator(generator.noise(2), labels)  # type: ignore[operator]
    with pytest.raises(InputError, match="cannot be read"):
        load("\0")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config.pop("digest")
    config["weights"]["bytes"] = 2**62
    config["digest"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Failure, match="not the 4,611,686,018,427,387,904 bytes"):
        load(tmp_path / "out")


def test_an_evaluation_that_cannot_be_computed_costs_the_scores_and_not_the_run(
    gandist: Callable, recipe: Callable, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gandist.games import scores

    def fails(*_: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(scores, "score", fails)
    result = gandist("train", recipe("other", images=32), "run.evaluate_images=16", *FEW)
    assert result.code == 0, result.err
    assert "could not be scored: RuntimeError: can't allocate memory" in result.err
    assert checkpoint.find(tmp_path / "other").state.images == 32
