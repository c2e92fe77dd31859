"""What the user told Accelerate is done or refused by name, never dropped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run, start, wait_for_images

from gandist import launcher
from gandist.launcher import _launch_words, bf16_in_hardware, choose_precision, refuse_plugins
from gandist.recipe import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_plugins_that_are_not_served_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    refuse_plugins()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=r"DeepSpeed|Megatron"):
        refuse_plugins()


def test_a_dynamo_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(InputError, match="INDUCTOR"):
        refuse_plugins()


@pytest.mark.parametrize(
    ("recipe", "settings", "expected"),
    [
        ("auto", {}, "bf16" if bf16_in_hardware(CPU) else "fp32"),
        ("auto", {"mixed_precision": "bf16"}, "bf16"),
        ("auto", {"mixed_precision": "no"}, "fp32"),
        ("fp32", {"mixed_precision": "no"}, "fp32"),
        ("bf16", {}, "bf16"),
        ("fp16", {"mixed_precision": "fp16"}, "fp16"),
    ],
)
def test_auto_honours_what_accelerate_was_told(recipe: str, settings: dict, expected: str) -> None:
    assert choose_precision(recipe, CPU, settings)[0] == expected


@pytest.mark.parametrize(("recipe", "told"), [("fp32", "bf16"), ("bf16", "no"), ("fp16", "bf16"), ("auto", "fp8")])
def test_a_contradiction_in_precision_is_refused(recipe: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        choose_precision(recipe, CPU, {"mixed_precision": told})


def test_a_request_that_comes_while_the_ranks_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    world = launcher.World(CPU, 0, 1, "fp32", "")
    stop = launcher.Stop(world)
    # the signal lands inside the agreement, which has read the flag already
    monkeypatch.setattr(launcher.World, "any", lambda self, *here: (os.kill(os.getpid(), signal.SIGTERM), here)[1])
    assert not stop.agreed()[0]
    assert stop.agreed()[0]
    stop.requested = False
    stop.close()


def test_the_environment_alone_counts_unless_it_is_the_launchers_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_precision("auto", CPU, {})[0] == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what Accelerate sets when nobody said anything
    monkeypatch.setattr(launcher, "bf16_in_hardware", lambda device: True)
    assert choose_precision("auto", CPU, {})[0] == "bf16"


def test_the_launchers_words_are_found_in_every_spelling() -> None:
    for line in (
        ["/venv/bin/python", "/venv/bin/accelerate", "launch", "--num_processes", "2"],
        ["/venv/bin/accelerate-launch", "--num_processes", "2"],
        ["python", "-m", "accelerate.commands.launch", "--num_processes", "2"],
    ):
        assert _launch_words(line, [Path(word).name for word in line]) == ["--num_processes", "2"]
    line = ["python", "train.py", "launch"]
    assert _launch_words(line, line) is None


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_mixed_precision_from_accelerates_config_file_reaches_the_run(
    recipe: Callable, tmp_path: Path, precision: str
) -> None:
    """A real launcher with a real config file, as `accelerate config` writes it."""
    import subprocess

    from conftest import ENVIRONMENT, ROOT, command

    config = tmp_path / "accelerate.yaml"
    config.write_text(f"""\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: '{precision}'
num_machines: 1
num_processes: 2
main_process_port: 0
use_cpu: false
""")
    words = command("train", recipe(), "run.images=32", ranks=2)
    place = words.index("launch")
    words = [*words[: place + 1], "--config_file", str(config), *words[words.index("-m", place) :]]
    done = subprocess.run(words, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = {"bf16": "bf16", "no": "fp32"}[precision]
    assert f"2 processes on cpu, {expected} (as accelerate was told" in done.stderr


def test_a_wrong_recipe_under_two_processes_is_told_once(recipe: Callable) -> None:
    result = run("train", recipe(), "run.batch=15", ranks=2)
    assert result.out.count("15 images cannot be split over 2 processes") == 1


def test_ranks_that_lose_their_launcher_save_and_end(recipe: Callable, tmp_path: Path) -> None:
    import psutil

    process = start("train", recipe(), "run.images=200000", ranks=2)
    wait_for_images(tmp_path / "run", 32, process)
    ranks = [c for c in psutil.Process(process.pid).children(recursive=True) if "gandist" in " ".join(c.cmdline())]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
