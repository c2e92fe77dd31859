"""The layering and the one-door rule of docs/design.md, read from the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gandist"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each layer may import itself and the layers before it. A module not named here is in no layer, which is a fault.
LAYERS = [
    {"seeding", "recipe", "health", "constants"},
    {"data"},
    {"losses", "penalties", "augment", "networks", "tensors", "weights", "palette", "maps", "pairs", "windows"},
    {"exported"},
    {"metrics"},
    {"optimizers", "sharding"},
    {"player"},
    {"game"},
    {"games"},
    {"pictures", "plots"},
    {"evaluations"},
    {"checkpoint", "log", "cores", "launcher"},
    {"inputs"},
    {"check", "run", "restored", "sample", "neighbours", "predict", "masks", "describe", "inspection", "export"},
    {"steps"},
    {"train", "evaluate", "memory"},
    {"cli"},
    {"__main__", "__init__"},
]
DOORS = {
    "accelerate": {"launcher"},
    "webdataset": {"data/pack", "data/plain", "data/sources/shards"},
    "fsspec": {"data/storage"},
    "wandb": {"log"},
    "safetensors": {"tensors"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
    "matplotlib": {"plots"},
    "torchmetrics": {"metrics/distribution", "metrics/segmentation"},
    "pickle": set(),
    "dill": set(),
    "joblib": set(),
    "shelve": set(),
    "marshal": set(),
}
NEVER = {"torch.load", "torch.save", "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list",
         "save_state", "load_state", "eval", "exec", "unsafe_load", "full_load", "prepare"}  # fmt: skip


def module(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def layer(name: str) -> int:
    top = name.split("/")[0]
    return next(number for number, names in enumerate(LAYERS) if top in names)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "gandist"}
    return found


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_file_imports_only_from_its_own_layer_and_those_before(path: Path) -> None:
    here = layer(module(path))
    for name in imports(path):
        if name.startswith("gandist."):
            other = name.removeprefix("gandist.").replace(".", "/")
            assert layer(other) <= here, f"{module(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_third_party_comes_in_by_its_one_door(path: Path) -> None:
    for name in imports(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or module(path) in doors, f"{module(path)} imports {name}; its door is {doors}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_nothing_pickles_evaluates_or_prepares(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in NEVER, f"{module(path)}:{node.lineno} calls {called}"
            assert called.rpartition(".")[2] not in NEVER - {"eval"}, f"{module(path)}:{node.lineno} calls {called}"


def test_data_does_not_know_a_game_and_the_loop_does_not_know_which() -> None:
    for path in FILES:
        if module(path).split("/")[0] not in ("games", "__init__"):
            assert not any(name.startswith("gandist.games.") for name in imports(path)), module(path)
