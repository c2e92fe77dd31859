"""Pack: a source to plain WebDataset shards with their indexes; the same input gives the same bytes.

Each shard is a function of the source, the options and its number alone. So any number of processes or machines may write
them in any order, the same one twice does no harm, and a packing that was killed goes on with the shards it lacks.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import webdataset
from PIL import Image
from pydantic import ValidationError

from gandist.data.contents import Contents, examine, finish
from gandist.data.dataset import NAME, Dataset, Names, write_atomically
from gandist.data.decode import (
    ENCODED,
    MAX_PIXELS,
    ROLES,
    SIGNAL_SUFFIX,
    channels_of,
    check_encoded,
    image_shape,
    is_turned,
    mask_classes,
    open_encoded,
    to_array,
)
from gandist.data.index import index_path
from gandist.data.order import Permutation
from gandist.data.sources import Item, Source, Split
from gandist.data.sources.arrays import npy_bytes
from gandist.data.sources.open import open_source
from gandist.data.storage import Store, is_remote, refuse_secrets
from gandist.data.transform import resized
from gandist.recipe import Failure, InputError

LOCK = ".lock"
PLAN = ".pack.json"  # what is being packed here, so that two packings do not mix
SCRATCH = ".spool"
SHARD_SAMPLES = 4096
MAX_SHARD_SAMPLES = 100_000
FITS = ("crop", "shorter", "stretch")
Progress = Callable[[int, int], None]
Record = dict[str, str | int | None]
Shares = tuple[tuple[str, int | float], ...]


@dataclass(frozen=True)
class Options:
    """How a source is packed: every field decides the bytes of the shards.

    `size` with `fit`: `crop` cuts out the central square and makes it size × size, `shorter` makes the shorter side `size`
    long, `stretch` makes size × size of the whole. `shuffle` is the seed of the order, None for the source's own. `splits` are
    the shares of the source's split `train` by name: floats are fractions of it, taken by chance, and whole numbers are counts,
    taken in the source's order. `bad` says what becomes of damaged files: `refuse` or `skip`.
    """

    size: int | None = None
    fit: str = "crop"
    shard_samples: int = SHARD_SAMPLES
    shuffle: int | None = 0
    splits: Shares = ()
    ignore: int | None = 255
    names: Names = ()
    bad: str = "refuse"

    def check(self) -> None:
        """Raises InputError for what cannot be."""
        if self.size is not None and not 1 <= self.size * self.size <= MAX_PIXELS:
            raise InputError(f"--size {self.size}: must be from 1 to {int(MAX_PIXELS**0.5)} pixels")
        if self.fit not in FITS:
            raise InputError(f"--fit {self.fit}: must be one of {', '.join(FITS)}")
        if self.fit != "crop" and self.size is None:
            raise InputError(f"--fit {self.fit}: has no effect without --size")
        if not 1 <= self.shard_samples <= MAX_SHARD_SAMPLES:
            raise InputError(f"--shard-samples {self.shard_samples}: must be from 1 to {MAX_SHARD_SAMPLES:,}")
        if self.bad not in ("refuse", "skip"):
            raise InputError(f"--bad {self.bad}: must be refuse or skip")
        self._check_shares()
        for name, _ in self.splits:
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
                raise InputError(f"--split {name}: a split's name is small letters, digits and '_'")
        if len({name for name, _ in self.splits}) < len(self.splits):
            raise InputError("--split: a name stands twice")

    @property
    def counted(self) -> bool:
        """Whether `splits` are counts."""
        return any(isinstance(share, int) for _, share in self.splits)

    def _check_shares(self) -> None:
        given = [share for _, share in self.splits]
        listed = ", ".join(map(str, given))
        if self.counted:
            if not all(isinstance(share, int) for share in given):
                raise InputError(
                    f"--split: {listed} are counts and fractions; give whole numbers alone, or fractions alone"
                )
            if min(given) < 1:
                raise InputError(f"--split: the counts {listed} must be 1 or more")
        elif given and (not all(map(math.isfinite, given)) or min(given) <= 0 or abs(sum(given) - 1) > 1e-6):
            raise InputError(
                f"--split: the fractions {listed} must be positive and add up to 1; counts are whole numbers, such as 50000"
            )


@dataclass(frozen=True)
class Job:
    """One shard to write: which items of which split of the source."""

    split: str
    number: int
    source: Split
    items: npt.NDArray[np.int64]

    @property
    def name(self) -> str:
        """The shard's file name."""
        return f"{self.split}-{self.number:06d}.tar"


@dataclass(frozen=True)
class Packing:
    """A source, how to pack it, and where to."""

    source: str
    out: Path
    options: Options = Options()
    allow_pipe: bool = False

    @property
    def _scratch(self) -> Path:
        return self.out / SCRATCH

    def open(self) -> Source:
        """Understands the source; raises InputError."""
        return open_source(self.source, scratch=self._scratch, allow_pipe=self.allow_pipe)

    def clear_scratch(self) -> None:
        """Removes the copies of remote shards."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def record(self, found: Source) -> Record:
        """What `dataset.json` says of the packing; equal records mean equal shards."""
        digests = {f"digest of {name}": split.digest for name, split in found.splits.items()}
        options = {key: value for key, value in asdict(self.options).items() if key not in ("splits", "names")}
        shares = ", ".join(f"{name}={share!r}" for name, share in self.options.splits) or None
        return {**found.record, **digests, **options, "splits": shares, "names": ", ".join(self.options.names) or None}

    def jobs(self, found: Source) -> list[Job]:
        """Every shard of the packing."""
        return [
            Job(name, number, split, items[first : first + self.options.shard_samples])
            for name, split, items in _divide(found, self.options)
            for number, first in enumerate(range(0, len(items), self.options.shard_samples))
        ]


def _check_fits(found: Source, options: Options) -> None:
    """Refuses a size where there are no images, and shares that the source cannot be divided into; raises InputError."""
    generated = found.record.get("kind") == "generated"
    if options.size is not None and generated and SIGNAL_SUFFIX in found.splits["train"].read(0).members:
        raise InputError(f"--size {options.size}: has no effect on generated signals; leave it out")
    if not options.splits:
        return
    listed = ", ".join(found.splits)
    if "train" not in found.splits:
        raise InputError(f"--split: divides the split train, and the source has only {listed}; leave --split out")
    for name, _ in options.splits:
        if name != "train" and name in found.splits:
            raise InputError(
                f"--split {name}: the source is divided already, into {listed}; choose a name that none of these has"
            )
    samples, total = found.splits["train"].samples, sum(share for _, share in options.splits)
    if options.counted and total != samples:
        raise InputError(
            f"--split: the counts add up to {total}, and the source has {samples} samples in train; the two must be equal"
        )


def _divide(found: Source, options: Options) -> Iterator[tuple[str, Split, npt.NDArray[np.int64]]]:
    """The splits with the items of each, in the order in which they are written."""
    for name, split in found.splits.items():
        if options.splits and name == "train":
            for part, items in _parts(split.samples, options):
                yield part, split, items
        else:
            yield name, split, _ordered(split.samples, options.shuffle)


def _ordered(samples: int, shuffle: int | None) -> npt.NDArray[np.int64]:
    places = np.arange(samples, dtype=np.uint64)
    return (places if shuffle is None else Permutation(samples, shuffle, "pack", 0)(places)).astype(np.int64)


def _parts(samples: int, options: Options) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """The items of each share; those of a count are shuffled as if there were no others."""
    wanted = np.array([share for _, share in options.splits])
    if options.counted:
        for (part, _), count, end in zip(options.splits, wanted, np.cumsum(wanted), strict=True):
            yield part, end - count + _ordered(int(count), options.shuffle)
        return
    ends = np.round(np.cumsum(wanted) * samples).astype(int)
    for (part, _), items in zip(
        options.splits, np.split(_ordered(samples, options.shuffle or 0), ends[:-1]), strict=True
    ):
        if not len(items):
            raise InputError(f"--split {part}: none of the {samples} samples would be in it")
        yield part, items if options.shuffle is not None else np.sort(items)


def _fitted(image: Image.Image, size: int, fit: str, how: Image.Resampling) -> Image.Image:
    width, height = image.size
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if fit == "shorter":
        height, width = resized(height, width, size)
        if height * width > MAX_PIXELS:
            raise ValueError(f"would become {width}×{height} pixels; the limit is {MAX_PIXELS}")
        return image.resize((width, height), how)
    return image.resize((size, size), how)


def _resized(data: bytes, suffix: str, options: Options) -> bytes:
    """The image at another size, as .npy."""
    assert options.size is not None
    if suffix == "npy":
        pixels = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        if pixels.ndim == 3 and pixels.shape[2] not in (1, 3):
            raise ValueError(f"has {pixels.shape[2]} channels; only images of 1 or 3 channels can be resized")
        image = Image.fromarray(pixels.squeeze(2) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    else:
        image = open_encoded(data, suffix)
    pixels = to_array(image, channels_of(image))
    upright = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    return npy_bytes(np.asarray(_fitted(upright, options.size, options.fit, Image.Resampling.LANCZOS)))


def _members(item: Item, options: Options) -> dict[str, bytes]:
    """The members to write: untouched, unless another size was asked for; raises ValueError where one is damaged."""
    members = {}
    for suffix, data in item.members.items():
        role = ROLES[suffix]
        if role == "image":
            if suffix in ENCODED:
                check_encoded(data, suffix)
            size = image_shape(data, suffix)[:2]
            if is_turned(data, suffix) and any(ROLES[other] == "mask" for other in item.members):
                raise ValueError("is turned by its EXIF, and its mask is not; store it upright")
            if options.size is not None:
                suffix, data = "npy", _resized(data, suffix, options)
        elif role == "mask":
            classes = mask_classes(data, suffix)
            if "image" in {ROLES[other] for other in item.members} and classes.shape != size:
                raise ValueError(
                    f"is {size[1]}×{size[0]}, and its mask {classes.shape[1]}×{classes.shape[0]}; they must agree"
                )
            if options.size is not None:
                mask = _fitted(Image.fromarray(classes), options.size, options.fit, Image.Resampling.NEAREST)
                suffix, data = "mask.npy", npy_bytes(np.asarray(mask))
        members[suffix] = data
    return members


def key(number: int, name: str) -> str:
    """Unique by its number in the source, readable by its name; safe in any tar and with webdataset's first dot."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name.rpartition(".")[0])[-60:].strip("_-")
    return f"{number:08d}-{stem}" if stem else f"{number:08d}"


def _write_shard(packing: Packing, job: Job) -> Contents:
    """Writes one shard, its index, and last the note of what it holds."""
    path = packing.out / job.name
    skipped: list[str] = []
    handle, name = tempfile.mkstemp(suffix=".tmp", prefix=job.name, dir=packing.out)
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
                for number in job.items.tolist():
                    item = Item("", {})
                    try:
                        item = job.source.read(number)
                        members = _members(item, packing.options)
                    except (ValueError, OSError, SyntaxError) as error:
                        what = f"{item.name or f'item {number}'} {error}"
                        if packing.options.bad == "refuse":
                            raise InputError(
                                f"{packing.source}: {what}; mend it, take it out of the source, or pass over "
                                "all such files with --bad skip"
                            ) from None
                        skipped.append(what)
                        continue
                    tar.write({"__key__": key(number, item.name), **members})
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        if len(skipped) == len(job.items):
            contents = Contents(
                outer=(), mask_present=(0,) * 256, skipped=tuple(skipped)
            )  # and no tar: a shard holds a sample
        else:
            aside.replace(path)
            contents = examine(path, ignore=packing.options.ignore).model_copy(update={"skipped": tuple(skipped)})
    finally:
        aside.unlink(missing_ok=True)
    write_atomically(_note(path), contents.model_dump_json().encode())
    return contents


def _note(shard: Path) -> Path:
    return shard.with_name(f".{shard.stem}.json")


def _written(packing: Packing, job: Job) -> Contents | None:
    """What a shard holds that was written before, or None."""
    path = packing.out / job.name
    try:
        contents = Contents.model_validate_json(_note(path).read_bytes())
        if contents.shard is None:
            return contents
        sizes_fit = path.stat().st_size == contents.shard.bytes and index_path(path).exists()
    except (OSError, ValidationError):
        return None
    return contents if sizes_fit else None


def _nameless(plan: bytes) -> object:
    """A plan without the names of classes, on which no shard depends; as it is where it is none."""
    try:
        found = json.loads(plan)
    except ValueError:
        return plan
    return {key: value for key, value in found.items() if key != "names"} if isinstance(found, dict) else plan


def _begin(packing: Packing, record: Record) -> None:
    """Makes the folder and notes what is packed into it; raises InputError where something else is."""
    out = packing.out
    ours = (".tar", ".idx", ".tmp", ".json")
    for name in (LOCK, PLAN, SCRATCH):
        if (out / name).is_symlink():  # what is written or removed there must not lie elsewhere
            raise InputError(f"{out / name}: is a link; choose another folder, or delete it")
    if out.exists():
        if not out.is_dir():
            raise InputError(f"{out}: is a file; choose an empty folder")
        strange = [p.name for p in out.iterdir() if p.suffix not in ours and p.name not in (LOCK, SCRATCH)]
        if strange or not ((out / PLAN).exists() or not any(p.suffix in ours for p in out.iterdir())):
            name = sorted(strange or (p.name for p in out.iterdir()))[0]
            raise InputError(f"{out}: is not empty: it holds {name!r}; choose an empty folder")
    plan = json.dumps(record, indent=1).encode()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / PLAN).exists() and _nameless((out / PLAN).read_bytes()) != _nameless(plan):
            raise InputError(
                f"{out}: another packing has begun there ({PLAN} tells which); choose another folder or delete that one"
            )
        write_atomically(out / PLAN, plan)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {error.strerror}; choose a folder that you may write to") from None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The only packing of this folder by one command; parts need no lock, since they write the same bytes."""
    with os.fdopen(os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out}: another process is packing into it; wait for it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            (out / LOCK).unlink()


def _done_before(packing: Packing, record: Record) -> Dataset | None:
    """The dataset in the folder where it is this one; raises InputError where it is another."""
    if not (packing.out / NAME).exists():
        return None
    dataset = Dataset(packing.out)
    packing.clear_scratch()
    if dataset.manifest.source != record:
        raise InputError(
            f"{packing.out}: holds another dataset ({NAME} tells which); choose another folder or delete that one"
        )
    for name in dataset.manifest.splits:
        dataset.check_sizes(name)
    return dataset


def _understood(packing: Packing) -> tuple[Source, Record, Dataset | None]:
    """The source, what `dataset.json` is to say of it, and the dataset where it is there already; raises InputError."""
    packing.options.check()
    found = packing.open()
    _check_fits(found, packing.options)
    record = packing.record(found)
    return found, record, _done_before(packing, record)


def pack_part(packing: Packing, part: int, parts: int, progress: Progress = lambda *_: None) -> int:
    """Writes every `parts`-th shard from number `part` on that is not there yet; returns how many that are."""
    if not 0 <= part < parts:
        raise InputError(f"--part {part + 1}/{parts}: must be from 1/{parts} to {parts}/{parts}")
    found, record, dataset = _understood(packing)
    if dataset is not None:
        return 0
    _begin(packing, record)
    jobs = packing.jobs(found)[part::parts]
    done, total = 0, sum(len(job.items) for job in jobs)
    for job in jobs:
        if _written(packing, job) is None:
            _write_shard(packing, job)
        done += len(job.items)
        progress(done, total)
    return len(jobs)


def merge(packing: Packing) -> tuple[Dataset, bool]:
    """Writes `dataset.json` when all parts are done; raises InputError naming what is missing."""
    found, record, done = _understood(packing)
    if done is not None:
        return done, False
    if not (packing.out / PLAN).exists():
        raise InputError(f"{packing.out}: nothing has been packed there; run the parts first, with --part")
    _begin(packing, record)
    return _merge(packing, found, record), True


def _merge(packing: Packing, found: Source, record: Record) -> Dataset:
    jobs = packing.jobs(found)
    splits: dict[str, list[Contents]] = {}
    missing = []
    for job in jobs:
        contents = _written(packing, job)
        if contents is None:
            missing.append(job.name)
        else:
            splits.setdefault(job.split, []).append(contents)
    if missing:
        raise InputError(
            f"{packing.out}: {len(missing)} of {len(jobs)} shards are not there, such as {missing[0]}; run the parts that make them"
        )
    options = packing.options
    dataset = finish(packing.out, splits, record, given=options.names, found=found.names, ignore=options.ignore)
    for job in jobs:
        _note(packing.out / job.name).unlink()
    for file in packing.out.glob("*.tmp"):
        file.unlink(missing_ok=True)
    packing.clear_scratch()
    (packing.out / PLAN).unlink()
    return dataset


def pack(packing: Packing, workers: int = 1, progress: Progress = lambda *_: None) -> tuple[Dataset, bool]:
    """Writes `source` as a dataset into the folder `out`; returns it, and False where it was there already.

    Goes on where an earlier call was stopped. Images are stored as they are: encoded files untouched, arrays and resized
    images as .npy. With several `workers` the shards are divided over as many processes. Raises InputError.
    """
    found, record, done = _understood(packing)
    if done is not None:
        return done, False
    _begin(packing, record)
    try:
        with _locked(packing.out):
            jobs = packing.jobs(found)
            workers = min(workers, len(jobs))
            if workers <= 1:
                pack_part(packing, 0, 1, progress)
            else:
                _run_parts(packing, jobs, workers, progress)
            return _merge(packing, found, record), True
    except InputError:
        _clear(packing.out)
        raise


def _clear(out: Path) -> None:
    """Leaves nothing behind where no shard was finished, so that the same folder can be packed into once the input is mended."""
    if any(out.glob("*.tar")) or (out / LOCK).exists():
        return
    for file in [*out.glob("*.tmp"), out / PLAN]:
        file.unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()


def _run_parts(packing: Packing, jobs: list[Job], workers: int, progress: Progress) -> None:
    """Each part in a process of its own, by the same command that packs a part on another machine: nothing is pickled."""
    with ExitStack() as files:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and not without the workers
        files.callback(signal.signal, signal.SIGTERM, before)
        words = [files.enter_context(tempfile.TemporaryFile()) for _ in range(workers)]
        _wait_for_parts(packing, jobs, words, progress)


def _wait_for_parts(packing: Packing, jobs: list[Job], words: Sequence[IO[bytes]], progress: Progress) -> None:
    """Starts a process for each of `words`, files that take what it says: from a pipe nobody would read it meanwhile."""
    workers = len(words)
    processes = [
        subprocess.Popen(_command(packing, f"{part + 1}/{workers}"), stdout=subprocess.DEVNULL, stderr=words[part])
        for part in range(workers)
    ]
    total = sum(len(job.items) for job in jobs)
    waiting = {job.name: job for job in jobs}
    done = 0
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
            for name in [name for name in waiting if _note(packing.out / name).exists()]:
                done += len(waiting.pop(name).items)
            progress(done, total)
            if any(process.poll() for process in processes):
                break
    finally:
        codes = [process.poll() for process in processes]  # before the others are ended because of one
        for process in processes:
            process.terminate()
            process.wait()
    for code, said in zip(codes, words, strict=True):
        said.seek(0)
        message = said.read(1 << 20).decode("utf-8", "replace").strip().rpartition("gandist: ")[2]
        if code is not None and code > 0:
            raise (InputError if code == 2 else Failure)(message)
        if code is not None and code < 0:
            raise Failure(
                f"a process of the packing was ended by signal {-code}; call again, and it goes on where it was"
            )
    progress(total, total)


def _command(packing: Packing, part: str) -> list[str]:
    options = packing.options
    words = [sys.executable, "-m", "gandist", "pack"]
    words += ["--size", str(options.size), "--fit", options.fit] if options.size is not None else []
    words += ["--shard-samples", str(options.shard_samples), "--bad", options.bad]
    words += ["--no-shuffle"] if options.shuffle is None else ["--shuffle", str(options.shuffle)]
    words += ["--split", ",".join(f"{name}={share!r}" for name, share in options.splits)] if options.splits else []
    words += ["--ignore", str(-1 if options.ignore is None else options.ignore)]
    words += ["--names", ",".join(options.names)] if options.names else []
    words += ["--allow-pipe"] if packing.allow_pipe else []
    return [*words, "--part", part, "--", packing.source, str(packing.out)]


def index(
    shards: list[str],
    *,
    split: str = "train",
    out: Path | None = None,
    decode: bool = False,
    names: Names = (),
    ignore: int | None = 255,
    progress: Callable[[int], None] = lambda _: None,
) -> Dataset:
    """Indexes shards that somebody else wrote, all in one folder or behind one URL, and writes `dataset.json`; raises InputError.

    The index of local shards lies beside them; that of remote ones, and any other, goes to the folder `out`.
    """
    parents = {shard.rpartition("/")[0] or "." for shard in shards}
    files = [shard.rpartition("/")[2] for shard in shards]
    doubled = sorted(name for name, count in Counter(files).items() if count > 1)
    if len(parents) != 1:
        raise InputError(f"the shards lie in {len(parents)} folders; a dataset is one folder")
    if doubled:
        raise InputError(f"{doubled[0]}: named twice; each shard counts once")
    (parent,) = parents
    for shard in shards:
        refuse_secrets(shard, "the place of the shards is written into dataset.json")
    if is_remote(parent) and out is None:
        raise InputError(f"{parent}: the shards are remote; name a folder for their index with --out")
    folder = out or Path(parent)
    if (folder / NAME).exists():
        raise InputError(f"{folder / NAME}: exists; delete it to index the folder anew")
    folder.mkdir(parents=True, exist_ok=True)
    store = Store.at(parent)
    found = []
    for name in sorted(files):
        found.append(_index_one(store, name, folder, decode, ignore, progress))
    apart = None if out is None else (parent if is_remote(parent) else str(Path(parent).resolve()))
    return finish(folder, {split: found}, {"kind": "shards"}, given=names, ignore=ignore, shards_at=apart)


def _index_one(
    store: Store, name: str, folder: Path, decode: bool, ignore: int | None, progress: Callable[[int], None]
) -> Contents:
    """Examines one shard where it lies, or a copy of it that is fetched and removed again."""
    if store.local is not None and store.local.resolve() == folder.resolve():
        return examine(store.local / name, ignore=ignore, decode=decode, progress=progress)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        copy = Path(aside) / name
        if store.local is not None:
            copy.symlink_to((store.local / name).resolve())
        else:
            store.fetch(name, copy)
        try:
            contents = examine(copy, ignore=ignore, decode=decode, progress=progress)
        except InputError as error:
            raise InputError(
                str(error).replace(str(copy), store.name(name))
            ) from None  # a user knows the shard, not the copy
        index_path(copy).replace(folder / index_path(copy).name)
    return contents


def shares(text: Iterable[str]) -> Shares:
    """`train=0.9,test=0.1` or `train=50000,validation=10000` as pairs; raises InputError.

    A whole number is a count, but for 1 alone, which is all.
    """
    found: list[tuple[str, int | float]] = []
    for word in ",".join(text).split(","):
        name, equals, share = word.partition("=")
        try:
            count = re.fullmatch(r"\s*\d[\d_]{0,17}\s*", share)
            found.append((name.strip(), int(share) if count else float(share)))
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(
                f"--split {word!r}: must read NAME=FRACTION or NAME=COUNT, such as train=0.9,test=0.1 or train=50000,test=10000"
            )
    return ((found[0][0], 1.0),) if len(found) == 1 and found[0][1] == 1 else tuple(found)
