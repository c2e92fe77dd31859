"""Pack: images as users have them to plain WebDataset shards with their indexes; the same input gives the same bytes."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import webdataset
from PIL import Image

from gandist.data.dataset import NAME, Dataset, Indexer, Shard
from gandist.data.decode import ENCODED, LABEL_SUFFIX, MAX_PIXELS, channels_of, check_encoded, open_encoded, to_array
from gandist.recipe import InputError, suggestion

LOCK = ".lock"
EMBEDDED = {"fashion-mnist": Path(__file__).parent / "embedded" / "fashion-mnist"}
GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SHARD_SAMPLES = 4096
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
_UNREAD = ("tif", "tiff", "gif", "heic", "heif", "avif", "jp2", "jxl", "ppm", "pgm", "tga", "psd", "svg")
_KNOWN = "IDX files (plain or .gz), NPZ files, and folders of images, whose subfolders become classes"

Item = tuple[str, str, bytes, int | None]  # path in the source, suffix of the image, its bytes, class number


@dataclass(frozen=True)
class Split:
    """One split of a source: how many images, how to read them in order, and what tells the source from another."""

    samples: int
    read: Callable[[], Iterator[Item]]
    digest: str


@dataclass(frozen=True)
class Images:
    """A source that has been understood: its splits by name, as counts and readers, and what it is called."""

    record: dict[str, str | int | None]
    splits: dict[str, Split]
    names: tuple[str, ...] = ()


def _npy(pixels: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _array_items(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer] | None) -> Split:
    digest = hashlib.blake2b(str(images.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(images).data)
    digest.update(b"" if labels is None else labels.astype("<i8").data)

    def read() -> Iterator[Item]:
        for number, pixels in enumerate(images):
            yield "", "npy", _npy(pixels), None if labels is None else int(labels[number])

    return Split(len(images), read, digest.hexdigest())


def _check_arrays(where: str, images: npt.NDArray[np.generic], labels: npt.NDArray[np.generic] | None) -> None:
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


# ---- IDX, the format of MNIST: big-endian magic (0, 0, type, axes), u32 per axis, then the values

_IDX_IMAGES = re.compile(r"(?P<prefix>.*?)-?images[-.]idx3-ubyte(?P<gz>\.gz)?")


def _refuse_bomb(where: object, size: int, packed: int | None) -> None:
    """Refuses what would unfold to more than a GiB and 200 times its own size; images do not compress like that."""
    if packed is not None and size > BOMB_BYTES and size > BOMB_RATIO * packed:
        raise InputError(f"{where}: {packed} bytes would unfold to {size}; no images compress like that")


def _read_idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    def read(stream: BinaryIO) -> npt.NDArray[np.uint8]:
        head = stream.read(4 + 4 * axes)
        if head[:4] != bytes([0, 0, 8, axes]) or len(head) != 4 + 4 * axes:
            raise InputError(
                f"{path}: not an IDX file of unsigned bytes with {axes} axes: it begins with {head[:4].hex()}"
            )
        shape = tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))
        size = math.prod(shape)
        _refuse_bomb(path, size, path.stat().st_size if path.suffix == ".gz" else None)
        if path.suffix != ".gz" and size > path.stat().st_size:
            raise InputError(f"{path}: its head promises {shape}, and the file has {path.stat().st_size} bytes")
        data = stream.read(size + 1)  # never more than the head promises, whatever a gzip file would unfold to
        if len(data) != size:
            raise InputError(
                f"{path}: its head promises {shape}, and {'more' if len(data) > size else len(data)} bytes follow"
            )
        return np.frombuffer(data, np.uint8).reshape(shape)

    try:
        with path.open("rb") as file:
            if path.suffix == ".gz":
                with gzip.open(file) as unzipped:
                    return read(unzipped)  # type: ignore[arg-type]
            return read(file)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise InputError(f"{path}: cannot be read: {error or 'it asks for too much memory'}") from None


def _idx_split(path: Path) -> Split:
    labels_path = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    images = _read_idx(path, 3)
    labels = _read_idx(labels_path, 1) if labels_path.exists() else None
    _check_arrays(str(path), images, labels)
    return _array_items(images, labels)


def _idx_images(paths: list[Path]) -> Images:
    splits: dict[str, Split] = {}
    for path in paths:
        match = _IDX_IMAGES.fullmatch(path.name)
        assert match is not None
        name = {"t10k": "test", "": "train"}.get(match["prefix"], match["prefix"]) if len(paths) > 1 else "train"
        if name in splits:
            raise InputError(f"{path}: a second file of the split `{name}`; a folder holds one of each")
        splits[name] = _idx_split(path)
    return Images({"kind": "idx"}, splits)


# ---- NPZ

_NPZ_IMAGES, _NPZ_LABELS = ("images", "image", "x", "data", "arr_0"), ("labels", "label", "y", "targets", "arr_1")


def _npz_images(path: Path) -> Images:
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_bomb(path, sum(entry.file_size for entry in archive.infolist()), path.stat().st_size)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if strange:
            raise ValueError(f"{strange[0]!r} is no array")
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile, zlib and numpy raise whatever a damaged file leads them to
        raise InputError(f"{path}: not an NPZ file of plain arrays: {type(error).__name__}: {error}") from None
    splits: dict[str, Split] = {}
    for split in ("train", "test", "validation", ""):
        images = next((arrays[n] for name in _NPZ_IMAGES for n in _spelled(name, split) if n in arrays), None)
        labels = next((arrays[n] for name in _NPZ_LABELS for n in _spelled(name, split) if n in arrays), None)
        if images is not None and (split or not splits):
            labels = labels.reshape(-1) if labels is not None else None
            _check_arrays(f"{path} ({split or 'all'})", images, labels)
            splits[split or "train"] = _array_items(images, labels)
    if not splits:
        raise InputError(
            f"{path}: no images among its arrays {', '.join(arrays) or '(none)'}; name them `images` and `labels`, "
            "or `x_train`, `y_train`, `x_test`, `y_test`"
        )
    return Images({"kind": "npz"}, splits)


def _spelled(name: str, split: str) -> tuple[str, ...]:
    return (f"{name}_{split}", f"{split}_{name}") if split else (name,)


# ---- folders

_SPLITS = {"train": "train", "training": "train", "test": "test", "val": "validation", "validation": "validation"}


def _folder_split(folder: Path, files: list[Path], classes: tuple[str, ...]) -> Split:
    def read() -> Iterator[Item]:
        for file in files:
            parts = file.relative_to(folder).parts
            label = classes.index(parts[0]) if classes else None
            yield "/".join(parts), file.suffix[1:].lower(), file.read_bytes(), label

    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(os.fsencode(file.relative_to(folder).as_posix()) + f"\0{file.stat().st_size}\0".encode())
    return Split(len(files), read, digest.hexdigest())


def _folder_images(folder: Path) -> Images:
    files = sorted(
        (file for file in folder.rglob("*") if file.suffix[1:].lower() in ENCODED and file.is_file()),
        key=lambda file: file.relative_to(folder).as_posix(),
    )
    unread = [file for file in sorted(folder.rglob("*")) if file.suffix[1:].lower() in _UNREAD]
    if unread:
        raise InputError(
            f"{folder}: {len(unread)} images, such as {unread[0].relative_to(folder)}, are in a format that is not read; "
            f"convert them to one of {', '.join(ENCODED)}, or take them out"
        )
    if not files:
        raise InputError(f"{folder}: no images in it; known: {_KNOWN}, with the suffixes {', '.join(ENCODED)}")
    tops = {file.relative_to(folder).parts[0] for file in files if len(file.relative_to(folder).parts) > 1}
    if len(tops) > len({_SPLITS.get(top, top) for top in tops}):
        raise InputError(f"{folder}: {', '.join(sorted(tops))}: two of these are one split; merge them or rename one")
    roots = {_SPLITS[top]: folder / top for top in sorted(tops) if top in _SPLITS} if tops <= _SPLITS.keys() else {}
    roots = roots or {"train": folder}
    members = {name: [file for file in files if root in file.parents] for name, root in roots.items()}
    found: set[str] = set()
    loose: list[Path] = []
    for name, root in roots.items():
        for file in members[name]:
            parts = file.relative_to(root).parts
            found.add(parts[0]) if len(parts) > 1 else loose.append(file)
    if found and loose:
        raise InputError(
            f"{folder}: {len(loose)} images (such as {loose[0].name}) lie beside the class folders "
            f"{', '.join(sorted(found)[:5])}; put every image into a class folder, or all into one folder"
        )
    classes = tuple(sorted(found))
    for name in classes:
        if not name.isprintable():  # a name in another encoding comes as lone surrogates
            raise InputError(f"{folder}: the class folder {name!r} has no name in UTF-8; rename it")
    splits = {name: _folder_split(root, members[name], classes) for name, root in roots.items()}
    return Images({"kind": "folder"}, splits, classes)


def open_source(source: str) -> Images:
    """Understands `source`; raises InputError that says what is known."""
    if source.startswith("embedded:"):
        name = source.removeprefix("embedded:")
        if name not in EMBEDDED:
            raise InputError(f"{source}: no such embedded dataset{suggestion(name, list(EMBEDDED))}")
        found = _idx_images(sorted(EMBEDDED[name].glob("*images*")))
        return Images({"kind": "idx", "name": name, "licence": "MIT"}, found.splits, GARMENTS)
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"{source}: does not exist; known: {_KNOWN}, and {', '.join('embedded:' + n for n in EMBEDDED)}"
        )
    if path.is_dir():
        idx = sorted(file for file in path.iterdir() if _IDX_IMAGES.fullmatch(file.name))
        return _idx_images(idx) if idx else _folder_images(path)
    if _IDX_IMAGES.fullmatch(path.name):
        return _idx_images([path])
    if path.suffix == ".npz":
        return _npz_images(path)
    raise InputError(f"{source}: not a source that is known; known: {_KNOWN} (name the folder, not one image)")


def _resized(data: bytes, suffix: str, size: int) -> bytes:
    """The image's central square, at size × size pixels, as .npy."""
    if suffix == "npy":
        pixels = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        if pixels.ndim == 3 and pixels.shape[2] not in (1, 3):
            raise ValueError(f"has {pixels.shape[2]} channels; only images of 1 or 3 channels can be resized")
        image = Image.fromarray(pixels.squeeze(2) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    else:
        image = open_encoded(data, suffix)
    pixels = to_array(image, channels_of(image))
    upright = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    square = upright.crop((left, top, left + side, top + side))
    return _npy(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)))


def _key(number: int, name: str) -> str:
    """Unique by its number, readable by its name; safe in any tar and with webdataset's rule of the first dot."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name.rpartition(".")[0])[-60:].strip("_-")
    return f"{number:08d}-{stem}" if stem else f"{number:08d}"


def _write_shard(path: Path, items: list[Item], first: int, size: int | None) -> None:
    aside = path.with_suffix(".tar.tmp")
    with aside.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for number, (name, suffix, data, label) in enumerate(items, first):
            try:
                if size is not None:
                    suffix, data = "npy", _resized(data, suffix, size)
                elif suffix in ENCODED:
                    check_encoded(data, suffix)
            except (ValueError, OSError, SyntaxError) as error:
                aside.unlink()
                raise InputError(
                    f"{name or f'image {number}'} {error}; mend it, or take it out of the source"
                ) from None
            sample: dict[str, str | bytes] = {"__key__": _key(number, name), suffix: data}
            if label is not None:
                sample[LABEL_SUFFIX] = str(label).encode()
            tar.write(sample)
    aside.replace(path)


def pack(
    source: str,
    out: Path,
    *,
    size: int | None = None,
    shard_samples: int = SHARD_SAMPLES,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Dataset, bool]:
    """Writes `source` as a dataset into the folder `out`; returns it, and False where it was there already.

    Images are stored as they are: encoded files untouched, arrays and resized images as .npy. Raises InputError.
    """
    if size is not None and not 1 <= size * size <= MAX_PIXELS:
        raise InputError(f"--size {size}: must be from 1 to {int(MAX_PIXELS**0.5)} pixels")
    if not 1 <= shard_samples <= 1_000_000:
        raise InputError(f"--shard-samples {shard_samples}: must be from 1 to 1,000,000")
    images = open_source(source)
    digests = {f"digest of {name}": split.digest for name, split in images.splits.items()}
    record = {**images.record, **digests, "size": size, "shard_samples": shard_samples}
    if (out / NAME).exists():
        dataset = Dataset(out)
        if dataset.manifest.source == record:
            for name in dataset.manifest.splits:
                dataset.check_sizes(name)
            return dataset, False
        raise InputError(f"{out}: holds another dataset ({NAME} tells which); choose another folder or delete that one")
    if out.exists() and (
        strange := [p.name for p in out.iterdir() if p.suffix not in (".tar", ".idx", ".tmp") and p.name != LOCK]
    ):
        raise InputError(f"{out}: is not empty: it holds {sorted(strange)[0]!r}; choose an empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {error.strerror}; choose a folder that you may write to") from None

    lock = (out / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another process is packing into it; wait for it, or choose another folder") from None
    indexer = Indexer(out)
    total = sum(split.samples for split in images.splits.values())
    done = 0
    splits: dict[str, tuple[Shard, ...]] = {}
    for name, split in images.splits.items():
        shards: list[Shard] = []
        first, items = 0, split.read()
        while chunk := list(islice(items, shard_samples)):
            path = out / f"{name}-{len(shards):06d}.tar"
            _write_shard(path, chunk, first, size)
            shards.append(indexer.add(path))
            first, done = first + len(chunk), done + len(chunk)
            progress(done, total)
        splits[name] = tuple(shards)
    dataset = indexer.finish(splits, record, images.names)
    (out / LOCK).unlink()
    return dataset, True


def index(paths: list[Path], *, split: str = "train", progress: Callable[[int], None] = lambda _: None) -> Dataset:
    """Indexes shards that somebody else wrote, all in one folder, and writes its `dataset.json`; raises InputError."""
    doubled = sorted({path.name for path in paths if [p.resolve() for p in paths].count(path.resolve()) > 1})
    if doubled:
        raise InputError(f"{doubled[0]}: named twice; each shard counts once")
    folders = {path.parent for path in paths}
    if len(folders) != 1:
        raise InputError(f"the shards lie in {len(folders)} folders; a dataset is one folder")
    (folder,) = folders
    if (folder / NAME).exists():
        raise InputError(f"{folder / NAME}: exists; delete it to index the folder anew")
    indexer = Indexer(folder, decode=True)
    shards = tuple(indexer.add(path, progress) for path in sorted(paths))
    return indexer.finish({split: shards}, {"kind": "shards"})
