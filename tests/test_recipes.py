"""Every recipe in configs/ loads, describes itself and takes two steps; and so do the verbs that go with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SIZES, packed, rows, scenes_on_disk
from PIL import Image

from gandist.check import read_recipe
from gandist.data.dataset import Dataset
from gandist.describe import sides

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, fashion: Path) -> Callable[[str], Path]:
    """A small dataset like the one that a recipe names: points, waveforms, colour photos of 64 pixels, or the garments."""
    folder = tmp_path_factory.mktemp("datasets")
    source = np.random.default_rng(0)

    def like(name: str) -> Path:
        values = {
            "grid-25": source.normal(size=(300, 2, 1)).astype(np.float32),
            "photos": source.integers(0, 256, (300, 64, 64, 3), np.uint8),
        }.get(name)
        if name == "strings":
            lines = [",".join(["label", *map(str, range(1024))])]
            lines += [",".join(map(str, [number % 6, *source.uniform(-1, 1, 1024).round(3)])) for number in range(300)]
            (folder / "strings.csv").write_text("\n".join(lines))
            packed(folder / "strings.csv", folder / name)
            return folder / name
        if name in ("cifar10", "svhn"):
            images, labels = source.integers(0, 256, (240, 32, 32, 3), np.uint8), np.arange(240) % 10
            parts = {"x_train": images[:200], "y_train": labels[:200], "x_test": images[200:], "y_test": labels[200:]}
            np.savez(folder / f"{name}.npz", **parts)
            packed(folder / f"{name}.npz", folder / name)
            return folder / name
        if name in ("stanford", "fashion-scenes"):
            if (folder / name).exists():
                return folder / name
            scenes_on_disk(folder / f"{name}-source", 40, SIZES if name == "stanford" else [(64, 64)])
            return packed(folder / f"{name}-source", folder / name).store.local or folder
        if values is None:
            return fashion
        if not (folder / name).exists():
            np.save(folder / f"{name}.npy", values)
            packed(folder / f"{name}.npy", folder / name)
        return folder / name

    return like


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps_and_its_header_tells_how_to_run_it(
    gandist: Callable, datasets: Callable[[str], Path], tmp_path: Path, path: Path
) -> None:
    named = yaml.safe_load(path.read_text())["data"]
    data = datasets(Path(named["path"]).name)
    fewer = ["data.subset={per_class: 2, seed: 0}"] if "subset" in named else []
    batch = min(16, read_recipe(path, [f"data.path={data}", *fewer]).run.batch)
    options = [
        f"data.path={data}",
        *fewer,
        f"run.folder={tmp_path / 'run'}",
        f"run.batch={batch}",
        f"run.images={2 * batch}",
    ]
    options += ["run.log_every=1", "run.evaluate_images=null"]  # scores need weights that a test does not fetch
    result = gandist("train", path, *options)
    assert result.code == 0, result.err
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    head = path.read_text().split("\ndata:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in ("command:", "hardware"):
        assert word in head, f"{path.name} does not say its {word}"


def test_describe_counts_parameters_and_arithmetic_without_memory(
    gandist: Callable, recipe: Callable, fashion: Path
) -> None:
    path = recipe(generator="{kind: dcgan, width: 64}", discriminator="{kind: dcgan, width: 64}")
    result = gandist("describe", path)
    assert result.code == 0
    loaded = read_recipe(path, [])
    spec = Dataset(fashion).spec("train")
    for name, side in loaded.game.sides(spec).items():  # type: ignore[attr-defined]
        count = sum(p.numel() for p in side.build().parameters())
        assert re.search(rf"{name} +{count:,} parameters", result.out)
    # the generator: noise 8 to 128·7·7, then 4×4 to 64 at 7×7 inputs, then 4×4 to 1 at 14×14 inputs
    macs = 8 * 128 * 49 + 49 * 16 * 128 * 64 + 196 * 16 * 64
    assert sides(loaded, spec)["generator"].forward_flops == 2 * macs


def test_inspect_shows_each_rank_its_share_of_the_same_draw(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    path = recipe()
    keys = {}
    for ranks in (1, 2, 4):
        result = gandist("inspect", path, "--draws", "3:5", "--world-size", ranks, "--out", tmp_path / "sheet.png")
        assert result.code == 0, result.err
        found = re.findall(r"draw (\d) rank (\d): (.*)", result.out)
        assert len(found) == 2 * ranks
        keys[ranks] = [key for _, _, line in found for key in line.split()]
    assert keys[1] == keys[2] == keys[4]
    assert len(set(keys[1])) == 32
    assert Image.open(tmp_path / "sheet.png").size[0] >= 140
    assert gandist("inspect", path, "--draws", "5:3").code == 2


def test_sample_gives_single_images_by_seed_from_a_run_or_a_checkpoint(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    assert gandist("train", recipe()).code == 0
    folder = tmp_path / "run" / "checkpoints" / "images_000000160"
    pictures = {}
    for name, run, seed in (("a", tmp_path / "run", 1), ("b", folder, 1), ("c", folder, 2)):
        result = gandist("sample", run, "--count", 70, "--seed", seed, "--single", "--out", tmp_path / name)
        assert result.code == 0, result.err
        pictures[name] = [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]
    assert len(pictures["a"]) == 70
    assert pictures["a"] == pictures["b"] != pictures["c"]
    assert Image.open(tmp_path / "a" / "000069.png").size == (28, 28)


def test_sample_needs_a_run(gandist: Callable, tmp_path: Path) -> None:
    result = gandist("sample", tmp_path)
    assert result.code == 2
    assert "name a run folder" in result.err


def test_every_verb_explains_itself(gandist: Callable) -> None:
    listed = gandist("--help")
    assert listed.code == 0
    for verb in ("pack", "index", "verify", "describe", "inspect", "train", "sample", "predict"):
        assert verb in listed.out
        assert gandist(verb, "--help").code == 0
    assert gandist("trian").code == 2


def test_weights_at_the_start_depend_on_seed_and_player_alone(
    gandist: Callable, recipe: Callable, fashion: Path
) -> None:
    from gandist.run import make_players

    def weights(*overrides: str) -> dict[str, torch.Tensor]:
        loaded = read_recipe(recipe(), list(overrides))
        players = make_players(loaded, Dataset(fashion).spec("train"), torch.device("cpu"), "fp32")
        return {name: player.parameters[0].detach() for name, player in players.items()}

    first, second = weights(), weights("game.discriminator.network={kind: dcgan, width: 4}")
    assert torch.equal(first["generator"], second["generator"])
    assert not torch.equal(first["generator"], weights("run.seed=1")["generator"])
