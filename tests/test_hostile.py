"""Files from strangers are refused by rule: no traceback, no memory beyond their own size, nothing executed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT
from PIL import Image

from gandist import checkpoint
from gandist.data.decode import image_pixels, image_shape
from gandist.data.tar import BLOCK


def png(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1" + "0" * 30 + ", 1" + "0" * 30 + ")}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 64)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 64)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (8, 8, 64)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (8, 8)}",
        "((((",
        "__import__('os').system('touch exploded')",
    ],
)
def test_npy_headers_that_lie_are_refused(header: str) -> None:
    with pytest.raises(ValueError, match=r"npy|shape|holds|pixels"):
        image_shape(npy(header) + bytes(64), "npy")
    assert not Path("exploded").exists()


def test_a_picture_of_sixty_thousand_pixels_a_side_is_refused_before_it_is_decoded() -> None:
    stream = io.BytesIO()
    Image.new("1", (1, 1)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ValueError, match=r"PNG image|pixels"):
        image_pixels(bytes(data), "png", np.empty((8, 8, 3), np.uint8))


LIMITED = """
import resource
from gandist.cli import main
import gandist.data.pack, gandist.check
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    main()
finally:
    print("GREW", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)
"""


def limited(tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own that tells how much its memory grew, in KiB."""
    (tmp_path / "limited.py").write_text(LIMITED)
    return subprocess.run([sys.executable, tmp_path / "limited.py", *map(str, words)], env=ENVIRONMENT, cwd=ROOT,
                          capture_output=True, text=True, timeout=60)  # fmt: skip


def sparse_member(path: Path) -> None:
    """A tar that claims a member of 8 GiB, as a hole that costs no disk."""
    info = tarfile.TarInfo("a.png")
    info.size = 8 << 30
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, BLOCK + info.size + 2 * BLOCK)


def long_name(path: Path) -> None:
    """A header of 2 KiB that claims a name of 50 GiB."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 50 << 30
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(3 * BLOCK))


def zipped_bomb(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1200, 1024, 1024)}"))
        for _ in range(1200):
            file.write(bytes(1 << 20))


def gzipped_bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(bytes([0, 0, 8, 3]) + struct.pack(">III", 1200, 1024, 1024))
        for _ in range(1200):
            file.write(bytes(1 << 20))


@pytest.mark.parametrize(
    ("name", "make", "verb"),
    [
        ("a.tar", sparse_member, "index"),
        ("b.tar", long_name, "index"),
        ("c.npz", zipped_bomb, "pack"),
        ("t10k-images-idx3-ubyte.gz", gzipped_bomb, "pack"),
        ("zero", lambda path: path.symlink_to("/dev/zero"), "describe"),
    ],
)
def test_a_small_file_cannot_take_much_memory(tmp_path: Path, name: str, make: Callable, verb: str) -> None:
    make(tmp_path / name)
    words = [verb, tmp_path / name, *([tmp_path / "out"] if verb == "pack" else [])]
    done = limited(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert int(done.stdout.rpartition("GREW")[2]) < 256 * 1024


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.write_bytes(b"PK\x03\x04 nonsense"),
        lambda p: zipfile.ZipFile(p, "w").writestr("images.npy", "text"),
        lambda p: np.save(p.open("wb"), np.zeros((2, 8, 8), np.uint8)),
        lambda p: np.savez(p, images=np.zeros((2, 8, 8), np.uint8), labels=np.array(["a", "b"])),
        lambda p: zipfile.ZipFile(p, "w").writestr("images.npy", npy("((((")),
    ],
)
def test_npz_files_that_are_none_are_refused(gandist: Callable, tmp_path: Path, make: Callable) -> None:
    make(tmp_path / "x.npz")
    result = gandist("pack", tmp_path / "x.npz", tmp_path / "out")
    assert result.code == 2
    assert "x.npz" in result.err


@pytest.mark.parametrize(
    "head", [(2**31, 2**31, 4), (2**32 - 1, 28, 28), (2**31, 2**32 - 2, 2**31), (0, 28, 28), (2, 28, 29)]
)
def test_idx_heads_that_lie_are_refused(gandist: Callable, tmp_path: Path, head: tuple[int, ...]) -> None:
    path = tmp_path / "t-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">III", *head) + bytes(1568))
    result = gandist("pack", path, tmp_path / "out")
    assert result.code == 2
    assert path.name in result.err


def test_folders_that_are_one_split_are_not_merged_in_silence(gandist: Callable, tmp_path: Path) -> None:
    for name in ("train", "val", "validation"):
        png(tmp_path / "in" / name / "a.png")
    result = gandist("pack", tmp_path / "in", tmp_path / "out")
    assert result.code == 2
    assert "two of these are one split" in result.err


def test_names_that_are_not_utf_8_are_taken_for_files_and_refused_for_classes(
    gandist: Callable, tmp_path: Path
) -> None:
    png(tmp_path / "in" / "a.png")
    shutil.copy(tmp_path / "in" / "a.png", os.fsencode(tmp_path / "in") + b"/caf\xe9.png")
    assert gandist("pack", tmp_path / "in", tmp_path / "out").code == 0
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    png(tmp_path / "classes" / "a" / "a.png")
    os.rename(os.fsencode(tmp_path) + b"/caf\xe9", os.fsencode(tmp_path / "classes") + b"/caf\xe9")
    shutil.copy(tmp_path / "in" / "a.png", os.fsencode(tmp_path / "classes") + b"/caf\xe9/a.png")
    result = gandist("pack", tmp_path / "classes", tmp_path / "other")
    assert result.code == 2
    assert "no name in UTF-8" in result.err


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda m: m["splits"].update(train=[]), "splits.train"),
        (lambda m: m.update(splits={}), "splits"),
        (lambda m: m["splits"].update(train=m["splits"]["train"] * 2), "named twice"),
        (lambda m: m["image"].update(height=8192, width=8192), "dataset.json says otherwise"),
        (lambda m: m["image"].update(height=2**20, width=2**20), "too many"),
        (lambda m: m["label"].update(classes=10**18), "classes"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m["counts"]["train"].update(sizes=[[10**400, 28]]), "counts.train.sizes"),
        (lambda m: m["counts"]["train"].update(sizes=[[0, 28]]), "counts.train.sizes"),
        (lambda m: m["counts"]["train"].update(sizes=[[28, 28]] * 6), "counts.train.sizes"),
        (lambda m: m.update(gandist_dataset=1), "pack or index it anew"),
    ],
)
def test_dataset_files_that_lie_are_refused_before_memory_is_taken(
    gandist: Callable, recipe: Callable, fashion: Path, tmp_path: Path, change: Callable, rule: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(fashion, copy)
    manifest = json.loads((copy / "dataset.json").read_text())
    change(manifest)
    (copy / "dataset.json").write_text(json.dumps(manifest))
    result = gandist("train", recipe(data=copy))
    assert result.code == 2
    assert rule in result.err


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda s: s.update(step=5), "are not 5 steps"),
        (lambda s: s.update(step=10**30), "step"),
        (lambda s: s.update(images=16), "the folder's name another number"),
        (lambda s: s.update(players={}), "its state of the generator"),
        (lambda s: s["players"]["generator"].update(scale=1.0), "its state of the generator"),
    ],
)
def test_states_that_contradict_themselves_do_not_resume(
    gandist: Callable, recipe: Callable, tmp_path: Path, change: Callable, rule: str
) -> None:
    assert gandist("train", recipe()).code == 0
    folder = checkpoint.folders(tmp_path / "run" / "checkpoints")[0]
    state = json.loads((folder / "state.json").read_text())
    change(state)
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result = gandist("train", recipe(), "run.images=320")
    assert result.code == 1
    assert rule in result.err


def test_recipes_of_ten_thousand_keys_and_nul_bytes_are_refused_at_once(gandist: Callable, recipe: Callable) -> None:
    path = recipe()
    text = path.read_text()
    path.write_text(text + "".join(f"k{number}: 1\n" for number in range(10_000)))
    result = gandist("describe", path)
    assert result.code == 2
    assert "more than 1000 keys" in result.err
    path.write_text(text)
    assert "NUL" in gandist("train", path, 'data.path="x\\0y"').err
    assert len(gandist("train", path, "a" * 100_000 + "=1").err) < 2000


def test_two_packs_into_one_folder_do_not_mix(gandist: Callable, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = gandist("pack", "embedded:fashion-mnist", tmp_path / "out")
    assert result.code == 2
    assert "another process is packing" in result.err
    assert gandist("pack", "embedded:fashion-mnist", tmp_path / "out").code == 0


def test_a_shard_named_twice_counts_once(gandist: Callable, fashion: Path, tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    shutil.copy(fashion / "train-000000.tar", shard)
    result = gandist("index", shard, shard)
    assert result.code == 2
    assert "named twice" in result.err


def test_links_in_the_folder_to_pack_into_destroy_nothing(gandist: Callable, tmp_path: Path) -> None:
    png(tmp_path / "in" / "a.png")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("mine")
    for name, target in ((".lock", "victim"), (".spool", "folder"), (".pack.json", "victim")):
        out = tmp_path / f"out{name}"
        out.mkdir()
        (out / name).symlink_to(tmp_path / target)
        result = gandist("pack", tmp_path / "in", out)
        assert result.code == 2
        assert "is a link" in result.err
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "folder" / "precious.txt").exists()


def test_a_name_of_slashes_costs_no_time(gandist: Callable, tmp_path: Path) -> None:
    import time

    name = b"/" * 65_535
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, len(name) + 1
    data = info.tobuf(tarfile.GNU_FORMAT) + (name + b"\0").ljust(-(-len(name) // BLOCK) * BLOCK + BLOCK, b"\0")[:65_536]
    (tmp_path / "s.tar").write_bytes(data + tarfile.TarInfo("x").tobuf() + bytes(2 * BLOCK))
    began = time.monotonic()
    assert gandist("index", tmp_path / "s.tar").code == 2
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("verb", [("index", "f.tar", "--out", "ix"), ("pack", "f.tar", "o"), ("verify", "ds")])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(
    gandist: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    png(tmp_path / "in" / "a.png")
    assert gandist("pack", "in", "ds").code == 0
    (tmp_path / "ds" / "train-000000.idx").unlink()
    os.mkfifo(tmp_path / "ds" / "train-000000.idx")
    os.mkfifo(tmp_path / "f.tar")
    result = gandist(*verb)
    assert result.code in (1, 2)
    assert "plain file" in result.err or "known:" in result.err, result.err


def test_exif_that_pillow_cannot_write_again_neither_fails_nor_turns_wrongly(tmp_path: Path) -> None:
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", exif=exif)
        height, width, _ = image_shape(stream.getvalue(), "png")
        out = np.empty((height, width, 3), np.uint8)
        image_pixels(stream.getvalue(), "png", out)
        from PIL import ImageOps

        assert np.array_equal(out, np.asarray(ImageOps.exif_transpose(Image.open(stream))))


def test_a_strip_of_an_image_is_not_blown_up(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("L", (20_000, 1)).save(tmp_path / "in" / "strip.png")
    for number in range(20):
        Image.new("L", (40, 40)).save(tmp_path / "in" / f"{number}.png")
    result = gandist("pack", tmp_path / "in", tmp_path / "a", "--size", 128, "--fit", "shorter")
    assert result.code == 2
    assert "strip.png would become 2560000×128 pixels" in result.err
    assert gandist("pack", tmp_path / "in", tmp_path / "b").code == 0
    result = gandist("train", recipe(data=tmp_path / "b"), "data.transform={size: 128, crop: 16}")
    assert result.code == 1
    assert "would become" in result.err


def test_names_of_strangers_do_not_reach_the_terminal_raw(gandist: Callable, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for suffix in ("png", "jpg"):
            info = tarfile.TarInfo(f"a\x1b]0;owned\x07.{suffix}")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    result = gandist("index", tmp_path / "s.tar")
    assert result.code == 2
    assert "\x1b" not in result.err
    assert "\x07" not in result.err


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (("data.subset={per_class: 1}", "run.batch=2000000000", "run.images=4000000000"), "GiB on each process"),
        (("data.transform={range: [0, 1e39]}",), "must be at most"),
    ],
)
def test_settings_that_would_take_all_memory_or_overflow_are_refused(
    gandist: Callable, recipe: Callable, settings: tuple[str, ...], rule: str
) -> None:
    result = gandist("train", recipe(), *settings)
    assert result.code == 2
    assert rule in result.err


def test_names_that_do_not_fit_the_classes_are_refused(gandist: Callable, fashion: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.arange(6) % 3)
    np.savez(tmp_path / "y.npz", images=np.zeros((6, 8, 8), np.uint8))
    assert "2 names for 3 classes" in gandist("pack", tmp_path / "x.npz", tmp_path / "o", "--names", "a,b").err
    assert "--names has no effect" in gandist("pack", tmp_path / "y.npz", tmp_path / "p", "--names", "a,b").err
