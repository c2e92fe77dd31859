"""What a source is: found out from its name and from what lies there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from gandist.data.sources import Source
from gandist.data.sources.arrays import (
    EMBEDDED,
    cifar_binary,
    cifar_pictures,
    embedded_source,
    idx_source,
    is_idx,
    npy_source,
    npz_source,
    refuse_pickle,
)
from gandist.data.sources.generated import GENERATED, generated_source
from gandist.data.sources.shards import pattern_source, tar_source
from gandist.data.sources.tables import csv_source
from gandist.data.sources.trees import KNOWN, folder_tree, tree_source, zip_tree
from gandist.data.storage import is_remote
from gandist.recipe import InputError

_FILES: dict[str, Callable[[Path], Source]] = {
    ".npz": npz_source,
    ".npy": npy_source,
    ".csv": csv_source,
    ".tar": tar_source,
    ".zip": lambda path: tree_source(zip_tree(path)),
}


def open_source(source: str, *, scratch: Path, allow_pipe: bool = False) -> Source:
    """Understands `source`, the same way in every process; raises InputError that says what is known.

    Remote shards are copied once into the folder `scratch`, which processes may share. `allow_pipe` permits `pipe:command`.
    """
    if source.startswith("embedded:"):
        return embedded_source(source.removeprefix("embedded:"))
    if source.startswith("generated:"):
        return generated_source(source.removeprefix("generated:"))
    if not source or "\0" in source or len(source) > 4096:
        raise InputError(f"{source[:80]!r}: a source has 1 to 4096 characters, none of them NUL")
    if source.startswith(("pipe:", "file:")) or is_remote(source):
        return pattern_source(source, scratch, allow_pipe=allow_pipe)
    path = Path(source)
    try:
        if path.is_dir():
            return _folder(path)
        if path.is_file():
            return _file(path)
        there = path.exists()
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from None
    if there:
        raise InputError(f"{source}: neither a folder nor a plain file; known: {KNOWN}")
    if re.search(r"[{*?]", source):
        return pattern_source(source, scratch)
    made = [*(f"embedded:{name}" for name in EMBEDDED), *(f"generated:{name}" for name in GENERATED)]
    raise InputError(f"{source}: does not exist; known: {KNOWN}, and {', '.join(made)}")


def _folder(path: Path) -> Source:
    files = sorted(file for file in path.iterdir() if is_idx(file))
    if files:
        return idx_source(files)
    found = cifar_binary(path) or cifar_pictures(path)
    if found is not None:
        return found
    refuse_pickle(path, {file.name for file in path.iterdir() if file.is_file()})
    return tree_source(folder_tree(path))


def _file(path: Path) -> Source:
    refuse_pickle(path, [path.name])
    if is_idx(path):
        return idx_source([path])
    if re.search(r"\.(t[gbx]z2?|tar\.\w+)$", path.name.lower()):
        raise InputError(f"{path}: a compressed tar cannot be read in any order; unpack it, and name the folder")
    if path.suffix.lower() not in _FILES:
        raise InputError(f"{path}: not a source that is known; known: {KNOWN} (name the folder, not one image)")
    return _FILES[path.suffix.lower()](path)
