"""The plain reader: shards streamed from their begin to their end through webdataset, for what cannot be indexed.

Its shuffle is that of webdataset: shards in a new order each pass, and a buffer that samples are drawn from. Its seeds are
functions of the run's seed, the draw it began with, the process, the thread and the pass, so that the same start gives the
same batches. It cannot find a sample again, and says so.
"""

from __future__ import annotations

import hashlib
import queue
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.tariterators import group_by_keys

from gandist.data.dataset import ImageSpec, LabelSpec, SignalSpec, Spec
from gandist.data.decode import ROLES, SIGNAL_SUFFIX, decoded, image_shape, label_number, signal_values
from gandist.data.index import key_and_suffix
from gandist.data.order import Permutation, places_of
from gandist.data.storage import expand, is_remote, open_stream, redact
from gandist.data.stream import PARTS, Batch, Fault, Share, view_spec
from gandist.data.tar import check_sum, refusal, walk
from gandist.data.transform import Moves, moves, values
from gandist.recipe import DataOptions, Failure, InputError
from gandist.seeding import derive

_DEPTH = 2  # batches that each thread has ready


class _Forward:
    """Bytes of a stream by place, always further on."""

    def __init__(self, file: Any) -> None:
        self.file, self.place = file, 0

    def __call__(self, start: int, size: int) -> bytes:
        while self.place < start:
            skipped = len(self.file.read(min(start - self.place, 1 << 20)))
            if not skipped:
                return b""
            self.place += skipped
        parts, left = [], size
        while left and (part := self.file.read(left)):
            parts.append(part)
            left -= len(part)
        self.place += size - left
        return b"".join(parts)


def members_of(
    url: str, allow_pipe: bool, wanted: Callable[[str], bool] = ROLES.__contains__
) -> Iterator[dict[str, Any]]:
    """The members of a shard, by `wanted` suffixes, as webdataset's `group_by_keys` takes them.

    webdataset's own reading of tars ends at a damaged header in silence, takes what any header claims into memory, and passes
    over links; so only its grouping is used. Raises InputError for what is no plain tar, Failure for what cannot be read.
    """
    name = redact(url)
    try:
        with open_stream(url, allow_pipe=allow_pipe) as file:
            fetch = _Forward(file)

            def check(place: int, header: bytes, total: int) -> None:
                check_sum(name, place, header, total)

            for member in walk(name, fetch, 1 << 62, check):
                parsed = key_and_suffix(member.name)
                if parsed is not None and wanted(parsed[1]):
                    data = fetch(member.start, member.size)
                    if len(data) < member.size:
                        raise refusal(name, member.offset, f"{member.name!r} is cut off")
                    yield {"fname": member.name, "data": data, "__url__": name}
        yield {}  # so that samples of two shards are not mixed up
    except OSError as error:
        raise Failure(f"{name}: cannot be read: {error.strerror or error}") from None


def samples_of(urls: Sequence[str], allow_pipe: bool, buffer: int = 1, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The samples of shards, by webdataset's own grouping and shuffling: `__key__`, `__url__` and bytes by suffix."""

    reading = ""

    def found() -> Iterator[dict[str, Any]]:
        nonlocal reading
        for url in urls:
            reading = redact(url)
            yield from members_of(url, allow_pipe)

    stages: list[Any] = [found, group_by_keys]
    if buffer > 1:
        stages.append(shuffle(buffer, initial=buffer, rng=random.Random(seed)))
    try:
        yield from DataPipeline(*stages)
    except InputError as error:
        raise Failure(str(error)) from None
    except ValueError as error:  # webdataset's, for a name that stands twice
        raise Failure(f"{reading}: {error.args[0]}") from None


def locations(options: DataOptions) -> list[str]:
    """The shards that `data.path` stands for; raises InputError."""
    urls = expand(options.path)
    for url in urls:
        if not url.startswith("pipe:") and not is_remote(url) and Path(url).is_dir():
            raise InputError(
                f"{url}: is a folder; name its tars, such as {url}/train-{{000..003}}.tar, or use `reader: index`"
            )
    if len(set(urls)) < len(urls):
        raise InputError("names a shard twice; each counts once")
    return urls


def location_digest(options: DataOptions) -> str:
    """What tells these shards from others: their names, since nobody has read them."""
    return hashlib.blake2b("\n".join(locations(options)).encode(), digest_size=32).hexdigest()


def stored_spec(options: DataOptions, allow_pipe: bool = False) -> Spec:
    """What the first sample says of the data; raises InputError."""
    first = locations(options)[0]
    try:
        sample = next(samples_of([first], allow_pipe), None)
    except Failure as failure:
        raise InputError(str(failure)) from None
    if sample is None:
        raise InputError(f"{redact(first)} holds no samples")
    image, signal = None, None
    suffix = next((suffix for suffix in sample if ROLES.get(suffix) == "image"), None)
    try:
        if suffix is not None:
            height, width, channels = image_shape(sample[suffix], suffix)
            image = ImageSpec(height=height, width=width, channels=channels)
        elif SIGNAL_SUFFIX in sample:
            count, length = signal_values(sample[SIGNAL_SUFFIX]).shape
            signal = SignalSpec(channels=count, length=length)
        else:
            raise ValueError("has neither an image nor a signal")
    except ValueError as error:
        raise InputError(f"{redact(first)}: sample {sample['__key__']!r} {error}") from None
    label = LabelSpec(classes=options.classes) if options.classes is not None and "cls" in sample else None
    if options.classes is not None and label is None:
        raise ValueError("`classes`: the samples have no labels; leave it out")
    return Spec(samples=None, image=image, label=label, signal=signal)


class PlainStream:
    """Batches in the order in which they are asked for, draw after draw; each process has shards of its own and never ends."""

    def __init__(self, options: DataOptions, share: Share, allow_pipe: bool = False) -> None:
        urls, parts = locations(options), share.parts
        assert len(urls) >= share.ranks, (urls, share.ranks)  # the recipe has been checked
        if any(
            PARTS[part] not in (("labelled", "image"), ("labelled", "label"), ("labelled", "signal")) for part in parts
        ):
            raise InputError(
                f"`data.reader`: webdataset reads images, labels and signals, and the game wants {', '.join(parts)}; "
                "index the shards with `gandist index` and use the index reader"
            )
        self.options, self.share, self.parts, self.allow_pipe = options, share, tuple(parts), allow_pipe
        self.spec = view_spec(stored_spec(options, allow_pipe), options)
        self.batch, self.seed, self.rank, self.rows = share.batch, share.seed, share.rank, share.rows
        self.waited = 0.0
        self.own = urls[share.rank :: share.ranks]
        self._recent: OrderedDict[int, list[Batch]] = OrderedDict()
        self._stop = threading.Event()
        self._queues: list[queue.Queue[dict[str, torch.Tensor] | Fault | Exception]] = []
        self._threads: list[threading.Thread] = []
        self._first: int | None = None
        self._next: dict[int, dict[str, torch.Tensor] | Fault] = {}

    def promises(self) -> list[str]:
        """What this reader cannot promise, for the user to read at the start."""
        return [
            "`data.reader: webdataset` streams shards that have no index: a run that goes on after a stop reads other batches "
            "than one that was not stopped, another number of processes or threads reads other batches, and shards of unequal "
            "length are read unequally often; damage inside a sample shows only where it cannot be decoded"
        ]

    # ---- the background

    def _start(self, draw: int) -> None:
        """Begins to stream; `draw` goes into the seeds, so that a run that goes on does not see its first samples again."""
        self._first = draw
        workers = max(1, min(self.options.workers, len(self.own)))
        for worker in range(workers):
            batches: queue.Queue[dict[str, torch.Tensor] | Fault | Exception] = queue.Queue(_DEPTH)
            thread = threading.Thread(
                target=self._work, args=(worker, workers, draw, batches), daemon=True, name=f"webdataset-{worker}"
            )
            self._queues.append(batches)
            self._threads.append(thread)
            thread.start()

    def _work(
        self, worker: int, workers: int, first: int, batches: queue.Queue[dict[str, torch.Tensor] | Fault | Exception]
    ) -> None:
        samples = self._endless(worker, workers, first)
        draw = first + worker
        while not self._stop.is_set():
            found: dict[str, torch.Tensor] | Fault | Exception
            try:
                found = self._assemble(samples, draw)
            except (Failure, InputError) as error:
                found = Fault(-1, str(error))
            except Exception as error:  # noqa: BLE001 - raised in `_take`: the loop must not wait for a dead thread
                found = error
            while not self._stop.is_set():
                try:
                    batches.put(found, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(found, Fault | Exception):
                return
            draw += workers

    def _endless(self, worker: int, workers: int, first: int) -> Iterator[dict[str, Any]]:
        """Samples of this thread's shards, pass after pass, each pass in an order of its own."""
        mine = self.own[worker::workers]
        passes = 0
        while True:
            where = (first, self.rank, worker, passes)
            order = Permutation(len(mine), self.seed, "webdataset/shards", *where)(
                np.arange(len(mine), dtype=np.uint64)
            )
            urls = [mine[place] for place in order.tolist()]
            seed = derive(self.seed, "webdataset/samples", *where)
            count = 0
            for sample in samples_of(urls, self.allow_pipe, self.options.buffer, seed):
                count += 1
                yield sample
            if not count:
                raise Failure(f"{redact(mine[0])}: its shards hold no samples")
            passes += 1

    def _assemble(self, samples: Iterator[dict[str, Any]], draw: int) -> dict[str, torch.Tensor]:
        """A batch of this process's rows as it was stored: image (B, H, W, C) uint8, label (B,) int64, signal float."""
        count = len(self.rows)
        arrays: dict[str, Any] = {}
        image = self.spec.image
        if "image" in self.parts:
            if image is None or image.height is None or image.width is None:
                raise Failure("`data.path`: its samples have no images of one size; set `data.transform.crop`")
            arrays["image"] = np.empty((count, image.height, image.width, image.channels), np.uint8)
        if "label" in self.parts:
            arrays["label"] = np.empty(count, np.int64)
        if "signal" in self.parts:
            assert self.spec.signal is not None
            arrays["signal"] = np.empty((count, self.spec.signal.channels, self.spec.signal.length), np.float32)
        transform = self.options.transform
        drawn = Moves.draw(transform, places_of(draw, self.rows, self.batch), self.seed, "transform/labelled")
        for row in range(count):
            sample = next(samples)
            by_role = {ROLES[s]: (s, data) for s, data in sample.items() if s in ROLES}
            try:
                if len(by_role) < sum(suffix in ROLES for suffix in sample):
                    raise ValueError(f"has two members of one role among {', '.join(s for s in sample if s in ROLES)}")
                for part, array in arrays.items():
                    if part not in by_role:
                        raise ValueError(f"has no {part}")
                    suffix, data = by_role[part]
                    if part == "label":
                        array[row] = label_number(data)
                        if self.spec.label is not None and array[row] >= self.spec.label.classes:
                            raise ValueError(
                                f"has the label {array[row]}, and `data.classes` is {self.spec.label.classes}"
                            )
                        continue
                    if part == "signal":
                        found: Any = signal_values(data)
                    else:
                        assert image is not None
                        if image_shape(data, suffix)[2] > image.channels:
                            raise ValueError(
                                "has colours, and the first sample is grey; index the shards, which counts both"
                            )
                        found = decoded(data, suffix, image.channels)
                        found = (
                            np.broadcast_to(found, (*found.shape[:2], image.channels)) if found.shape[2] == 1 else found
                        )
                        found = drawn.apply(transform, row, found) if moves(transform) else found
                    if found.shape != array.shape[1:]:
                        raise ValueError(
                            f"has shape {found.shape}, and the first sample says {array.shape[1:]}; images of several sizes want `data.transform.crop`"
                        )
                    array[row] = found
            except ValueError as error:
                raise Failure(f"{sample['__url__']}: sample {sample['__key__']!r} {error}") from None
        return {part: torch.from_numpy(array) for part, array in arrays.items()}

    # ---- the loop's side

    def _take(self, draw: int) -> dict[str, torch.Tensor] | Fault:
        if self._first is None:
            self._start(draw)
        assert self._first is not None
        if draw not in self._next:
            began = time.perf_counter()
            found = self._queues[(draw - self._first) % len(self._queues)].get()
            self.waited += time.perf_counter() - began
            if isinstance(found, Exception):
                raise found
            self._next[draw] = found
        return self._next[draw]

    def ready(self, draws: Sequence[int]) -> list[Fault]:
        """Waits for these draws, which must follow one another, and returns what is wrong with them."""
        for draw in draws:
            found = None if draw in self._recent else self._take(draw)
            if isinstance(found, Fault):
                return [found]  # nothing comes after it
        return []

    def read(self, draw: int) -> list[Batch]:
        """The micro-batches of a draw, on the device; raises Failure."""
        if draw not in self._recent:
            loaded = self._take(draw)
            del self._next[draw]
            if isinstance(loaded, Fault):
                raise Failure(loaded.message)
            self._recent[draw] = self._split(draw, loaded)
            while len(self._recent) > self.share.recall:
                self._recent.popitem(last=False)
        return self._recent[draw]

    def _split(self, draw: int, loaded: dict[str, torch.Tensor]) -> list[Batch]:
        parts = {name: tensor.to(self.share.device) for name, tensor in loaded.items()}
        if "image" in parts:
            parts["image"] = values(self.options.transform, parts["image"].permute(0, 3, 1, 2))
        return self.share.micro_batches(draw, parts, {})

    def close(self) -> None:
        """Ends the background threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join(5)
