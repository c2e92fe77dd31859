"""Data behind a URL trains to the same bytes as data in a folder, and data that goes away stops all processes with a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import test_storage
from conftest import Result, open_stream, packed, rows, run, start, tensor_files, wait_for_images
from test_storage import Server

from gandist import checkpoint
from gandist.data import read, storage
from gandist.recipe import Failure

s3 = test_storage.s3
CACHE = 440_000  # bytes: five shards of `few`, and a seventh of `many`
WINDOW = ("data.shuffle=window", "data.window_shards=2")


class Files(dict[str, bytes]):
    """What a server holds; `lost` is not there any more once so many were asked for, and each call tells `watch`."""

    def __init__(self) -> None:
        super().__init__()
        self.lost, self.after, self.asked, self.since = "", 0, 0, 0.0
        self.watch: Callable[[], object] = lambda: None

    def get(self, path: str, default: object = None) -> bytes | None:  # type: ignore[override]
        self.watch()
        self.asked += 1
        if path.endswith(self.lost or "\0") and self.asked > self.after:
            self.since = self.since or time.monotonic()
            return None
        return super().get(path)


class Site(Server):
    """Serves whole folders; every `flaky`-th answer is a 503."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Files = Files()  # type: ignore[assignment]
        self.flaky = self.count = 0

    def take(self, what: str) -> bool:
        if what != "fail" or not self.flaky:
            return super().take(what)
        with self.lock:
            self.count += 1
            return self.count % self.flaky == 0

    def serve(self, folder: Path, suffix: str = "") -> str:
        at = f"/{folder.name}"
        self.files |= {f"{at}/{path.name}": path.read_bytes() for path in folder.iterdir() if path.suffix != suffix}
        return f"http://127.0.0.1:{self.server_port}{at}"


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def small(folder: Path, samples: int, shard_samples: int) -> Path:
    random = np.random.default_rng(samples)
    images = random.integers(0, 256, (samples, 8, 8), np.uint8)
    np.savez(folder / "source.npz", images=images, labels=np.arange(samples) % 10)
    packed(folder / "source.npz", folder / "data", shard_samples=shard_samples, shuffle=0)
    return folder / "data"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of forty samples."""
    return small(tmp_path_factory.mktemp("few"), 240, 40)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More shards than a thread keeps open, of four samples each."""
    return small(tmp_path_factory.mktemp("many"), 640, 4)


def upload(folder: Path) -> str:
    import boto3

    client = boto3.client("s3")
    for path in folder.iterdir():
        client.put_object(Bucket="bucket", Key=f"few/{path.name}", Body=path.read_bytes())
    return "s3://bucket/few"


def final(folder: Path) -> dict[str, bytes]:
    return tensor_files(checkpoint.folders(folder / "checkpoints")[0])


def held(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.rglob("*.tar")}


# ---- the same bytes from everywhere


@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize("order", [(), WINDOW], ids=["full", "window"])
def test_a_remote_dataset_trains_to_the_bytes_of_a_local_one(
    gandist: Callable, recipe: Callable, site: Site, few: Path, tmp_path: Path, request: pytest.FixtureRequest,
    kind: str, order: tuple[str, ...],
) -> None:  # fmt: skip
    if kind == "s3":
        request.getfixturevalue("s3")
    url = upload(few) if kind == "s3" else site.serve(few)
    cache, sizes = tmp_path / "cache", [0]
    site.files.watch = lambda: sizes.append(sum(held(cache).values()))
    limit = f"data.cache_gib={CACHE / 2**30:.9f}" if order else "data.cache_gib=64"
    words = (*order, f"data.path={url}", f"data.cache={cache}", limit, "run.images=480")
    remote = gandist("train", recipe("remote"), *words)
    assert remote.code == 0, remote.err
    assert gandist("train", recipe("local", data=few), *order, "run.images=480").code == 0
    assert final(tmp_path / "remote") == final(tmp_path / "local")
    assert len([*cache.rglob("*.idx")]) == 6
    assert (len(held(cache)) >= 4) == bool(order)
    assert max(sizes) <= CACHE
    assert sum(held(cache).values()) <= CACHE


def test_shards_that_are_indexed_where_they_lie_stay_there(
    gandist: Callable, recipe: Callable, site: Site, few: Path, tmp_path: Path
) -> None:
    shards, copy = f"{site.serve(few, '.json')}/train-{{000000..000003}}.tar", tmp_path / "index"
    assert gandist("index", shards, "--out", copy).code == 0
    assert sorted(path.name for path in copy.iterdir()) == [
        "dataset.json",
        *(f"train-{number:06d}.idx" for number in range(4)),
    ]
    assert gandist("train", recipe("remote", data=copy)).code == 0
    assert not held(tmp_path)
    here = tmp_path / "here"
    assert gandist("index", f"{few}/train-{{000000..000003}}.tar", "--out", here).code == 0
    assert gandist("train", recipe("local", data=here)).code == 0
    assert final(tmp_path / "remote") == final(tmp_path / "local")
    assert gandist("verify", copy).code == 0


def test_verify_and_inspect_read_a_remote_dataset_like_a_local_one(
    gandist: Callable, recipe: Callable, site: Site, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    url = site.serve(few)
    assert "every byte is as it was packed" in gandist("verify", url).out
    pictures = []
    for where, order in ((few, ()), (url, ()), (few, WINDOW), (url, WINDOW)):
        out = tmp_path / f"{len(pictures)}.png"
        seen = gandist("inspect", recipe(), f"data.path={where}", *order, "--world-size", 2, "--out", out)
        assert seen.code == 0, seen.err
        pictures.append((seen.out.replace(out.name, ""), out.read_bytes()))
    assert pictures[0] == pictures[1] != pictures[2] == pictures[3]
    damaged = bytearray(site.files["/data/train-000003.tar"])
    damaged[5000] ^= 8
    site.files["/data/train-000003.tar"] = bytes(damaged)
    result = gandist("verify", url)
    assert result.code == 1
    assert f"{url}/train-000003.tar: damaged" in result.err


@pytest.mark.parametrize("order", [(), WINDOW], ids=["full", "window"])
def test_a_server_that_fails_now_and_then_costs_nothing_but_retries(
    gandist: Callable, recipe: Callable, site: Site, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    order: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setattr(storage, "BACKOFF", 0.01)
    site.flaky = 3
    words = (*order, f"data.path={site.serve(few)}", f"data.cache={tmp_path / 'cache'}")
    assert gandist("train", recipe("remote"), *words).code == 0
    assert site.count > 9
    assert gandist("train", recipe("local", data=few), *order).code == 0
    assert final(tmp_path / "remote") == final(tmp_path / "local")


@pytest.mark.parametrize(
    ("lost", "code", "words"),
    [
        ("dataset.json", 2, "no dataset: {}/dataset.json: is not there"),
        ("train-000000.idx", 2, "{}/train-000000.idx: is gone; put it back"),
        ("train-000000.tar", 2, "{}/train-000000.tar: at byte 512: is gone; put it back"),
        ("train-000003.tar", 1, "{}/train-000003.tar: at byte "),
        ("train-000003.idx", 1, "{}/train-000003.idx: is gone; put it back"),
    ],
)
def test_a_file_that_is_not_on_the_server_is_named_in_a_sentence(
    gandist: Callable, recipe: Callable, site: Site, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    lost: str, code: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(storage, "BACKOFF", 0.01)
    url, site.files.lost = site.serve(few), lost
    result = gandist("train", recipe("remote"), f"data.path={url}", f"data.cache={tmp_path / 'cache'}")
    assert result.code == code, result.err
    assert words.format(url) in result.err
    assert "Traceback" not in result.err
    assert (tmp_path / "remote" / "checkpoints").exists() == (code == 1)


# ---- a shard that goes away in mid-run

LOST = "train-000077.tar"
IMAGES = "run.images=1600"
ORDERS = {"full": (), "window": ("data.shuffle=window", "data.window_shards=8")}


@pytest.fixture(scope="module")
def undisturbed(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """What two processes make of the local data, each order run once."""
    made: dict[str, dict[str, bytes]] = {}

    def bytes_of(order: str, words: tuple[object, ...]) -> dict[str, bytes]:
        if order not in made:
            folder = tmp_path_factory.mktemp(order) / "run"
            result = run(*words, f"data.path={many}", f"run.folder={folder}", ranks=2)
            assert result.code == 0, result.out
            made[order] = final(folder)
        return made[order]

    return bytes_of


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def check_the_loss(result: Result, folder: Path, what: str, note: Path) -> int:
    """One message, a checkpoint where it stopped, a line in the record, and no process left; returns the images."""
    assert result.code == 1, result.out
    assert note.read_text() == "1"
    assert "exitcode  : 1" in result.out
    said = [line for line in result.out.splitlines() if line.startswith("gandist: ")]
    assert len(said) == 1, result.out
    assert what in said[0]
    images = checkpoint.find(folder).state.images
    assert f"; a checkpoint at {images:,} images is saved" in said[0]
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lost = [event for event in events if event.get("event") == "data_lost"]
    assert lost
    assert all(event["images"] == images and LOST in event["error"] for event in lost)
    assert max(row["images"] for row in rows(folder)) == images
    return images


@pytest.mark.parametrize("order", ["full", "window"])
def test_a_shard_that_goes_off_the_server_stops_all_ranks_and_back_again_the_run_goes_on(
    recipe: Callable, site: Site, many: Path, undisturbed: Callable, tmp_path: Path, order: str
) -> None:
    url, note = site.serve(many), tmp_path / "note"
    site.files.lost, site.files.after = LOST, 250
    base = ("train", recipe(), IMAGES, *ORDERS[order])
    cache = [f"data.cache={tmp_path / 'cache'}", *[f"data.cache_gib={CACHE / 2**30:.9f}"] * (order == "window")]
    result = run(*base, f"data.path={url}", *cache, ranks=2, GANDIST_EXIT_FILE=str(note))
    assert time.monotonic() - site.files.since < 30, result.out
    images = check_the_loss(result, tmp_path / "run", f"{url}/{LOST}: ", note)
    assert 0 < images < 1600
    site.files.lost = ""
    second = run(*base, f"data.path={url}", *cache, ranks=2)
    assert second.code == 0, second.out
    assert f"going on at {images:,} images" in second.out
    assert final(tmp_path / "run") == undisturbed(order, base)


def test_a_local_shard_that_is_deleted_stops_all_ranks_and_back_again_the_run_goes_on(
    recipe: Callable, many: Path, undisturbed: Callable, tmp_path: Path
) -> None:
    shard, aside, note = many / LOST, tmp_path / "aside", tmp_path / "note"
    # A picture a step slows the run down, so that it does not end before the shard is gone.
    base = ("train", recipe(data=many), IMAGES, "run.sample_images=16")
    expected = undisturbed("full", base[:-1])
    process = start(*base, ranks=2, GANDIST_EXIT_FILE=str(note))
    try:
        wait_for_images(tmp_path / "run", 32, process)
        shard.rename(aside)
        since = time.monotonic()
        ranks = ranks_of(process)
        out, _ = process.communicate(timeout=60)
        assert time.monotonic() - since < 30
    finally:
        aside.rename(shard)
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    images = check_the_loss(Result(process.returncode, out, out), tmp_path / "run", f"{shard}: ", note)
    assert 0 < images < 1600
    assert run(*base, ranks=2).code == 0
    assert final(tmp_path / "run") == expected


def unreadable(shard: Path) -> None:
    shard.chmod(0)
    if os.access(shard, os.R_OK):
        pytest.skip("root reads everything")


def emptied(shard: Path) -> None:
    shard.write_bytes(b"")


def a_folder(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


@pytest.mark.parametrize(
    ("harm", "rule"),
    [
        (Path.unlink, "at byte .*: cannot be read: No such file"),
        (emptied, "at byte .*: cut off: 0 of"),
        (a_folder, "at byte .*: cannot be read: Is a directory"),
        (unreadable, "at byte .*: cannot be read: Permission denied"),
    ],
)
@pytest.mark.parametrize("order", ["full", "window"])
def test_whatever_befalls_a_shard_its_samples_alone_are_lost_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], object], rule: str, order: str
) -> None:
    monkeypatch.setattr(read, "PAUSE", 0.01)
    folder = small(tmp_path, 640, 4)
    options = {"batch": 16, "workers": 0, **({"shuffle": "window", "window_shards": 8} if order == "window" else {})}
    stream = open_stream(folder, **options)
    harm(folder / LOST)
    gone = range(77 * 4, 78 * 4)
    for draw in range(40):
        faults = stream.ready([draw])
        assert bool(faults) == any(number in gone for number in stream.numbers(draw)), faults
        if faults:
            assert [fault.number for fault in faults] == [-1]
            with pytest.raises(Failure, match=f"{LOST}: {rule}"):
                stream.read(draw)
        else:
            stream.read(draw)
    stream.close()


def shards_held(cache: Path, size: int) -> set[int]:
    """The files of a shard's size in a cache, by inode: one that was removed takes room until it is closed."""
    found = set()
    for path in [*Path("/proc/self/fd").iterdir(), *cache.rglob("*.tar")]:
        with suppress(OSError):  # closed, or removed, meanwhile
            place = path if path.is_relative_to(cache) else path.readlink()
            if place.is_relative_to(cache) and path.stat().st_size == size:
                found.add(path.stat().st_ino)
    return found


@pytest.mark.parametrize("options", [{}, {"subset": {"per_class": 2}}], ids=["all", "subset"])
def test_the_cache_of_windows_stays_within_its_bound_deleted_files_included(
    site: Site, tmp_path: Path, options: dict
) -> None:
    folder = small(tmp_path, 400, 10)
    url = site.serve(folder)
    shard = (folder / "train-000000.tar").stat().st_size
    limit = 5 * shard / 2**30
    parts = ("label", "unlabelled") if options else ("image", "label")
    stream = open_stream(url, parts=parts, batch=20, shuffle="window", window_shards=2, cache=str(tmp_path / "cache"),
                         cache_gib=limit, memory_gib=0.0, **options)  # fmt: skip
    most = 0
    for draw in range(40):
        stream.read(draw)
        most = max(most, len(shards_held(tmp_path / "cache", shard)))
    stream.close()
    assert most <= 7  # five on disk, and two that a thread is about to let go of
    with pytest.raises(ValueError, match="cannot hold two windows of 2 shards"):
        open_stream(url, batch=20, shuffle="window", window_shards=2, cache=str(tmp_path / "c2"), cache_gib=limit / 2)


def test_a_damaged_copy_in_the_cache_is_fetched_anew(site: Site, tmp_path: Path) -> None:
    url = site.serve(small(tmp_path, 40, 10))
    settings = {"shuffle": "window", "window_shards": 2, "cache": str(tmp_path / "cache")}

    def images() -> bytes:
        stream = open_stream(url, batch=40, workers=0, **settings)
        loaded = stream.load(0)
        stream.close()
        assert not loaded.faults, loaded.faults
        return bytes(loaded.parts["image"].numpy())

    whole = images()
    for path in [*(tmp_path / "cache").rglob("*.tar"), *(tmp_path / "cache").rglob("*.idx")]:
        data = bytearray(path.read_bytes())
        data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
        path.write_bytes(data)
    assert images() == whole


@pytest.mark.parametrize("far", ["labelled", "unlabelled"])
def test_of_two_datasets_either_may_be_remote_and_the_run_is_scored(
    site: Site, few: Path, tmp_path: Path, far: str
) -> None:
    mine, other = tmp_path / "mine", few
    shares = (("train", 0.8), ("test", 0.2))
    packed(small(tmp_path, 60, 20).parent / "source.npz", mine, splits=shares)
    places = {"labelled": str(mine), "unlabelled": str(other)}
    places[far] = site.serve(Path(places[far]))
    path = tmp_path / "run.yaml"
    network = "network: {kind: mlp, width: 8}"
    path.write_text(f"""\
data: {{path: {places["labelled"]}, unlabelled_path: {places["unlabelled"]}, cache: {tmp_path / "cache"}, subset: {{per_class: 2}}}}
game: {{kind: semi, noise: 4, generator: {{{network}}}, discriminator: {{{network}}}}}
run: {{folder: {tmp_path / "run"}, images: 32, batch: 8, evaluate_images: 16, precision: fp32}}
""")
    done = run("train", path)
    assert done.code == 0, done.err
    assert [row["images"] for row in rows(tmp_path / "run") if "score/errors" in row] == [16, 32]
    again = run("evaluate", tmp_path / "run", "--json")
    assert json.loads(again.out)["samples"] == 12, again.err
    overrides = [f"data.path={mine}", f"data.unlabelled_path={other}", "data.cache=null"]
    local = run("train", path, *overrides, f"run.folder={tmp_path / 'local'}")
    assert local.code == 0, local.err
    assert final(tmp_path / "run") == final(tmp_path / "local")
