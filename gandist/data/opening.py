"""From the `data` section of a recipe to what it names: the one place that chooses a reader and its caches."""

from __future__ import annotations

import os
from pathlib import Path

from gandist.data import plain
from gandist.data.cache import Cache
from gandist.data.dataset import Dataset, Spec
from gandist.data.read import Reader
from gandist.data.storage import is_remote, refuse_secrets
from gandist.data.stream import PARTS, Batches, Share, Stream, view_spec
from gandist.recipe import DataOptions

INDEX_CACHE = 16 << 30  # bytes of indexes of remote datasets; 40 a sample


def open_reader(options: DataOptions, alone: bool = True) -> Reader:
    """The samples of a split; raises InputError where they are not there or not what their index says.

    Not `alone`, it shares the settings of its cache with another dataset, which may be the one that has an effect of them.
    """
    refuse_secrets(options.path, "a recipe is copied into logs and checkpoints")
    dataset = Dataset(options.path)
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gandist"
    folder = Path(options.cache) if options.cache is not None else default
    indexes = shards = None
    if dataset.store.local is None:
        indexes = Cache(dataset.store, folder / dataset.digest[:16] / "indexes", INDEX_CACHE)
    if dataset.shard_store.local is None and options.shuffle == "window":
        shards = Cache(dataset.shard_store, folder / dataset.digest[:16] / "shards", int(options.cache_gib * 2**30))
    alone = alone and options.unlabelled_path is None
    if options.cache is not None and indexes is None and shards is None and alone:
        raise ValueError(f"`cache` has no effect, since {options.path} is local; leave it out")
    if options.cache_gib != DataOptions.model_fields["cache_gib"].default and shards is None and alone:
        raise ValueError("`cache_gib` has no effect but with remote shards and `shuffle: window`; leave it out")
    if shards is not None:
        largest = sorted((shard.bytes for shard in dataset.shards(options.split)), reverse=True)
        two = sum(largest[: 2 * options.window_shards])
        if two > options.cache_gib * 2**30:
            raise ValueError(
                f"`cache_gib` {options.cache_gib:g} cannot hold two windows of {options.window_shards} shards "
                f"({two / 2**30:.3g} GiB); lower `window_shards`, or raise it"
            )
    return Reader(dataset, options.split, indexes=indexes, shards=shards)


def open_batches(options: DataOptions, share: Share, allow_pipe: bool = False) -> Batches:
    """A stream of the data; raises InputError."""
    if options.reader == "webdataset":
        return plain.PlainStream(options, share, allow_pipe)
    other = options.unlabelled() if any(PARTS[part].view != "labelled" for part in share.parts) else None
    return Stream(open_reader(options), options, share, open_reader(other, alone=False) if other is not None else None)


def data_spec(options: DataOptions, allow_pipe: bool = False) -> Spec:
    """What a game gets; raises InputError, and ValueError where the transform does not fit the data."""
    refuse_secrets(options.path, "a recipe is copied into logs and checkpoints")
    if options.reader == "webdataset":
        return view_spec(plain.stored_spec(options, allow_pipe), options)
    return view_spec(Dataset(options.path).spec(options.split), options)


def unlabelled_spec(options: DataOptions, spec: Spec) -> Spec | None:
    """What a game gets of `data.unlabelled_path`; raises InputError, and ValueError where its images do not come out as those of `spec`."""
    other = options.unlabelled()
    if other is None:
        return None
    found = data_spec(other)
    if found.image != spec.image:
        one, two = (
            f"{i.width}×{i.height}×{i.channels}" if i is not None else "no images" for i in (found.image, spec.image)
        )
        raise ValueError(f"its images come out as {one}, and those of `path` as {two}; set `unlabelled_transform`")
    if options.cache is not None and not any(is_remote(path) for path in (options.path, other.path)):
        raise ValueError("`cache` has no effect, since both datasets are local; leave it out")
    return found


def data_digest(options: DataOptions) -> str:
    """What tells this data from any other."""
    if options.reader == "webdataset":
        return plain.location_digest(options)
    return Dataset(options.path).digest
