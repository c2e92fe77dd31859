"""Files of tensors: safetensors written and read, with all that the format leaves unchecked; no pickle, ever."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gandist.data.dataset import Count, Hex
from gandist.recipe import Failure, Section

_MAX_HEADER = 16 << 20
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
}  # fmt: skip


class FileRecord(Section):
    """What a file must be."""

    bytes: Count
    sha256: Hex


NO_FILE = FileRecord(bytes=1, sha256="0" * 64)


def record(data: bytes) -> FileRecord:
    """That of a file with these bytes."""
    return FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def packed(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as a safetensors file."""
    # safetensors refuses channels-last strides; `copy_` at load brings them back
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata)


def unpacked(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all of them finite; raises Failure, which names `path`."""
    _check_header(data, path)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise Failure(f"{path}: not a safetensors file that torch reads: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise Failure(f"{path}: `{name}` is of {tensor.dtype}, which no file of ours holds")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Failure(f"{path}: `{name}` is not finite")
    return tensors


def fill(into: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Copies the tensors of a file into those of a network, which must have exactly these names, shapes and dtypes; raises Failure."""
    if found.keys() != into.keys():
        missing, strange = sorted(into.keys() - found.keys()), sorted(found.keys() - into.keys())
        raise Failure(
            f"{path}: lacks {missing[:3]} and has {strange[:3]} that the network does not: another architecture"
        )
    for name, tensor in into.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise Failure(
                f"{path}: `{name}` is {found[name].dtype} {tuple(found[name].shape)}, and the network has "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(found[name])


def _check_header(data: bytes, path: Path) -> None:
    """Bounds on the header before safetensors parses it: it takes the last of duplicate keys, and any length."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name stands twice in its header")
        return dict(pairs)

    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8):
        raise Failure(f"{path}: not a safetensors file: its header would have {length} bytes")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=once)
        if not isinstance(header, dict):
            raise ValueError("its header is not a mapping")
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path}: not a safetensors file: {error}") from None
