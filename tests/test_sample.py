"""Samples are a function of seed, number, class and truncation; pictures show what is there; the nearest of a real image is itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, open_stream, packed
from PIL import Image

from gandist import checkpoint
from gandist.check import read_recipe
from gandist.data.dataset import Dataset
from gandist.data.opening import open_reader
from gandist.launcher import World
from gandist.metrics.features import PixelsOptions, in_8_bits
from gandist.neighbours import nearest, real_data, real_samples
from gandist.pictures import GAP, MARGIN, VIEW, curves, grid, sheet
from gandist.recipe import InputError
from gandist.sample import Asked, Sampler, between, write_sheet
from gandist.train import train

CPU = torch.device("cpu")


def trained(folder: Path, data: Path, *overrides: str) -> Path:
    """A run of ten steps."""
    mlp = "{kind: mlp, width: 16}"
    path = folder / "recipe.yaml"
    path.write_text(TINY.format(data=data, folder=folder / "run", generator=mlp, discriminator=mlp, images=160))
    world = World.join("fp32", 1)
    assert train(read_recipe(path, [*overrides]), world) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory, fashion: Path) -> Path:
    """A conditional run, whose transform moves images at random."""
    moved = ["data.transform.pad=2", "data.transform.crop=28", "data.transform.flip=true"]
    return trained(tmp_path_factory.mktemp("garments"), fashion, "game.conditional=projection", *moved)


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on signals (2, 50) with uniform noise and no classes."""
    folder = tmp_path_factory.mktemp("waves")
    np.save(folder / "signals.npy", np.random.default_rng(0).normal(size=(48, 2, 50)).astype(np.float32))
    packed(folder / "signals.npy", folder / "data")
    return trained(folder, folder / "data", "game.noise_distribution=uniform")


def sampler(run: Path, *asked: object) -> Sampler:
    return Sampler(checkpoint.find(run), CPU, Asked(*asked))


def test_the_same_seed_gives_the_same_samples_whatever_their_count(garments: Path, waves: Path) -> None:
    for run in (garments, waves):
        many, few, other = (sampler(run, *asked).all() for asked in ((150, 3), (16, 3), (16, 4)))
        assert torch.equal(many[:16], few)
        assert not torch.equal(few, other)
        (_, block) = next(sampler(run, 150, 3).blocks(2))
        assert torch.equal(many[128:], block)


def test_the_classes_asked_for_are_the_classes_given(garments: Path) -> None:
    asked = sampler(garments, 8, 0, "Sneaker,3")
    assert asked.classes == (7, 3)
    latents = asked.game.latents(0, 0, CPU)
    with asked.players["generator"].evaluating() as module:
        wanted = [module(latents, torch.full((64,), label))[:8] for label in (7, 3)]
    made = asked.all()
    torch.testing.assert_close(made[0::2], wanted[0][0::2])
    torch.testing.assert_close(made[1::2], wanted[1][1::2])
    assert not torch.allclose(wanted[0], wanted[1])
    assert sampler(garments, 1).classes == tuple(range(10))


def test_each_class_has_a_row_of_the_sheet(garments: Path, tmp_path: Path) -> None:
    asked = sampler(garments, 20)
    lines = [*write_sheet(asked, tmp_path)]
    assert "classes in turns: 0 T-shirt/top, 1 Trouser" in lines[0]
    assert "duplicates:" in lines[1]
    picture, made = np.asarray(Image.open(tmp_path / "grid.png")), asked.all()
    side = picture.shape[0] // 10
    assert picture.shape[1] == 2 * side
    for number, image in enumerate(made):
        row, column = number % 10, number // 10
        cell = picture[row * side : (row + 1) * side, column * side : (column + 1) * side]
        assert np.array_equal(cell[:: side // 28, :: side // 28], in_8_bits(image[0]).byte().numpy())


def test_truncated_noise_is_within_its_bound_and_uniform_noise_is_refused(garments: Path, waves: Path) -> None:
    asked = sampler(garments, 64, 0, None, 0.5)
    noise, whole = asked.game.latents(0, 0, CPU, 0.5), asked.game.latents(0, 0, CPU)
    assert 0.45 < noise.abs().max() <= 0.5 < whole.abs().max()
    assert not torch.allclose(asked.all(), sampler(garments, 64).all())
    with pytest.raises(InputError, match="uniform"):
        sampler(waves, 64, 0, None, 0.5)
    for bad in (0.0, -1.0, 9.0, math.nan):
        with pytest.raises(InputError, match="must be above 0"):
            sampler(garments, 64, 0, None, bad)


def test_a_way_on_the_sphere_keeps_its_ends_turns_evenly_and_changes_length_linearly() -> None:
    source = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 6, 40, generator=source)
    way = between(start, end, 9, normal=True)
    assert torch.equal(way[:, 0], start)
    assert torch.equal(way[:, -1], end)
    share = torch.linspace(0, 1, 9)
    lengths = (1 - share) * start.norm(dim=1)[:, None] + share * end.norm(dim=1)[:, None]
    torch.testing.assert_close(way.norm(dim=2), lengths)
    unit = way.double() / way.double().norm(dim=2, keepdim=True)
    turns = torch.acos((unit[:, 1:] * unit[:, :-1]).sum(2))
    torch.testing.assert_close(turns, turns[:, :1].expand(-1, 8), rtol=1e-4, atol=1e-6)
    straight = between(start, end, 9, normal=False)
    torch.testing.assert_close(straight[:, 1:] - straight[:, :-1], ((end - start) / 8)[:, None].expand(-1, 8, -1))
    assert straight[:, 4].norm(dim=1).mean() < 0.8 * way[:, 4].norm(dim=1).mean()  # what slerp is for


def test_the_frames_of_a_video_of_signals_have_one_scale(gandist: Callable, waves: Path, tmp_path: Path) -> None:
    assert gandist("sample", waves, "--interpolate", 3, "--video", "--count", 4, "--out", tmp_path).code == 0
    asked = sampler(waves, 4)
    latents = asked.game.latents(0, 0, CPU)
    ways = between(latents[0:8:2], latents[1:8:2], 3, normal=False)
    made = [asked.made_of(ways[:, frame], None) for frame in range(3)]
    for frame, path in enumerate(sorted((tmp_path / "frames").iterdir())):
        assert np.array_equal(np.asarray(Image.open(path)), sheet(made[frame], like=torch.cat(made))[:, :, 0])


@pytest.mark.parametrize("end", [1.0, -1.0])
def test_a_way_between_equal_or_opposite_latents_is_straight(end: float) -> None:
    start = torch.tensor([[3.0, 4.0]])
    way = between(start, end * start, 5, normal=True)
    torch.testing.assert_close(way, between(start, end * start, 5, normal=False))


def test_strips_go_from_one_sample_to_the_next_of_the_same_class_and_the_video_back(
    gandist: Callable, garments: Path, tmp_path: Path
) -> None:
    result = gandist("sample", garments, "--interpolate", 5, "--video", "--count", 3, "--out", tmp_path, "--seed", 2)
    assert result.code == 0, result.err
    asked = sampler(garments, 3, 2)
    latents = asked.game.latents(0, 2, CPU)
    ends = [asked.made_of(latents[first:6:2], asked.labels(3)) for first in (0, 1)]
    picture = np.asarray(Image.open(tmp_path / "interpolation.png"))
    assert np.array_equal(picture[:, : picture.shape[1] // 5], grid(ends[0], 1, magnify=False).repeat(3, 0).repeat(3, 1)[:, :, 0])  # fmt: skip
    frames = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").iterdir())]
    assert len(frames) == 5
    assert np.array_equal(frames[0], sheet(ends[0])[:, :, 0])
    assert np.array_equal(frames[4], sheet(ends[1])[:, :, 0])
    with Image.open(tmp_path / "interpolation.webp") as video:
        assert (video.n_frames, video.info["loop"]) == (8, 0)
        for place, frame in enumerate([0, 1, 2, 3, 4, 3, 2, 1]):
            video.seek(place)
            assert np.array_equal(np.asarray(video.convert("RGB"))[:, :, 0], frames[frame])
    again = gandist("sample", garments, "--interpolate", 5, "--video", "--out", tmp_path)
    assert (again.code, "holds interpolation.png already" in again.err) == (2, True)


def test_the_nearest_of_a_real_image_is_itself_at_no_distance(garments: Path) -> None:
    options = real_data(sampler(garments, 1), None)
    reader = open_reader(options)
    numbers = np.array([9999, 5, 300], np.uint64)
    (found, images), *rest = real_samples(reader, options, CPU, numbers)
    assert (found, rest) == ([9999, 5, 300], [])
    seen: list[int] = []

    def watched() -> object:
        for them, piece in real_samples(open_reader(options), options, CPU):
            seen.extend(them)
            yield them, piece

    distances, which = nearest(images, watched(), PixelsOptions(kind="pixels").build(), 3)
    assert seen == [*range(10_000)]  # each once, the last piece too
    assert which[:, 0].tolist() == [9999, 5, 300]
    assert not distances[:, 0].any()
    assert (distances[:, 1:].diff(dim=1) >= 0).all()
    assert (distances[:, 1] > 0).all()


def test_the_nearest_are_those_of_all_distances_whatever_the_pieces() -> None:
    source = torch.Generator().manual_seed(0)
    samples, real = torch.randn(7, 1, 9, generator=source), torch.randn(50, 1, 9, generator=source)
    real[40] = real[3]  # of equal ones the first comes first
    pieces = [([*range(first, min(50, first + 8))], real[first : first + 8]) for first in range(0, 50, 8)]
    distances, which = nearest(samples, pieces, PixelsOptions(kind="pixels").build(), 4)
    all_of_them = torch.cdist(samples.flatten(1).double(), real.flatten(1).double())
    wanted = all_of_them.sort(dim=1, stable=True)
    torch.testing.assert_close(distances, wanted.values[:, :4])
    assert torch.equal(which, wanted.indices[:, :4])


def test_neighbours_are_read_without_the_random_moves_of_training_and_named_by_their_keys(
    gandist: Callable, garments: Path, fashion: Path, waves: Path, tmp_path: Path
) -> None:
    result = gandist("sample", garments, "--neighbours", 2, "--count", 3, "--out", tmp_path)
    assert result.code == 0, result.err
    nearest_keys = [line.split(": ")[1].split(", ") for line in result.out.splitlines() if line.startswith("sample ")]
    plain = open_stream(fashion, batch=1)
    picture = np.asarray(Image.open(tmp_path / "neighbours.png"))
    side = picture.shape[0] // 3
    for row, words in enumerate(nearest_keys):
        for column, word in enumerate(words):
            key, distance = word.split(" ")
            number = next(n for n in range(10_000) if n == int(key))  # packed in the source's order
            pixels = np.frombuffer(plain.reader.members(number)["image"][1], np.uint8)[-784:].reshape(28, 28)
            left = side + 4 + column * side
            cell = picture[row * side : (row + 1) * side, left : left + side]
            assert np.array_equal(cell[:: side // 28, :: side // 28], pixels)
            made = in_8_bits(sampler(garments, 3).all()[row, 0]).numpy()
            assert float(distance) == pytest.approx(np.linalg.norm(made / 255 - pixels / 255), rel=1e-3)
    plain.close()
    for words, message in (
        (["--neighbours", 0], "must be from 1"),
        (["--neighbours", 2, "--data", waves.parent / "data"], "another kind or size"),
        (["--neighbours", 2, "--features", "torchscript"], "needs options"),
        (["--neighbours", 2, "--features", "spectrum"], "not for images"),
        (["--features", "pixels"], "no effect without --neighbours"),
        (["--video"], "no effect without --interpolate"),
        (["--single", "--shards"], "contradict"),
        (["--interpolate", 1], "from 2 to"),
    ):
        refused = gandist("sample", garments, *words, "--out", tmp_path / "refused")
        assert (refused.code, message in refused.err) == (2, True), (words, refused.err)


def test_shards_hold_the_samples_in_order_with_their_classes_and_can_be_trained_on(
    gandist: Callable, garments: Path, recipe: Callable, tmp_path: Path
) -> None:
    out = tmp_path / "made"
    words = ["sample", garments, "--shards", "--count", 100, "--class", "2,9", "--out", out]
    assert gandist(*words).code == 0
    assert gandist("verify", out).code == 0
    made = sampler(garments, 100, 0, "2,9").all()
    dataset = Dataset(out)
    assert dataset.manifest.label is not None
    assert dataset.manifest.label.names[9] == "Ankle boot"
    stream = open_stream(out, parts=("image", "label"), batch=100)
    (batch,) = stream.read(0)
    numbers = torch.tensor(batch.numbers["image"])
    assert torch.equal(in_8_bits(batch["image"]), in_8_bits(made)[numbers])
    assert batch["label"].tolist() == [(2, 9)[number % 2] for number in numbers.tolist()]
    stream.close()
    path = recipe(data=out, images=32)
    assert gandist("inspect", path, "--out", tmp_path / "inspect.png").code == 0
    assert gandist("train", path).code == 0
    assert "packed already" in gandist(*words).out
    assert gandist(*words[:-4], "--out", out).code == 2  # other samples


def test_single_files_are_the_samples_and_never_mixed_with_others(
    gandist: Callable, garments: Path, waves: Path, tmp_path: Path
) -> None:
    for run, out in ((garments, tmp_path / "images"), (waves, tmp_path / "signals")):
        assert gandist("sample", run, "--single", "--count", 70, "--out", out).code == 0
        made = sampler(run, 70).all()
        paths = sorted(out.iterdir())
        assert len(paths) == 70
        for path, one in zip(paths, made, strict=True):
            if path.suffix == ".npy":
                values = np.load(path, allow_pickle=False)
                assert (values.dtype, values.shape) == (np.float32, (2, 50))
                assert np.array_equal(values, one.numpy())
            else:
                assert np.array_equal(np.asarray(Image.open(path)), in_8_bits(one[0]).byte().numpy())
        refused = gandist("sample", run, "--single", "--seed", 1, "--out", out)
        assert (refused.code, "is not empty" in refused.err) == (2, True)
        assert sorted(out.iterdir()) == paths


def test_a_class_is_refused_where_there_is_none_of_it(garments: Path, waves: Path) -> None:
    for word, message in (("10", "0 to 9"), ("Sneeker", "did you mean `Sneaker`"), ("3,Dress", "stands twice")):
        with pytest.raises(InputError, match=message):
            sampler(garments, 1, 0, word)
    with pytest.raises(InputError, match="not conditional"):
        sampler(waves, 1, 0, "0")


def test_a_curve_reaches_every_peak_of_a_signal_and_shows_no_beat() -> None:
    spikes = torch.zeros(3, 1, 1024)
    for row, place in enumerate((1, 500, 1022)):
        spikes[row, 0, place] = 1
    drawn = curves(spikes)[:, 0] > 0
    assert drawn[:, GAP].any(1).all()  # the topmost row that is drawn in: one value in each signal
    fast = torch.sin(2 * torch.pi * torch.arange(1024) / 8.1)[None, None]  # a slow wave to who looks at one value in 8
    inked = (curves(fast)[0, 0, :, GAP:-GAP] > 0).sum(0)
    assert inked.min() > 45
    assert (curves(torch.sin(torch.arange(1024) / 40)[None, None])[0, 0] > 0).sum(0).max() < 10  # a slow one is a line


def test_curves_of_a_sheet_have_one_scale_and_channels_lie_below_each_other() -> None:
    wave = torch.sin(torch.arange(300) / 9)
    drawn = curves(torch.stack([torch.stack([wave, wave]), torch.stack([wave / 4, wave])]))[:, 0] > 0
    heights = [int(part.any(1).sum()) for part in (drawn[0, :32], drawn[1, :32], drawn[0, 32:], drawn[1, 32:])]
    assert heights[0] == heights[2] == heights[3] > 3 * heights[1]
    alone = curves(wave[None, None] / 4)[0, 0] > 0
    scaled = curves(wave[None, None] / 4, like=wave[None, None])[0, 0] > 0
    assert alone.any(1).sum() > 3 * scaled.any(1).sum()


def test_points_are_one_scatter_and_numbers_one_histogram() -> None:
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])[:, :, None].repeat(5, 1, 1)
    picture = sheet(corners)[:, :, 0]
    assert picture.shape == (VIEW + 2 * MARGIN,) * 2
    inner = picture[MARGIN : MARGIN + VIEW, MARGIN : MARGIN + VIEW] == 255
    halves = [inner[rows][:, columns] for rows in (slice(None, 256), slice(256, None)) for columns in (slice(None, 256), slice(256, None))]  # fmt: skip
    assert [int(half.sum()) for half in halves] == [5, 5, 5, 0]  # up is up: top left, top right, bottom left
    numbers = torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None, None]
    bars = sheet(numbers)[MARGIN : MARGIN + VIEW, MARGIN : MARGIN + VIEW, 0] == 255
    left, right = int(bars[:, 2].sum()), int(bars[:, -6].sum())
    assert abs(right - 3 * left) <= 2
    assert not bars[:, 200:300].any()


@pytest.mark.parametrize("shape", [(2, 1), (1, 1), (3, 40)])
def test_a_run_that_has_diverged_can_still_be_drawn(shape: tuple[int, int]) -> None:
    for value in (math.nan, math.inf, 3e38, 0.0, 1e9):
        assert sheet(torch.full((5, *shape), value)).ndim == 3
