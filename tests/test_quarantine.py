"""Bad samples: without leave the first stops all processes; with it each has the same substitute everywhere, and is counted."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import webdataset
from conftest import open_stream, run, tensor_files
from PIL import Image

from gandist import checkpoint
from gandist.data.index import ShardIndex, index_path
from gandist.data.pack import index, npy_bytes
from gandist.recipe import Failure

SAMPLES, BATCH, CLASSES = 96, 16, 10

# A game that reads labels too, installed as a stranger's package would be.
GAME = """\
from typing import Literal
from gandist.games.gan import Gan
class Labelled(Gan):
    kind: Literal["labelled"]

    def parts(self, spec):
        return "image", "label"
"""


RECIPE = """\
data: {{path: {data}}}
game:
  kind: labelled
  noise: 8
  generator: {{network: {{kind: mlp, width: 16}}}}
  discriminator: {{network: {{kind: mlp, width: 16}}}}
run: {{folder: {folder}, images: 160, batch: 16, log_every: 1}}
"""


class Bad(NamedTuple):
    """A dataset with bad samples: `flipped` lies in draw 1, `cut` in 2, `label` in 3 and `late`, flipped as well, in 5."""

    folder: Path
    flipped: int
    cut: int
    label: int
    late: int
    reasons: dict[int, str]  # what is said of each
    substitutes: dict[int, int]


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image(number)).save(stream, "JPEG")
    return stream.getvalue()


def write(folder: Path, labels: dict[int, int], cut: set[int]) -> None:
    """Four shards of arrays; every eighth sample is a JPEG, and those of `cut` are JPEGs cut off behind their head."""
    folder.mkdir()
    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar"), encoder=False, mtime=0) as tar:
            for number in range(shard * 24, shard * 24 + 24):
                members = {"npy": npy_bytes(image(number))}
                if number % 8 == 3 or number in cut:
                    members = {"jpg": jpeg(number)[: -60 if number in cut else None]}
                label = str(labels.get(number, number % CLASSES)).encode()
                tar.write({"__key__": f"{number:04d}", "cls": label, **members})
    index([str(path) for path in sorted(folder.glob("*.tar"))])


def flip(folder: Path, number: int, role: str = "image") -> int:
    """Turns a bit in the middle of a member; returns where the member begins."""
    shard = folder / f"train-{number // 24:06d}.tar"
    found = ShardIndex.open(index_path(shard))
    start = found.offset[number % 24] + found.start[role][number % 24]
    data = bytearray(shard.read_bytes())
    data[start + found.size[role][number % 24] // 2] ^= 4
    shard.write_bytes(data)
    return start


def manifest_with_too_few_classes(folder: Path) -> None:
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["label"]["classes"] = CLASSES  # the index counted one more
    (folder / "dataset.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Bad:
    root = tmp_path_factory.mktemp("bad")
    write(root / "sound", {}, set())
    stream = open_stream(root / "sound", batch=BATCH)
    taken: list[int] = []

    def pick(draw: int, rows: slice, encoded: bool = False) -> None:
        near = {number + step for number in taken for step in (-1, 0, 1)}
        numbers = [n for n in stream.numbers(draw)[rows] if n not in near and n % 24 < 23]
        taken.append(next(n for n in numbers if (n % 8 == 3) == encoded))

    pick(1, slice(0, 8))
    pick(2, slice(None), encoded=True)
    pick(3, slice(8, 16))
    pick(5, slice(8, 16))
    stream.close()
    flipped, cut, label, late = taken
    folder = root / "bad"
    write(folder, {label: CLASSES}, {cut})
    offsets = {number: flip(folder, number) for number in (flipped, late)}
    manifest_with_too_few_classes(folder)
    shards = {number: f"{folder}/train-{number // 24:06d}.tar" for number in taken}
    reasons = {n: f"{shards[n]}: at byte {at}: the image is damaged: its digest is not" for n, at in offsets.items()}
    reasons[cut] = f"{shards[cut]}: sample '{cut:04d}' cannot be decoded"
    reasons[label] = f"{shards[label]}: sample '{label:04d}' has the label 10, and there are 10 classes"
    return Bad(folder, flipped, cut, label, late, reasons, {number: number + 1 for number in taken})


@pytest.fixture
def words(bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[object, ...]]:
    """`train` with the game that reads labels, for this process and for others."""
    (tmp_path / "game" / "labelled-1.dist-info").mkdir(parents=True)
    (tmp_path / "game" / "labelled.py").write_text(GAME)
    (tmp_path / "game" / "labelled-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: labelled\nVersion: 1\n"
    )
    (tmp_path / "game" / "labelled-1.dist-info" / "entry_points.txt").write_text(
        "[gandist.games]\nlabelled = labelled:Labelled\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "game")

    def train(name: str, *overrides: str) -> tuple[object, ...]:
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(data=bad.folder, folder=tmp_path / name))
        return "train", tmp_path / f"{name}.yaml", *overrides

    return train


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == kind]


def complaints(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("gandist: ")]


# ---- batches


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (1, 4), (2, 0), (2, 1), (2, 4), (4, 2)])
def test_a_bad_sample_has_the_same_substitute_for_any_processes_and_threads(bad: Bad, ranks: int, workers: int) -> None:
    parts = ("image", "label")
    streams = [
        open_stream(bad.folder, parts=parts, batch=BATCH, rank=rank, ranks=ranks, workers=workers)
        for rank in range(ranks)
    ]
    said: dict[int, list[str]] = {}
    for draw in range(9):  # an epoch has six
        numbers = [number for stream in streams for number in stream.numbers(draw)]
        for fault in [fault for stream in streams for fault in stream.ready([draw])]:
            said.setdefault(fault.number, []).append(fault.message)
        batches = [stream.read(draw)[0] for stream in streams]
        images, labels = (torch.cat([batch[part] for batch in batches]) for part in parts)
        for row, number in enumerate(numbers):
            shown = bad.substitutes.get(number, number)
            assert labels[row] == shown % CLASSES
            if shown % 8 != 3:
                wanted = torch.from_numpy(image(shown)).permute(2, 0, 1).float() / 127.5 - 1
                assert torch.equal(images[row], wanted)
    for stream in streams:
        stream.close()
    assert said.keys() == bad.reasons.keys()
    for number, messages in said.items():
        assert len(set(messages)) == 1
        assert messages[0].startswith(bad.reasons[number])


def test_bad_samples_side_by_side_are_all_named_and_have_the_next_sound_one(tmp_path: Path) -> None:
    write(tmp_path / "data", {}, set())
    for number in (22, 23, 24, 95):  # across the end of a shard, and of all
        flip(tmp_path / "data", number)
    flip(tmp_path / "data", 0, "label")
    stream = open_stream(tmp_path / "data", parts=("image", "label"), batch=BATCH)
    said: dict[int, set[int]] = {}
    for draw in range(6):
        faults = {fault.number for fault in stream.ready([draw])}
        batch = stream.read(draw)[0]
        for number, label in zip(stream.numbers(draw), batch["label"].tolist(), strict=True):
            said[number] = faults
            assert label == {22: 25, 23: 25, 24: 25, 95: 1, 0: 1}.get(number, number) % CLASSES
    assert {22, 23, 24} <= said[22]
    assert {95, 0} <= said[95]
    stream.close()


def test_a_dataset_without_a_sound_sample_is_refused_in_the_end(tmp_path: Path) -> None:
    write(tmp_path / "data", {}, set())
    for number in range(SAMPLES):
        flip(tmp_path / "data", number)
    for shard in (tmp_path / "data").glob("*.tar"):
        os.utime(shard, (0, 0))  # one younger than its index is refused at the start
    stream = open_stream(tmp_path / "data", batch=BATCH)
    (*bad, last) = stream.ready([0])
    assert {fault.number for fault in bad} == set(range(SAMPLES))
    assert last.number == -1
    with pytest.raises(Failure, match="bad samples one after the other"):
        stream.read(0)
    stream.close()


# ---- runs


def test_without_a_quarantine_a_flipped_bit_stops_all_ranks_at_once(bad: Bad, words: Callable, tmp_path: Path) -> None:
    note = tmp_path / "note"
    path = {"PYTHONPATH": str(tmp_path / "game")}
    result = run(*words("run"), ranks=2, timeout=60, GANDIST_EXIT_FILE=str(note), **path)
    assert (result.code, note.read_text()) == (1, "1"), result.out
    (said,) = complaints(result.out)
    assert bad.reasons[bad.flipped] in said
    assert "`data.quarantine` 0 allows no more bad samples; a checkpoint at 16 images is saved" in said
    state = checkpoint.find(tmp_path / "run").state
    assert (state.images, state.quarantined) == (16, ())
    assert [event["sample"] for event in events(tmp_path / "run", "data_lost")] == [bad.flipped]


def test_a_quarantine_counts_each_sample_once_and_over_a_resume(bad: Bad, words: Callable, tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(tmp_path / "game")}
    command = words("run", "data.quarantine=3")
    first = run(*command, "run.images=64", ranks=2, timeout=60, **path)
    assert first.code == 0, first.out
    found = events(tmp_path / "run", "quarantine")
    early = [bad.flipped, bad.cut, bad.label]
    assert [event["sample"] for event in found] == early
    assert [event["images"] for event in found] == [16, 32, 48]
    for event in found:
        assert str(event["error"]).startswith(bad.reasons[int(str(event["sample"]))])
    assert first.out.count("quarantined 1 of at most 3 samples: ") == 1
    assert checkpoint.find(tmp_path / "run").state.quarantined == tuple(sorted(early))
    second = run(*command, ranks=2, timeout=60, **path)
    assert second.code == 1, second.out
    (said,) = complaints(second.out)
    assert bad.reasons[bad.late] in said
    assert "`data.quarantine` 3 allows no more bad samples; a checkpoint at 80 images is saved" in said
    assert len(events(tmp_path / "run", "quarantine")) == 3
    state = checkpoint.find(tmp_path / "run").state
    assert (state.images, state.quarantined) == (80, tuple(sorted(early)))


def test_a_bad_sample_too_many_stops_the_same_command_again_and_a_larger_quarantine_goes_on(
    gandist: Callable, bad: Bad, words: Callable, tmp_path: Path
) -> None:
    for _ in range(2):
        result = gandist(*words("run", "data.quarantine=3"))
        assert result.code == 1, result.err
        assert bad.reasons[bad.late] in result.err
        assert checkpoint.find(tmp_path / "run").state.images == 80
    assert gandist(*words("run", "data.quarantine=4")).code == 0
    assert len(events(tmp_path / "run", "quarantine")) == 4
    assert gandist(*words("straight", "data.quarantine=4", "data.workers=0")).code == 0
    newest = [checkpoint.find(tmp_path / name) for name in ("run", "straight")]
    assert newest[0].state.quarantined == newest[1].state.quarantined == tuple(sorted(bad.reasons))
    assert tensor_files(newest[0].folder) == tensor_files(newest[1].folder)
