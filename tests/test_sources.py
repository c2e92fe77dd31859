"""Whatever a source is: its items come by number, the same in every process, and what it should not be is named."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, open_stream, run
from PIL import Image

from gandist.data.dataset import Dataset
from gandist.data.sources import Item, Source
from gandist.data.sources.arrays import GARMENTS, embedded_source
from gandist.data.sources.generated import GENERATED, OPEN_STRINGS, RATE, mixture, string
from gandist.data.sources.open import open_source
from gandist.data.sources.scenes import CLASSES, SAMPLES, SIZE, WORN, scene
from gandist.pictures import curves
from gandist.recipe import Failure, InputError

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (12, 6, 5, 3), np.uint8)
LABELS = RANDOM.integers(0, 3, 12).astype(np.uint8)
WAVES = RANDOM.normal(size=(9, 2, 16)).astype(np.float32)


def load(path: object, tmp_path: Path, **options: bool) -> Source:
    return open_source(str(path), scratch=tmp_path / "scratch", **options)


def items(source: Source, split: str = "train") -> list[Item]:
    return [source.splits[split].read(number) for number in range(source.splits[split].samples)]


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fails where more bytes than `limit` are taken at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def encoded(number: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (8, 6), number).save(stream, kind)
    return stream.getvalue()


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def tree(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def shard(first: int = 0, count: int = 4) -> dict[str, bytes]:
    files = {}
    for number in range(first, first + count):
        files |= {f"d/{number:04d}.jpg": encoded(number, "JPEG"), f"d/{number:04d}.CLS": b"%d" % (number % 3)}
        files[f"d/{number:04d}.json"] = b"{}"
    return files


PHOTOS = {
    f"{label}/{n} a.b.{kind}": encoded(n)
    for n, (label, kind) in enumerate([("cat", "png"), ("cat", "PNG"), ("dog", "png")])
}
SCENES = {f"images/{n}.jpg": encoded(n, "JPEG") for n in range(4)} | {
    f"labels/{n}.png": encoded(n, mode="L") for n in range(4)
}
TABLE = "path,label,split\ncat/0 a.b.png,cat,train\ndog/2 a.b.png,dog,val\ncat/1 a.b.PNG,cat,train\n"

KINDS: dict[str, Callable[[Path], object]] = {
    "idx": lambda p: tree(p / "i", {"train-images-idx3-ubyte": idx(IMAGES[..., 0]), "train-labels-idx1-ubyte": idx(LABELS)}),
    "npy": lambda p: tree(p, {"x.npy": saved(IMAGES)}) / "x.npy",
    "classes": lambda p: tree(p / "c", PHOTOS),
    "masks": lambda p: tree(p / "m", SCENES),
    "tar": lambda p: tar(p / "t.tar", {f"top/{name}": data for name, data in SCENES.items()}),
    "zip": lambda p: zipped(p / "z.zip", {f"top/{name}": data for name, data in PHOTOS.items()}),
    "table": lambda p: tree(p / "v", {**PHOTOS, "t.csv": TABLE}) / "t.csv",
    "numbers": lambda p: tree(p, {"n.csv": "a,label,b\n1,0,2\n3,1,4\n"}) / "n.csv",
    "signals": lambda p: tree(p / "s", {f"up/{n}.npy": saved(wave) for n, wave in enumerate(WAVES)}),
    "shards": lambda p: tar(p / "w/train-1.tar", shard()).parent / "train-{1,2}.tar" if tar(p / "w/train-2.tar", shard(4)) else 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_opening_gives_the_same_items_in_any_order(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    first, second = load(path, tmp_path), load(path, tmp_path)
    assert first.record == second.record
    assert first.names == second.names
    for name, split in first.splits.items():
        assert split.digest == second.splits[name].digest
        backwards = [second.splits[name].read(number) for number in reversed(range(split.samples))]
        assert items(first, name) == backwards[::-1]


def test_arrays_are_the_same_items_however_they_are_spelled(tmp_path: Path) -> None:
    grey = IMAGES[..., 0]
    tree(tmp_path / "a", {"x-images-idx3-ubyte": idx(grey), "x-labels-idx1-ubyte": idx(LABELS)})
    tree(tmp_path / "b", {"x-images-idx3-ubyte.gz": gzip.compress(idx(grey)), "x-labels-idx1-ubyte.gz": gzip.compress(idx(LABELS))})  # fmt: skip
    np.savez_compressed(tmp_path / "c.npz", images=grey, labels=LABELS)
    found = [load(tmp_path / name, tmp_path) for name in ("a", "b", "c.npz")]
    assert items(found[0]) == items(found[1]) == items(found[2])
    assert len({source.splits["train"].digest for source in found}) == 1
    assert [int(item.members["cls"]) for item in items(found[0])] == LABELS.tolist()
    tree(tmp_path, {"d.npy": saved(np.asfortranarray(grey))})
    alone = items(load(tmp_path / "d.npy", tmp_path))
    assert [item.members["npy"] for item in alone] == [item.members["npy"] for item in items(found[0])]


@pytest.mark.parametrize("array", [WAVES, WAVES[:, 0], np.asfortranarray(WAVES), WAVES.astype(">f8"), WAVES[:, :1].astype("f2")])  # fmt: skip
def test_signals_become_float32_of_channels_and_length(array: np.ndarray, tmp_path: Path) -> None:
    tree(tmp_path, {"x.npy": saved(array)})
    for number, item in enumerate(items(load(tmp_path / "x.npy", tmp_path))):
        assert item.members.keys() == {"signal.npy"}
        assert item.members["signal.npy"][:8] == b"\x93NUMPY\x01\x00"
        signal = npy(item.members["signal.npy"])
        assert signal.dtype == "<f4"
        assert np.array_equal(signal, np.atleast_2d(array[number]).astype("f4"))


def cifar(rows: int, head: int, top: int) -> tuple[np.ndarray, bytes]:
    values = RANDOM.integers(0, 256, (rows, head + 3072), np.uint8)
    values[:, :head] %= top
    return values, values.tobytes()


def test_cifar_in_binary_and_as_pictures_gives_the_same_pixels_labels_and_names(tmp_path: Path) -> None:
    files, pictures, labels = {}, {}, {"train": [], "test": []}
    for name, rows, split in (("data_batch_1", 5, "train"), ("data_batch_2", 3, "train"), ("test_batch", 2, "test")):
        values, files[f"{name}.bin"] = cifar(rows, 1, 10)
        stream = io.BytesIO()
        pixels = values[:, 1:].reshape(rows, 3, 1024).transpose(0, 2, 1)
        Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
        pictures[f"{name}.png"] = stream.getvalue()
        labels[split] += values[:, 0].tolist()
    pictures |= {f"{split}_lables.json": json.dumps(found).encode() for split, found in labels.items()}
    binary, shown = load(tree(tmp_path / "b", files), tmp_path), load(tree(tmp_path / "p", pictures), tmp_path)
    assert binary.names == shown.names == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # fmt: skip
    for split, found in labels.items():
        assert items(binary, split) == items(shown, split)
        assert [int(item.members["cls"]) for item in items(binary, split)] == found
    assert npy(items(shown)[0].members["npy"]).shape == (32, 32, 3)
    tree(tmp_path / "b", {"batches.meta.txt": "\n".join("abcdefghij") + "\n"})
    assert load(tmp_path / "b", tmp_path).names == tuple("abcdefghij")


def test_cifar_100_has_the_fine_labels(tmp_path: Path) -> None:
    values, data = cifar(6, 2, 100)
    names = "\n".join(f"class_{number}" for number in range(100))
    source = load(tree(tmp_path / "c", {"train.bin": data, "fine_label_names.txt": names}), tmp_path)
    assert [int(item.members["cls"]) for item in items(source)] == values[:, 1].tolist()
    assert source.names[7] == "class_7"


class Trap:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_pickles_are_refused_with_advice_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trap = pickle.dumps(Trap())
    tree(tmp_path / "a", {"data_batch_1": trap, "batches.meta": trap})
    tree(tmp_path / "b", {"train": trap, "test": trap, "meta": trap})
    tar(tmp_path / "c.tar", {"cifar-10-batches-py/data_batch_1": trap})
    for name in ("a", "a/data_batch_1", "b", "c.tar"):
        with pytest.raises(InputError, match="take the binary version"):
            load(name, tmp_path)
    np.save(tmp_path / "o.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", images=np.array([Trap()], dtype=object))
    tar(tmp_path / "s.tar", {"a.npy": (tmp_path / "o.npy").read_bytes(), "a.pkl": trap, "a.cls": b"0"})
    for name in ("o.npy", "o.npz"):
        with pytest.raises(InputError):
            load(name, tmp_path)
    with pytest.raises(ValueError, match=r"a\.npy\) is not a \.npy file"):
        load("s.tar", tmp_path).splits["train"].read(0)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("layout", "splits"),
    [
        ("{role}/{name}", {"train"}),
        ("{role}/{split}/deep/{name}", {"train", "validation"}),
        ("{split}/{role}/{name}", {"train", "validation"}),
        ("top/{role}/{name}", {"train"}),
    ],
)
def test_images_and_masks_are_paired_by_stem_and_untouched(layout: str, splits: set[str], tmp_path: Path) -> None:
    files, pairs = {}, set()
    for number, split in enumerate(["train", "train", "val"]):
        image, mask = encoded(number, "JPEG"), encoded(number, mode="L")
        files[layout.format(role="JPEGImages", split=split, name=f"{number}.x.jpg")] = image
        files[layout.format(role="SegmentationClass", split=split, name=f"{number}.x.png")] = mask
        pairs.add((image, mask))
    tree(tmp_path / "f", files)
    tar(tmp_path / "t.tar", files)
    zipped(tmp_path / "z.zip", files)
    for name in ("f", "t.tar", "z.zip"):
        source = load(tmp_path / name, tmp_path)
        assert source.splits.keys() == splits
        assert not source.names
        found = [item for split in splits for item in items(source, split)]
        assert {(item.members["jpg"], item.members["mask.png"]) for item in found} == pairs
        assert {item.members.keys() == {"jpg", "mask.png"} for item in found} == {True}


@pytest.mark.parametrize(
    ("files", "rule"),
    [
        ({"images/9.jpg": b""}, r"5 images and 4 masks, of which 1 images have no mask, such as images/9\.jpg"),
        ({"labels/9.png": b"", "labels/8.png": b""}, r"2 masks have no image, such as labels/8\.png"),
        ({"images/1.png": b""}, "a second file with this stem"),
        ({"masks/1.png": b""}, "labels and masks are both folders of masks"),
        ({"labels/1.jpg": b""}, "second file"),
        ({"labels/7.jpg": b"", "images/7.jpg": b""}, "is no PNG"),
        ({"more/1.png": b""}, "lie beside"),
        ({"images/train/9.jpg": b"", "labels/train/9.png": b""}, "divide all or none"),
        ({"labels/9.gif": b""}, "a format that is not read"),
    ],
)
def test_images_without_masks_and_masks_without_images_are_counted(files: dict, rule: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rule):
        load(tree(tmp_path / "m", {**SCENES, **files}), tmp_path)


def test_a_folder_a_tar_and_a_zip_of_the_same_files_are_the_same_items(tmp_path: Path) -> None:
    tree(tmp_path / "f", PHOTOS)
    tar(tmp_path / "t.tar", {f"./photos/{name}": data for name, data in PHOTOS.items()} | {"photos/README": b"x"})
    zipped(
        tmp_path / "z.zip", {"p/": b"", "__MACOSX/p/cat/._0 a.b.png": b"x"} | {f"p/{n}": d for n, d in PHOTOS.items()}
    )
    found = [load(tmp_path / name, tmp_path) for name in ("f", "t.tar", "z.zip")]
    assert items(found[0]) == items(found[1]) == items(found[2])
    assert {source.names for source in found} == {("cat", "dog")}
    assert [item.name for item in items(found[0])] == ["cat/0 a.b.png", "cat/1 a.b.PNG", "dog/2 a.b.png"]


def link(path: Path, kind: bytes = tarfile.SYMTYPE) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a/b.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)


def linked_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("b.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")


def zip_bomb(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w") as file,
    ):
        for _ in range(1100):
            file.write(bytes(1 << 20))


def encrypted_zip(path: Path) -> None:
    zipped(path, {"b.png": b"x"})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "make", "rule"),
    [
        ("a.tar", link, "not a plain file"),
        ("a.tar", partial(link, kind=tarfile.CHRTYPE), "not a plain file"),
        ("a.tar", lambda p: tar(p, {"../b.png": b"x"}), "leads out of the archive"),
        ("a.tar", lambda p: tar(p, {"/b.png": b"x"}), "leads out of the archive"),
        ("a.tar", lambda p: tar(p, {"a/b.png": b"x", "a/./b.png": b"y"}), "stands twice"),
        ("a.tar", lambda p: p.write_bytes(tar(p, PHOTOS).read_bytes()[:1400]), "cut off"),
        ("a.tar", lambda p: tar(p, {"a.txt": b"x"}), "no images in it"),
        ("a.tar.gz", lambda p: p.write_bytes(b""), "unpack it"),
        ("a.tgz", lambda p: p.write_bytes(b""), "unpack it"),
        ("a.zip", linked_zip, "not a plain file"),
        ("a.zip", encrypted_zip, "is encrypted"),
        ("a.zip", zip_bomb, "no images compress like that"),
        ("a.zip", lambda p: zipfile.ZipFile(p, "w", zipfile.ZIP_BZIP2).writestr("a.png", "x"), "neither stored nor deflated"),
        ("a.zip", lambda p: zipped(p, {"a/../../b.png": b"x"}), "leads out of the archive"),
        ("a.zip", lambda p: p.write_bytes(b"PK\x03\x04 nonsense"), "not a zip archive"),
        ("a.mat", lambda p: p.write_bytes(b""), "not a source that is known"),
        ("a", lambda p: os.mkfifo(p), "neither a folder nor a plain file"),
        ("a.npy", lambda p: p.symlink_to("/dev/zero"), "neither a folder nor a plain file"),
        ("a", lambda p: tree(p, {"a.png": b""}) and (p / "b.png").symlink_to("gone"), "a link to nothing"),
        ("a", lambda p: tree(p, {"train/a.png": b"", "b.png": b""}), "lie beside"),
        ("a", lambda p: tree(p, {"data_batch_1.bin": bytes(3072)}), "rows of 3073 bytes"),
        ("a", lambda p: tree(p, {"data_batch_1.bin": b"\x0a" + bytes(3072)}), "image 0 has the label 10"),
        ("a", lambda p: tree(p, {"data_batch_1.png": encoded(0), "train_lables.json": "[0]"}), "1024 in RGB"),
        ("a.npy", lambda p: p.write_bytes(saved(IMAGES)[:-1]), "promises"),
        ("a.npy", lambda p: p.write_bytes(saved(IMAGES) + b"x"), "promises"),
        ("a.npy", lambda p: p.write_bytes(b""), "empty"),
        ("a.npy", lambda p: np.save(p, np.zeros((4, 4), np.uint8)), "is needed"),
        ("a.npy", lambda p: np.save(p, np.zeros((4, 4), np.int32)), "uint8"),
        ("a.npy", lambda p: np.save(p, np.zeros(4, "f4")), "is needed"),
        ("a.npy", lambda p: np.save(p, np.zeros(4, "i4,f4")), "not plain numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_source_is_refused_by_rule(name: str, make: Callable, rule: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError, match=rule) as refused:
        load(tmp_path / name, tmp_path)
    assert str(tmp_path / name) in str(refused.value)


def test_a_head_that_lies_takes_no_memory(tmp_path: Path) -> None:
    for shape in ("(100000000, 1000)", "(18446744073709551616, 18446744073709551616)", "(-1, 4)", "(True, 16)"):
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)
        tree(tmp_path, {"x.npy": head, "folder/x.npy": head})
        tar(tmp_path / "s.tar", {"a.signal.npy": head})
        for source in ("x.npy", "folder", "s.tar"):
            with memory_below(4 << 20), pytest.raises(ValueError, match=r"is not a \.npy file that is read"):
                load(tmp_path / source, tmp_path)


def test_a_zip_that_lies_about_a_size_unfolds_no_further(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(200 << 20))
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(struct.pack("<I", 200 << 20), struct.pack("<I", 4000)))
    source = load(tmp_path / "a.zip", tmp_path)
    with memory_below(4 << 20), pytest.raises(ValueError, match=r"\(a\.png\) cannot be read"):
        source.splits["train"].read(0)


def test_a_file_that_changes_after_it_was_opened_is_named(tmp_path: Path) -> None:
    source = load(tree(tmp_path / "c", PHOTOS), tmp_path)
    (tmp_path / "c/dog/2 a.b.png").write_bytes(b"shorter")
    with pytest.raises(ValueError, match=r"\(dog/2 a\.b\.png\) has changed since it was opened"):
        source.splits["train"].read(2)


def test_a_table_of_paths_gives_labels_splits_and_masks(tmp_path: Path) -> None:
    tree(tmp_path, {**PHOTOS, **SCENES})
    source = load(tree(tmp_path, {"t.csv": "\ufeff" + TABLE.replace("\n", "\r\n")}) / "t.csv", tmp_path)
    assert source.names == ("cat", "dog")
    assert {name: split.samples for name, split in source.splits.items()} == {"train": 2, "validation": 1}
    assert items(source, "validation") == [Item("dog/2 a.b.png", {"png": PHOTOS["dog/2 a.b.png"], "cls": b"1"})]
    table = 'Image,mask,target\nimages/1.jpg,labels/1.png,7\n"images/3.jpg",labels/3.png,10\n'
    source = load(tree(tmp_path, {"u.csv": table}) / "u.csv", tmp_path)
    assert source.names == ()
    assert items(source)[1].members == {"jpg": SCENES["images/3.jpg"], "mask.png": SCENES["labels/3.png"], "cls": b"10"}


@pytest.mark.parametrize(
    ("table", "rule"),
    [
        ("path\n/etc/passwd.png\n", r"row 2: '/etc/passwd\.png' leads out"),
        ("path\na/0.png\n../x.png\n", "row 3: .* leads out"),
        ("path\nout.png\n", "through a link"),
        ("path\nouter/x.png\n", "through a link"),
        ("path\na\0.png\n", "leads out|cannot be read|not a CSV"),
        ("path\ngone.png\n", "No such file"),
        ("path\na\n", "does not end with one of"),
        ("path\nfolder.png\n", "is not a plain file"),
        ("path,label\na/0.png\n", "row 2 has 1 cells, and the header has 2"),
        ("path,label\na/0.png,\n", "row 2 has no label"),
        ("path,label\na/0.png,1\na/0.png,-1\n", "row 3 has a negative label"),
        ("path,split\na/0.png,trian\n", "the split is 'trian'; known: train"),
        ("path,file\na/0.png,a/0.png\n", "2 columns named path or file"),
        ("path,mask\na/0.png,a/0.jpg\n", "does not end with one of png"),
        ("path\n", "a header and no rows"),
        ('path\n"' + "x" * 200_000 + '"\n', "field larger than field limit"),
        ("path\n\udcff.png\n", "can't decode|decode"),
    ],
)  # fmt: skip
def test_a_table_cannot_lead_out_of_its_folder_or_say_nonsense(table: str, rule: str, tmp_path: Path) -> None:
    tree(tmp_path / "t", {"a/0.png": encoded(0), "folder.png/x": b""})
    tree(tmp_path, {"x.png": encoded(0), "outside/x.png": encoded(0)})
    (tmp_path / "t/out.png").symlink_to(tmp_path / "x.png")
    (tmp_path / "t/outer").symlink_to(tmp_path / "outside")
    (tmp_path / "t/t.csv").write_bytes(table.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=rule):
        load(tmp_path / "t/t.csv", tmp_path)


@pytest.mark.parametrize("header", ["", "x0,x1,x2\n", "x0,x1,label\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_of_numbers_is_one_signal_a_row(header: str, end: str, tmp_path: Path) -> None:
    path = tree(tmp_path, {"n.csv": (header + "1,2.5,3\n4,5,6e0").replace("\n", end)}) / "n.csv"
    found = items(load(path, tmp_path))
    width = 2 if "label" in header else 3
    assert [npy(item.members["signal.npy"]).tolist() for item in found] == [[[1, 2.5, 3][:width]], [[4, 5, 6][:width]]]
    assert [item.members.get("cls") for item in found] == ([b"3", b"6"] if width == 2 else [None, None])


@pytest.mark.parametrize(
    ("table", "rule"),
    [
        ("1,2\n3,nan\n", "row 2 holds 'nan'"),
        ("a,b\n1,2\n3,-inf\n", "row 3 holds '-inf'"),
        ("1,2\n1e39,2\n", "row 2 holds '1e39'"),
        ("1,2\n3\n", "row 2 has 1 cells, and the first has 2"),
        ("a,b\n1,2\n3,x\n", "row 3 holds 'x', which is not a number; a CSV file holds numbers alone, or paths"),
        ("1,2\n3,\n", "row 2 holds ''"),
        ("a,label\n1,0.5\n", "the label 0.5 of signal 0"),
        ("a,label\n1,-1\n", "the label -1 of signal 0"),
        ("label\n1\n", "labels and no values"),
        ("a,b\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_a_table_that_holds_more_than_finite_numbers_is_refused_by_row(table: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rule):
        load(tree(tmp_path, {"n.csv": table}) / "n.csv", tmp_path)


def test_a_folder_of_signals_has_classes_and_one_shape(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"up/0.npy": saved(WAVES[0].astype("f8")), "down/1.npy": saved(WAVES[1])}
    files["up/2.csv"] = "\n".join(",".join(map(str, row)) for row in WAVES[2].T.tolist())  # one column a channel
    source = load(tree(tmp_path / "s", files), tmp_path)
    assert source.names == ("down", "up")
    for item, wave, label in zip(items(source), (WAVES[1], WAVES[0], WAVES[2]), (b"0", b"1", b"1"), strict=True):
        assert np.array_equal(npy(item.members["signal.npy"]), wave)
        assert item.members["cls"] == label
    for bad, rule in (
        (
            WAVES[0, :, 1:],
            r"\(up/9\.npy\) holds a signal of shape \(2, 15\), and the first, down/1\.npy, has \(2, 16\)",
        ),
        (WAVES[0] * np.nan, r"\(up/9\.npy\) holds NaN"),
        (IMAGES[0], "not both images or signals"),
        (WAVES, r"a signal is floats of shape \(length,\)"),
        (np.arange(32).reshape(2, 16), "a signal is floats"),
    ):
        tree(tmp_path / "s", {"up/9.npy": saved(bad)})
        with pytest.raises(ValueError, match=rule):
            load(tmp_path / "s", tmp_path).splits["train"].read(3)


def test_a_folder_of_uint8_arrays_is_one_of_images(tmp_path: Path) -> None:
    source = load(tree(tmp_path / "s", {f"{n}.npy": saved(image) for n, image in enumerate(IMAGES[:3])}), tmp_path)
    assert [npy(item.members["npy"]).tolist() for item in items(source)] == IMAGES[:3].tolist()


def test_shards_are_read_in_place_and_foreign_members_are_passed_over(tmp_path: Path) -> None:
    for number in range(3):
        tar(tmp_path / f"s/part-{number}.tar", shard(4 * number))
    for pattern in ("part-{0..2}.tar", "part-*.tar"):
        source = load(tmp_path / "s" / pattern, tmp_path)
        found = items(source)
        assert [item.name for item in found] == [f"d/{number:04d}.jpg" for number in range(12)]
        assert [item.members for item in found] == [
            {"jpg": encoded(n, "JPEG"), "cls": b"%d" % (n % 3)} for n in range(12)
        ]
    assert not (tmp_path / "scratch").exists()
    assert items(load(tmp_path / "s/part-1.tar", tmp_path)) == found[4:8]


def test_shards_named_after_splits_are_these_splits(tmp_path: Path) -> None:
    for number, name in enumerate(("train-0", "train-1", "val-0")):
        tar(tmp_path / f"s/{name}.tar", shard(10 * number))
    source = load(tmp_path / "s/*.tar", tmp_path)
    assert {name: split.samples for name, split in source.splits.items()} == {"train": 8, "validation": 4}
    tar(tmp_path / "s/other-0.tar", shard(900))
    assert load(tmp_path / "s/*.tar", tmp_path).splits["train"].samples == 16


def test_masks_arrays_and_signals_in_shards_come_under_one_spelling(tmp_path: Path) -> None:
    mask = encoded(1, mode="L")
    tar(tmp_path / "m.tar", {"a.png": encoded(0), "a.seg.png": mask, "b.mask.png": mask, "b.jpeg": encoded(1, "JPEG")})
    assert [item.members for item in items(load(tmp_path / "m.tar", tmp_path))] == [
        {"png": encoded(0), "mask.png": mask}, {"jpeg": encoded(1, "JPEG"), "mask.png": mask}
    ]  # fmt: skip
    tar(tmp_path / "s.tar", {"a.signal.npy": saved(WAVES[0].astype(">f8")), "b.signal.npy": saved(WAVES[1])})
    assert [npy(item.members["signal.npy"]).tolist() for item in items(load(tmp_path / "s.tar", tmp_path))] == WAVES[
        :2
    ].tolist()
    tar(tmp_path / "n.tar", {"a.npy": saved(np.asfortranarray(IMAGES[0])), "a.cls": b"07\n"})
    (item,) = items(load(tmp_path / "n.tar", tmp_path))
    assert np.array_equal(npy(item.members["npy"]), IMAGES[0])
    assert item.members["cls"] == b"7"


@pytest.mark.parametrize(
    ("files", "rule"),
    [
        ({"a.cls": b"0"}, "sample 'a' has no image and no signal"),
        ({"a.png": b"", "a.signal.npy": b""}, "both an image and a signal"),
        ({"a.png": b"", "a.jpg": b"", "a.cls": b"0"}, "a second image of the sample 'a'"),
        ({"a.png": b"", "a.mask.png": b"", "a.seg.png": b""}, "a second mask of the sample 'a'"),
        ({"a.png": b"", "a.cls": b"0", "b.png": b""}, "sample 'b' has image, and the first has image, label"),
        ({"a.png": b"", "a.cls": "٣".encode()}, r"a\.cls\) holds"),
        ({"a.png": b"", "a.cls": b"1.5"}, r"a\.cls\) holds"),
        ({"a.npy": saved(WAVES[0]), "a.cls": b"0"}, "an image is uint8"),
        ({"a.signal.npy": saved(WAVES[0] * np.inf), "b.signal.npy": b""}, "NaN"),
        ({"a.signal.npy": saved(WAVES[0]), "b.signal.npy": saved(WAVES[0, :1])}, r"of shape \(1, 16\), and the first, a, has"),
    ],
)  # fmt: skip
def test_samples_that_contradict_each_other_are_refused(files: dict[str, bytes], rule: str, tmp_path: Path) -> None:
    tar(tmp_path / "s.tar", files)
    with pytest.raises(ValueError, match=rule):
        items(load(tmp_path / "s.tar", tmp_path))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server of the folder `web`, and what was asked of it."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            if self.command == "GET":
                asked.append(self.path)

    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "web"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_remote_shards_are_copied_once_and_are_the_same_items(tmp_path: Path, web: tuple[str, list[str]]) -> None:
    url, asked = web
    for number in range(3):
        tar(tmp_path / f"web/t-{number}.tar", shard(4 * number))
    remote = load(f"{url}/t-{{0..2}}.tar", tmp_path)
    assert items(remote) == items(load(tmp_path / "web/t-{0..2}.tar", tmp_path))
    count = len(asked)
    assert load(f"{url}/t-{{0..2}}.tar", tmp_path).splits["train"].digest == remote.splits["train"].digest
    assert len(asked) == count
    assert not list((tmp_path / "scratch").glob("*.tmp"))
    assert not any(
        b"json" in path.read_bytes() for path in (tmp_path / "scratch").glob("*.tar")
    )  # unknown members stay out


def test_a_copy_that_was_killed_is_made_anew_and_the_complete_ones_stay(
    tmp_path: Path, web: tuple[str, list[str]]
) -> None:
    url, asked = web
    for number in range(2):
        tar(tmp_path / f"web/t-{number}.tar", shard(4 * number))
    load(f"{url}/t-{{0,1}}.tar", tmp_path)
    first, second = sorted((tmp_path / "scratch").glob("*.tar"))
    second.rename(second.with_name(f"{second.stem}.0123.tmp"))
    asked.clear()
    assert len(items(load(f"{url}/t-{{0,1}}.tar", tmp_path))) == 8
    assert set(asked) == {"/t-1.tar"}
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir() if path.suffix != ".lock") == [
        first.name,
        second.name,
    ]


def test_processes_that_open_one_source_at_once_fetch_each_shard_once(
    tmp_path: Path, web: tuple[str, list[str]]
) -> None:
    for number in range(6):
        tar(tmp_path / f"src/t-{number}.tar", shard(4 * number))
    pattern = f"pipe:echo x >> {tmp_path}/log; sleep 0.1; cat {tmp_path}/src/t-{{0..5}}.tar"
    code = (
        "import sys; from pathlib import Path; from gandist.data.sources.open import open_source\n"
        "s = open_source(sys.argv[1], scratch=Path(sys.argv[2]), allow_pipe=True).splits['train']; print(s.samples, s.digest)"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, pattern, tmp_path / "scratch"], env=ENVIRONMENT, cwd=ROOT, text=True,
                         stdout=subprocess.PIPE) for _ in range(3)
    ]  # fmt: skip
    told = {worker.communicate(timeout=60)[0] for worker in workers}
    assert len(told) == 1
    assert told.pop().startswith("24 ")
    assert (tmp_path / "log").read_text() == "x\n" * 6


def test_a_process_waits_for_the_one_that_fetches(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", shard())
    load(f"pipe:cat {path}", tmp_path, allow_pipe=True)
    (copy,) = (tmp_path / "scratch").glob("*.tar")
    aside = copy.rename(copy.with_suffix(".kept"))
    with copy.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found: list[Source] = []
        path.unlink()  # a second fetch would fail
        thread = threading.Thread(target=lambda: found.append(load(f"pipe:cat {path}", tmp_path, allow_pipe=True)))
        thread.start()
        time.sleep(0.2)
        assert not found
        aside.rename(copy)
    thread.join(10)
    assert found[0].splits["train"].samples == 4


def test_commands_run_only_where_they_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="allow"):
        load(f"pipe:touch {tmp_path}/ran; cat x.tar", tmp_path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises((Failure, InputError)):
        load("pipe:false", tmp_path, allow_pipe=True)
    with pytest.raises(Failure, match="exit status 3"):
        load(f"pipe:cat {tar(tmp_path / 'x.tar', shard())}; exit 3", tmp_path, allow_pipe=True)
    assert not list((tmp_path / "scratch").glob("*.t*"))


def damaged(path: Path) -> None:
    data = bytearray(tar(path, shard()).read_bytes())
    place = data.index(b"d/0002.jpg")
    data[place + 130] ^= 1
    path.write_bytes(data)


def claims(path: Path, kind: bytes, size: int) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.size = kind, size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (damaged, "at byte .*checksum"),
        (lambda p: p.write_bytes(tar(p, shard()).read_bytes()[:5000]), "is cut off"),
        (lambda p: p.write_bytes(tar(p, shard()).read_bytes()[:-10240] + b"x" * 10240), "cut off|complete|damaged"),
        (lambda p: p.write_bytes(gzip.compress(tar(p, shard()).read_bytes())), "not an uncompressed tar"),
        (lambda p: p.write_bytes(tar(p, shard()).read_bytes().rstrip(b"\0")), "cut off|unexpected end of data$"),
        (lambda p: p.write_bytes(tar(p, shard()).read_bytes() + b"x" * 512), "cut off or damaged"),
        (lambda p: p.write_bytes(b"<html>" * 200), "at byte 0: not a complete"),
        (lambda p: p.write_bytes(b""), "cut off|empty"),
        (link, "not a plain file"),
        (partial(claims, kind=tarfile.REGTYPE, size=8 << 30), "the limit is"),
        (partial(claims, kind=tarfile.GNUTYPE_LONGNAME, size=50 << 30), "the limit is"),
        (partial(claims, kind=tarfile.GNUTYPE_SPARSE, size=0), "sparse"),
        (lambda p: tar(p, {"a": b"", "README": b""}), "holds no samples"),
        (lambda p: tar(p, {"a.txt": b"x"}), "holds no samples"),
        (lambda p: tar(p, {"a.cls": b"0", "b.cls": b"0"}), "no image and no signal"),
    ],
)  # fmt: skip
def test_remote_tars_that_webdataset_would_cut_short_or_swallow_are_refused(
    make: Callable, rule: str, tmp_path: Path
) -> None:
    make(tmp_path / "t.tar")
    with pytest.raises(InputError, match=rule) as refused:
        items(load(f"pipe:cat {tmp_path / 't.tar'}", tmp_path, allow_pipe=True))
    assert f"pipe:cat {tmp_path / 't.tar'}: " in str(refused.value)
    assert not list((tmp_path / "scratch").glob("*.tmp"))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, b""])
def test_a_stream_without_an_end_ends(kind: bytes, tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", shard())
    if kind:
        claims(tmp_path / "t.tar", kind, 1 << 33)
    with memory_below(16 << 20), pytest.raises(InputError, match=r"the limit is|a tar ends with two empty blocks"):
        load(f"pipe:cat {tmp_path / 't.tar'} /dev/zero", tmp_path, allow_pipe=True)


def test_a_pax_header_cannot_give_a_member_another_size(tmp_path: Path) -> None:
    record = b"20 size=99999999999\n"
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    body = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    (tmp_path / "t.tar").write_bytes(body + tar(tmp_path / "u.tar", shard()).read_bytes())
    with pytest.raises(InputError, match="the limit is"):
        load(f"pipe:cat {tmp_path / 't.tar'}", tmp_path, allow_pipe=True)


def test_a_remote_archive_of_a_tree_is_not_taken_for_unlabelled_shards(
    tmp_path: Path, web: tuple[str, list[str]]
) -> None:
    tar(tmp_path / "web/t.tar", {f"top/{name}": data for name, data in SCENES.items()})
    assert items(load(f"{web[0]}/t.tar", tmp_path)) == items(load(tmp_path / "web/t.tar", tmp_path))
    tar(tmp_path / "web/p.tar", PHOTOS)
    assert load(f"{web[0]}/p.tar", tmp_path).names == ("cat", "dog")


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("gone-{0..2}.tar", "gone-0.tar: does not exist"),
        ("{a,a}.tar", "named twice"),
        ("*.nothing", "no file matches"),
        ("{0..99999999}.tar", "names"),
        ("http://localhost/x.tar.gz", "uncompressed"),
        ("gopher://x/y.tar", "not read"),
        ("nothing.tar", "does not exist; known: IDX"),
        ("embedded:fashion", "did you mean `fashion-mnist`"),
        ("generated:grid", "did you mean `grid-25`"),
        ("generated:fashion", "did you mean `fashion-scenes`"),
        ("generated:", "no such formula; known: fashion-scenes, gaussian, grid-25, ring-8, strings"),
        ("x\0y", "NUL"),
        ("x" * 5000, "4096"),
        ("x" * 3000, "cannot be read|does not exist"),
    ],
)  # fmt: skip
def test_patterns_that_stand_for_nothing_are_named(
    pattern: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rule):
        load(pattern, tmp_path)


def generated(name: str, tmp_path: Path, samples: int) -> tuple[np.ndarray, list[int | None]]:
    """The first samples (N, C, L) of a formula, and their classes."""
    read = load(f"generated:{name}", tmp_path).splits["train"].read
    found = [read(number).members for number in range(samples)]
    labels = [int(members["cls"]) if "cls" in members else None for members in found]
    return np.stack([npy(members["signal.npy"]) for members in found]).astype(np.float64), labels


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_item_is_the_same_alone_and_in_order_and_no_two_are_alike(name: str, tmp_path: Path) -> None:
    first, second = load(f"generated:{name}", tmp_path), load(f"generated:{name}", tmp_path)
    assert first.record == second.record == {"kind": "generated", "name": name, "version": 1}
    digests = {split.digest for source in (first, second) for split in source.splits.values()}
    assert len(digests) == len(first.splits)
    seen = set()
    for key, split in first.splits.items():
        last = split.samples - 1
        backwards = [second.splits[key].read(number) for number in (last, *reversed(range(30)))]
        assert [split.read(number) for number in (*range(30), last)] == backwards[::-1]
        seen |= {next(iter(item.members.values())) for item in backwards}
    assert len(seen) == 31 * len(first.splits)


def assert_normal(values: np.ndarray) -> None:
    """Moments of N(0, 1) to five standard errors: 1, √2 and √96 by √N for the first, second and fourth."""
    count = np.sqrt(values.size)
    assert abs(values.mean()) < 5 / count
    assert abs((values**2).mean() - 1) < 5 * np.sqrt(2) / count
    assert abs((values**4).mean() - 3) < 5 * np.sqrt(96) / count


def test_a_gaussian_has_the_moments_of_its_law(tmp_path: Path) -> None:
    values, labels = generated("gaussian", tmp_path, 4000)
    assert values.shape == (4000, 1, 1)
    assert {*labels} == {None}
    assert_normal(values)
    assert abs((values[1:] * values[:-1]).mean()) < 5 / np.sqrt(4000)  # neighbours know nothing of each other


@pytest.mark.parametrize(("name", "modes", "nearest"), [("grid-25", 25, 2), ("ring-8", 8, 4 * np.sin(np.pi / 8))])
def test_a_mixture_has_the_centres_and_the_deviation_that_it_is_said_to_have(
    name: str, modes: int, nearest: float, tmp_path: Path
) -> None:
    centres, deviation = mixture(name)
    assert centres.shape == (modes, 2)
    distances = np.linalg.norm(centres[:, None] - centres, axis=2) + np.eye(modes) * 9
    assert np.allclose(distances.min(1), nearest)
    assert np.allclose(centres.mean(0), 0)
    points, labels = generated(name, tmp_path, 4000)
    assert points.shape == (4000, 2, 1)
    away = (points[:, :, 0] - centres[labels]) / deviation
    for axis in away.T:
        assert_normal(axis)
    assert abs((away[:, 0] * away[:, 1]).mean()) < 5 / np.sqrt(4000)
    counts = np.bincount(labels, minlength=modes)
    assert ((counts - 4000 / modes) ** 2).sum() / (4000 / modes) < modes - 1 + 5 * np.sqrt(2 * (modes - 1))  # χ²


def test_only_mixtures_in_the_plane_have_centres() -> None:
    assert np.array_equal(np.abs(mixture("grid-25")[0]).max(0), [4, 4])
    assert np.allclose(np.linalg.norm(mixture("ring-8")[0], axis=1), 2)
    with pytest.raises(InputError, match="gaussian: no mixture of Gaussians in the plane; known: grid-25, ring-8"):
        mixture("gaussian")


def test_open_strings_are_fourths_apart_but_for_one_third_and_tuned_to_440_hz() -> None:
    semitones = 12 * np.log2(np.array([*OPEN_STRINGS.values()]) / 440)
    assert np.allclose(semitones, np.cumsum([-29, 5, 5, 5, 4, 5]), atol=0.01)  # E2 lies 29 semitones below A4


def test_a_string_is_the_sum_of_its_modes_and_its_spectrum_has_its_peaks_there(tmp_path: Path) -> None:
    waves, labels = generated("strings", tmp_path, 40)
    assert {*labels} == {*range(6)}
    seconds = np.arange(1024) / RATE
    hertz = np.fft.rfftfreq(1 << 16, 1 / RATE)
    for number, (wave, label) in enumerate(zip(waves[:, 0], labels, strict=True)):
        drawn = string(number)
        assert label == drawn.label
        assert abs(drawn.f0 / [*OPEN_STRINGS.values()][label] - 1) <= 0.02
        n = np.arange(1, 60)
        pitch = n * drawn.f0 * np.sqrt(1 + drawn.stiffness * n**2)
        height = np.sin(n * np.pi * drawn.pluck) / n**2
        decay = np.exp(-np.outer(drawn.damping + drawn.damping_growth * n**2, seconds))
        heard = pitch < RATE / 2
        summed = (height[:, None] * decay * np.sin(2 * np.pi * np.outer(pitch, seconds)))[heard].sum(0)
        assert np.allclose(wave, summed / np.abs(summed).max() * 0.9, atol=1e-6)
        assert np.abs(wave).max() == np.float32(0.9)
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(1024), 1 << 16))
        for mode in range(8):
            if abs(height[mode]) * (mode + 1) ** 2 > 0.3:  # others have a node where the string is plucked
                near = np.abs(hertz - pitch[mode]) < drawn.f0 / 2
                assert abs(hertz[near][spectrum[near].argmax()] - pitch[mode]) < 1, (number, mode)


def test_strings_are_packed_by_the_command_and_are_read_and_drawn_as_signals(gandist: Callable, tmp_path: Path) -> None:
    result = gandist("pack", "generated:strings", tmp_path / "out", "--workers", 1)
    assert result.code == 0, result.err
    for line in (
        "9,000 samples in 3 shards",
        "1,000 samples in 1 shard",
        "1 channel of 1,024 values",
        "6 E2, A2, D3, G3, B3, E4",
    ):
        assert line in result.out
    source = json.loads((tmp_path / "out" / "dataset.json").read_text())["source"]
    assert (source["kind"], source["name"], source["version"]) == ("generated", "strings", 1)
    stream = open_stream(tmp_path / "out", parts=("signal", "label"), batch=8, split="test")
    (batch,) = stream.read(0)
    for row, number in enumerate(batch.numbers["signal"]):
        drawn = string(9000 + int(stream.reader.key(number)))
        assert np.array_equal(batch["signal"][row, 0].numpy(), drawn.waveform().astype(np.float32))
        assert batch["label"][row] == drawn.label
    drawings = curves(batch["signal"])
    assert drawings.shape[:2] == (8, 1)
    assert {*drawings.unique().tolist()} == {-1, 1}
    stream.close()


def test_a_size_has_no_effect_on_what_is_generated_and_is_refused(gandist: Callable, tmp_path: Path) -> None:
    result = gandist("pack", "generated:grid-25", tmp_path / "out", "--size", 64)
    assert result.code == 2
    assert "--size 64: has no effect on generated signals" in result.err
    assert not (tmp_path / "out").exists()


def test_scenes_of_test_show_no_garment_of_train_and_every_garment_keeps_its_class() -> None:
    labels = items(embedded_source("fashion-mnist"))
    assert {*WORN["train"], *WORN["test"]} == {*range(len(labels))}
    shown: dict[str, set[int]] = {"train": set(), "test": set()}
    for split, numbers in {"train": (*range(150), 3999), "test": (4000, *range(4001, 4150))}.items():
        classes = set()
        for number in numbers:
            found = scene(number)
            assert 3 <= len(found.garments) <= 6
            assert found.image.shape == (SIZE, SIZE, 3)
            assert found.mask.shape == (SIZE, SIZE)
            worn = {1 + int(labels[which].members["cls"]) for which in found.garments}
            assert {*np.unique(found.mask).tolist()} <= {0, *worn}
            classes |= {*np.unique(found.mask).tolist()}
            shown[split] |= {*found.garments}
        assert classes == {*range(11)}
    assert not shown["train"] & shown["test"]


def test_no_threshold_tells_the_garments_of_scenes_from_their_grounds() -> None:
    found = [scene(number) for number in range(150)]
    garment = np.stack([one.mask > 0 for one in found])
    images = np.stack([one.image for one in found]).astype(np.float64)
    assert 0.25 < garment.mean() < 0.5
    for values in (*np.moveaxis(images, 3, 0), images.mean(3), images.max(3) - images.min(3)):
        for threshold in range(0, 256, 8):
            right = ((values > threshold)[garment].mean() + (values <= threshold)[~garment].mean()) / 2
            assert 0.4 < right < 0.6


def test_scenes_are_packed_by_the_command_with_the_names_of_their_classes(
    gandist: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLES, "train", 240)  # of 4,000, which take 15 seconds
    monkeypatch.setitem(SAMPLES, "test", 60)
    result = gandist("pack", "generated:fashion-scenes", tmp_path / "out", "--workers", 1)
    assert result.code == 0, result.err
    for line in (
        "240 samples in 1 shard",
        "60 samples in 1 shard",
        "64×64, 3 channels",
        "11 background, T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot",
        "ignored 0.0%",
    ):
        assert line in result.out
    manifest = Dataset(tmp_path / "out").manifest
    assert manifest.label is None
    assert manifest.mask.names == CLASSES == ("background", *GARMENTS)
    for name, counts in manifest.counts.items():
        assert sum(counts.mask_pixels) == SAMPLES[name] * SIZE * SIZE
        assert all(0 < count < present for count, present in zip(counts.mask_pixels, counts.mask_present, strict=True))
    stream = open_stream(tmp_path / "out", parts=("image", "mask"), batch=8, split="test")
    (batch,) = stream.read(0)
    for row, number in enumerate(batch.numbers["image"]):
        made = scene(240 + int(stream.reader.key(number)))
        assert np.array_equal(batch["mask"][row].numpy(), made.mask)
    stream.close()


def test_scenes_are_the_same_bytes_from_another_process_and_another_division(gandist: Callable, tmp_path: Path) -> None:
    command = ("pack", "generated:fashion-scenes")
    assert gandist(*command, tmp_path / "one", "--shard-samples", 100, "--part", "9/9").code == 0
    assert run(*command, tmp_path / "other", "--shard-samples", 100, "--part", "15/15").code == 0
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")} for name in ("one", "other"))
    both = {name for name in one.keys() & other.keys() if name.endswith((".tar", ".idx"))}
    assert both == {"test-000004.tar", "test-000004.idx"}  # the last of 45
    assert {name: one[name] for name in both} == {name: other[name] for name in both}


def test_scenes_have_the_size_that_is_asked_for(gandist: Callable, tmp_path: Path) -> None:
    options = ("--size", 16, "--shard-samples", 100, "--part", "1/45")
    assert gandist("pack", "generated:fashion-scenes", tmp_path / "out", *options).code == 0
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        shapes = {name.partition(".")[2]: npy(archive.extractfile(name).read()).shape for name in archive.getnames()}
    assert shapes == {"npy": (16, 16, 3), "mask.npy": (16, 16)}
