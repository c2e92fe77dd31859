"""From the `data` section of a recipe to what it names: the one place that chooses a reader and its caches."""

from __future__ import annotations

import os
from pathlib import Path

from gandist.data import plain
from gandist.data.cache import Cache
from gandist.data.dataset import Dataset, Spec
from gandist.data.read import Reader
from gandist.data.storage import refuse_secrets
from gandist.data.stream import PARTS, Batches, Share, Stream, view_spec
from gandist.recipe import DataOptions

INDEX_CACHE = 16 << 30  # bytes of indexes of remote datasets; 40 a sample


def open_reader(options: DataOptions) -> Reader:
    """The samples of a split; raises InputError where they are not there or not what their index says."""
    refuse_secrets(options.path, "a recipe is copied into logs and checkpoints")
    dataset = Dataset(options.path)
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gandist"
    folder = Path(options.cache) if options.cache is not None else default
    indexes = shards = None
    if dataset.store.local is None:
        indexes = Cache(dataset.store, folder / dataset.digest[:16] / "indexes", INDEX_CACHE)
    if _whole_shards(dataset, options):
        shards = Cache(dataset.shard_store, folder / dataset.digest[:16] / "shards", int(options.cache_gib * 2**30))
    if shards is not None:
        largest = sorted((shard.bytes for shard in dataset.shards(options.split)), reverse=True)
        two = sum(largest[: 2 * options.window_shards])
        if two > options.cache_gib * 2**30:
            raise ValueError(
                f"`cache_gib` {options.cache_gib:g} cannot hold two windows of {options.window_shards} shards "
                f"({two / 2**30:.3g} GiB); lower `window_shards`, or raise it"
            )
    return Reader(dataset, options.split, indexes=indexes, shards=shards)


def _whole_shards(dataset: Dataset, options: DataOptions) -> bool:
    """Whether shards are fetched whole: remote ones that are read in windows, which a subset is not."""
    subset_alone = options.subset is not None and options.unlabelled_path is not None
    return dataset.shard_store.local is None and options.shuffle == "window" and not subset_alone


def refuse_idle_cache(options: DataOptions) -> None:
    """Raises ValueError where a setting of the cache has no effect on any dataset that is read."""
    sections = [section for section in (options, options.unlabelled()) if section is not None]
    datasets = [(Dataset(section.path), section) for section in sections]
    whole = any(_whole_shards(*one) for one in datasets)
    if options.cache is not None and not whole and all(dataset.store.local is not None for dataset, _ in datasets):
        which = f"{options.path} is local" if len(datasets) == 1 else "both datasets are local"
        raise ValueError(f"`cache` has no effect, since {which}; leave it out")
    if options.cache_gib != DataOptions.model_fields["cache_gib"].default and not whole:
        raise ValueError("`cache_gib` has no effect but with remote shards and `shuffle: window`; leave it out")


def open_batches(options: DataOptions, share: Share, allow_pipe: bool = False) -> Batches:
    """A stream of the data; raises InputError."""
    if options.reader == "webdataset":
        return plain.PlainStream(options, share, allow_pipe)
    other = options.unlabelled() if any(PARTS[part].view != "labelled" for part in share.parts) else None
    return Stream(open_reader(options), options, share, open_reader(other) if other is not None else None)


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
    if data_digest(other) == data_digest(options) and other.split == options.split:
        raise ValueError("is the split that unlabelled images are of anyway; leave it out")
    found = data_spec(other)
    mine, theirs = spec.image, found.image
    if mine is None or theirs is None:
        raise ValueError(f"{other.path if theirs is None else options.path} has no images")
    if mine.channels != theirs.channels:
        raise ValueError(
            f"its images have {theirs.channels} channels, and those of `path` {mine.channels}; pack them with as many channels"
        )
    if mine.height is not None and (mine.height, mine.width) != (theirs.height, theirs.width):
        if theirs.height is None:
            raise ValueError(
                f"its images differ in size, and those of `path` come out as {mine.width}×{mine.height}: give `unlabelled_transform` a `crop`, or "
                f"`canvas: [{mine.height}, {mine.width}]`"
            )
        raise ValueError(
            f"its images come out as {theirs.width}×{theirs.height}, and those of `path` as {mine.width}×{mine.height}; set `unlabelled_transform`"
        )
    return found


def data_digest(options: DataOptions) -> str:
    """What tells this data from any other."""
    if options.reader == "webdataset":
        return plain.location_digest(options)
    return Dataset(options.path).digest
