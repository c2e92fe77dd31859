"""Leaks: labelled samples of a run that lie, byte for byte, in another split of their dataset as well."""

from __future__ import annotations

import numpy as np

from gandist.data.opening import open_reader
from gandist.data.stream import choose
from gandist.recipe import DataOptions, InputError

NAMED = 3  # keys in a message


def refuse_leaks(options: DataOptions) -> None:
    """Raises InputError where an image of `data.subset` is in another split, by the digests of the indexes; nothing is decoded."""
    assert options.subset is not None
    reader = open_reader(options)
    try:
        spec = reader.dataset.spec(options.split)
        if "image" not in spec.roles or (options.subset.per_class is not None and spec.label is None):
            return
        chosen = choose(reader, options, spec.label.classes if spec.label is not None else None)
        digests = reader.digests("image")[chosen]
        for split in reader.dataset.manifest.splits:
            if split == options.split:
                continue
            other = open_reader(options.model_copy(update={"split": split}))
            try:
                leaked = np.flatnonzero(np.isin(digests, other.digests("image")))
            finally:
                other.close()
            if leaked.size:
                keys = ", ".join(repr(reader.key(int(number))) for number in chosen[leaked[:NAMED]])
                raise InputError(
                    f"`data.subset`: {leaked.size} of {len(chosen)} labelled images are in the split `{split}` as well ({keys}"
                    f"{', …' if leaked.size > NAMED else ''}), so that a score there would know them; choose another "
                    "`data.subset.seed`, or pack the dataset without its duplicates"
                )
    finally:
        reader.close()
