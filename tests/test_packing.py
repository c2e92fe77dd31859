"""Packing is a function of the source and the options: processes, machines, kills and orders do not show in the bytes."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import open_stream, packed, run, start
from PIL import Image

from gandist.data.dataset import Dataset
from gandist.data.index import scan
from gandist.data.pack import Options, Packing, pack_part


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety small photos of three classes."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(90):
        folder = root / ("ape", "bee", "cat")[number % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (24, 30, 3), np.uint8)).save(folder / f"{number:03d}.png")
    return root


def test_any_number_of_processes_or_parts_writes_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    options = ("--size", 16, "--shard-samples", 8, "--shuffle", 5, "--split", "train=0.7,test=0.3")
    assert run("pack", photos, tmp_path / "one", *options, "--workers", 1).code == 0
    assert run("pack", photos, tmp_path / "three", *options, "--workers", 3).code == 0
    for part in (2, 1):
        result = run("pack", photos, tmp_path / "parts", *options, "--part", f"{part}/2")
        assert result.code == 0, result.out
        if part == 2:
            written = sorted(int(path.stem[-6:]) for path in (tmp_path / "parts").glob("train-*.tar"))
            assert written == list(range(1, 8, 2))  # its own shards, and no other's
            early = run("pack", photos, tmp_path / "parts", *options, "--merge")
            assert early.code == 2
            assert "shards are not there" in early.out
    assert run("pack", photos, tmp_path / "parts", *options, "--merge").code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "parts")
    assert "packed already" in run("pack", photos, tmp_path / "parts", *options).out


def test_a_packing_that_was_killed_goes_on_with_the_shards_it_lacks(photos: Path, tmp_path: Path) -> None:
    options = ("--shard-samples", 2, "--size", 400, "--workers", 2)
    packed(photos, tmp_path / "whole", shard_samples=2, size=400, shuffle=0)
    killed = 0
    for _ in range(3):
        process = start("pack", photos, tmp_path / "out", *options)
        before = len([*(tmp_path / "out").glob("*.tar")])
        deadline = time.monotonic() + 60
        while (
            len([*(tmp_path / "out").glob("*.tar")]) < before + 5
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.005)
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert killed >= 2
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert run("pack", photos, tmp_path / "out", *options).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    kept = [path for path, when in written.items() if path.stat().st_mtime_ns == when]
    assert len(kept) >= 10


def test_another_packing_is_not_mixed_into_one_that_was_killed(gandist: Callable, photos: Path, tmp_path: Path) -> None:
    assert gandist("pack", photos, tmp_path / "out", "--shard-samples", 8, "--part", "1/2").code == 0
    result = gandist("pack", photos, tmp_path / "out", "--shard-samples", 9, "--part", "2/2")
    assert result.code == 2
    assert "another packing has begun there" in result.err


def test_shuffling_permutes_splits_divide_and_keys_name_the_item(photos: Path, tmp_path: Path) -> None:
    keys = {}
    for name, options in {
        "plain": {"shuffle": None},
        "a": {"shuffle": 1},
        "b": {"shuffle": 2},
        "split": {"shuffle": 1, "splits": (("train", 0.8), ("validation", 0.1), ("test", 0.1))},
    }.items():
        packed(photos, tmp_path / name, shard_samples=40, **options)
        keys[name] = [s.key for path in sorted((tmp_path / name).glob("*.tar")) for s in scan(path)]
    assert keys["plain"] == sorted(keys["plain"])
    assert keys["plain"][0] == "00000000-ape_000"
    assert Counter(keys["a"]) == Counter(keys["b"]) == Counter(keys["plain"]) == Counter(keys["split"])
    assert len({tuple(order) for order in (keys["plain"], keys["a"], keys["b"])}) == 3
    manifest = Dataset(tmp_path / "split").manifest
    assert {name: sum(s.samples for s in shards) for name, shards in manifest.splits.items()} == {
        "train": 72, "validation": 9, "test": 9,
    }  # fmt: skip
    assert sum(sum(counts.labels) for counts in manifest.counts.values()) == 90
    assert manifest.counts["train"].labels != (72, 0, 0)  # class folders come in order, and a split is taken by chance


def numbered(samples: int, first: int = 0) -> np.ndarray:
    """Images that each show their number."""
    return np.broadcast_to(np.arange(first, first + samples, dtype=np.uint8)[:, None, None], (samples, 4, 4))


def shown(folder: Path, split: str) -> list[int]:
    """What the images of a split show, in the order in which they lie."""
    shards = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    return [int(sample["npy"].max()) for sample in webdataset.WebDataset(shards, shardshuffle=False).decode()]


def test_a_count_takes_the_next_items_of_the_source_and_packs_them_as_if_they_were_all(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", images=numbered(90))
    np.savez(tmp_path / "first.npz", images=numbered(50))
    counts = (("train", 50), ("validation", 10), ("rest", 30))
    for shuffle in (None, 0, 7):
        whole = packed(
            tmp_path / "all.npz", tmp_path / f"all{shuffle}", splits=counts, shard_samples=20, shuffle=shuffle
        )
        packed(tmp_path / "first.npz", tmp_path / f"first{shuffle}", shard_samples=20, shuffle=shuffle)
        assert [*whole.manifest.splits] == ["train", "validation", "rest"]
        found = {split: shown(tmp_path / f"all{shuffle}", split) for split, _ in counts}
        ranges = {"train": [*range(50)], "validation": [*range(50, 60)], "rest": [*range(60, 90)]}
        assert {split: sorted(numbers) for split, numbers in found.items()} == ranges
        assert (found == ranges) == (shuffle is None)
        for path in (tmp_path / f"first{shuffle}").glob("train-*"):
            assert path.read_bytes() == (tmp_path / f"all{shuffle}" / path.name).read_bytes()


def test_a_count_is_the_same_in_processes_of_their_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", images=numbered(30))
    for workers in (1, 2):
        packed(tmp_path / "all.npz", tmp_path / f"{workers}", workers, splits=(("a", 29), ("b", 1)), shard_samples=10)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("shares", ["train=0.75,validation=0.25", "train=30,validation=10", "fit=10,tune=30"])
def test_a_divided_source_has_its_train_divided_and_the_rest_left(
    shares: str, gandist: Callable, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", x_train=numbered(40), x_test=numbered(20, 100))
    assert gandist("pack", tmp_path / "x.npz", tmp_path / "whole", "--workers", 1).code == 0
    assert gandist("pack", tmp_path / "x.npz", tmp_path / "out", "--workers", 1, "--split", shares).code == 0
    names = [share.partition("=")[0] for share in shares.split(",")]
    assert {*Dataset(tmp_path / "out").manifest.splits} == {*names, "test"}
    assert sorted(number for name in names for number in shown(tmp_path / "out", name)) == [*range(40)]
    for name in ("test-000000.tar", "test-000000.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_share_of_1_is_all_and_no_count(gandist: Callable, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=numbered(5))
    for number, share in enumerate(["train=1", "train=1.0", "train = 1 "]):
        assert gandist("pack", tmp_path / "x.npz", tmp_path / f"{number}", "--split", share).code == 0
        assert contents(tmp_path / f"{number}") == contents(tmp_path / "0")
    np.savez(tmp_path / "two.npz", images=numbered(2))
    assert (
        gandist("pack", tmp_path / "two.npz", tmp_path / "two", "--workers", 1, "--split", "train=1,test=1").code == 0
    )
    assert gandist("pack", tmp_path / "two.npz", tmp_path / "all", "--split", "train=2").code == 0


@pytest.mark.parametrize(
    ("arrays", "shares", "rule"),
    [
        (("x_train", "x_test"), "train=30,validation=9", "the counts add up to 39, and the source has 40 samples in train"),
        (("x_train", "x_test"), "train=50,validation=10", "the counts add up to 60, and the source has 40"),
        (("x_train",), "train=41", "the counts add up to 41, and the source has 40"),
        (("x_train", "x_test"), "train=30,test=10", "--split test: the source is divided already, into train, test"),
        (("x_train", "x_test"), "train=0.5,test=0.5", "--split test: the source is divided already"),
        (("x_test", "x_validation"), "train=0.5,rest=0.5", "divides the split train, and the source has only test, validation"),
        (("x_train",), "train=20,validation=0.5", "20, 0.5 are counts and fractions"),
        (("x_train",), "train=1,validation=0.5", "are counts and fractions"),
        (("x_train",), "train=40,validation=0", "must be 1 or more"),
        (("x_train",), "train=30.0,validation=10.0", "counts are whole numbers"),
        (("x_train",), "train=3__0,validation=10", "must read NAME=FRACTION or NAME=COUNT"),
        (("x_train",), f"train={'9' * 5000}", "counts are whole numbers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", [(), ("--part", "1/2")])
def test_shares_that_the_source_does_not_have_are_refused_and_nothing_is_written(
    arrays: tuple[str, ...], shares: str, rule: str, part: tuple[str, ...], gandist: Callable, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **dict.fromkeys(arrays, numbered(40)))
    result = gandist("pack", tmp_path / "x.npz", tmp_path / "out", "--split", shares, *part)
    assert result.code == 2
    assert rule in result.err
    assert not (tmp_path / "out").exists()


def test_every_shard_of_a_shuffled_packing_holds_every_class(fashion: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "sorted.npz", images=np.zeros((4000, 4, 4), np.uint8), labels=np.repeat(np.arange(10), 400))
    packed(tmp_path / "sorted.npz", tmp_path / "out", shard_samples=500, shuffle=0)
    for shard in range(8):
        stream = open_stream(tmp_path / "out", parts=("label",), batch=500)
        labels = [int(bytes(stream.reader.read(shard, place, ("label",))["label"][1])) for place in range(500)]
        assert min(Counter(labels)[label] for label in range(10)) > 20
        stream.close()


def test_bad_files_are_named_and_refused_or_passed_over_and_counted(
    gandist: Callable, photos: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    for number in range(12):
        (source / "ape").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(source / "ape" / f"{number:02d}.png")
    whole = (source / "ape" / "03.png").read_bytes()
    (source / "ape" / "03.png").write_bytes(whole[: len(whole) // 2])
    (source / "ape" / "07.png").write_bytes(b"not an image")
    refused = gandist("pack", source, tmp_path / "refused")
    assert refused.code == 2
    assert "--bad skip" in refused.err
    assert "03.png" in refused.err or "07.png" in refused.err
    skipped = gandist("pack", source, tmp_path / "skipped", "--bad", "skip", "--shard-samples", 5)
    assert skipped.code == 0, skipped.err
    assert "10 samples" in skipped.out
    assert "2 bad files passed over" in skipped.out
    assert gandist("verify", tmp_path / "skipped").code == 0


def test_images_and_masks_stay_untouched_and_are_counted_by_class(gandist: Callable, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for number in range(8):
        height, width = 20 + number, 30
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(
            tmp_path / "in" / "images" / f"{number}.png"
        )
        mask = random.integers(0, 4, (height, width), np.uint8)
        mask[0] = 255
        image = _palette(mask) if number % 2 else Image.fromarray(mask)
        image.save(tmp_path / "in" / "labels" / f"{number}.png")
    result = gandist("pack", tmp_path / "in", tmp_path / "out", "--names", "sky,tree,road,cow")
    assert result.code == 0, result.err
    assert "4 sky, tree, road, cow, 255 is ignored" in result.out
    dataset = Dataset(tmp_path / "out")
    counts = dataset.manifest.counts["train"]
    assert counts.ignored_pixels == 8 * 30
    assert counts.mask_present == 4 * (sum(counts.mask_pixels),)
    assert dataset.spec("train").mask_pixels == counts.mask_pixels
    assert dataset.spec("train").mask_present == counts.mask_present
    assert sum(counts.mask_pixels) == sum(30 * (19 + number) for number in range(8))
    stored = webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False)
    files = {(s["png"], s["mask.png"]) for s in stored}
    sources = {
        tuple((tmp_path / "in" / folder / f"{n}.png").read_bytes() for folder in ("images", "labels")) for n in range(8)
    }
    assert files == sources


@pytest.fixture
def streets(tmp_path: Path) -> Path:
    """Forty images of several sizes; of classes 0 … 4 each has two or three, and 9 is to be ignored."""
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for number in range(40):
        mask = random.choice([number % 5, number % 3, (number + 2) % 5, 9], (8 + number, 10)).astype(np.uint8)
        Image.fromarray(np.stack([mask] * 3, 2)).save(tmp_path / "in" / "images" / f"{number:02d}.png")
        Image.fromarray(mask).save(tmp_path / "in" / "masks" / f"{number:02d}.png")
    return tmp_path / "in"


def _present(folder: Path, value: int, ignore: int) -> int:
    """Pixels that are not ignored, of the masks that hold `value`."""
    masks = [np.asarray(Image.open(path)) for path in (folder / "masks").iterdir()]
    return sum(int((mask != ignore).sum()) for mask in masks if (mask == value).any())


def test_pixels_of_the_images_in_which_a_class_occurs_are_counted_alike_by_processes_parts_and_an_index(
    streets: Path, gandist: Callable, tmp_path: Path
) -> None:
    options = ("--shard-samples", 4, "--shuffle", 5, "--ignore", 9)
    assert gandist("pack", streets, tmp_path / "one", *options, "--workers", 1).code == 0
    assert gandist("pack", streets, tmp_path / "three", *options, "--workers", 3).code == 0
    for part in (2, 1):
        assert gandist("pack", streets, tmp_path / "parts", *options, "--part", f"{part}/2").code == 0
    assert gandist("pack", streets, tmp_path / "parts", *options, "--merge").code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "parts")
    counts = Dataset(tmp_path / "one").manifest.counts["train"]
    assert counts.mask_present == tuple(_present(streets, value, 9) for value in range(5))
    (tmp_path / "three" / "dataset.json").unlink()
    shards = sorted((tmp_path / "three").glob("*.tar"))
    assert gandist("index", *shards, "--ignore", 9).code == 0
    assert Dataset(tmp_path / "three").manifest.counts["train"] == counts
    assert gandist("index", *shards, "--out", tmp_path / "all", "--ignore", -1).code == 0
    counted = Dataset(tmp_path / "all").manifest.counts["train"].mask_present
    assert counted == tuple(_present(streets, value, -1) for value in range(10))


def test_a_packing_of_masks_goes_on_but_not_with_shards_whose_pixels_were_not_counted(
    streets: Path, tmp_path: Path
) -> None:
    whole = packed(streets, tmp_path / "whole", shard_samples=4, ignore=9)
    pack_part(Packing(str(streets), tmp_path / "out", Options(shard_samples=4, ignore=9, shuffle=None)), 0, 2)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    notes = sorted((tmp_path / "out").glob(".train-*.json"))
    assert len(notes) == len(times) == 5
    for path, name in zip(notes, ("mask_present", "outer"), strict=False):  # as before they were noted
        note = json.loads(path.read_text())
        del note[name]
        path.write_text(json.dumps(note))
    found = packed(streets, tmp_path / "out", shard_samples=4, ignore=9)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert found.digest == whole.digest
    assert [path.stat().st_mtime_ns == times[path] for path in sorted(times)] == [False, False, True, True, True]


def test_a_dataset_without_masks_says_nothing_of_the_pixels_of_their_images(photos: Path, tmp_path: Path) -> None:
    counts = json.loads((packed(photos, tmp_path / "out").store.local / "dataset.json").read_text())["counts"]["train"]
    assert [*counts] == ["labels", "mask_pixels", "ignored_pixels", "skipped"]


def _palette(mask: np.ndarray) -> Image.Image:
    coloured = Image.new("P", mask.shape[::-1])
    coloured.putpalette([n * 7 % 256 for n in range(768)])
    coloured.putdata(mask.ravel().tolist())
    return coloured


def test_a_mask_that_does_not_fit_its_image_or_is_no_mask_is_refused(gandist: Callable, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    Image.new("RGB", (10, 10)).save(tmp_path / "in" / "images" / "a.png")
    for mask, rule in ((Image.new("L", (9, 10)), "they must agree"), (Image.new("RGB", (10, 10)), "not of colours")):
        mask.save(tmp_path / "in" / "masks" / "a.png")
        result = gandist("pack", tmp_path / "in", tmp_path / "out")
        assert result.code == 2
        assert rule in result.err


def test_resizing_keeps_masks_to_their_classes_and_fits_as_asked(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 7
    for number in range(3):
        Image.fromarray(np.stack([mask * 30] * 3, 2)).save(tmp_path / "in" / "images" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "in" / "masks" / f"{number}.png")
    for fit, (height, width) in {"crop": (20, 20), "shorter": (20, 30), "stretch": (20, 20)}.items():
        packed(tmp_path / "in", tmp_path / fit, size=20, fit=fit)
        stream = open_stream(tmp_path / fit, parts=("image", "mask"), batch=3)
        loaded = stream.load(0)
        assert not loaded.faults, loaded.faults
        assert loaded.parts["mask"].shape == (3, height, width)
        assert set(loaded.parts["mask"].unique().tolist()) == {0, 7}
        agree = (loaded.parts["image"][..., 0] > 105) == (loaded.parts["mask"] == 7)
        assert agree.float().mean() > 0.95
        stream.close()


def test_signals_become_float_batches_and_a_picture(gandist: Callable, tmp_path: Path, recipe: Callable) -> None:
    time_ = np.linspace(0, 6.28, 50, dtype=np.float32)
    signals = np.stack([np.sin(time_ * (n + 1)) for n in range(20)])
    np.save(tmp_path / "signals.npy", signals)
    packed(tmp_path / "signals.npy", tmp_path / "out")
    stream = open_stream(tmp_path / "out", parts=("signal",), batch=20)
    (batch,) = stream.read(0)
    assert batch["signal"].shape == (20, 1, 50)
    assert np.array_equal(batch["signal"][:, 0].numpy(), signals[batch.numbers["signal"]])
    stream.close()
    result = gandist("train", recipe(data=tmp_path / "out", discriminator="{kind: dcgan}"))
    assert result.code == 2
    assert "`dcgan` is for images, and the dataset has signals" in result.err
    assert gandist("train", recipe(data=tmp_path / "out")).code == 0


def test_shares_parts_and_options_that_cannot_be_are_refused_before_anything_is_written(
    gandist: Callable, photos: Path, tmp_path: Path
) -> None:
    for options, rule in [
        (("--split", "train=0.5,test=0.6"), "add up to 1"),
        (("--split", "train"), "NAME=FRACTION"),
        (("--split", "train=0.5,train=0.5"), "stands twice"),
        (("--fit", "stretch"), "no effect without --size"),
        (("--size", 16, "--fit", "squeeze"), "must be one of"),
        (("--part", "3/2"), "must be from 1/2"),
        (("--part", "x"), "must read I/N"),
        (("--part", "1/2", "--merge"), "contradict"),
        (("--shuffle", 1, "--no-shuffle"), "contradict"),
        (("--bad", "ignore"), "refuse or skip"),
        (("--merge",), "run the parts first"),
    ]:
        result = gandist("pack", photos, tmp_path / "out", *options)
        assert result.code == 2, options
        assert rule in result.err, result.err
        assert not (tmp_path / "out").exists()


def test_what_dataset_json_says_is_what_the_shards_hold(photos: Path, tmp_path: Path) -> None:
    packed(photos, tmp_path / "out", shard_samples=32, shuffle=3)
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["counts"]["train"]["labels"] == [30, 30, 30]
    assert manifest["source"]["shuffle"] == 3
    assert [shard["samples"] for shard in manifest["splits"]["train"]] == [32, 32, 26]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_of_any_depth_hold_the_numbers_that_were_stored(tmp_path: Path, mode: str, depth: int) -> None:
    classes = np.random.default_rng(depth).integers(0, min(2**depth, 200), (12, 20), np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    Image.new("RGB", (20, 12)).save(tmp_path / "in" / "images" / "a.png")
    (tmp_path / "in" / "masks" / "a.png").write_bytes(grey_or_palette(classes, depth, mode))
    packed(tmp_path / "in", tmp_path / "out", ignore=None)
    stream = open_stream(tmp_path / "out", parts=("mask",), batch=1)
    assert np.array_equal(stream.load(0).parts["mask"][0].numpy(), classes)
    assert stream.spec.mask.classes == classes.max() + 1
    stream.close()


def grey_or_palette(classes: np.ndarray, depth: int, mode: str) -> bytes:
    """A PNG of so many bits a pixel, which Pillow itself would not write."""
    rows = np.unpackbits(classes[:, :, None], axis=2)[:, :, 8 - depth :].reshape(len(classes), -1)
    packed_rows = np.packbits(rows, axis=1)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", classes.shape[1], classes.shape[0], depth, 0 if mode == "L" else 3, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(n * 37 % 256 for n in range(3 << depth))) if mode == "P" else b""
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed_rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_labels_and_masks_of_a_table_keep_their_own_classes_and_names(gandist: Callable, tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        Image.fromarray(np.full((8, 8), number % 3, np.uint8)).save(tmp_path / f"m{number}.png")
    rows = [f"{n}.png,{('eel', 'ape', 'cat', 'dog', 'bee')[n % 5]},m{n}.png" for n in range(6)]
    (tmp_path / "t.csv").write_text("path,label,mask\n" + "\n".join(rows) + "\n")
    assert gandist("pack", tmp_path / "t.csv", tmp_path / "out", "--names", "sky,sea,land").code == 0
    manifest = Dataset(tmp_path / "out").manifest
    assert (manifest.label.classes, manifest.label.names) == (5, ("ape", "bee", "cat", "dog", "eel"))
    assert (manifest.mask.classes, manifest.mask.names) == (3, ("sky", "sea", "land"))
    assert manifest.counts["train"].labels == (1, 1, 1, 1, 2)


def test_an_image_that_exif_turns_away_from_its_mask_is_refused(gandist: Callable, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    Image.new("L", (10, 10)).save(tmp_path / "in" / "masks" / "a.png")
    for orientation, code in ((3, 2), (1, 0)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (10, 10)).save(tmp_path / "in" / "images" / "a.jpg", exif=exif)
        result = gandist("pack", tmp_path / "in", tmp_path / f"out{orientation}")
        assert result.code == code, result.err
        assert code == 0 or "is turned by its EXIF, and its mask is not" in result.err


def test_masks_of_0_and_255_are_not_taken_for_one_class_in_silence(gandist: Callable, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    Image.new("RGB", (10, 10)).save(tmp_path / "in" / "images" / "a.png")
    Image.fromarray(np.eye(10, dtype=np.uint8) * 255).save(tmp_path / "in" / "masks" / "a.png")
    assert "one class is left" in gandist("pack", tmp_path / "in", tmp_path / "out").err


def test_a_shard_of_which_all_is_bad_is_passed_over_with_the_rest(gandist: Callable, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        Image.new("L", (8, 8)).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "2.png").write_bytes(b"no")
    result = gandist("pack", tmp_path / "in", tmp_path / "out", "--bad", "skip", "--shard-samples", 1, "--no-shuffle")
    assert result.code == 0, result.err
    assert "4 samples in 4 shards, 1 bad file passed over" in result.out
    assert len([*(tmp_path / "out").glob("*.tar")]) == 4


def test_a_picture_with_a_thousand_damaged_entries_does_not_hang_its_process(photos: Path, tmp_path: Path) -> None:
    """Pillow warns of each entry; a pipe that nobody reads would be full."""
    entries = b"".join(struct.pack("<HHII", 0x9000 + n, 4, 1 << 31, n * 8) for n in range(1500))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1500) + entries + bytes(4)
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    data = stream.getvalue()
    (tmp_path / "in").mkdir()
    for number in range(4):
        head = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        (tmp_path / "in" / f"{number}.jpg").write_bytes(head + data[2:])
    result = run("pack", tmp_path / "in", tmp_path / "out", "--workers", 2, "--shard-samples", 1, timeout=60)
    assert result.code in (0, 2), result.out
    assert len(result.out) < 5000
