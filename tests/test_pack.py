"""Whatever goes in: the same bytes come out each time, any tar reader understands them, and bad input is named."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import open_stream, packed
from PIL import Image

from gandist.data.sources.open import EMBEDDED


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of small photos in several formats, sizes and modes."""
    random = np.random.default_rng(0)
    for number, (label, mode, suffix) in enumerate(
        [("cats", "RGB", "png"), ("cats", "RGB", "jpg"), ("dogs", "L", "png"), ("dogs", "RGBA", "png"), ("eels", "P", "png")] * 4
    ):  # fmt: skip
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (40 + number, 60, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"a photo.{number}.{suffix}")
    return tmp_path / "photos"


def test_packing_twice_gives_identical_bytes(photos: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        packed(photos, tmp_path / out, size=16, shard_samples=7)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.tar"))) == 3


def test_packing_again_does_nothing_and_says_so(gandist: Callable, photos: Path, tmp_path: Path) -> None:
    assert gandist("pack", photos, tmp_path / "out", "--size", 16).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    result = gandist("pack", photos, tmp_path / "out", "--size", 16)
    assert result.code == 0
    assert "nothing to do" in result.out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert gandist("pack", photos, tmp_path / "out", "--size", 32).code == 2


def test_idx_plain_and_gzipped_and_npz_hold_the_same_pixels(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    images, labels = random.integers(0, 256, (50, 9, 7), np.uint8), random.integers(0, 5, 50).astype(np.uint8)
    for name in ("plain", "zipped"):
        (tmp_path / name).mkdir()
    (tmp_path / "plain" / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "plain" / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (tmp_path / "zipped" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "zipped" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    np.savez(tmp_path / "arrays.npz", images=images, labels=labels)
    shards = []
    for source in ("plain", "zipped", "arrays.npz"):
        packed(tmp_path / source, tmp_path / f"out-{source}")
        shards.append((tmp_path / f"out-{source}" / "train-000000.tar").read_bytes())
        stream = open_stream(tmp_path / f"out-{source}", parts=("image", "label"), batch=50)
        loaded, numbers = stream.load(0).parts, stream.numbers(0)
        stream.close()
        assert np.array_equal(loaded["image"][..., 0].numpy(), images[numbers])
        assert np.array_equal(loaded["label"].numpy(), labels[numbers])
    assert shards[0] == shards[1] == shards[2]


def test_a_folder_of_idx_files_and_keras_names_give_train_and_test(tmp_path: Path) -> None:
    images = np.zeros((6, 8, 8), np.uint8)
    for name in ("train", "t10k"):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
    np.savez(tmp_path / "k.npz", x_train=images, y_train=np.arange(6), x_test=images[:2], y_test=np.arange(2))
    assert set(packed(tmp_path, tmp_path / "a").manifest.splits) == {"train", "test"}
    dataset = packed(tmp_path / "k.npz", tmp_path / "b")
    assert {name: shards[0].samples for name, shards in dataset.manifest.splits.items()} == {"train": 6, "test": 2}


def test_files_go_in_untouched_and_subfolders_become_classes(photos: Path, tmp_path: Path) -> None:
    dataset = packed(photos, tmp_path / "out")
    assert dataset.manifest.label is not None
    assert dataset.manifest.label.names == ("cats", "dogs", "eels")
    assert dataset.manifest.image.height is None  # they differ, and nobody asked for a size
    stored = sorted(s[k] for s in webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False)
                    for k in s if k in ("png", "jpg"))  # fmt: skip
    assert stored == sorted(path.read_bytes() for path in photos.rglob("*.*"))


def test_shards_are_read_by_tar_and_by_plain_webdataset(fashion: Path, tmp_path: Path) -> None:
    shard = fashion / "train-000000.tar"
    listed = subprocess.run(["tar", "-tf", shard], capture_output=True, text=True, check=True).stdout.split()
    assert listed[:2] == ["00000000.cls", "00000000.npy"] or listed[:2] == ["00000000.npy", "00000000.cls"]
    sample = next(iter(webdataset.WebDataset(str(shard), shardshuffle=False).decode()))
    raw = gzip.decompress((EMBEDDED["fashion-mnist"] / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert np.array_equal(sample["npy"].ravel(), np.frombuffer(raw, np.uint8, 784, 16))


def test_shards_that_webdataset_wrote_are_indexed_and_read(gandist: Callable, photos: Path, tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=8, verbose=0) as sink:
        for number in range(20):
            sink.write({"__key__": f"k{number}", "png": np.full((12, 12, 3), number, np.uint8), "cls": number % 4})
    result = gandist("index", *sorted(tmp_path.glob("s-*.tar")))
    assert result.code == 0, result.err
    stream = open_stream(tmp_path, parts=("image", "label"), batch=20)
    loaded, numbers = stream.load(0).parts, stream.numbers(0)
    assert loaded["image"][:, 0, 0, 0].tolist() == numbers
    assert loaded["label"].tolist() == [number % 4 for number in numbers]
    assert stream.reader.key(13) == "k13"
    stream.close()


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda p: (p / "x.png").write_bytes(b"not an image"), "is not a PNG image"),
        (lambda p: np.savez(p.with_suffix(".npz"), images=np.zeros((2, 4, 4))), "uint8"),
        (lambda p: np.savez(p.with_suffix(".npz"), images=np.array([{}], dtype=object)), "not an NPZ file of plain arrays"),
        (lambda p: (p / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((2, 4, 4), np.uint8))[:-3]), "promises"),
        (lambda p: (p / "t.txt").write_text("hello"), "no images in it"),
    ],
)  # fmt: skip
def test_bad_sources_are_named(gandist: Callable, tmp_path: Path, make: Callable, rule: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    make(source)
    if (tmp_path / "source.npz").exists():
        source = tmp_path / "source.npz"
    result = gandist("pack", source, tmp_path / "out")
    assert result.code == 2
    assert rule in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_mixed_loose_and_class_images_and_foreign_folders_are_refused(
    gandist: Callable, photos: Path, tmp_path: Path
) -> None:
    shutil.copy(next(photos.rglob("*.png")), photos / "loose.png")
    assert "lie beside the class folders" in gandist("pack", photos, tmp_path / "out").err
    (photos / "loose.png").unlink()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    result = gandist("pack", photos, tmp_path / "home")
    assert result.code == 2
    assert "is not empty" in result.err


def test_a_photo_lies_as_its_exif_says(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise
    Image.new("RGB", (30, 20)).save(tmp_path / "in" / "a.jpg", exif=exif)
    dataset = packed(tmp_path / "in", tmp_path / "out")
    assert (dataset.manifest.image.width, dataset.manifest.image.height) == (20, 30)


def test_nothing_but_plain_files_is_indexed(gandist: Callable, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    result = gandist("index", path)
    assert result.code == 2
    assert "at byte 0: 'a.png' is a symbolic link, not a plain file" in result.err


def test_grey_photos_among_coloured_ones_are_read_with_their_channels(photos: Path, tmp_path: Path) -> None:
    packed(photos, tmp_path / "out", size=16)
    stream = open_stream(tmp_path / "out", parts=("image", "label"), batch=20)
    loaded = stream.load(0).parts
    assert loaded["image"].shape == (20, 16, 16, 3)
    grey = (loaded["image"][..., 0] == loaded["image"][..., 2]).flatten(1).all(1)
    assert grey.sum() == 4  # the four photos in mode L
    stream.close()


def test_another_source_of_the_same_kind_and_count_is_not_taken_for_the_same(gandist: Callable, tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        np.savez(tmp_path / f"{name}.npz", images=np.full((20, 8, 8), number, np.uint8))
    assert gandist("pack", tmp_path / "a.npz", tmp_path / "out").code == 0
    result = gandist("pack", tmp_path / "b.npz", tmp_path / "out")
    assert result.code == 2
    assert "holds another dataset" in result.err


def test_a_photo_that_is_cut_off_is_refused_by_name_before_it_is_trained_on(
    gandist: Callable, photos: Path, tmp_path: Path
) -> None:
    photo = next(photos.rglob("*.jpg"))
    data = photo.read_bytes()
    photo.write_bytes(data[: len(data) * 3 // 4])
    result = gandist("pack", photos, tmp_path / "out")
    assert result.code == 2
    assert photo.name in result.err
    assert "truncated" in result.err
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), verbose=0) as sink:
        sink.write({"__key__": "k", "jpg": data[: len(data) * 3 // 4]})
    assert "sample 'k' cannot be decoded" in gandist("index", "--decode", tmp_path / "s-000.tar").err


def test_images_in_a_format_that_is_not_read_are_not_left_out_in_silence(
    gandist: Callable, photos: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (9, 9)).save(photos / "cats" / "scan.tiff")
    result = gandist("pack", photos, tmp_path / "out")
    assert result.code == 2
    assert "1 images, such as cats/scan.tiff, are in a format that is not read" in result.err


def test_a_place_that_cannot_be_written_is_named_without_a_traceback(
    gandist: Callable, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = gandist("pack", photos, tmp_path / "file" / "out")
    assert result.code == 2
    assert "cannot be made" in result.err
