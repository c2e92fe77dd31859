"""Shards: WebDataset tars as numbered items, local ones where they lie, others copied once to a scratch folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from bisect import bisect_right
from collections import Counter
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from gandist.data.decode import ENCODED, IMAGE_SUFFIXES, LABEL_SUFFIX, ROLES, SIGNAL_SUFFIX, label_number
from gandist.data.index import group, key_and_suffix
from gandist.data.plain import members_of
from gandist.data.sources import Item, Source, Split
from gandist.data.sources.arrays import HEAD, check_shape, image_members, npy_view, signal_members
from gandist.data.sources.trees import SPLITS, suffix_of, tar_tree, tree_source
from gandist.data.storage import Store, expand, redact
from gandist.data.tar import Member, mapped, members
from gandist.recipe import Failure, InputError

_SUFFIXES = tuple(ROLES)
_PROBE = 1 << 16  # bytes at either end of a shard that go into the digest: arrays all have the same size
_SPLIT = re.compile(r"([a-z]+)(?![a-z])")


def is_shard(found: list[Member]) -> bool:
    """Whether a tar holds samples rather than a tree of files: labels, masks or signals by suffix, or several members a key."""
    images: set[str] = set()
    others: set[str] = set()
    for member in found:
        key, suffix = key_and_suffix(member.name) or (member.name, "")
        if ROLES.get(suffix, "image") != "image":
            return True
        if suffix in ROLES:
            images.add(key)
        elif suffix and suffix_of(suffix) not in ENCODED:
            others.add(key)
    return not images.isdisjoint(others)


def tar_source(path: Path, name: str | None = None) -> Source:
    """A single tar, which was called `name`: WebDataset samples, or an archive of a tree."""
    found, probe = _scanned(path)
    if not is_shard(found):
        return tree_source(tar_tree(path, found))
    return _source([_Shard(path, found, probe)], [name or path.name])


def _scanned(path: Path) -> tuple[list[Member], bytes]:
    """The members of a tar and the bytes at its ends."""
    with mapped(path) as data:
        return members(path, data), data[:_PROBE] + data[-_PROBE:]


def pattern_source(pattern: str, scratch: Path, *, allow_pipe: bool = False) -> Source:
    """The shards that a pattern or a URL stands for, in its order; raises InputError, and Failure where a transfer breaks."""
    urls = expand(pattern)
    doubled = [url for url, count in Counter(urls).items() if count > 1]
    if doubled:
        raise InputError(f"{redact(doubled[0])}: named twice; each shard counts once")
    paths: list[Path] = []
    fetched: list[tuple[str, Path]] = []
    for number, url in enumerate(urls):
        piped = url.startswith("pipe:")
        if not piped and re.search(
            r"\.(t[gbx]z2?|tar\.\w+|zip|np[yz]|csv|gz|png|jpe?g)$", url.partition("?")[0].lower()
        ):
            raise InputError(
                f"{redact(url)}: not an uncompressed .tar; patterns and URLs are those of WebDataset shards"
            )
        local = None if piped else Store.at(url).local
        if local is None:
            mark = hashlib.blake2b(url.encode(), digest_size=4).hexdigest()  # another source leaves other files
            paths.append(scratch / f"spool-{number:06d}-{mark}.tar")
            fetched.append((url, paths[-1]))
        elif not local.is_file():
            raise InputError(f"{local}: does not exist, or is not a plain file")
        else:
            paths.append(local)
    for wait in (False, True):  # several processes fetch several shards at once, and each in the end has all
        for url, path in fetched:
            if not path.exists():
                _fetch(url, path, wait, allow_pipe)
    names = ["" if url.startswith("pipe:") else urlsplit(url).path.rpartition("/")[2] for url in urls]
    try:
        if len(paths) == 1:
            return tar_source(paths[0], names[0])
        return _source([_Shard(path, *_scanned(path)) for path in paths], names)
    except InputError as error:
        text = str(error)
        for url, path in fetched:  # a user knows the URL, and not the copy
            text = text.replace(str(path), redact(url))
        raise InputError(text) from None


def _fetch(url: str, path: Path, wait: bool, allow_pipe: bool) -> None:
    """Copies a remote shard to `path`, whole or not at all; where another process does so already, waits for it or returns."""
    aside = path.with_name(f"{path.stem}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return
            if path.exists():
                return
            for stale in path.parent.glob(f"{path.stem}.*.tmp"):  # the lock is ours: whoever wrote it is dead
                stale.unlink(missing_ok=True)
            with aside.open("xb") as file:
                _copy(url, file, allow_pipe)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
    except OSError as error:
        raise Failure(
            f"{redact(url)}: cannot be copied to {path.parent}: {error}; call again, and it goes on with this shard"
        ) from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _copy(url: str, file: BinaryIO, allow_pipe: bool) -> None:
    """Writes the members that gandist knows to a tar of their own; raises InputError."""

    def known(suffix: str) -> bool:
        return suffix in ROLES or suffix_of(suffix) in ENCODED

    written = 0
    with TarWriter(file, encoder=False, mtime=0, keep_meta=True) as tar:
        for member in members_of(url, allow_pipe, known):
            if member:
                key, suffix = base_plus_ext(member["fname"])
                written += tar.write({"__key__": key, suffix: member["data"]})
    if not written:
        raise InputError(f"{redact(url)}: holds no samples: no member ends with one of {', '.join(ROLES)}")


class _Shard:
    """The samples of one tar: their keys, their members' places as (suffix, start, size) by role, and what tells it apart."""

    def __init__(self, path: Path, found: list[Member], probe: bytes) -> None:
        self.path, self.probe = path, probe
        samples = group(path, found)
        self.keys = [sample.key for sample in samples]
        self.roles = tuple(sorted(samples[0].members))
        for sample in samples:
            self.check(sample.key, tuple(sorted(sample.members)), self.roles)
        self.places: npt.NDArray[np.int64] = np.array(
            [
                [(_SUFFIXES.index((m := s.members[role]).suffix), m.start, m.size) for role in self.roles]
                for s in samples
            ]
        )

    def check(self, key: str, roles: tuple[str, ...], first: tuple[str, ...]) -> None:
        """Raises InputError unless a sample has an image or a signal, and what the first of the source has."""
        if ("image" in roles) == ("signal" in roles):
            raise InputError(
                f"{self.path}: sample {key!r} has {'both an image and a signal' if 'image' in roles else 'no image and no signal'}; "
                f"one is needed, as one of: {', '.join(IMAGE_SUFFIXES)}, or {SIGNAL_SUFFIX}"
            )
        if roles != first:
            raise InputError(
                f"{self.path}: sample {key!r} has {', '.join(roles)}, and the first has {', '.join(first)}; "
                "all samples of a source have the same"
            )

    def read(self, number: int) -> Item:
        """One sample by number; raises ValueError."""
        found: dict[str, bytes] = {}
        name = ""
        for role, (code, start, size) in zip(self.roles, self.places[number].tolist(), strict=True):
            suffix = _SUFFIXES[code]
            try:
                with self.path.open("rb") as file:
                    data = os.pread(file.fileno(), size, start)
                if len(data) != size:
                    raise ValueError("has changed since it was opened")
                found |= _member(role, suffix, data)
            except (ValueError, OSError) as error:
                raise ValueError(f"({self.path.name}: {self.keys[number]}.{suffix}) {error}") from None
            if role in ("image", "signal"):
                name = f"{self.keys[number]}.{suffix}"
        return Item(name, found)


def _member(role: str, suffix: str, data: bytes) -> dict[str, bytes]:
    """A member under its one suffix, arrays and labels in their one spelling; raises ValueError."""
    if role == "label":
        return {LABEL_SUFFIX: str(label_number(data)).encode()}
    if not suffix.endswith("npy"):
        return {"mask.png" if role == "mask" else suffix: data}
    values = npy_view(data)
    if role == "signal":
        return signal_members(values)
    return {suffix: image_members(values)["npy"]}


def _source(shards: list[_Shard], names: list[str]) -> Source:
    """Samples of shards; where all of their `names` begin with that of a split, they are of these splits."""
    found = [match[0] if (match := _SPLIT.match(name)) else "" for name in names]
    splits = [SPLITS[name] for name in found] if set(found) <= SPLITS.keys() else ["train"] * len(shards)
    first = shards[0]
    for shard in shards:
        shard.check(shard.keys[0], shard.roles, first.roles)
    head = first.read(0).members.get(SIGNAL_SUFFIX, b"")[:HEAD] if "signal" in first.roles else b""
    return Source(
        {"kind": "shards", "shards": len(shards)},
        {
            name: _split(
                [shard for shard, split in zip(shards, splits, strict=True) if split == name], first.keys[0], head
            )
            for name in sorted(set(splits))
        },
    )


def _split(shards: list[_Shard], first: str, head: bytes) -> Split:
    ends = [*accumulate(len(shard.keys) for shard in shards)]
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update("\0".join(shard.keys).encode("utf-8", "surrogateescape"))
        digest.update(shard.places[:, :, [0, 2]].tobytes() + shard.probe)

    def read(number: int) -> Item:
        place = bisect_right(ends, number)
        item = shards[place].read(number - (ends[place - 1] if place else 0))
        if head:
            check_shape(item.name, item.members[SIGNAL_SUFFIX], first, head)
        return item

    return Split(ends[-1], read, digest.hexdigest())
