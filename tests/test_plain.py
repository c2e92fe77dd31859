"""Shards without an index, streamed through webdataset: divided, shuffled, refused where damaged, and never trusted."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import run, tensor_files

from gandist import checkpoint
from gandist.data.opening import open_batches
from gandist.data.pack import npy_bytes
from gandist.data.plain import PlainStream
from gandist.data.stream import Share
from gandist.recipe import DataOptions, Failure

LENGTHS = (7, 12, 5, 20, 9)
SAMPLES = sum(LENGTHS)
NUMBERS = [range(sum(LENGTHS[:n]), sum(LENGTHS[: n + 1])) for n in range(len(LENGTHS))]  # of each shard's samples
READER = ("data.reader=webdataset", "data.buffer=4")


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def write(folder: Path, sizes: dict[int, tuple[int, int]] | None = None, **others: bytes) -> Path:
    """Five shards of grey images, their numbers as labels; `sizes` of some are others, `others` lie beside each image."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard, numbers in enumerate(NUMBERS):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar"), encoder=False, mtime=0) as tar:
            for number in numbers:
                pixels = random.integers(0, 256, (sizes or {}).get(number, (8, 8)), np.uint8)
                tar.write({"__key__": f"{number:04d}", "npy": npy_bytes(pixels), "cls": f"{number}".encode(), **others})
    return folder


def pattern(folder: Path, count: int = len(LENGTHS)) -> str:
    return f"{folder}/train-{{000000..{count - 1:06d}}}.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain") / "shards")


def open_plain(
    path: str, *, rank: int = 0, ranks: int = 1, batch: int = 8, seed: int = 0, allow_pipe: bool = False, **options: object
) -> PlainStream:  # fmt: skip
    chosen = DataOptions(path=path, reader="webdataset", **{"classes": SAMPLES, "buffer": 4, **options})
    share = Share(("image", "label"), batch, seed, torch.device("cpu"), rank, ranks)
    stream = open_batches(chosen, share, allow_pipe)
    assert isinstance(stream, PlainStream)
    return stream


def labels(path: str, draws: range = range(40), **options: object) -> list[list[int]]:
    """The labels, which are the samples' numbers, of each draw."""
    stream = open_plain(path, **options)
    found = []
    for draw in draws:
        assert not stream.ready([draw])
        (batch,) = stream.read(draw)
        assert batch["image"].shape == (len(batch["label"]), *batch["image"].shape[1:])
        found.append(batch["label"].tolist())
    stream.close()
    return found


def final(folder: Path) -> dict[str, bytes]:
    return tensor_files(checkpoint.folders(folder / "checkpoints")[0])


def lost(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "data_lost"]


# ---- order


@pytest.mark.parametrize("rank", [0, 1])
def test_each_thread_of_each_process_reads_its_own_shards_once_a_pass(shards: Path, rank: int) -> None:
    draws = labels(pattern(shards), rank=rank, ranks=2, workers=2)
    assert {len(draw) for draw in draws} == {4}
    for worker in range(2):
        mine = NUMBERS[rank::2][worker::2]
        known = sorted(number for numbers in mine for number in numbers)
        flat = [number for draw in draws[worker::2] for number in draw]
        passes = [flat[first : first + len(known)] for first in range(0, len(flat) - len(known) + 1, len(known))]
        assert len(passes) >= 3
        assert all(sorted(found) == known for found in passes)
        assert len({tuple(found) for found in passes}) > len(passes) / 2  # of five samples there are few orders


def test_the_same_seed_gives_the_same_batches_and_another_seed_or_start_others(shards: Path) -> None:
    first = labels(pattern(shards), workers=2)
    assert labels(pattern(shards), workers=2) == first
    others = [labels(pattern(shards), workers=2, seed=1), labels(pattern(shards), range(5, 45), workers=2)]
    for other in others:  # a run that goes on at draw 5 does not begin with the first samples again
        assert other[:5] != first[:5]
        assert other[:5] != first[5:10]
    assert labels(pattern(shards), workers=1) != first


def test_images_are_those_of_their_labels_and_crops_of_one_size(shards: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (8, 8), np.uint8) for _ in range(SAMPLES)]
    stream = open_plain(pattern(shards))
    for draw in range(20):
        for image, label in zip(*[stream.read(draw)[0][part] for part in ("image", "label")], strict=True):
            assert torch.equal(image[0], torch.from_numpy(pixels[int(label)]).float() / 127.5 - 1)
    stream.close()
    mixed = write(tmp_path / "mixed", dict.fromkeys(range(0, SAMPLES, 3), (9, 13)))
    crop = {"crop": 6, "flip": True}
    stream = open_plain(pattern(mixed), transform=crop)
    assert {tuple(stream.read(draw)[0]["image"].shape) for draw in range(20)} == {(8, 1, 6, 6)}
    stream.close()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, r"train-000003\.tar: sample '0030' has shape \(9, 13, 1\), and the first sample says \(8, 8, 1\)"),
        ({"transform": {"crop": 9}}, "`crop` 9 is larger than images of 8×8"),
        ({"transform": {"size": 9, "crop": 9}, "classes": 50}, "has the label 5[0-2], and `data.classes` is 50"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(tmp_path: Path, options: dict[str, object], rule: str) -> None:
    odd = write(tmp_path / "odd", {30: (9, 13)})
    with pytest.raises((Failure, ValueError), match=rule):
        labels_or_raise(open_plain(pattern(odd), **options))


def labels_or_raise(stream: PlainStream) -> None:
    try:
        for draw in range(40):
            stream.read(draw)
    finally:
        stream.close()


# ---- runs


def test_two_processes_with_unequal_shards_come_to_the_end_and_say_what_they_cannot_promise(
    recipe: Callable, shards: Path, tmp_path: Path
) -> None:
    words = ("train", recipe(), *READER, f"data.path={pattern(shards)}", "game.discriminator_steps=2")
    first = run(*words, "run.images=80", ranks=2, timeout=60)
    assert first.code == 0, first.out
    assert first.out.count("a run that goes on after a stop reads other batches") == 1
    second = run(*words, ranks=2, timeout=60)
    assert second.code == 0, second.out
    assert "going on at 80 images" in second.out
    assert checkpoint.find(tmp_path / "run").state.images == 160


def test_fewer_shards_than_processes_are_refused(recipe: Callable, shards: Path, tmp_path: Path) -> None:
    note = tmp_path / "note"
    words = ("train", recipe(), *READER, f"data.path={pattern(shards, 1)}")
    result = run(*words, ranks=2, timeout=60, GANDIST_EXIT_FILE=str(note))
    assert (result.code, note.read_text()) == (1, "2"), result.out  # torch's launcher says 1 whatever its ranks return
    assert result.out.count("1 shards cannot be divided over 2 processes; use more shards, or fewer processes") == 1


def test_a_pipe_is_run_where_the_command_line_allows_it_and_nowhere_else(
    gandist: Callable, recipe: Callable, shards: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    evil = f"data.path=pipe:touch {mark}; cat {pattern(shards)}"
    for verb in ("train", "describe"):
        result = gandist(verb, recipe("piped"), *READER, evil)
        assert result.code == 2, result.err
        assert "give --allow-pipe on the command line" in result.err
    assert not mark.exists()
    result = gandist("train", recipe("piped"), *READER, evil, "--allow-pipe")
    assert result.code == 0, result.err
    assert mark.exists()
    assert gandist("train", recipe("plain"), *READER, f"data.path={pattern(shards)}").code == 0
    assert final(tmp_path / "piped") == final(tmp_path / "plain")


def test_neither_webdatasets_environment_nor_members_of_other_kinds_change_anything(
    gandist: Callable, recipe: Callable, shards: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    laden = write(tmp_path / "laden", pkl=bomb, pyd=bomb, pth=bomb, **{"x.pickle": bomb, "npz": bomb, "json": b"{"})
    environment = {"GOPEN_REWRITE": f"{laden}=/nowhere", "GOPEN_VERBOSE": "1", "WDS_CACHE": str(tmp_path / "cache"),
                   "WDS_SEED": "7", "WDS_EPOCH": "3", "WDS_SECURE": "0", "NUM_WORKERS": "5", "WORKER": "3"}  # fmt: skip
    result = run("train", recipe("guarded"), *READER, f"data.path={pattern(laden)}", **environment)
    assert result.code == 0, result.out
    assert not mark.exists()
    pickle.loads(bomb)  # noqa: S301 - it would have left its mark
    assert mark.exists()
    assert not (tmp_path / "cache").exists()
    assert gandist("train", recipe("plain"), *READER, f"data.path={pattern(shards)}").code == 0
    assert final(tmp_path / "guarded") == final(tmp_path / "plain")


# ---- damage


def cut(shard: Path) -> str:
    shard.write_bytes(shard.read_bytes()[:8_800])
    return r"at byte \d+: .*cut off"


def without_an_end(shard: Path) -> str:
    data = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(data + bytes(-len(data) % 512))
    return r"at byte \d+: a tar ends with two empty blocks, and this one is cut off"


def damaged_header(shard: Path) -> str:
    data = bytearray(shard.read_bytes())
    data[4 * 2048 + 20] ^= 4  # a sample is two headers, an image of one block and a label
    shard.write_bytes(data)
    return r"at byte 8192: not a tar header: its checksum does not match"


def append(shard: Path, name: str, kind: bytes) -> None:
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member, io.BytesIO())


def a_link(shard: Path) -> str:
    append(shard, "9999.npy", tarfile.SYMTYPE)
    return r"at byte \d+: '9999\.npy' is a symbolic link, not a plain file"


def a_hole(shard: Path) -> str:
    append(shard, "9999.npy", tarfile.GNUTYPE_SPARSE)
    return r"at byte \d+: '9999\.npy' is a sparse file"


def a_name_twice(shard: Path) -> str:
    append(shard, "0052.cls", tarfile.REGTYPE)
    return "0052.*duplicate"


@pytest.mark.parametrize("harm", [cut, without_an_end, damaged_header, a_link, a_hole, a_name_twice])
def test_a_damaged_shard_ends_the_stream_with_its_name_and_place(tmp_path: Path, harm: Callable[[Path], str]) -> None:
    folder = write(tmp_path / "data")
    rule = harm(folder / "train-000004.tar")
    stream = open_plain(pattern(folder), workers=1)
    faults = []
    for step in range(40):  # three draws at once, as of a step with three turns
        faults = stream.ready(range(3 * step, 3 * step + 3))
        if faults:
            break
        for draw in range(3 * step, 3 * step + 3):
            stream.read(draw)
    (fault,) = faults
    assert fault.number == -1
    with pytest.raises(Failure, match=rf"train-000004\.tar: {rule}"):
        raise Failure(fault.message)
    stream.close()


def test_damage_in_one_processes_shards_stops_all_with_a_checkpoint(recipe: Callable, tmp_path: Path) -> None:
    folder, note = write(tmp_path / "data"), tmp_path / "note"
    rule = a_link(folder / "train-000003.tar")  # which the second process reads
    words = ("train", recipe(), *READER, f"data.path={pattern(folder)}", "data.workers=1", "game.discriminator_steps=3")
    result = run(*words, ranks=2, timeout=60, GANDIST_EXIT_FILE=str(note))
    assert (result.code, note.read_text()) == (1, "1"), result.out
    (said,) = [line for line in result.out.splitlines() if line.startswith("gandist: ")]
    with pytest.raises(Failure, match=rf"train-000003\.tar: {rule}"):
        raise Failure(said)
    (event,) = lost(tmp_path / "run")
    assert checkpoint.find(tmp_path / "run").state.images == event["images"]


@pytest.mark.parametrize(
    "setting", ["split=test", "shuffle=window", "subset.per_class=3", "quarantine=1", "cache=/tmp/cache"]
)
def test_settings_that_need_an_index_are_refused(
    gandist: Callable, recipe: Callable, shards: Path, setting: str
) -> None:
    result = gandist("train", recipe(), *READER, f"data.path={pattern(shards)}", f"data.{setting}")
    assert result.code == 2
    assert f"`{setting.partition('=')[0].partition('.')[0]}` has no effect with `reader: webdataset`" in result.err
