"""A checkpoint is whole or refused by name; the one before it is used; no pickle is read, whatever it is called."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ENVIRONMENT, ROOT, tensor_files

from gandist import checkpoint
from gandist.recipe import Failure


@pytest.fixture
def trained(gandist: Callable, recipe: Callable, tmp_path: Path) -> Path:
    """A run of 160 images with checkpoints at 80 and 160."""
    assert gandist("train", recipe(), "run.save_images=80", "run.keep_checkpoints=3").code == 0
    return tmp_path / "run"


def last(folder: Path) -> Path:
    return checkpoint.folders(folder / "checkpoints")[0]


def forge(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file and makes the manifest agree, as somebody with intent would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploded",)


def test_a_checkpoint_holds_everything_of_the_run_and_no_pickle(trained: Path) -> None:
    folder = last(trained)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "manifest.json", "state.json", "generator.safetensors", "generator.ema.safetensors",
        "generator.optimizer.safetensors", "discriminator.safetensors", "discriminator.optimizer.safetensors",
    }  # fmt: skip
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["images"]) == (10, 160)
    moments = safetensors.torch.load_file(folder / "generator.optimizer.safetensors")
    assert {name.rpartition("/")[2] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(value == 10 for name, value in moments.items() if name.endswith("/step"))
    for path in folder.iterdir():
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(path.read_bytes())  # noqa: S301 - it must not be one


def flip(folder: Path) -> None:
    path = folder / "generator.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def empty_tail(folder: Path) -> None:
    path = folder / "generator.ema.safetensors"  # what a power cut leaves of a file that was renamed but not synced
    path.write_bytes(path.read_bytes()[:-4096] + b"\0" * 4096)


def link(folder: Path) -> None:
    path = folder / "discriminator.safetensors"
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


DAMAGES = {
    "a flipped bit": (flip, "generator.safetensors: damaged"),
    "a zeroed tail": (empty_tail, "generator.ema.safetensors: damaged"),
    "a missing file": (lambda f: (f / "discriminator.optimizer.safetensors").unlink(), "discriminator.optimizer.safetensors: cannot be read"),
    "a cut file": (lambda f: os.truncate(f / "generator.safetensors", 100), "generator.safetensors: 100 bytes, and the manifest says"),
    "a pickle in place of tensors": (lambda f: (f / "generator.safetensors").write_bytes(pickle.dumps(Bomb())), "generator.safetensors: "),
    "a pickle beside them": (lambda f: (f / "optimizer.bin").write_bytes(pickle.dumps(Bomb())), "optimizer.bin: not in the manifest"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: cannot be read"),
    "a manifest of nonsense": (lambda f: (f / "manifest.json").write_text('{"files": {"../../x": 3}}'), "manifest.json: `files"),
    "a link out of the folder": (link, "discriminator.safetensors: not a plain file"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    gandist: Callable, recipe: Callable, trained: Path, damage: str
) -> None:
    act, message = DAMAGES[damage]
    intact = tensor_files(last(trained))
    act(last(trained))
    refused = gandist("verify", trained)
    assert refused.code == 1
    assert message in refused.err
    assert "images_000000080  80 images  sound" in refused.out
    resumed = gandist("train", recipe(), "run.save_images=80", "run.keep_checkpoints=3")
    assert resumed.code == 0
    assert message in resumed.err
    assert "going on at 80 images" in resumed.err
    assert tensor_files(last(trained)) == intact
    assert not Path("exploded").exists()


def test_a_forged_manifest_does_not_get_a_pickle_read(gandist: Callable, trained: Path) -> None:
    forge(last(trained), "generator.safetensors", pickle.dumps(Bomb()) + bytes(1 << 20))
    result = gandist("sample", last(trained))
    assert result.code == 1
    assert "not a safetensors file" in result.err
    assert not Path("exploded").exists()


def header(entries: str) -> bytes:
    return len(entries).to_bytes(8, "little") + entries.encode()


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}') + b"abcd", "stands twice"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "its header would have"),
        (header("[" * 100_000), "not a safetensors file"),
        (safetensors.torch.save({"other": torch.zeros(100_000)}), "another architecture"),
    ],
)  # fmt: skip
def test_hostile_tensor_files_are_refused_by_rule(gandist: Callable, trained: Path, data: bytes, rule: str) -> None:
    forge(last(trained), "generator.safetensors", data + bytes(0 if "architecture" in rule else 1 << 20))
    result = gandist("sample", last(trained))
    assert result.code == 1
    assert rule in result.err


def test_tensors_of_another_shape_or_type_are_refused_by_name(trained: Path) -> None:
    found = checkpoint.Checkpoint(last(trained))
    into = {name: torch.zeros_like(tensor) for name, tensor in found.tensors("generator").items()}
    first = next(iter(into))
    for wrong in (torch.zeros(3), into[first].double()):
        with pytest.raises(Failure, match=f"`{first}` is torch.float32"):
            found.restore("generator", into | {first: wrong})


def test_a_forged_recipe_cannot_ask_for_more_memory_than_the_file_holds(gandist: Callable, trained: Path) -> None:
    state = json.loads((last(trained) / "state.json").read_text())
    state["recipe"]["game"]["generator"]["network"]["width"] = 60_000
    forge(last(trained), "state.json", json.dumps(state).encode())
    result = gandist("sample", last(trained))
    assert result.code == 1
    assert "describes a larger generator than the one it holds" in result.err


def test_when_no_checkpoint_verifies_nothing_starts_over_in_silence(
    gandist: Callable, recipe: Callable, trained: Path
) -> None:
    for folder in checkpoint.folders(trained / "checkpoints"):
        flip(folder)
    result = gandist("train", recipe(), "run.save_images=80", "run.keep_checkpoints=3")
    assert result.code == 1
    assert result.err.count("damaged") == 2
    assert "name another `run.folder`" in result.err


def test_the_newest_n_are_kept(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    assert gandist("train", recipe(), "run.save_images=32", "run.keep_checkpoints=2").code == 0
    assert [f.name for f in checkpoint.folders(tmp_path / "run" / "checkpoints")] == [
        "images_000000160",
        "images_000000128",
    ]


def test_a_weight_that_is_not_finite_is_never_saved(trained: Path) -> None:
    found = checkpoint.Checkpoint(last(trained))
    state = found.state.model_copy(update={"images": 176})
    with pytest.raises(Failure, match="`w` is not finite after 176 images"):
        checkpoint.save(trained / "checkpoints", state, {"generator": {"w": torch.tensor([1.0, float("nan")])}}, 3)
    assert last(trained).name == "images_000000160"


def test_channels_last_weights_survive_the_way_there_and_back(trained: Path) -> None:
    found = checkpoint.Checkpoint(last(trained))
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    state = found.state.model_copy(update={"images": 320})
    folder = checkpoint.save(trained / "checkpoints", state, {"x": {"w": weight}}, 9)
    into = torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)
    checkpoint.Checkpoint(folder).restore("x", {"w": into})
    assert torch.equal(into, weight)
    assert into.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("limit", [0, 1000, 20_000, 60_000])
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(trained: Path, limit: int) -> None:
    """A limit on the size of files makes real writes fail at different places."""
    folder = last(trained)
    before = {path: path.read_bytes() for path in (trained / "checkpoints").rglob("*") if path.is_file()}
    found = checkpoint.Checkpoint(folder)
    files = {name.removesuffix(".safetensors"): found.tensors(name.removesuffix(".safetensors"))
             for name in found.files if name.endswith("safetensors")}  # fmt: skip
    state = found.state.model_copy(update={"images": 176})
    old, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        with pytest.raises(OSError, match="too large"):
            checkpoint.save(trained / "checkpoints", state, files, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path: path.read_bytes() for path in (trained / "checkpoints").rglob("*") if path.is_file()} == before


KILLED_AT = """
import os, signal, sys
from pathlib import Path
import torch
from gandist import checkpoint

calls = 0
def hook(event, arguments):
    global calls
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

root = Path(sys.argv[1])
found, _ = checkpoint.newest(root)
state = found.state.model_copy(update={"images": found.state.images + 16})
sys.addaudithook(hook)
checkpoint.save(root, state, {"generator": {"w": torch.ones(3)}}, 1)
"""


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(trained: Path, tmp_path: Path) -> None:
    """SIGKILL at the k-th open, mkdir, rename or removal of a save, for every k; audit hooks stand before the call."""
    shutil.rmtree(checkpoint.folders(trained / "checkpoints")[1])
    survivors = set()
    for kill_at in range(1, 60):
        root = tmp_path / f"kill{kill_at}"
        shutil.copytree(trained / "checkpoints", root)
        pid = os.fork()
        if pid == 0:  # a fork has torch imported already
            sys.argv = ["", str(root), str(kill_at)]
            exec(KILLED_AT, {})
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found, _ = checkpoint.newest(root)
        assert found is not None, f"no checkpoint is left after a kill at file operation {kill_at}"
        survivors.add(found.state.images)
        if not os.WIFSIGNALED(status):
            break
    assert kill_at > 10
    assert survivors == {160, 176}


def test_training_code_cannot_unpickle(recipe: Callable, tmp_path: Path) -> None:
    """Train, resume and sample with every way to unpickle made to fail."""
    script = tmp_path / "guard.py"
    script.write_text("""
import pickle, sys, torch, importlib.metadata
from gandist.cli import main
import gandist.train, gandist.sample  # what they import may define classes; what runs may not unpickle
def hook(event, arguments):
    if event == "pickle.find_class":
        raise SystemExit(f"unpickled {arguments}")
sys.addaudithook(hook)
torch.load = pickle.load = pickle.loads = lambda *a, **k: sys.exit("unpickling")
main()
""")
    path = recipe()
    for words in (
        ["train", path, "run.images=80"],
        ["train", path],
        ["sample", tmp_path / "run", "--out", tmp_path / "out"],
    ):
        done = subprocess.run(
            [sys.executable, script, *map(str, words)], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(trained: Path) -> None:
    found = checkpoint.Checkpoint(last(trained))
    flip(last(trained))
    files = {"generator": {"w": torch.ones(2)}}
    for images in (96, 112, 128):
        checkpoint.save(trained / "checkpoints", found.state.model_copy(update={"images": images}), files, 2)
    valid = []
    for folder in checkpoint.folders(trained / "checkpoints"):
        try:
            valid.append(checkpoint.Checkpoint(folder).state.images)
        except Failure:
            assert folder.name == "images_000000160"
    assert valid == [128, 112]


def test_a_record_that_cannot_be_written_costs_rows_and_not_the_run(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")
    (tmp_path / "run" / "samples").write_text("a file where a folder belongs")
    result = gandist("train", recipe(), "run.sample_images=80")
    assert result.code == 0, result.err
    assert result.err.count("rows are lost from here on") == 1
    assert "the picture is lost" in result.err
    assert checkpoint.find(tmp_path / "run").state.images == 160


def test_a_disk_that_fails_at_the_end_is_told_without_a_traceback(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    (tmp_path / "run" / "checkpoints").symlink_to("/proc/self/fd")  # exists, and takes no folder
    result = gandist("train", recipe(), "run.save_images=80")
    assert result.code == 1
    assert "checkpoint at 80 images failed" in result.err
    assert "could not be written" in result.err
    assert "Traceback" not in result.err
