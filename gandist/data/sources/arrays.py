"""Arrays: IDX, NPY, NPZ and CIFAR files as numbered images or signals; what a head claims is checked before memory is taken."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import struct
import tokenize
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from einops import rearrange

from gandist.data.decode import LABEL_SUFFIX, MAX_SIGNAL, SIGNAL_SUFFIX, open_encoded
from gandist.data.sources import Item, Source, Split
from gandist.recipe import InputError, suggestion

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.integer]

EMBEDDED = {"fashion-mnist": Path(__file__).parent.parent / "embedded" / "fashion-mnist"}
GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200
CIFAR_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# What zipfile, zlib and numpy raise when a damaged file leads them astray.
DAMAGE = (
    ValueError, TypeError, SyntaxError, OSError, EOFError, LookupError, OverflowError, MemoryError, RuntimeError,
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
)  # fmt: skip
HEAD = 128  # bytes of the head of every .npy file of ours
_HEAD_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 23


def npy_bytes(values: Array) -> bytes:
    """The bytes of a .npy file of version 1.0."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def npy_view(data: bytes | npt.NDArray[np.uint8]) -> Array:
    """The array in the bytes of a .npy file, as a view of them: a head that lies costs no memory; raises ValueError."""
    try:
        stream = io.BytesIO(bytes(data[:_HEAD_BYTES]))
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} instead of (1, 0)")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.kind not in "biuf" or dtype.subdtype is not None:
            raise ValueError(f"holds {dtype}, which is not plain numbers")
        if not all(type(n) is int and n >= 1 for n in shape):
            raise ValueError(f"has shape {shape}")
        if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
            raise ValueError(f"its head promises {shape} of {dtype}, and {len(data) - stream.tell()} bytes follow")
        flat: Array = np.frombuffer(data, dtype, offset=stream.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
    except DAMAGE as error:
        raise ValueError(f"is not a .npy file that is read: {error}") from None


def image_members(pixels: Array) -> dict[str, bytes]:
    """The member of an image (H, W) or (H, W, C) of uint8; raises ValueError."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] > (16,):
        raise ValueError(
            f"holds {pixels.dtype} of shape {pixels.shape}; an image is uint8 of shape (height, width) or "
            "(height, width, channels)"
        )
    return {"npy": npy_bytes(pixels)}


def signal_members(values: Array) -> dict[str, bytes]:
    """The member of a signal (L,) or (C, L) of floats; raises ValueError where it cannot be one of float32."""
    if values.dtype.kind != "f" or values.ndim not in (1, 2) or not 0 < values.size <= MAX_SIGNAL:
        raise ValueError(
            f"holds {values.dtype} of shape {values.shape}; a signal is floats of shape (length,) or (channels, length), "
            f"at most {MAX_SIGNAL} of them"
        )
    with np.errstate(over="ignore"):
        signal = np.atleast_2d(values).astype("<f4")
    if not np.isfinite(signal).all():
        raise ValueError("holds NaN, infinity or a number too large for float32")
    return {SIGNAL_SUFFIX: npy_bytes(signal)}


def check_shape(name: str, signal: bytes, first: str, head: bytes) -> None:
    """Raises ValueError unless a signal has the shape of the first, whose bytes begin with `head`."""
    if signal[:HEAD] != head:
        found, wanted = (
            text.partition(b"'shape': ")[2].partition(b"),")[0].decode() + ")" for text in (signal[:HEAD], head)
        )
        raise ValueError(
            f"holds a signal of shape {found}, and the first, {first}, has {wanted}; all must have the same"
        )


def joined(parts: Sequence[Array]) -> Callable[[int], Array]:
    """Item `number` of several arrays as if they were one."""
    ends = [*accumulate(map(len, parts))]

    def item(number: int) -> Array:
        part = bisect_right(ends, number)
        found: Array = parts[part][number - (ends[part - 1] if part else 0)]
        return found

    return item


def rows_split(
    rows: Callable[[int], Array],
    count: int,
    labels: Labels | None,
    digest: str,
    members: Callable[[Array], dict[str, bytes]],
) -> Split:
    """A split of `count` items that `rows` gives by number and `members` makes bytes of."""

    def read(number: int) -> Item:
        found = members(rows(number))
        return Item("", found if labels is None else {**found, LABEL_SUFFIX: str(int(labels[number])).encode()})

    return Split(count, read, digest)


def array_split(
    parts: Sequence[Array], labels: Labels | None, members: Callable[[Array], dict[str, bytes]] = image_members
) -> Split:
    """A split of the arrays `parts`, one after the other; its digest is that of their values."""
    count = sum(map(len, parts))
    digest = hashlib.blake2b(str((count, *parts[0].shape[1:])).encode(), digest_size=16)
    for part in parts:
        step = max(1, _BLOCK_BYTES // max(1, part[0].nbytes))
        for first in range(0, len(part), step):
            digest.update(np.ascontiguousarray(part[first : first + step]).data)
    digest.update(b"" if labels is None else labels.astype("<i8").data)
    return rows_split(joined(parts), count, labels, digest.hexdigest(), members)


def _check_arrays(where: str, images: Array, labels: Array | None) -> None:
    if images.dtype != np.uint8:
        raise InputError(f"{where}: images are {images.dtype}; uint8 in 0 … 255 is needed")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise InputError(f"{where}: images have shape {images.shape}; (N, H, W) or (N, H, W, C) is needed")
    if images.ndim == 4 and images.shape[3] > 16:
        raise InputError(f"{where}: images have shape {images.shape}: the last axis must be the channels, (N, H, W, C)")
    if labels is not None:
        if labels.shape != images.shape[:1]:
            raise InputError(
                f"{where}: {labels.shape} labels for {len(images)} images; one whole number each is needed"
            )
        if not np.issubdtype(labels.dtype, np.integer) or int(labels.min()) < 0:
            raise InputError(
                f"{where}: labels are {labels.dtype}, or some are negative; whole numbers from 0 are needed"
            )


# IDX, the format of MNIST: big-endian magic (0, 0, type, axes), u32 per axis, then the values
_IDX_IMAGES = re.compile(r"(?P<prefix>.*?)-?images[-.]idx3-ubyte(?P<gz>\.gz)?")


def is_idx(path: Path) -> bool:
    """Whether a file has the name of an IDX file of images."""
    return _IDX_IMAGES.fullmatch(path.name) is not None and path.is_file()


def _refuse_bomb(where: object, size: int, packed: int) -> None:
    """Refuses what would unfold to more than a GiB and 200 times its own size; images do not compress like that."""
    if size > BOMB_BYTES and size > BOMB_RATIO * packed:
        raise InputError(f"{where}: {packed} bytes would unfold to {size}; no images compress like that")


def check_zip(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses bombs, passwords, and the methods that zipfile unfolds without a limit; raises InputError."""
    _refuse_bomb(path, sum(entry.file_size for entry in archive.infolist()), path.stat().st_size)
    for entry in archive.infolist():
        if entry.flag_bits & 1:
            raise InputError(
                f"{path}: {entry.filename!r} is encrypted; unpack it with its password and name the folder"
            )
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path}: {entry.filename!r} is neither stored nor deflated; pack the archive anew")


def _read_idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    zipped = path.suffix == ".gz"

    def shape_of(stream: BinaryIO | gzip.GzipFile) -> tuple[int, ...]:
        head = stream.read(4 + 4 * axes)
        if head[:4] != bytes([0, 0, 8, axes]) or len(head) != 4 + 4 * axes:
            raise InputError(
                f"{path}: not an IDX file of unsigned bytes with {axes} axes: it begins with {head[:4].hex()}"
            )
        return tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))

    def check(shape: tuple[int, ...], found: int) -> None:
        if found != math.prod(shape):
            raise InputError(
                f"{path}: its head promises {shape}, and {'more' if found > math.prod(shape) else found} bytes follow"
            )

    try:
        if not zipped:
            with path.open("rb") as file:
                shape = shape_of(file)
            check(shape, path.stat().st_size - 4 - 4 * axes)
            return (
                np.memmap(path, np.uint8, "r", 4 + 4 * axes, shape) if math.prod(shape) else np.empty(shape, np.uint8)
            )
        with gzip.open(path) as unzipped:
            shape = shape_of(unzipped)
            _refuse_bomb(path, math.prod(shape), path.stat().st_size)
            data = unzipped.read(math.prod(shape) + 1)  # never more than the head promises, whatever would unfold
        check(shape, len(data))
        return np.frombuffer(data, np.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error, MemoryError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read: {error or 'it asks for too much memory'}") from None


def idx_source(paths: list[Path]) -> Source:
    """IDX files of images with the labels that lie beside them; several are splits, named by their prefixes."""
    splits: dict[str, Split] = {}
    for path in paths:
        match = _IDX_IMAGES.fullmatch(path.name)
        assert match is not None
        name = {"t10k": "test", "": "train"}.get(match["prefix"], match["prefix"]) if len(paths) > 1 else "train"
        if name in splits:
            raise InputError(f"{path}: a second file of the split `{name}`; a folder holds one of each")
        labels_path = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        images = _read_idx(path, 3)
        labels = _read_idx(labels_path, 1) if labels_path.exists() else None
        _check_arrays(str(path), images, labels)
        splits[name] = array_split([images], labels)
    return Source({"kind": "idx"}, splits)


def embedded_source(name: str) -> Source:
    """A dataset that comes with gandist."""
    if name not in EMBEDDED:
        raise InputError(f"embedded:{name}: no such embedded dataset{suggestion(name, list(EMBEDDED))}")
    found = idx_source(sorted(EMBEDDED[name].glob("*images*")))
    return Source({"kind": "idx", "name": name, "licence": "MIT"}, found.splits, GARMENTS)


_NPZ_IMAGES, _NPZ_LABELS = ("images", "image", "x", "data", "arr_0"), ("labels", "label", "y", "targets", "arr_1")


def npz_source(path: Path) -> Source:
    """An NPZ file of images and labels, or of several splits of them."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(path, archive)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if strange:
            raise ValueError(f"{strange[0]!r} is no array")
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"{path}: not an NPZ file of plain arrays: {type(error).__name__}: {error}") from None
    splits: dict[str, Split] = {}
    for split in ("train", "test", "validation", ""):
        images = next((arrays[n] for name in _NPZ_IMAGES for n in _spelled(name, split) if n in arrays), None)
        labels = next((arrays[n] for name in _NPZ_LABELS for n in _spelled(name, split) if n in arrays), None)
        if images is not None and (split or not splits):
            labels = labels.reshape(-1) if labels is not None else None
            _check_arrays(f"{path} ({split or 'all'})", images, labels)
            splits[split or "train"] = array_split([images], labels)
    if not splits:
        raise InputError(
            f"{path}: no images among its arrays {', '.join(arrays) or '(none)'}; name them `images` and `labels`, "
            "or `x_train`, `y_train`, `x_test`, `y_test`"
        )
    return Source({"kind": "npz"}, splits)


def _spelled(name: str, split: str) -> tuple[str, ...]:
    return (f"{name}_{split}", f"{split}_{name}") if split else (name,)


def npy_source(path: Path) -> Source:
    """A .npy file of images (N, H, W[, C]) as uint8, or of signals (N, L) or (N, C, L) as floats, read where it lies."""
    try:
        array = npy_view(np.memmap(path, np.uint8, "r"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: {error}") from None
    if array.dtype.kind != "f":
        _check_arrays(str(path), array, None)
        return Source({"kind": "npy"}, {"train": array_split([array], None)})
    if array.ndim not in (2, 3) or array[0].size > MAX_SIGNAL:
        raise InputError(
            f"{path}: signals have shape {array.shape}; (N, L) or (N, C, L) of at most {MAX_SIGNAL} numbers each is needed"
        )
    return Source({"kind": "npy"}, {"train": array_split([array], None, signal_members)})


_PICKLED = ("data_batch_1", "batches.meta")


def refuse_pickle(where: object, names: Iterable[str]) -> None:
    """Refuses the Python version of CIFAR by its files' names; its pickles could run anything."""
    found = set(names)
    if found & set(_PICKLED) or found >= {"train", "test", "meta"}:
        raise InputError(
            f"{where}: the Python version of CIFAR, whose files are pickles, which are never opened; take the binary "
            "version (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz)"
        )


def cifar_binary(folder: Path) -> Source | None:
    """The binary version of CIFAR-10 or CIFAR-100 in a folder; None where there is none."""
    ten = {"train": sorted(folder.glob("data_batch_*.bin")), "test": sorted(folder.glob("test_batch.bin"))}
    hundred = {name: sorted(folder.glob(f"{name}.bin")) for name in ("train", "test")}
    listed_hundred = (folder / "fine_label_names.txt").exists()
    sizes = [path.stat().st_size for paths in hundred.values() for path in paths]
    if not any(ten.values()) and not (sizes and (listed_hundred or all(size and size % 3074 == 0 for size in sizes))):
        return None
    files, head, classes, listed, names = (
        (ten, 1, 10, "batches.meta.txt", CIFAR_10)
        if any(ten.values())
        else (hundred, 2, 100, "fine_label_names.txt", ())
    )
    splits = {}
    for split, paths in files.items():
        images, labels = [], []
        for path in paths:
            size, row = path.stat().st_size, head + 3072
            if not path.is_file() or not size or size % row:
                raise InputError(f"{path}: has {size} bytes; CIFAR-{classes} in binary is rows of {row} bytes")
            rows: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r", shape=(size // row, row))
            images.append(rearrange(rows[:, head:], "n (c h w) -> n h w c", c=3, h=32, w=32))
            labels.append(_check_classes(path, rows[:, head - 1], classes))
        if images:
            splits[split] = array_split(images, np.concatenate(labels))
    return Source({"kind": f"cifar-{classes}"}, splits, _class_names(folder / listed, classes) or names)


def _check_classes(path: Path, labels: Labels, classes: int) -> Labels:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        row = int(wrong[0])
        raise InputError(f"{path}: image {row} has the label {int(labels[row])}; CIFAR-{classes} has {classes} classes")
    return labels


def _class_names(path: Path, classes: int) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    names = tuple(path.read_bytes()[: 1 << 16].decode("utf-8", "replace").split())
    if len(names) != classes or not all(name.isprintable() for name in names):
        raise InputError(f"{path}: {len(names)} names; the {classes} names of the classes are needed, one a line")
    return names


def cifar_pictures(folder: Path) -> Source | None:
    """CIFAR-10 as pictures of 1024 pixels a row, one image each, with labels as JSON; None where there is none."""
    splits = {}
    for split, pattern in (("train", "data_batch_*.png"), ("test", "test_batch.png")):
        paths = sorted(folder.glob(pattern))
        lists = [p for p in (folder / f"{split}_lables.json", folder / f"{split}_labels.json") if p.is_file()]
        if paths and lists:
            splits[split] = _pictures_split(paths, lists[0])
    return Source({"kind": "cifar-10"}, splits, CIFAR_10) if splits else None


def _pictures_split(paths: list[Path], listed: Path) -> Split:
    digest = hashlib.blake2b(digest_size=16)
    ends: list[int] = []
    for path in paths:
        data = path.read_bytes()
        digest.update(data)
        try:
            picture = open_encoded(data, "png")
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        if picture.width != 1024 or picture.mode != "RGB":
            raise InputError(
                f"{path}: {picture.width} pixels a row in mode {picture.mode}; 1024 in RGB are an image of CIFAR-10"
            )
        ends.append(picture.height + (ends[-1] if ends else 0))
    try:
        found = json.loads(listed.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{listed}: not a list of labels: {error}") from None
    if not isinstance(found, list) or len(found) != ends[-1] or not all(type(n) is int and 0 <= n < 10 for n in found):
        raise InputError(f"{listed}: must be a list of {ends[-1]} labels from 0 to 9, one for each image")
    labels = np.array(found, np.uint8)
    digest.update(labels.data)

    @cache  # one picture of 10,000 images is 30 MB; it is decoded when the first of them is asked for
    def pixels(part: int) -> Array:
        picture = np.asarray(open_encoded(paths[part].read_bytes(), "png"))
        if picture.shape != (ends[part] - (ends[part - 1] if part else 0), 1024, 3):
            raise ValueError(f"{paths[part].name} has changed since it was opened")
        return rearrange(picture, "n (h w) c -> n h w c", h=32, w=32)

    def row(number: int) -> Array:
        part = bisect_right(ends, number)
        try:
            found: Array = pixels(part)[number - (ends[part - 1] if part else 0)]
        except (OSError, SyntaxError) as error:
            raise ValueError(f"lies in {paths[part].name}, which cannot be decoded: {error}") from None
        return found

    return rows_split(row, ends[-1], labels, digest.hexdigest(), image_members)
