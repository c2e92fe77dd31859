"""A batch is a function of its draw number: no process count, no worker count and no history changes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import open_stream, packed

from gandist.data.dataset import Dataset
from gandist.data.index import ShardIndex, index_path, scan
from gandist.data.read import Reader
from gandist.data.stream import Stream
from gandist.recipe import Failure, InputError


def both(folder: Path, **options: int) -> Stream:
    return open_stream(folder, parts=("image", "label"), **{"batch": 24, "seed": 5} | options)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 4), (2, 1), (2, 4), (3, 2), (4, 1), (8, 2)])
def test_the_global_batch_is_the_same_for_any_processes_and_workers(fashion: Path, ranks: int, workers: int) -> None:
    draws = [0, 1, 416, 417, 10**6]  # 10,000 samples end inside draw 416
    whole = both(fashion)
    for draw in draws:
        expected = whole.read(draw)[0]
        images, noise = [], []
        for rank in range(ranks):
            stream = both(fashion, rank=rank, ranks=ranks, workers=workers)
            (batch,) = stream.read(draw)
            images.append(batch["image"])
            noise.append(batch.normal("noise", 7))
            stream.close()
        assert torch.equal(torch.cat(images), expected["image"])
        assert torch.equal(torch.cat(noise), expected.normal("noise", 7))
    whole.close()


def test_draws_may_be_read_in_any_order(fashion: Path) -> None:
    stream, other = both(fashion), both(fashion)
    forward = [stream.read(draw)[0]["image"].clone() for draw in range(6)]
    for draw in (5, 0, 3, 3, 1):
        assert torch.equal(other.read(draw)[0]["image"], forward[draw])
    stream.close()
    other.close()


def test_micro_batches_are_the_rows_of_the_batch_in_order(fashion: Path) -> None:
    whole, parts = both(fashion), both(fashion, accumulate=3)
    micro = parts.read(2)
    assert len(micro) == 3
    assert torch.equal(torch.cat([m["image"] for m in micro]), whole.read(2)[0]["image"])
    assert torch.equal(torch.cat([m.normal("n", 4) for m in micro]), whole.read(2)[0].normal("n", 4))
    whole.close()
    parts.close()


def test_pixels_stay_uint8_until_the_device_and_come_as_minus_one_to_one(fashion: Path) -> None:
    stream = both(fashion)
    assert stream.load(0).parts["image"].dtype == torch.uint8
    image = stream.read(0)[0]["image"]
    assert image.shape == (24, 1, 28, 28)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert image.min() == -1
    assert 0.9 < image.max() <= 1
    stream.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A small dataset to damage."""
    np.savez(
        tmp_path / "small.npz",
        images=np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8),
        labels=np.arange(20),
    )
    packed(tmp_path / "small.npz", tmp_path / "small")
    return tmp_path / "small"


def test_a_damaged_header_does_not_end_a_shard_in_silence(copy: Path) -> None:
    shard = copy / "train-000000.tar"
    damaged = bytearray(shard.read_bytes())
    third = [sample.offset for sample in scan(shard)][2]
    damaged[third + 20] ^= 4
    shard.write_bytes(damaged)
    with pytest.raises(InputError, match=f"at byte {third}"):
        list(scan(shard))


def test_replaced_and_missing_shards_are_refused_at_start(gandist: Callable, recipe: Callable, copy: Path) -> None:
    path = recipe(data=copy)
    shard = copy / "train-000000.tar"
    intact = shard.read_bytes()
    shard.write_bytes(intact + b"\0" * 512)
    result = gandist("train", path)
    assert result.code == 2
    assert "was replaced or cut off" in result.err
    shard.unlink()
    assert "No such file" in gandist("train", path).err


def test_verify_reads_every_byte_and_names_the_fault(gandist: Callable, copy: Path) -> None:
    sound = gandist("verify", copy)
    assert sound.code == 0
    assert Dataset(copy).digest in sound.out
    for name in ("train-000000.tar", "train-000000.idx"):
        intact = (copy / name).read_bytes()
        for position in (0, len(intact) // 2, len(intact) - 1):
            damaged = bytearray(intact)
            damaged[position] ^= 1
            (copy / name).write_bytes(damaged)
            result = gandist("verify", copy)
            assert result.code == 1
            assert name in result.err
        (copy / name).write_bytes(intact)


def test_a_dataset_file_from_a_stranger_cannot_point_elsewhere(gandist: Callable, recipe: Callable, copy: Path) -> None:
    shutil.copy(copy / "train-000000.tar", copy.parent / "outside.tar")
    text = (copy / "dataset.json").read_text().replace("train-000000.tar", "../outside.tar")
    (copy / "dataset.json").write_text(text)
    result = gandist("train", recipe(data=copy))
    assert result.code == 2
    assert "splits.train.0.name" in result.err


def test_labels_are_the_shards_own(fashion: Path) -> None:
    stream = both(fashion, batch=1000)
    counts = torch.bincount(torch.cat([stream.read(draw)[0]["label"] for draw in range(10)]))
    assert counts.tolist() == [1000] * 10
    stream.close()


def test_an_index_from_a_stranger_cannot_ask_for_bytes_beyond_the_shard(copy: Path) -> None:
    path = index_path(copy / "train-000000.tar")
    intact = path.read_bytes()
    index = ShardIndex.open(path)
    place = intact.index(index.size["image"].tobytes())

    def forge(size: int) -> None:
        path.write_bytes(intact[: place + 12] + size.to_bytes(4, "little") + intact[place + 16 :])

    forge(0xFFFFFFFE)
    with pytest.raises(Failure, match="points beyond the shard"):
        Reader(Dataset(copy), "train").members(3)
    forge(0xFFFFFFFF)
    with pytest.raises(Failure, match="lacks one of image"):
        Reader(Dataset(copy), "train").read(0, 3, ("image",))
    path.write_bytes(intact[:-9])
    with pytest.raises(Failure, match="damaged index"):
        Reader(Dataset(copy), "train").members(3)


def test_a_draw_that_several_phases_share_is_loaded_once(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 1 with k = 3: the generator reads the step's first draw again."""
    stream = open_stream(fashion, batch=24, seed=5, recall=3)
    loaded: list[int] = []
    load = stream.load
    monkeypatch.setattr(stream, "load", lambda draw: loaded.append(draw) or load(draw))
    for step in range(6):
        for draw in (3 * step, 3 * step + 1, 3 * step + 2, 3 * step):
            stream.read(draw)
    stream.close()
    assert len(loaded) == len(set(loaded))
    assert set(range(18)) <= set(loaded)
