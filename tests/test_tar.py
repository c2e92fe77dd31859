"""Tars of anybody are read by their index, and damage anywhere in one is found."""

from __future__ import annotations

import io
import os
import random
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

from gandist.data.dataset import Dataset, file_digest
from gandist.data.index import ABSENT, ShardIndex, index_path, scan
from gandist.data.read import Reader
from gandist.data.tar import BLOCK, MAX_MEMBERS
from gandist.recipe import Failure, InputError


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    tar.addfile(info, io.BytesIO(data))


def values(folder: Path, count: int) -> list[tuple[int, int]]:
    """(red of the first pixel, label) of the samples in their stored order."""
    stream = open_stream(folder, parts=("image", "label"), batch=count)
    loaded, numbers = stream.load(0), stream.numbers(0)
    assert not loaded.faults, loaded.faults
    found = zip(loaded.parts["image"][:, 0, 0, 0].tolist(), loaded.parts["label"].tolist(), strict=True)
    stream.close()
    return [pair for _, pair in sorted(zip(numbers, found, strict=True))]


LONG = "a-folder-with-a-rather-long-name/" * 5


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("layout", ["together", "reversed", "interleaved"])
@pytest.mark.parametrize("name", ["k{:03d}", LONG + "k{:03d}", "ünïcode/{:03d}"])
def test_samples_are_found_in_any_form_and_order_of_members(
    gandist: Callable, tmp_path: Path, form: int, layout: str, name: str
) -> None:
    if form == tarfile.USTAR_FORMAT and len(name) > 100:
        name = name[-90:]  # of 100 characters and a prefix
    members = [(name.format(n) + suffix, data) for n in range(12)
               for suffix, data in ((".PNG", png(n)), (".cls", str(n % 3).encode()), (".json", b"{}"))]  # fmt: skip
    if layout == "reversed":
        members = [member for n in range(12) for member in members[3 * n : 3 * n + 3][::-1]]
    elif layout == "interleaved":
        members = members[0::3] + members[1::3] + members[2::3]
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        for member in members:
            add(tar, *member)
    result = gandist("index", tmp_path / "s.tar")
    assert result.code == 0, result.err
    assert values(tmp_path, 12) == [(n, n % 3) for n in range(12)]
    reader = Reader(Dataset(tmp_path), "train")
    assert [reader.key(n) for n in range(12)] == [name.format(n) for n in range(12)]


def test_shards_of_gnu_tar_and_of_webdataset_are_read_here_and_ours_by_them(gandist: Callable, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for n in range(10):
        (loose / f"{n:04d}.png").write_bytes(png(n))
        (loose / f"{n:04d}.cls").write_text(str(n % 3))
    (tmp_path / "a").mkdir()
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "a" / "s.tar", "-C", loose, "."], check=True)
    (tmp_path / "b").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "b" / "s-%03d.tar"), maxcount=4, verbose=0) as sink:
        for n in range(10):
            sink.write({"__key__": f"{n:04d}", "png": png(n), "cls": n % 3})
    for name in ("a", "b"):
        assert gandist("index", *sorted((tmp_path / name).glob("*.tar"))).code == 0
        assert values(tmp_path / name, 10) == [(n, n % 3) for n in range(10)]
    packed(tmp_path / "a" / "s.tar", tmp_path / "c")
    theirs = webdataset.WebDataset(str(tmp_path / "c" / "train-000000.tar"), shardshuffle=False)
    assert [(sample["png"], sample["cls"]) for sample in theirs] == [(png(n), str(n % 3).encode()) for n in range(10)]
    listed = subprocess.run(
        ["tar", "-tf", tmp_path / "c" / "train-000000.tar"], capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.split()) == 20


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Twelve labelled arrays in one shard, to damage."""
    images = np.random.default_rng(0).integers(0, 256, (12, 9, 7), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(12))
    packed(tmp_path / "x.npz", tmp_path / "x")
    return tmp_path / "x"


def test_a_shard_cut_off_at_any_block_is_refused_before_training(small: Path) -> None:
    shard = small / "train-000000.tar"
    intact = shard.read_bytes()
    for length in range(0, len(intact), BLOCK):
        shard.write_bytes(intact[:length])
        with pytest.raises(InputError, match=r"train-000000\.tar"):  # by its size
            Reader(Dataset(small), "train")
        shard.with_name("cut.tar").write_bytes(intact[:length])
        if length < len(intact.rstrip(b"\0")) + 2 * BLOCK:  # what is cut beyond that is padding that tar does not need
            with pytest.raises(InputError, match=r"cut\.tar"):  # by its contents, where nobody knows its size
                scan(shard.with_name("cut.tar"))


def test_each_of_ten_thousand_flipped_bits_is_found_where_it_matters(small: Path) -> None:
    """In a member by whoever reads it, in a header by the indexer, and anywhere at all by `verify`.

    A flip in the eight bytes of a header's checksum shows, or turns a zero into a blank, which no reader of tars minds.
    """
    shard = small / "train-000000.tar"
    intact = shard.read_bytes()
    reader = Reader(Dataset(small), "train")
    index = ShardIndex.open(index_path(shard))
    where: dict[int, int] = {}
    headers: set[int] = set()
    for sample in range(12):
        for role in index.roles:
            start = index.offset[sample] + index.start[role][sample]
            where |= dict.fromkeys(range(start, start + index.size[role][sample]), sample)
            headers |= {*range(start - BLOCK, start - BLOCK + 148), *range(start - BLOCK + 156, start)}
    pick = random.Random(1)
    whole = file_digest(shard)
    unseen = 0
    with shard.open("r+b", buffering=0) as file:
        for _ in range(10_000):
            place, bit = pick.randrange(len(intact)), 1 << pick.randrange(8)
            os.pwrite(file.fileno(), bytes([intact[place] ^ bit]), place)
            if place in where:
                with pytest.raises(Failure, match=r"train-000000\.tar: at byte \d+: the (image|label) is damaged"):
                    reader.members(where[place])
            elif place in headers:
                with pytest.raises(InputError, match=r"train-000000\.tar: at byte"):
                    scan(shard)
            else:
                unseen += 1  # padding, which nobody reads
            assert file_digest(shard) != whole
            os.pwrite(file.fileno(), intact[place : place + 1], place)
    assert unseen < 10_000 * (1 - (len(where) + len(headers)) / len(intact)) * 1.2
    assert shard.read_bytes() == intact


def test_the_index_costs_at_most_sixty_bytes_a_sample_and_names_what_is_absent(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for n in range(2000):
            add(tar, f"{n:05d}.png", png(n % 256))
            add(tar, f"{n:05d}.mask.png", png(n % 256))
            if n != 7:
                add(tar, f"{n:05d}.cls", b"3")
    from gandist.data.index import index_bytes
    from gandist.data.tar import mapped

    with mapped(tmp_path / "s.tar") as data, memoryview(data) as view:
        stored = index_bytes(tmp_path / "s.tar", scan(tmp_path / "s.tar"), view, len(data))
    (tmp_path / "s.idx").write_bytes(stored)
    assert len(stored) <= 60 * 2000
    index = ShardIndex.open(tmp_path / "s.idx")
    assert index.roles == ("image", "label", "mask")
    assert [n for n in range(2000) if index.size["label"][n] == ABSENT] == [7]


def test_a_replaced_shard_of_the_same_size_is_refused_at_start_and_a_copy_is_not(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        images = np.random.default_rng(seed).integers(0, 256, (40, 8, 8), np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images)
        packed(tmp_path / f"{name}.npz", tmp_path / name)
    os.utime(tmp_path / "a" / "train-000000.tar")
    assert gandist("describe", recipe(data=tmp_path / "a")).code == 0
    shutil.copy(tmp_path / "b" / "train-000000.tar", tmp_path / "a" / "train-000000.tar")
    result = gandist("train", recipe(data=tmp_path / "a"))
    assert result.code == 2
    assert "the shard was replaced" in result.err
    assert not (tmp_path / "run").exists()


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(text: bytes) -> bytes:
    return header("PaxHeader", len(text), b"x") + text.ljust(-(-len(text) // BLOCK) * BLOCK, b"\0")


END = bytes(2 * BLOCK)
HOSTILE = {
    "symbolic link": (header("a.png", 0, tarfile.SYMTYPE) + END, "a symbolic link"),
    "hard link": (header("a.png", 0, tarfile.LNKTYPE) + END, "a hard link"),
    "device": (header("a.png", 0, tarfile.CHRTYPE) + END, "a device"),
    "pipe": (header("a.png", 0, tarfile.FIFOTYPE) + END, "a pipe"),
    "GNU sparse file": (header("a.png", 0, tarfile.GNUTYPE_SPARSE) + END, "a sparse file"),
    "PAX sparse file": (pax(b"22 GNU.sparse.major=1\n") + header("a.png") + END, "a sparse file"),
    "PAX size below zero": (pax(b"11 size=-1\n") + header("a.png") + END, "a size of '-1'"),
    "PAX size of exabytes": (pax(b"28 size=9999999999999999999\n") + header("a.png") + END, "is cut off"),
    "PAX without length": (pax(b"x size=1\n") + header("a.png") + END, "without its length"),
    "PAX header of a gibibyte": (header("P", 1 << 30, b"x") + END, "a header of 1073741824 bytes"),
    "name of fifty gibibytes": (header("././@LongLink", 50 << 30, b"L") + END, "a header of 53687091200 bytes"),
    "member that ends beyond the file": (header("a.png", 1 << 20) + END, "is cut off"),
    "unknown type": (header("a.png", 0, b"Z") + END, "of the unknown type 'Z'"),
    "a key twice": ((header("a.cls", 1) + b"1".ljust(BLOCK, b"\0")) * 2 + END, "stands twice"),
    "two images": ((header("a.png", 1) + bytes(BLOCK)) + (header("a.jpg", 1) + bytes(BLOCK)) + END, "a second image"),
    "no suffix": (header("a", 1) + bytes(BLOCK) + END, "holds no samples"),
    "no sample": (header("a.txt", 1) + bytes(BLOCK) + END, "holds no samples"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(2000), "not an uncompressed tar; unpack it"),
    "nothing": (b"", "is empty"),
    "text after the end": (header("a.txt") + END + b"more" + bytes(508), "cut off or damaged"),
    "name without member": (
        header("././@LongLink", 4, b"L") + b"a.b\0".ljust(BLOCK, b"\0") + END,
        "cut off or damaged",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_not_a_plain_tar_of_samples_is_refused_with_shard_offset_and_rule(
    gandist: Callable, tmp_path: Path, what: str
) -> None:
    data, rule = HOSTILE[what]
    (tmp_path / "s.tar").write_bytes(data)
    result = gandist("index", tmp_path / "s.tar")
    assert result.code == 2
    assert rule in result.err
    assert str(tmp_path / "s.tar") in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


def test_a_shard_of_a_million_members_is_refused(tmp_path: Path) -> None:
    one = header("a.txt")
    with (tmp_path / "s.tar").open("wb") as file:
        for _ in range(11):
            file.write(one * (MAX_MEMBERS // 10))
        file.write(END)
    with pytest.raises(InputError, match="more than 500,000 members"):
        scan(tmp_path / "s.tar")


def test_names_that_point_elsewhere_are_keys_and_never_paths(gandist: Callable, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("../../evil", "/etc/evil", "a/../b"):
            add(tar, f"{name}.png", png(1))
            add(tar, f"{name}.cls", b"0")
            add(tar, f"{name}.pyd", b"never read")
            add(tar, f"{name}.pkl", b"never read")
    assert gandist("index", tmp_path / "s.tar").code == 0
    assert len(values(tmp_path, 3)) == 3
    packed(tmp_path / "s.tar", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dataset.json",
        "train-000000.idx",
        "train-000000.tar",
    ]


@pytest.mark.parametrize("suffix", ["npy", "png"])
def test_no_flipped_bit_of_an_index_ends_in_anything_but_a_named_fault(tmp_path: Path, suffix: str) -> None:
    """What a batch holds is what was packed, or the batch says that it does not."""
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as sink:
        for n in range(6):
            sink.write({"__key__": f"{n}", suffix: np.full((5, 6, 3), n, np.uint8), "cls": n})
    from gandist.data.pack import index as index_shards

    index_shards([str(tmp_path / "s.tar")])
    intact = (tmp_path / "s.idx").read_bytes()
    expected = values(tmp_path, 6)
    harmless = 0
    for place in range(len(intact)):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "s.idx").write_bytes(damaged)
        try:
            stream = open_stream(tmp_path, parts=("image", "label"), batch=6, workers=0)
            loaded = stream.load(0)
        except (Failure, InputError):
            continue
        found = zip(
            loaded.parts.get("image", np.zeros((0, 1, 1, 1)))[:, 0, 0, 0], loaded.parts.get("label", ()), strict=True
        )
        if not loaded.faults:
            harmless += 1  # padding, a blank of the table, a key's header
            assert sorted((int(a), int(b)) for a, b in found) == expected
        stream.close()
    assert harmless < len(intact) * 0.2
