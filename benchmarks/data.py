"""How fast samples come: the stream against a plain webdataset pipeline on the same shards, and what its promises cost.

    python benchmarks/data.py [--rounds 7] [--samples 4096] [--json FILE]

Images are the embedded garments, enlarged, coloured and with a little noise, as raw arrays of 64 pixels and as JPEG of 64 and 256.
The plain pipeline is written as in webdataset's documentation: shards in shuffled order, a shuffle buffer of 1000, decoding with
simplejpeg (or `frombuffer` for arrays), batches of uint8 arrays. Both run in this process, in turns, on one thread unless the row
says otherwise, and hand out uint8 images with labels; files lie in the page cache.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
import xxhash
from PIL import Image
from reporting import Plot, report
from step import processor

from gandist.check import read_recipe
from gandist.data.contents import examine
from gandist.data.dataset import NAME, Manifest, file_digest
from gandist.data.index import index_bytes, index_path, scan
from gandist.data.opening import open_reader
from gandist.data.pack import index
from gandist.data.sources.arrays import EMBEDDED
from gandist.data.stream import Share, Stream
from gandist.data.tar import mapped
from gandist.launcher import Stop, World
from gandist.recipe import DataOptions
from gandist.run import running, versions
from gandist.steps import plain_step

BATCH = 64
FORMATS = {"raw 64": (64, "npy"), "JPEG 64": (64, "jpg"), "JPEG 256": (256, "jpg")}
RECIPE = """\
data: {{path: {data}, memory_gib: 0}}
game:
  kind: gan
  generator: {{network: {{kind: dcgan, width: 64}}}}
  discriminator: {{network: {{kind: dcgan, width: 64}}}}
run: {{folder: {folder}, images: 1_000_000_000, batch: 64, log_every: 1000}}
"""


def write(folder: Path, size: int, suffix: str, samples: int) -> None:
    """Shards of `samples` images, indexed."""
    raw = gzip.decompress((EMBEDDED["fashion-mnist"] / "t10k-images-idx3-ubyte.gz").read_bytes())
    garments = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    random = np.random.default_rng(0)
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "train-%06d.tar"), maxcount=max(256, samples // 8), verbose=0) as sink:
        for number in range(samples):
            enlarged = Image.fromarray(garments[number % len(garments)]).resize((size, size), Image.Resampling.BICUBIC)
            shape = np.asarray(enlarged)[:, :, None] / 255
            front, back = random.random((2, 3))
            pixels = 255 * (front * shape + back * (1 - shape)) + random.normal(0, 4, (size, size, 3))
            image, stream = np.clip(pixels, 0, 255).astype(np.uint8), io.BytesIO()
            np.save(stream, image) if suffix == "npy" else Image.fromarray(image).save(stream, "JPEG", quality=90)
            sink.write({"__key__": f"{number:08d}", suffix: stream.getvalue(), "cls": str(number % 10).encode()})
    index([str(path) for path in sorted(folder.glob("*.tar"))])


def open_stream(
    folder: Path, workers: int = 0, parts: tuple[str, ...] = ("image", "label"), batch: int = BATCH
) -> Stream:
    """A stream on the CPU."""
    options = DataOptions(path=str(folder), workers=workers, memory_gib=0.0)  # what comes from memory is not read
    return Stream(open_reader(options), options, Share(parts, batch, 0, torch.device("cpu")))


def plain(folder: Path, size: int) -> Iterator[Any]:
    """What a user of webdataset would write."""

    def decode(sample: dict[str, bytes]) -> tuple[Any, int]:
        if "npy" in sample:
            return np.frombuffer(sample["npy"], np.uint8, offset=128).reshape(size, size, 3), int(sample["cls"])
        return simplejpeg.decode_jpeg(sample["jpg"]), int(sample["cls"])

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    while True:
        yield from (
            webdataset.WebDataset(shards, shardshuffle=100, seed=0)
            .shuffle(1000)
            .map(decode)
            .batched(BATCH, partial=False)
        )


class Take:
    """Calls that each take one more batch of a stream: by loading it at once, or as training does, from its threads."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.draw = stream, 0

    def at_once(self) -> None:
        """Loads the next draw."""
        loaded = self.stream.load(self.draw)
        assert not loaded.faults, loaded.faults
        self.draw += 1

    def waiting(self) -> None:
        """Waits for the next draw of the threads, and has them begin on those after it."""
        for ahead in range(self.draw, self.draw + 4):
            self.stream._ask(ahead)
        assert not self.stream._wait(self.draw).faults
        del self.stream._pending[self.draw]
        self.draw += 1

    def as_training(self) -> None:
        """Reads the next draw, floats and all."""
        assert not self.stream.ready([self.draw])
        self.stream.read(self.draw)
        self.draw += 1


def seconds(act: Callable[[], object], times: int) -> float:
    """Mean seconds of a call."""
    began = time.perf_counter()
    for _ in range(times):
        act()
    return (time.perf_counter() - began) / times


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int, times: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for act in contestants.values():
        seconds(act, 2)
    for _ in range(rounds):
        for name, act in contestants.items():
            found[name].append(seconds(act, times))
    return found


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of how many times as fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def pace_of_pipelines(folder: Path, rounds: int) -> dict[str, Any]:
    """Images a second of the stream and of webdataset, by format; on one thread, and in training's way."""
    found = {}
    for name, (size, _) in FORMATS.items():
        path = folder / name.replace(" ", "-")
        source, once, two = plain(path, size), Take(open_stream(path)), Take(open_stream(path, workers=2))
        contestants: dict[str, Callable[[], object]] = {
            "webdataset": lambda source=source: next(source),  # type: ignore[misc]
            "stream": once.at_once,
            "stream, 2 threads, floats": two.as_training,
        }
        times = in_turns(contestants, rounds, 4 if size > 64 else 24)
        two.stream.close()
        found[name] = {
            "images_per_second": {k: BATCH / statistics.median(v) for k, v in times.items()},
            "ratio": ratio(times["webdataset"], times["stream"]),
            "ratio_two_threads": ratio(times["webdataset"], times["stream, 2 threads, floats"]),
        }
    return found


def pace_of_reads(folder: Path, rounds: int, size: int) -> dict[str, Any]:
    """An epoch of raw arrays against bare positioned reads of the same bytes, thrown away or kept in a batch's memory."""
    taken = Take(open_stream(folder / "raw-64", parts=("image",), batch=size))
    reader = taken.stream.reader
    numbers = np.random.default_rng(0).permutation(len(reader)).astype(np.uint64)
    places = []
    for shard, place in zip(*reader.locate(numbers), strict=True):
        opened = reader._index(shard)
        places.append(
            (reader._file(shard), opened.size["image"][place], opened.offset[place] + opened.start["image"][place])
        )
    batches = [places[first : first + size] for first in range(0, len(places) - size, size)]

    def thrown_away(turn: list[int] = [0]) -> None:  # noqa: B006 - the state is wanted
        turn[0] += 1
        for file, size, start in batches[turn[0] % len(batches)]:
            os.pread(file, size, start)

    def kept(turn: list[int] = [0]) -> None:  # noqa: B006
        turn[0] += 1
        batch = batches[turn[0] % len(batches)]
        rows: Any = np.empty((size, batch[0][1]), np.uint8)
        for row, (file, _, start) in zip(rows, batch, strict=True):
            os.preadv(file, (row,), start)

    contestants: dict[str, Callable[[], object]] = {"stream": taken.at_once, "thrown away": thrown_away, "kept": kept}
    times = in_turns(contestants, rounds, 2000 // size)
    return {
        "images_per_second": {k: size / statistics.median(v) for k, v in times.items()},
        "share_of_reads_kept": ratio(times["kept"], times["stream"]),
        "share_of_reads_thrown_away": ratio(times["thrown away"], times["stream"]),
    }


class Draws(torch.utils.data.Dataset[Any]):
    """Draws as the map-style dataset that PyTorch's DataLoader divides over processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stream = folder, None

    def __getitem__(self, draw: int) -> dict[str, torch.Tensor]:
        if self.stream is None:
            self.stream = open_stream(self.folder)  # type: ignore[assignment]
        assert self.stream is not None
        return self.stream.load(draw).parts

    def __len__(self) -> int:
        return 1 << 30


def threads_and_processes(folder: Path, rounds: int) -> dict[str, Any]:
    """Images a second as uint8 batches with background threads, and with PyTorch's worker processes, by format."""
    found = {}
    for name in FORMATS:
        path = folder / name.replace(" ", "-")
        contestants: dict[str, Callable[[], object]] = {}
        closing: list[Stream] = []
        for threads in (1, 2):
            taken = Take(open_stream(path, workers=threads))
            contestants[f"{threads} threads"] = taken.waiting
            closing.append(taken.stream)
        for processes in (1, 2):
            loader = torch.utils.data.DataLoader(Draws(path), batch_size=None, num_workers=processes, prefetch_factor=4)
            contestants[f"{processes} processes"] = partial(next, iter(loader))
        times = in_turns(contestants, rounds, 4 if "256" in name else 24)
        for stream in closing:
            stream.close()
        found[name] = {k: BATCH / statistics.median(v) for k, v in times.items()}
    return found


def cost_of_digests(folder: Path, rounds: int) -> dict[str, float]:
    """The share of the data time that comparing digests takes, by format: their own time over that of a batch of floats."""
    found = {}
    for name in FORMATS:
        taken = Take(open_stream(folder / name.replace(" ", "-")))
        reader = taken.stream.reader
        numbers = np.arange(BATCH, dtype=np.uint64)
        members = [
            bytes(data)
            for shard, place in zip(*reader.locate(numbers), strict=True)
            for _, data in reader.read(shard, place, ("image", "label")).values()
        ]

        def digests(members: list[bytes] = members) -> None:
            for member in members:
                xxhash.xxh3_64_intdigest(member)

        times = in_turns({"data": taken.as_training, "digests": digests}, rounds, 8 if "256" in name else 24)
        found[name] = ratio(times["digests"], times["data"])
    return found


def pace_of_indexing(folder: Path, rounds: int) -> dict[str, Any]:
    """Samples a second of a shard's index (headers and digests) and of its full examination, against tarfile's reading alone."""
    shard = min((folder / "JPEG-64").glob("*.tar"))
    count = len(scan(shard))

    def by_tarfile() -> None:
        with tarfile.open(shard) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                xxhash.xxh3_64_intdigest(stream.read())

    def ours() -> None:
        with mapped(shard) as data, memoryview(data) as view:
            index_bytes(shard, scan(shard), view, len(data))

    times = in_turns({"tarfile": by_tarfile, "index": ours, "examine": lambda: examine(shard, ignore=None)}, rounds, 1)
    return {
        "samples_per_second": {k: count / statistics.median(v) for k, v in times.items()},
        "ratio": ratio(times["tarfile"], times["index"]),
        "ratio_examine": ratio(times["tarfile"], times["examine"]),
    }


FAR = """
import resource, sys, time
from gandist.data.opening import open_reader
from gandist.data.stream import Share, Stream
from gandist.recipe import DataOptions
import torch
options = DataOptions(path=sys.argv[1], workers=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
stream = Stream(open_reader(options), options, Share(("image",), 64, 0, torch.device("cpu")))
numbers = stream.numbers(10**8)
for number in numbers:
    shard, place = stream.reader._locate(number)
    stream.reader._index(shard).offset[place]
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(stream.reader))
"""


def far_draw(folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds and MiB from nothing to the places of draw 10⁸ in an index of 10⁸ samples: one shard, linked 250 times."""
    count, shards = 400_000, 250
    path = folder / "far"
    path.mkdir()
    small = folder / "far-source"
    write(small, 8, "npy", 256)
    (shard,) = small.glob("*.tar")
    one = scan(shard)[0]
    with mapped(shard) as data, memoryview(data) as view:
        stored = index_bytes(shard, [one] * count, view, len(data))
    (path / "train-000.idx").write_bytes(stored)
    os.link(shard, path / "train-000.tar")
    for number in range(1, shards):
        for suffix in ("idx", "tar"):
            os.link(path / f"train-000.{suffix}", path / f"train-{number:03d}.{suffix}")
    os.utime(path / "train-000.idx")
    manifest = json.loads((small / NAME).read_text())
    record = manifest["splits"]["train"][0] | {
        "samples": count,
        "index_bytes": len(stored),
        "index_digest": file_digest(index_path(path / "train-000.tar")),
    }
    manifest["splits"]["train"] = [record | {"name": f"train-{number:03d}.tar"} for number in range(shards)]
    (path / NAME).write_text(Manifest.model_validate_json(json.dumps(manifest)).model_dump_json())
    found = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", FAR, str(path)], capture_output=True, text=True, check=True)
        found.append([float(word) for word in done.stdout.split()])
    assert found[0][2] == count * shards
    return {
        "milliseconds": 1e3 * statistics.median(row[0] for row in found),
        "mebibytes": statistics.median(row[1] for row in found) / 1024,
    }


def waiting(folder: Path, steps: int) -> dict[str, Any]:
    """The share of a DCGAN's step at 64 pixels that it waits for data, by format."""
    found = {}
    world = World.join("auto")
    for name in ("raw 64", "JPEG 64"):
        path = folder / f"{name.replace(' ', '-')}.yaml"
        path.write_text(RECIPE.format(data=folder / name.replace(" ", "-"), folder=folder / f"run-{path.stem}"))
        stop = Stop(world)
        with running(read_recipe(path, []), world) as run:
            for number in range(steps + 2):
                if number == 2:
                    began, waited = time.perf_counter(), run.stream.waited
                stop.agreed(bool(run.data_faults()))
                plain_step(run)
                run.clock.advance()
            found[name] = (run.stream.waited - waited) / (time.perf_counter() - began)
        stop.close()
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, as the JSON that is written."""
    torch.set_num_threads(1)
    for name, (size, suffix) in FORMATS.items():
        write(folder / name.replace(" ", "-"), size, suffix, arguments.samples // (4 if size > 64 else 1))
    result = {
        "benchmark": "data",
        "setting": {"batch": BATCH, "rounds": arguments.rounds, "samples": arguments.samples},
        "machine": {"device": processor(), "cores": os.cpu_count()},
        "versions": versions(),
        "pipelines": pace_of_pipelines(folder, arguments.rounds),
        "reads": {str(size): pace_of_reads(folder, arguments.rounds, size) for size in (BATCH, 4 * BATCH)},
        "workers": threads_and_processes(folder, arguments.rounds),
        "digests": cost_of_digests(folder, arguments.rounds),
        "indexing": pace_of_indexing(folder, arguments.rounds),
        "far_draw": far_draw(folder, min(arguments.rounds, 5)),
    }
    torch.set_num_threads(os.cpu_count() or 1)
    return result | {"data_wait_fraction": waiting(folder, arguments.steps)}


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = [
        "",
        "| shards | webdataset | stream | ratio | 2 threads, floats | ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["pipelines"].items():
        pace = [f"{value:,.0f}" for value in row["images_per_second"].values()]
        lines.append(
            f"| {name} | {pace[0]} | {pace[1]} | {row['ratio']:.2f} | {pace[2]} | {row['ratio_two_threads']:.1f} |"
        )
    reads, indexing, far = result["reads"], result["indexing"], result["far_draw"]
    return "\n".join(
        [
            *lines,
            "",
            *(
                f"raw epoch in batches of {size}: {row['share_of_reads_kept']:.0%} of bare reads into a batch, "
                f"{row['share_of_reads_thrown_away']:.0%} of reads thrown away"
                for size, row in reads.items()
            ),
            *(
                f"{name}, images/s of uint8: " + ", ".join(f"{pace:,.0f} with {what}" for what, pace in row.items())
                for name, row in result["workers"].items()
            ),
            "digests: "
            + ", ".join(f"{value:.1%} of the data time of {name}" for name, value in result["digests"].items()),
            f"index: {indexing['ratio']:.1f} times tarfile, with a look at every image {indexing['ratio_examine']:.1f}",
            f"draw 10⁸ of 10⁸ samples: {far['milliseconds']:.0f} ms, {far['mebibytes']:.0f} MiB",
            "waiting for data: "
            + ", ".join(
                f"{value:.2%} of a DCGAN step on {name}" for name, value in result["data_wait_fraction"].items()
            ),
        ]
    )


def plotted(result: dict[str, Any]) -> Plot:
    """The pace of each pipeline."""
    found = {
        f"{shards}: {name}": [pace]
        for shards, row in result["pipelines"].items()
        for name, pace in row["images_per_second"].items()
    }
    return Plot("images/s", found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=4096, help="images of 64 pixels; a quarter of them at 256")
    parser.add_argument("--steps", type=int, default=8, help="steps of the DCGAN")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report(measure, table, plotted, arguments)


if __name__ == "__main__":
    main()
