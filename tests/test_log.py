"""The record is whole whatever the mirrors do, and the mirrors show what the record has."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gandist import log
from gandist.log import Bar, Meter
from gandist.pictures import grid


def test_rows_carry_progress_speed_losses_and_logits_by_their_terms(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    assert gandist("train", recipe()).code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "start"
    assert {"torch", "gandist", "precision", "ranks"} <= lines[0].keys()
    measured = rows(tmp_path / "run")
    assert [row["images"] for row in measured] == [32, 64, 96, 128, 160]
    for row in measured:
        assert {
            "step", "images", "seconds", "images_per_second", "data_wait_fraction", "memory_bytes",
            "loss/discriminator/real", "loss/discriminator/fake", "loss/generator/adversarial",
            "grad_norm/generator", "grad_norm/discriminator", "logits/real", "logits/fake",
        } <= row.keys()  # fmt: skip
        assert 0 <= row["data_wait_fraction"] <= 1
        assert row["images_per_second"] > 0


def read_wandb(path: Path) -> list[bytes]:
    """Payloads of a W&B file: a 7-byte head, then LevelDB log blocks of 32 KiB with 7-byte record heads."""
    data, records, part, position = path.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(part)
            part = b""
    return records


def test_wandb_gets_config_scalars_over_images_and_grids_without_a_network(
    gandist: Callable, recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    result = gandist("train", recipe(), "run.trackers=[wandb]", "run.sample_images=80")
    assert result.code == 0, result.err
    assert "left out" not in result.err, result.err
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    from wandb.proto import wandb_internal_pb2

    found = {"history": [], "config": [], "metric": []}
    for raw in read_wandb(path):
        record = wandb_internal_pb2.Record.FromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found["history"].append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        elif kind == "metric":
            found["metric"].append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "run":
            found["config"] += [item.key for item in record.run.config.update]
    losses = {
        row["images"]: row["loss/generator/adversarial"]
        for row in found["history"]
        if "loss/generator/adversarial" in row
    }
    assert losses == {row["images"]: pytest.approx(row["loss/generator/adversarial"]) for row in rows(tmp_path / "run")}
    assert ("*", "images") in found["metric"]
    assert {"data", "game", "run"} <= set(found["config"])
    assert {row["images"] for row in found["history"] if any(key.startswith("samples") for key in row)} == {0, 80, 160}


def test_tensorboard_gets_scalars_over_images_and_grids(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    assert gandist("train", recipe(), "run.trackers=[tensorboard]", "run.sample_images=80").code == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("loss/generator/adversarial")}
    assert scalars == {
        row["images"]: pytest.approx(row["loss/generator/adversarial"], rel=1e-5) for row in rows(tmp_path / "run")
    }
    assert [event.step for event in events.Images("samples")] == [0, 80, 160]


def test_a_tracker_that_fails_costs_neither_the_run_nor_a_row(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")  # a run that was killed before its first checkpoint
    (tmp_path / "run" / "tensorboard").write_text("a file where the tracker wants a folder")
    result = gandist("train", recipe(), "run.trackers=[tensorboard]")
    assert result.code == 0
    assert "tensorboard failed and is left out" in result.err
    assert len(rows(tmp_path / "run")) == 5
    assert '"event": "tracker_failed"' in (tmp_path / "run" / "log.jsonl").read_text()


def test_samples_appear_at_their_images_and_show_the_same_noise(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    assert gandist("train", recipe(), "run.sample_images=64").code == 0
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == [f"images_{n:09d}.png" for n in (0, 64, 128, 160)]
    result = gandist("sample", tmp_path / "run", "--out", tmp_path / "again", "--seed", 0)
    assert result.code == 0
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "again" / "grid.png")),
        np.asarray(Image.open(tmp_path / "run/samples/images_000000160.png")),
    )


def test_a_meter_means_over_steps_and_starts_anew() -> None:
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"a": torch.tensor(value)})
    meter.add({"b": torch.tensor(5.0, dtype=torch.bfloat16)})
    assert meter.read() == {"a": 3.0, "b": 5.0}
    assert meter.read() == {}


def test_a_grid_puts_each_image_in_its_place() -> None:
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 300, 300)
    picture = grid(images)
    assert picture.shape == (600, 900, 3)
    assert [int(picture[y, x, 0]) for y, x in ((0, 0), (0, 300), (0, 600), (300, 0), (300, 300), (300, 600))] == [
        0,
        64,
        128,
        191,
        255,
        0,
    ]


def test_the_bar_tells_speed_and_time_left_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "QUIET_SECONDS", 0.0)
    bar = Bar(1000, 0, shown=True)
    bar.update(500)
    bar.close()
    assert "500/1,000 images" in capsys.readouterr().err
