"""A run that was stopped, anywhere and by anything, ends bit for bit where an undisturbed one does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT, rows, run, start, tensor_files, wait_for_images

from gandist import checkpoint

DCGAN = {"generator": "{kind: dcgan, width: 8}", "discriminator": "{kind: dcgan, width: 8}"}


def final(folder: Path) -> dict[str, bytes]:
    return tensor_files(checkpoint.folders(folder / "checkpoints")[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_steps_equal_five_and_a_stop_and_five_bit_for_bit(recipe: Callable, tmp_path: Path, ranks: int) -> None:
    options = ["run.accumulate=2", "game.discriminator_steps=2", "run.sample_images=48"]
    schedule = ["game.generator.schedule.kind=cosine", "game.generator.schedule.until_images=500"]
    straight, halted = recipe("straight", **DCGAN), recipe("halted", **DCGAN)
    assert run("train", straight, *options, *schedule, ranks=ranks).code == 0
    assert run("train", halted, *options, *schedule, "run.images=80", ranks=ranks).code == 0
    assert checkpoint.find(tmp_path / "halted").state.step == 5
    second = run("train", halted, *options, *schedule, ranks=ranks)
    assert second.code == 0
    assert "going on at 80 images" in second.out
    assert final(tmp_path / "halted") == final(tmp_path / "straight")
    measured = [
        {k: v for k, v in row.items() if k.startswith(("loss", "logits", "grad"))}
        for row in rows(tmp_path / "straight")
    ]
    again = [
        {k: v for k, v in row.items() if k.startswith(("loss", "logits", "grad"))} for row in rows(tmp_path / "halted")
    ]
    assert measured[-2:] == again[-2:]  # the windows of steps 7–8 and 9–10 lie behind the stop


def test_a_scalers_state_is_part_of_the_resume(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    fp16 = ["run.precision=fp16", "run.save_images=1000"]
    assert gandist("train", recipe("straight"), *fp16).code == 0
    assert gandist("train", recipe("halted"), *fp16, "run.images=80").code == 0
    assert gandist("train", recipe("halted"), *fp16).code == 0
    assert final(tmp_path / "halted") == final(tmp_path / "straight")
    states = [checkpoint.find(tmp_path / name).state.players for name in ("straight", "halted")]
    assert states[0] == states[1]
    assert states[0]["generator"]["_growth_tracker"] == 10


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "gandist" in " ".join(child.cmdline()) and "launch" not in child.cmdline()]


LONG = "run.images=200000"


def stop_and_check(process: subprocess.Popen[str], folder: Path, codes: tuple[int, ...]) -> int:
    """Waits for the end of a process that was asked to stop; returns the images of its one checkpoint."""
    ranks = descendants(process) if process.poll() is None else []
    out, _ = process.communicate(timeout=60)
    assert process.returncode in codes, out
    psutil.wait_procs(ranks, timeout=30)  # a launcher that dies of the signal leaves its ranks to save by themselves
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    folders = checkpoint.folders(folder / "checkpoints")
    assert len(folders) == 1, out
    return checkpoint.Checkpoint(folders[0]).state.images


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_a_single_process_saves_and_exits_with_75(
    recipe: Callable, tmp_path: Path, number: signal.Signals
) -> None:
    process = start("train", recipe("halted"), LONG)
    wait_for_images(tmp_path / "halted", 64, process)
    process.send_signal(number)
    images = stop_and_check(process, tmp_path / "halted", (75,))
    last = rows(tmp_path / "halted")[-1]["images"]
    assert images == last
    if number != signal.SIGTERM:
        return
    # the same number of images without a stop, and the stopped run taken on by some more: all the same bits
    assert run("train", recipe("straight"), f"run.images={images + 160}").code == 0
    assert run("train", recipe("halted"), f"run.images={images + 160}").code == 0
    assert final(tmp_path / "halted") == final(tmp_path / "straight")


@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_to_any_rank_stops_all_ranks_at_one_step(recipe: Callable, tmp_path: Path, which: int) -> None:
    process = start("train", recipe("halted"), LONG, ranks=2)
    wait_for_images(tmp_path / "halted", 64, process)
    ranks = descendants(process)
    assert len(ranks) == 2
    os.kill(sorted(rank.pid for rank in ranks)[which], (signal.SIGTERM, signal.SIGUSR1)[which])
    images = stop_and_check(process, tmp_path / "halted", (1,))  # torch's launcher says 1 whatever its ranks return
    if which == 0:
        return
    out = run("train", recipe("halted"), f"run.images={images + 160}", ranks=2)
    assert f"going on at {images:,} images" in out.out
    assert run("train", recipe("straight"), f"run.images={images + 160}", ranks=2).code == 0
    assert final(tmp_path / "halted") == final(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_accelerates_launcher_reaches_the_ranks(
    recipe: Callable, tmp_path: Path, number: signal.Signals
) -> None:
    process = start("train", recipe("halted"), LONG, ranks=2)
    wait_for_images(tmp_path / "halted", 64, process)
    process.send_signal(number)
    assert stop_and_check(process, tmp_path / "halted", (1, -number)) >= 64


@pytest.mark.parametrize(("ranks", "number"), [(2, signal.SIGTERM), (2, signal.SIGUSR1), (1, signal.SIGTERM)])
def test_the_node_script_saves_and_exits_with_75(
    recipe: Callable, tmp_path: Path, ranks: int, number: signal.Signals
) -> None:
    options = ["--num_machines", "1", "--num_processes", str(ranks), "--main_process_port", "0"]
    options += ["--multi_gpu"] if ranks > 1 else []
    words = ["bash", "launch/node.sh", *options, "-m", "gandist", "train", str(recipe("halted")), LONG]
    process = subprocess.Popen(words, env=ENVIRONMENT, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    wait_for_images(tmp_path / "halted", 64, process)
    process.send_signal(number)
    assert stop_and_check(process, tmp_path / "halted", (75,)) >= 64


def test_two_signals_in_a_row_give_one_checkpoint(recipe: Callable, tmp_path: Path) -> None:
    process = start("train", recipe("halted"), LONG)
    wait_for_images(tmp_path / "halted", 64, process)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert stop_and_check(process, tmp_path / "halted", (75,)) >= 64


def test_a_killed_rank_takes_the_run_down_and_the_same_command_goes_on(recipe: Callable, tmp_path: Path) -> None:
    process = start("train", recipe("halted"), LONG, "run.save_images=160", ranks=2)
    wait_for_images(tmp_path / "halted", 400, process)
    ranks = descendants(process)
    os.kill(ranks[1].pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    newest = checkpoint.find(tmp_path / "halted").state.images
    assert newest >= 160
    target = f"run.images={newest + 160}"
    assert run("train", recipe("halted"), target, "run.save_images=160", ranks=2).code == 0
    assert run("train", recipe("straight"), target, ranks=2).code == 0
    assert final(tmp_path / "halted") == final(tmp_path / "straight")


def test_a_finished_run_started_again_does_nothing(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    assert gandist("train", recipe()).code == 0
    before = final(tmp_path / "run")
    result = gandist("train", recipe())
    assert result.code == 0
    assert "160 images are done, and `run.images` is" in result.err
    assert [row["images"] for row in rows(tmp_path / "run")] == [32, 64, 96, 128, 160]
    assert final(tmp_path / "run") == before


def test_a_changed_recipe_is_refused_with_the_differences(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    assert gandist("train", recipe()).code == 0
    result = gandist(
        "train",
        recipe(),
        "run.images=320",
        "run.seed=1",
        "game.generator.optimizer.learning_rate=1e-3",
        "run.trackers=[tensorboard]",
    )
    assert result.code == 2
    assert "`run.seed`: 0 → 1" in result.err
    assert "`game.generator.optimizer.learning_rate`: 0.0002 → 0.001" in result.err
    assert "trackers" not in result.err  # does not change the result
    assert "`run.images`" not in result.err
    assert "--init-from" in result.err


def test_init_from_takes_the_weights_and_nothing_else(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    assert gandist("train", recipe()).code == 0
    old = checkpoint.find(tmp_path / "run")
    result = gandist("train", recipe("new"), "run.seed=9", "run.images=16", "--init-from", tmp_path / "run",
                     "game.generator.optimizer.learning_rate=1e-12", "game.discriminator.optimizer.learning_rate=1e-12")  # fmt: skip
    assert result.code == 0, result.err
    new = checkpoint.find(tmp_path / "new")
    assert new.state.images == 16
    for name in ("generator", "discriminator"):
        before, after = old.tensors(name), new.tensors(name)
        assert all((before[key] - after[key]).abs().max() < 1e-9 for key in before)
    assert all(value == 1 for key, value in new.tensors("generator.optimizer").items() if key.endswith("/step"))
    result = gandist("train", recipe(), "--init-from", tmp_path / "new")
    assert result.code == 2
    assert "--init-from starts a new one" in result.err


def test_two_processes_do_not_train_in_one_folder(recipe: Callable, tmp_path: Path) -> None:
    first = start("train", recipe(), LONG)
    wait_for_images(tmp_path / "run", 32, first)
    second = run("train", recipe(), LONG)
    assert second.code == 2
    assert "another process is training there" in second.out
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 75


def test_a_failed_start_leaves_a_folder_that_can_be_used(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    wrong = gandist("train", recipe(), "--init-from", tmp_path / "typo")
    assert wrong.code == 2
    assert "name a run folder" in wrong.err
    assert not (tmp_path / "run").exists()
    other = recipe("other", generator="{kind: mlp, width: 16}")
    assert gandist("train", other, "run.images=16").code == 0
    mismatch = gandist("train", recipe(), "--init-from", tmp_path / "other")
    assert mismatch.code == 1
    assert "and the network has" in mismatch.err
    assert gandist("train", recipe()).code == 0


def test_the_same_command_resumes_a_run_that_started_from_old_weights(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    assert gandist("train", recipe(), "run.images=32").code == 0
    words = ["train", recipe("new"), "--init-from", tmp_path / "run"]
    assert gandist(*words, "run.images=80").code == 0
    second = gandist(*words)
    assert second.code == 0
    assert "going on at 80 images" in second.err
    straight = ["train", recipe("straight"), "--init-from", tmp_path / "run"]
    assert gandist(*straight).code == 0
    assert final(tmp_path / "new") == final(tmp_path / "straight")
    assert gandist("train", recipe("new"), "run.images=320", "--init-from", tmp_path / "straight").code == 2


def test_going_on_with_another_number_of_processes_is_said(recipe: Callable, tmp_path: Path) -> None:
    assert run("train", recipe(), "run.images=80", ranks=2).code == 0
    result = run("train", recipe())
    assert result.code == 0
    assert "was saved by 2 processes and goes on with 1" in result.out


def test_a_run_folder_that_cannot_be_made_is_named(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        result = gandist("train", recipe(), f"run.folder={folder}")
        assert result.code == 2
        assert "`run.folder`" in result.err
        assert "Traceback" not in result.err
