"""Checkpoints: folders of safetensors and JSON, written aside, synced, renamed, re-read; no pickle, ever."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from gandist.data.dataset import Count, Hex, Spec
from gandist.recipe import Failure, InputError, Section, wording
from gandist.tensors import FileRecord, fill, packed, record, unpacked

MANIFEST, STATE = "manifest.json", "state.json"
_FOLDER = re.compile(r"images_(\d{9,})")
_MAX_JSON = 4 << 20
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\.(safetensors|json)$")]

Kind = TypeVar("Kind", bound=Section)
Files = dict[str, dict[str, Tensor]]  # tensors by file name (without suffix) and name


class Manifest(Section):
    """The contents of `manifest.json`: every other file of the folder."""

    gandist_checkpoint: Literal[1] = 1
    files: dict[FileName, FileRecord]


class State(Section):
    """The contents of `state.json`: all of a run that is no tensor."""

    step: Annotated[int, Field(ge=0, lt=2**62)]
    images: Annotated[int, Field(ge=0, lt=2**62)]
    seconds: Annotated[float, Field(ge=0)]
    init_from: Hex | None = None  # the digest of the checkpoint whose weights the run started from
    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{8,32}$")]
    precision: Literal["fp32", "bf16", "fp16"]
    ranks: Count
    spec: Spec
    recipe: dict[str, Any]
    decisive: dict[str, Any]
    players: dict[str, dict[str, float | int]]
    quarantined: tuple[Annotated[int, Field(ge=0)], ...] = ()  # samples that were bad and had a substitute
    versions: dict[str, str]


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they come back from JSON, so that old and new ones compare: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> FileRecord:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return record(data)


def save(root: Path, state: State, files: Files, keep: int) -> Path:
    """Writes the checkpoint of `state.images` into `root`, verifies it, and then removes all but the newest `keep`.

    Raises Failure when a tensor is not finite, so that no checkpoint ever holds a NaN, and OSError when the disk fails;
    older checkpoints are untouched in both cases.
    """
    final = root / f"images_{state.images:09d}"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".images_*.tmp"):
        shutil.rmtree(leftover)
    if final.exists():
        try:
            Checkpoint(final)
            return final
        except Failure:
            shutil.rmtree(final)
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise Failure(
                    f"{file}: `{name}` is not finite after {state.images} images; no checkpoint is written of it"
                )
    aside = root / f".{final.name}.tmp"
    aside.mkdir()
    try:
        records = {
            f"{name}.safetensors": _write(aside / f"{name}.safetensors", packed(tensors))
            for name, tensors in files.items()
        }
        records[STATE] = _write(aside / STATE, state.model_dump_json(indent=1).encode())
        _write(aside / MANIFEST, Manifest(files=records).model_dump_json(indent=1).encode())
        _sync(aside)
        aside.rename(final)
        _sync(root)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    try:
        Checkpoint(final)
    except Failure as fault:
        raise OSError(errno.EIO, f"re-read after writing: {fault}", str(final)) from None
    # Newer folders did not verify when the run went on from an older one: they count for nothing, and stay as evidence.
    for old in [folder for folder in folders(root) if folder.name <= final.name][keep:]:
        shutil.rmtree(old)
    return final


def folders(root: Path) -> list[Path]:
    """The checkpoint folders of `root` by name alone, newest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("images_")), reverse=True)


def outside(path: Path) -> Path:
    """The path, unless it lies in a checkpoint, which holds what its manifest names and nothing else; raises InputError."""
    for folder in (path.resolve(), *path.resolve().parents):
        if (folder / MANIFEST).exists():
            raise InputError(
                f"{path}: lies in the checkpoint {folder}, which a file more would damage; name another folder"
            )
    return path


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones did not."""
    faults: list[str] = []
    for folder in folders(root):
        try:
            return Checkpoint(folder), faults
        except Failure as fault:
            faults.append(str(fault))
    return None, faults


def find(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest valid one of the run at `path`; raises InputError or Failure."""
    path = path.resolve() if path.name in ("", "..") else path  # whose parents are not those of its words
    if (path / MANIFEST).exists() or _FOLDER.fullmatch(path.name):
        return Checkpoint(path)
    if not path.is_dir():
        what = "is a file, and no run" if path.exists() else "does not exist"
        raise InputError(f"{path}: {what}; name a run folder or one of its checkpoints/images_…")
    found, faults = newest(path / "checkpoints")
    if found is None:
        if faults:
            raise Failure("\n".join(["no checkpoint verifies:", *faults]))
        raise InputError(f"{path}: no checkpoint in it; name a run folder or one of its checkpoints/images_…")
    return found


class Checkpoint:
    """A checkpoint folder whose every file has been compared with its manifest; raises Failure naming the first fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = self._read(MANIFEST, None)
        self.digest = hashlib.sha256(raw).hexdigest()
        self.files = self._parse(Manifest, MANIFEST, raw).files
        strange = sorted(
            path.name for path in folder.iterdir() if path.name not in {*self.files, MANIFEST} and path.name[0] != "."
        )
        if strange:
            raise Failure(f"{folder / strange[0]}: not in the manifest")
        for name, wanted in self.files.items():
            if name != STATE:
                self._read(name, wanted)
        if STATE not in self.files:
            raise Failure(f"{folder}: its manifest names no {STATE}")
        self.state = self._parse(State, STATE, self._read(STATE, self.files[STATE]))
        if _FOLDER.fullmatch(folder.name) and self.state.images != int(folder.name.removeprefix("images_")):
            raise Failure(f"{folder / STATE}: says {self.state.images} images, and the folder's name another number")

    def _read(self, name: str, wanted: FileRecord | None) -> bytes:
        path = self.folder / name
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise Failure(f"{path}: not a plain file")
            if wanted is not None and status.st_size != wanted.bytes:
                raise Failure(f"{path}: {status.st_size} bytes, and the manifest says {wanted.bytes}")
            if name.endswith(".json") and status.st_size > _MAX_JSON:
                raise Failure(f"{path}: {status.st_size} bytes are too many; the limit is {_MAX_JSON}")
            data = path.read_bytes()
        except OSError as error:
            raise Failure(f"{path}: cannot be read: {error.strerror}") from None
        if wanted is not None and hashlib.sha256(data).hexdigest() != wanted.sha256:
            raise Failure(f"{path}: damaged: its SHA-256 is not the manifest's")
        return data

    def _parse(self, kind: type[Kind], name: str, raw: bytes) -> Kind:
        try:
            return kind.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            raise Failure(f"{self.folder / name}: `{'.'.join(map(str, first['loc']))}`: {wording(first)}") from None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, from the very bytes whose digest was compared."""
        file = f"{name}.safetensors"
        if file not in self.files:
            raise Failure(f"{self.folder / file}: not in the checkpoint")
        data = self._read(file, self.files[file])
        return unpacked(data, self.folder / file)

    def restore(self, name: str, into: dict[str, Tensor]) -> None:
        """Copies a file's tensors into `into`, which must have exactly these names, shapes and dtypes."""
        fill(into, self.tensors(name), self.folder / f"{name}.safetensors")
