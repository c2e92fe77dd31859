"""What a game may ask of the data: several views of it, transformed, in orders of their own, the same for any processes."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import open_stream, packed, run
from PIL import Image

from gandist.data.dataset import Dataset, outer_sizes
from gandist.data.stream import IGNORED, Stream
from gandist.data.transform import resized
from gandist.recipe import InputError

WORLDS, WORKERS = (1, 2, 3, 4, 8), (0, 1, 4)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty JPEG scenes of several sizes whose masks can be told from their pixels."""
    root = tmp_path_factory.mktemp("scenes")
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / "in" / folder).mkdir(parents=True)
    for number in range(60):
        height, width = random.integers(40, 70, 2)
        mask = np.zeros((height, width), np.uint8)
        for _ in range(4):
            y, x = random.integers(0, height - 10), random.integers(0, width - 10)
            mask[y : y + 20, x : x + 20] = random.integers(1, 5)
        mask[:3] = 255
        image = np.stack([np.where(mask == 255, 250, mask * 50)] * 3, 2).astype(np.uint8)
        Image.fromarray(image).save(root / "in" / "images" / f"{number}.jpg", quality=95)
        Image.fromarray(mask).save(root / "in" / "masks" / f"{number}.png")
    packed(root / "in", root / "out", shard_samples=16, shuffle=0)
    return root / "out"


@pytest.mark.parametrize("options", [{}, {"shuffle": "window", "window_shards": 2}], ids=["full", "window"])
def test_keys_do_not_depend_on_processes_or_workers_anywhere_in_an_epoch(tmp_path: Path, options: dict) -> None:
    np.savez(tmp_path / "x.npz", images=np.arange(1000, dtype=np.uint32).view(np.uint8).reshape(1000, 2, 2))
    packed(tmp_path / "x.npz", tmp_path / "x", shard_samples=90)
    batch = 48
    places = (0, 10, 20, 21)  # the begin, the middle, across the end, and the epoch after
    expected = {}
    for world, workers in product(WORLDS, WORKERS):
        for draw in places:
            keys, pixels = [], []
            for rank in range(world):
                stream = open_stream(
                    tmp_path / "x", batch=batch, seed=7, rank=rank, ranks=world, workers=workers, **options
                )
                (found,) = stream.read(draw)
                keys += [stream.reader.key(number) for number in found.numbers["image"]]
                pixels.append(found["image"])
                stream.close()
            known = expected.setdefault(draw, (keys, torch.cat(pixels)))
            assert keys == known[0]
            assert torch.equal(torch.cat(pixels), known[1])
    assert len({tuple(keys) for keys, _ in expected.values()}) == len(places)


def test_inspect_shows_the_same_keys_for_any_world_size(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    shown = {}
    for world, draws in product(WORLDS, ("0:1", "208:209", "416:418", "10000:10001")):  # an epoch is 416.7 draws
        result = gandist(
            "inspect",
            recipe(),
            "run.batch=24",
            f"--draws={draws}",
            f"--world-size={world}",
            "--out",
            tmp_path / "i.png",
        )
        assert result.code == 0, result.err
        lines = re.findall(r"^draw (\d+) rank (\d+): (.*)$", result.out, re.MULTILINE)
        assert len(lines) == world * (2 if draws == "416:418" else 1)
        keys = [key for _, _, row in lines for key in row.split()]
        assert shown.setdefault(draws, keys) == keys
    assert len({tuple(keys) for keys in shown.values()}) == 4


TRANSFORM = {"size": 36, "crop": 32, "flip": True}


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 0), (4, 4)])
def test_crops_and_flips_are_functions_of_the_place(scenes: Path, world: int, workers: int) -> None:
    def whole(draw: int, world: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = []
        for rank in range(world):
            stream = open_stream(
                scenes, parts=("image", "mask"), batch=16, rank=rank, ranks=world, workers=workers, transform=TRANSFORM
            )
            parts.append(stream.read(draw)[0])
            stream.close()
        return torch.cat([p["image"] for p in parts]), torch.cat([p["mask"] for p in parts])

    for draw in (0, 3, 4, 1000):
        expected, got = whole(draw, 1, 2), whole(draw, world, workers)
        assert torch.equal(expected[0], got[0])
        assert torch.equal(expected[1], got[1])


def test_masks_move_with_their_images_and_keep_their_values(scenes: Path) -> None:
    stream = open_stream(scenes, parts=("image", "mask"), batch=60, transform=TRANSFORM)
    (batch,) = stream.read(0)
    stream.close()
    image, mask = (batch["image"][:, 0] + 1) * 127.5, batch["mask"]
    assert image.shape == mask.shape == (60, 32, 32)
    assert mask.dtype == torch.int64
    assert set(mask.unique().tolist()) <= {0, 1, 2, 3, 4, IGNORED}
    wanted = torch.where(mask == IGNORED, 250, mask * 50)
    assert ((image - wanted).abs() < 20).float().mean() > 0.85  # edges are blurred by JPEG and resizing, areas are not


def test_each_visit_of_a_sample_crops_it_anew_and_half_are_flipped(tmp_path: Path) -> None:
    ramp = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40)
    image = np.stack([ramp >> 8, ramp & 255, ramp * 0], 2).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=image[None].repeat(8, 0))
    packed(tmp_path / "x.npz", tmp_path / "x")
    stream = open_stream(tmp_path / "x", batch=8, transform={"pad": 2, "crop": 32, "flip": True, "range": [0, 255]})
    rows = torch.cat([stream.read(draw)[0]["image"] for draw in range(100)]).round()
    stream.close()
    value = rows[:, 0] * 256 + rows[:, 1]
    flipped = value[:, 5, 6] < value[:, 5, 5]
    assert 0.44 < flipped.float().mean() < 0.56
    top = ((value.amin((1, 2)) - 40) // 40)[~flipped]
    assert len({tuple(v[0, :2].tolist()) for v in value[~flipped]}) > 80  # of 13 × 13 places
    assert top.min() >= -1


def test_values_come_in_the_range_or_normalised_as_asked(fashion: Path) -> None:
    plain = open_stream(fashion, batch=32).read(0)[0]["image"]
    pixels = ((plain + 1) * 127.5).round()
    unit = open_stream(fashion, batch=32, transform={"range": [0, 1]}).read(0)[0]["image"]
    assert torch.allclose(unit, pixels / 255, atol=1e-6)
    normal = open_stream(fashion, batch=32, transform={"mean": [0.3], "std": [0.2]}).read(0)[0]["image"]
    assert torch.allclose(normal, (pixels / 255 - 0.3) / 0.2, atol=1e-5)


def test_the_labelled_subset_is_chosen_by_its_own_seed_and_cycles_at_its_own_pace(fashion: Path) -> None:
    def subset(per_class: int, seed: int, run_seed: int = 0) -> Stream:
        return open_stream(fashion, parts=("image", "label", "unlabelled", "unlabelled_again"), batch=20, seed=run_seed,
                           subset={"per_class": per_class, "seed": seed})  # fmt: skip

    stream = subset(4, 1)
    batches = [stream.read(draw)[0] for draw in range(6)]
    numbers = [number for batch in batches for number in batch.numbers["label"]]
    assert Counter(torch.cat([b["label"] for b in batches]).tolist()) == dict.fromkeys(range(10), 12)
    assert Counter(numbers) == dict.fromkeys(numbers, 3)  # 40 samples, three epochs of two batches
    assert set(numbers) == set(stream.subset.tolist())
    seen = [n for draw in range(500) for n in stream.read(draw)[0].numbers["unlabelled"]]
    assert sorted(seen) == list(range(10_000))  # the whole split, meanwhile
    again = [n for draw in range(500) for n in stream.read(draw)[0].numbers["unlabelled_again"]]
    assert sorted(again) == list(range(10_000))
    assert sum(a == b for a, b in zip(seen, again, strict=True)) < 10  # in an order of its own
    stream.close()
    assert set(subset(4, 1, run_seed=9).subset.tolist()) == set(numbers)
    assert set(subset(4, 2).subset.tolist()) != set(numbers)
    assert set(subset(2, 1).subset.tolist()) < set(numbers)  # fewer labels of the same choice
    with pytest.raises(InputError, match="class 0 has 1000 samples in the split, and `per_class` asks for 1001"):
        subset(1001, 0)


def test_a_run_writes_down_which_samples_its_labels_come_from(
    recipe: Callable, tmp_path: Path, gandist: Callable
) -> None:
    assert gandist("train", recipe(), "data.subset={per_class: 2, seed: 3}").code == 0
    record = json.loads((tmp_path / "run" / "subset.json").read_text())
    assert len(record["samples"]) == 20
    assert record["samples"][0]["key"] == f"{record['samples'][0]['number']:08d}"
    assert (record["per_class"], record["seed"], record["split"]) == (2, 3, "train")


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("data.transform={crop: 40}", "is larger than images of 28×28"),
        ("data.transform={crop_at: centre}", "no effect without `crop`"),
        ("data.transform={mean: [0.5]}", "come together"),
        ("data.transform={mean: [0.5, 0.5], std: [1, 1]}", "2 values for images of 1 channels"),
        ("data.transform={range: [1, 0]}", "must be less than the second"),
        ("data.transform={pad: 28, crop: 28}", "too much to mirror"),
        ("data.unlabelled_transform={flip: true}", "reads no unlabelled images"),
        ("data.window_shards=4", "no effect without `shuffle: window`"),
        ("data.buffer=10", "no effect with `reader: index`"),
        ("data.cache=here", "is local; leave it out"),
        ("data.cache_gib=1", "`cache_gib` has no effect"),
        ("data.subset={per_class: 2000}", "class 0 has 1000 samples; use at most 1000"),
        ("data.split=tset", "is not a split"),
        ("data={path: DATA, shuffle: window, subset: {per_class: 3}}", "window has no effect"),
    ],
)
def test_a_setting_that_cannot_be_or_has_no_effect_is_refused(
    gandist: Callable, recipe: Callable, fashion: Path, tmp_path: Path, setting: str, rule: str
) -> None:
    result = gandist("train", recipe(), setting.replace("DATA", str(fashion)))
    assert result.code == 2
    assert rule in result.err
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_outer_sizes_are_refused_where_any_of_all_sizes_is() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        sizes = [(int(h), int(w)) for h, w in random.integers(8, 400, (random.integers(2, 50), 2))]
        outer = outer_sizes(sizes)
        assert set(outer) <= set(sizes)
        assert len(outer) > 1 or len(set(sizes)) == 1
        for size in (None, 7, 64, 333):
            every, few = ([resized(*one, size) for one in several] for several in (sizes, outer))
            for axis in (0, 1):
                assert max(one[axis] for one in every) == max(one[axis] for one in few)
            assert min(map(min, every)) == min(map(min, few))


def test_photos_of_several_sizes_train_when_they_are_cropped(scenes: Path, recipe: Callable, gandist: Callable) -> None:
    path = recipe(data=scenes, images=32)
    assert "differ in size" in gandist("train", path).err
    smallest = min(min(size) for size in Dataset(scenes).spec("train").sizes)
    failed = gandist("train", path, f"data.transform.crop={smallest + 1}")
    assert failed.code == 2
    assert f"`crop` {smallest + 1} is larger than images of" in failed.err
    assert gandist("describe", path, f"data.transform.crop={smallest}").code == 0
    assert gandist("train", path, "data.transform={size: 20, crop: 16}").code == 0


def test_images_of_one_proportion_come_out_alike() -> None:
    for size in (63, 119, 127, 200):
        for height, width in ((3, 2), (2, 3), (16, 9), (7, 5)):
            found = {resized(height * scale, width * scale, size) for scale in range(1, 200)}
            assert len(found) == 1, (size, found)


@pytest.mark.parametrize("what", ["subset", "unlabelled", "scored"])
def test_what_is_read_beside_the_labelled_images_is_judged_before_a_run_too(
    tmp_path: Path, gandist: Callable, what: str
) -> None:
    """Images of 28 × 20 … 31 pixels, and tests of 16: a crop of 22 fits only some of them."""
    for split, widths in (("train", range(20, 32)), ("test", [16])):
        for label in "ab":
            (tmp_path / "in" / split / label).mkdir(parents=True)
            for width in widths:
                Image.new("L", (width, 28), width).save(tmp_path / "in" / split / label / f"{width}.png")
    packed(tmp_path / "in", tmp_path / "data")
    path = tmp_path / "run.yaml"
    network = "network: {kind: mlp, width: 8}"
    path.write_text(f"""\
data: {{path: {tmp_path / "data"}, workers: 0, subset: {{per_class: 4}}, transform: {{crop: 20}}}}
game: {{kind: semi, noise: 4, generator: {{{network}}}, discriminator: {{{network}}}}}
run: {{folder: {tmp_path / "run"}, images: 16, batch: 8, sample_images: 8}}
""")
    given = {
        "subset": ["data.transform.crop=22", "data.unlabelled_transform={size: 22, crop: 22}"],
        "unlabelled": ["data.unlabelled_transform={crop: 22}", "data.transform={size: 22, crop: 22}"],
        "scored": ["run.evaluate_images=8"],
    }[what]
    done = gandist("train", path, *given)
    if what == "subset":  # its eight may all be large enough: nobody knows beforehand
        assert done.code in (0, 1)
        assert "Traceback" not in done.err
        assert gandist("train", path, *given, "data.quarantine=20", f"run.folder={tmp_path / 'passed'}").code == 0
        return
    assert done.code == 2
    assert {"unlabelled": "of unlabelled images: ", "scored": "of the split test, which is scored: "}[what] in done.err
    assert "is larger than images of" in done.err
    assert not (tmp_path / "run").exists()


def test_inspect_shows_windows_alike_for_one_process_and_two(fashion: Path, recipe: Callable, tmp_path: Path) -> None:
    found = []
    for name, ranks in (("one", 1), ("two", 2)):
        result = run(
            "inspect",
            recipe(),
            "data.shuffle=window",
            "data.window_shards=2",
            f"--world-size={ranks}",
            "--out",
            tmp_path / f"{name}.png",
        )
        assert result.code == 0, result.out
        found.append(
            [key for line in result.out.splitlines() if line.startswith("draw") for key in line.split(": ")[1].split()]
        )
        assert Image.open(tmp_path / f"{name}.png").size
    assert found[0] == found[1]


def test_unlabelled_images_of_another_size_are_refused_and_of_the_same_are_moved_alike(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 256, (20, 12, 12), np.uint8))
    packed(tmp_path / "x.npz", tmp_path / "x")
    with pytest.raises(ValueError, match="gives images of another size"):
        open_stream(tmp_path / "x", batch=4, transform={"crop": 8}, unlabelled_transform={"flip": True})
    stream = open_stream(
        tmp_path / "x",
        parts=("image", "unlabelled"),
        batch=4,
        transform={"crop": 8},
        unlabelled_transform={"crop": 8, "flip": True},
    )
    (batch,) = stream.read(0)
    assert batch["image"].shape == batch["unlabelled"].shape == (4, 1, 8, 8)
    stream.close()


def test_readers_leave_no_file_open(fashion: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        stream = open_stream(fashion, batch=64, workers=3)
        for draw in range(5):
            stream.read(draw)
        stream.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # memory maps of indexes have no descriptors


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty grey images of 20×24 pixels, without labels; each one's pixels are its number."""
    root = tmp_path_factory.mktemp("others")
    (root / "in").mkdir()
    for number in range(40):
        Image.fromarray(np.full((24, 20), number, np.uint8)).save(root / "in" / f"{number:02}.png")
    packed(root / "in", root / "out", shard_samples=16)
    return root / "out"


def elsewhere(others: Path) -> dict[str, object]:
    return {"unlabelled_path": str(others), "unlabelled_transform": {"size": 28, "crop": 28}}


@pytest.mark.parametrize("shuffle", [{}, {"shuffle": "window", "window_shards": 2}], ids=["full", "window"])
def test_unlabelled_images_may_be_of_another_dataset(fashion: Path, others: Path, shuffle: dict) -> None:
    parts, batch = ("image", "label", "unlabelled", "unlabelled_again"), 40
    labelled = {"subset": {"per_class": 2}} if not shuffle else {}
    seen = {}
    for ranks in (1, 2):
        found: dict[str, list] = {part: [] for part in parts}
        for rank in range(ranks):
            stream = open_stream(
                fashion, parts=parts, batch=batch, rank=rank, ranks=ranks, **labelled, **elsewhere(others), **shuffle
            )
            (rows,) = stream.read(3)
            for part in parts:
                found[part].append(rows[part])
            for part in ("unlabelled", "unlabelled_again"):
                values = ((rows[part].mean((1, 2, 3)) + 1) * 127.5).round().int().tolist()
                assert values == [int(stream.key(part, number).partition("-")[2]) for number in rows.numbers[part]]
            stream.close()
        seen[ranks] = {part: torch.cat(several) for part, several in found.items()}
    assert all(torch.equal(seen[1][part], seen[2][part]) for part in parts)
    for part in ("unlabelled", "unlabelled_again"):  # forty of forty: an epoch
        assert len(seen[1][part].unique()) == 40
    alone = open_stream(fashion, parts=parts[:2], batch=batch, **labelled, **shuffle)
    (rows,) = alone.read(3)
    alone.close()
    assert all(torch.equal(rows[part], seen[1][part]) for part in parts[:2])


def test_a_damaged_unlabelled_image_is_told_by_its_own_dataset_and_number(
    fashion: Path, others: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "others"
    shutil.copytree(others, broken)
    shard = next(broken.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    place = data.find(b"IDAT") + 8
    data[place] ^= 1
    shard.write_bytes(bytes(data))
    stream = open_stream(fashion, parts=("image", "unlabelled"), batch=40, **elsewhere(broken))
    (fault,) = stream.ready([0])
    stream.close()
    assert shard.name in fault.message
    assert 10_000 <= fault.number < 10_040  # on from the 10,000 garments, so that both may be counted


@pytest.mark.parametrize(
    ("overrides", "where", "why"),
    [
        (["data.unlabelled_path=DATA"], "data.unlabelled_path", "the game gan reads no unlabelled images"),
        (["data.unlabelled_split=test"], "data", "`unlabelled_split` has no effect without `unlabelled_path`"),
        (["data.unlabelled_path=NOWHERE"], "data.unlabelled_path", "dataset.json"),
        (["data.unlabelled_path=DATA", "data.unlabelled_split=tset"], "data.unlabelled_path", "is not a split"),
        (["data.unlabelled_path=DATA"], "data.unlabelled_path", "come out as 20×24, and those of `path` as 28×28"),
        (
            ["data.unlabelled_path=DATA", "data.cache=here", "data.unlabelled_transform={size: 28, crop: 28}"],
            "data",
            "`cache` has no effect, since both datasets are local",
        ),
        (
            ["data={path: 'x.tar', reader: webdataset, unlabelled_path: DATA}"],
            "data",
            "`unlabelled_path` has no effect",
        ),
    ],
)
def test_another_dataset_that_cannot_be_is_refused(
    gandist: Callable, recipe: Callable, others: Path, tmp_path: Path, overrides: list[str], where: str, why: str
) -> None:
    given = [one.replace("DATA", str(others)).replace("NOWHERE", str(tmp_path)) for one in overrides]
    failed = gandist("train", recipe(), *given)
    assert failed.code == 2
    assert f"`{where}`" in failed.err
    assert why in failed.err
    assert not (tmp_path / "run" / "log.jsonl").exists()
