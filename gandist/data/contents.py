"""What a shard holds: examined once, written down beside it, and added up to the description of a whole dataset."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from gandist.data.dataset import (
    MAX_CLASSES,
    NAME,
    SHARD_NAME,
    Counts,
    Dataset,
    ImageSpec,
    LabelSpec,
    Manifest,
    MaskSpec,
    Names,
    Natural,
    PixelSize,
    Shard,
    SignalSpec,
    file_digest,
    outer_sizes,
    write_atomically,
)
from gandist.data.decode import (
    ENCODED,
    IMAGE_SUFFIXES,
    check_encoded,
    image_shape,
    is_turned,
    label_number,
    mask_classes,
    signal_values,
)
from gandist.data.index import Sample, group, index_bytes, index_path
from gandist.data.tar import mapped, members
from gandist.recipe import InputError, Section

Pair = tuple[Natural, Natural]


class Contents(Section):
    """What one shard holds; shapes of signals are the distinct ones, two at most, since it matters only whether they differ.

    What has no default is not in the notes of an older version, which are not taken then.
    """

    shard: Shard | None = None  # none where all that would be in it is damaged
    outer: tuple[PixelSize, ...]  # of all sizes, as in `Counts`
    channels: tuple[Natural, ...] = ()
    signals: tuple[Pair, ...] = ()
    labels: tuple[Natural, ...] = ()  # samples by class
    masked: Natural = 0
    mask_pixels: tuple[Natural, ...] = (0,) * 256  # pixels by value
    mask_present: tuple[Natural, ...]  # as in `Counts`, by value
    skipped: tuple[str, ...] = ()


def examine(
    path: Path, *, ignore: int | None, decode: bool = False, progress: Callable[[int], None] = lambda _: None
) -> Contents:
    """Scans a shard, looks at the head of every member, writes its index beside it and returns what it holds.

    `ignore` is the mask value of pixels that have no class. With `decode` every image is decoded to its end, which finds damage
    that its head does not show. Raises InputError naming shard, sample and rule.
    """
    if not re.fullmatch(SHARD_NAME, path.name):
        raise InputError(
            f"{path}: a shard's name must be letters, digits, '.', '_' and '-', and end with .tar; rename it"
        )
    sizes: set[Pair] = set()
    channels: set[int] = set()
    signals: set[Pair] = set()
    labels: Counter[int] = Counter()
    pixels, present = np.zeros(256, np.int64), np.zeros(256, np.int64)
    masked = 0
    with mapped(path) as data:
        samples = group(path, members(path, data))
        for number, sample in enumerate(samples):
            bytes_of = {role: data[m.start : m.start + m.size] for role, m in sample.members.items()}
            try:
                size = _look(sample, bytes_of, sizes, channels, signals, decode)
                if "label" in bytes_of:
                    label = label_number(bytes_of["label"])
                    if label >= MAX_CLASSES:
                        raise ValueError(f"has the label {label}; class numbers are less than {MAX_CLASSES:,}")
                    labels[label] += 1
                if "mask" in bytes_of:
                    if "image" in bytes_of and is_turned(bytes_of["image"], sample.members["image"].suffix):
                        raise ValueError("is turned by its EXIF, and its mask is not; store it upright")
                    classes = mask_classes(bytes_of["mask"], sample.members["mask"].suffix)
                    if classes.shape != size:
                        raise ValueError(f"has a mask of {classes.shape[1]}×{classes.shape[0]} pixels for another size")
                    found = np.bincount(classes.ravel(), minlength=256)
                    pixels += found
                    present[found > 0] += classes.size - (found[ignore] if ignore is not None else 0)
                    masked += 1
            except ValueError as error:
                raise InputError(f"{path}: sample {sample.key!r} {error}") from None
            if number % 256 == 255:
                progress(256)
        progress(len(samples) % 256)
        with memoryview(data) as view:
            index = index_bytes(path, samples, view, len(data))
        total = len(data)
    write_atomically(index_path(path), index)
    shard = Shard(
        name=path.name,
        samples=len(samples),
        bytes=total,
        digest=file_digest(path),
        index_bytes=len(index),
        index_digest=file_digest(index_path(path)),
    )
    return Contents(
        shard=shard,
        outer=outer_sizes(sizes),
        channels=tuple(sorted(channels)),
        signals=tuple(sorted(signals)[:2]),
        labels=tuple(labels[number] for number in range(max(labels, default=-1) + 1)),
        masked=masked,
        mask_pixels=tuple(pixels.tolist()),
        mask_present=tuple(present.tolist()),
    )


def _look(
    sample: Sample,
    data: dict[str, bytes],
    sizes: set[Pair],
    channels: set[int],
    signals: set[Pair],
    decode: bool,
) -> Pair | None:
    """Notes the size of a sample's image or signal, and returns that of the image."""
    if ("image" in data) == ("signal" in data):
        raise ValueError(
            f"has {'both an image and a signal' if 'image' in data else 'no image and no signal'}; "
            f"one is needed, as one of: {', '.join(IMAGE_SUFFIXES)}, or signal.npy"
        )
    if "signal" in data:
        count, length = signal_values(data["signal"]).shape
        signals.add((count, length))
        return None
    suffix = sample.members["image"].suffix
    height, width, depth = image_shape(data["image"], suffix)
    if decode and suffix in ENCODED:
        check_encoded(data["image"], suffix)
    sizes.add((height, width))
    channels.add(depth)
    return height, width


def finish(
    folder: Path,
    splits: dict[str, list[Contents]],
    source: dict[str, str | int | None],
    *,
    given: Names = (),
    found: Names = (),
    ignore: int | None = 255,
    shards_at: str | None = None,
) -> Dataset:
    """Adds up what all shards hold and writes `dataset.json`, last, so that a folder that has one is complete.

    `found` are the names in the source, of the labels or, where there are none, of the masks; names `given` by the user are
    those of the masks where there are any, and else of the labels. Raises InputError.
    """
    every = [contents for parts in splits.values() for contents in parts]
    samples = sum(contents.shard.samples for contents in every if contents.shard)
    for name, parts in splits.items():
        if not any(contents.shard for contents in parts):
            raise InputError(f"{folder}: all of the split {name} is damaged, such as: {parts[0].skipped[0]}")
    labelled = sum(sum(contents.labels) for contents in every)
    masked = sum(contents.masked for contents in every)
    for role, count in (("label", labelled), ("mask", masked)):
        if 0 < count < samples:
            raise InputError(f"{folder}: {count} of {samples} samples have a {role}; all or none must")
    signals = {shape for contents in every for shape in contents.signals}
    if len(signals) > 1:
        first, second = sorted(signals)[:2]
        raise InputError(f"{folder}: signals of shape {first} and {second}; all must have the same channels and length")
    channels = {count for contents in every for count in contents.channels}
    if len(channels) > 1 and not channels <= {1, 3}:
        raise InputError(f"{folder}: images with {sorted(channels)} channels cannot be mixed")
    if signals and channels:
        raise InputError(f"{folder}: holds images and signals; a dataset is one or the other")
    pixels = np.sum([contents.mask_pixels for contents in every], axis=0)
    mask = None
    if masked:
        values = [value for value in np.flatnonzero(pixels).tolist() if value != ignore]
        if values == [0] and ignore is not None and pixels[ignore]:
            raise InputError(
                f"{folder}: the masks hold 0 and {ignore} alone, and {ignore} is ignored: one class is left; "
                f"write class 1 as 1, or give another --ignore"
            )
        if len(given) > 256:
            raise InputError(f"{folder}: --names has {len(given)} names; masks have at most 256 classes")
        names = given or (() if labelled else found)
        mask = MaskSpec(classes=_classes(values, names), ignore=ignore, names=_fitting(values, names))
    label = None
    if labelled:
        classes = [number for contents in every for number in [len(contents.labels) - 1]]
        names = given if given and mask is None else found
        label = LabelSpec(classes=_classes(classes, names), names=_fitting(classes, names))
    named = mask if mask is not None else label
    if given and named is None:
        raise InputError(f"{folder}: --names has no effect: there are no labels and no masks")
    if given and named is not None and len(given) != named.classes:
        raise InputError(f"{folder}: --names has {len(given)} names for {named.classes} classes")
    sizes = {size for contents in every for size in contents.outer}
    manifest = Manifest(
        source=source,
        image=_image(channels, sizes) if channels else None,
        label=label,
        mask=mask,
        signal=SignalSpec(channels=min(signals)[0], length=min(signals)[1]) if signals else None,
        shards_at=shards_at,
        splits={name: tuple(c.shard for c in parts if c.shard) for name, parts in splits.items()},
        counts={name: _counts(parts, label, mask, len(sizes) > 1) for name, parts in splits.items()},
    )
    write_atomically(folder / NAME, manifest.model_dump_json(indent=1).encode() + b"\n")
    return Dataset(folder)


def _classes(numbers: Iterable[int], names: Names) -> int:
    return max([1 + number for number in numbers] + [len(names), 1])


def _fitting(numbers: Iterable[int], names: Names) -> Names:
    """The names, unless there are classes beyond them."""
    return names if names and _classes(numbers, ()) <= len(names) else ()


def _image(channels: set[int], sizes: set[Pair]) -> ImageSpec:
    height, width = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    return ImageSpec(height=height, width=width, channels=max(channels))


def _counts(found: list[Contents], label: LabelSpec | None, mask: MaskSpec | None, differ: bool) -> Counts:
    labels = np.zeros(label.classes if label else 0, np.int64)
    for contents in found:
        labels[: len(contents.labels)] += np.array(contents.labels, np.int64)
    pixels = np.sum([contents.mask_pixels for contents in found], axis=0)
    present = np.sum([contents.mask_present for contents in found], axis=0)
    classes = range(mask.classes if mask else 0)
    ignore = mask.ignore if mask else None
    return Counts(
        labels=tuple(labels.tolist()),
        mask_pixels=tuple(0 if value == ignore else int(pixels[value]) for value in classes),
        mask_present=tuple(0 if value == ignore else int(present[value]) for value in classes),
        ignored_pixels=int(pixels[ignore]) if ignore is not None else 0,
        skipped=sum(len(contents.skipped) for contents in found),
        sizes=outer_sizes(size for contents in found for size in contents.outer) if differ else (),
    )
