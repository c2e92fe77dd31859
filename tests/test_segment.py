"""The segment game: its losses and its adversary's inputs by their laws, on scenes of garments and on images of several sizes."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    ENVIRONMENT,
    ROOT,
    SIZES,
    Result,
    Table,
    on_ranks,
    open_stream,
    packed,
    rows,
    run,
    scenes_on_disk,
    tensor_files,
    tensors,
)
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from gandist.data.dataset import Dataset
from gandist.data.decode import image_shape
from gandist.data.opening import data_spec, open_reader
from gandist.data.sources.scenes import scene
from gandist.data.stream import EXTENT, IGNORED, Batch
from gandist.data.transform import resized
from gandist.game import Clock
from gandist.games.segment import Segment, in_block, over_maps
from gandist.launcher import World
from gandist.log import Meter
from gandist.maps import (
    at_grid,
    cross_entropy,
    dice,
    labelled,
    log_frequency,
    median_frequency,
    one_hot,
    over_cells,
    product,
    scaled,
)
from gandist.masks import file_of
from gandist.pairs import PairOptions, views
from gandist.palette import LINE, palette
from gandist.recipe import DataOptions, Recipe, RunOptions, TransformOptions
from gandist.run import make_players
from gandist.windows import Answers, InferenceOptions, answered, probabilities, starts, to_size

CPU = torch.device("cpu")
BATCH = 8
CLASSES = 11
NAMES = ("background", *["top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 images of several sizes with masks, a fifth of them held out; not to be written to."""
    folder = tmp_path_factory.mktemp("scenes")
    packed(
        scenes_on_disk(folder / "source", 35),
        folder / "scenes",
        splits=(("train", 0.8), ("test", 0.2)),
        shuffle=0,
        names=NAMES,
    )
    return folder / "scenes"


def segment(**options: Any) -> Segment:
    values: dict[str, Any] = {
        "kind": "segment",
        "segmenter": {"network": {"kind": "unet", "width": 4, "blocks": [1, 1], "decoder": 4, "dropout": 0.0}},
        "adversary": {"network": {"kind": "small_fov", "light": True}},
        "augmentation": {"crop": [32, 32], "scale": [0.8, 1.25], "flip": True},
    }
    for name, value in options.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name] = {**values[name], **value}
        else:
            values[name] = value
    return Segment.model_validate(values)


def table(data: object, game: Segment) -> Table:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    transform = TransformOptions(canvas=(64, 64))
    options = DataOptions(path=str(data), workers=0, transform=transform)
    recipe = Recipe.model_construct(data=options, game=game, run=RunOptions(folder="none", images=10**6, batch=BATCH))
    spec = data_spec(options)
    stream = open_stream(
        data, parts=game.parts(spec), batch=BATCH, rank=rank, ranks=ranks, workers=0, transform=transform
    )
    players = make_players(recipe, spec, CPU, "fp32")
    return Table(recipe, World(CPU, rank, ranks, "fp32", ""), players, stream, Clock(BATCH, 10**6), Meter())


def random_maps(count: int = 2, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (B, K, h, w) and class numbers (B, h, w), some of them ignored."""
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, CLASSES, size, size, generator=source, dtype=torch.float64)
    mask = torch.randint(CLASSES, (count, size, size), generator=source)
    mask[:, :2] = IGNORED
    return logits, mask


# ---- what the adversary sees


def test_every_encoding_of_the_truth_and_of_answers_sums_to_one_at_labelled_places_and_to_zero_elsewhere() -> None:
    logits, mask = random_maps()
    there = labelled(mask).double()
    truth, answers = one_hot(mask, CLASSES).double(), logits.softmax(1)
    for maps in (truth, answers * there, scaled(truth, answers, 0.9)):
        torch.testing.assert_close(maps.sum(1, keepdim=True), there)


def test_scaling_leaves_the_likeliest_class_and_the_proportions_of_the_others() -> None:
    logits, mask = random_maps(seed=1)
    truth, answers = one_hot(mask, CLASSES).double(), (4 * logits).softmax(1)
    soft = scaled(truth, answers, 0.9)
    known = mask != IGNORED
    assert torch.equal(soft.argmax(1)[known], mask[known])
    right = (soft * truth).sum(1)[known]
    torch.testing.assert_close(right, (answers * truth).sum(1)[known].clamp_min(0.9))
    others = (1 - truth) * known[:, None]
    shares, wanted = soft * others, answers * others
    norms = [found.sum(1, keepdim=True).clamp_min(1e-300) for found in (shares, wanted)]
    torch.testing.assert_close(shares / norms[0], wanted / norms[1])


def test_scaling_divides_by_nothing_where_an_answer_is_certain() -> None:
    answers = torch.zeros(1, 3, 1, 2)
    answers[0, 1] = 1  # as sure as a float can be
    truth = one_hot(torch.tensor([[[1, 0]]]), 3)
    soft = scaled(truth, answers, 0.9)
    torch.testing.assert_close(soft[0, :, 0, 0], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(soft[0, :, 0, 1], torch.tensor([0.9, 0.1, 0.0]))


def test_product_is_each_map_times_each_channel() -> None:
    maps, image = torch.rand(2, CLASSES, 4, 5), torch.rand(2, 3, 4, 5)
    found = product(maps, image)
    assert found.shape == (2, 3 * CLASSES, 4, 5)
    for row in range(2):
        for one in range(CLASSES):
            for channel in range(3):
                assert torch.equal(found[row, 3 * one + channel], maps[row, one] * image[row, channel])


def test_the_truth_of_a_coarser_grid_is_the_pixel_in_the_middle_of_each_cell_of_the_logits() -> None:
    mask = torch.arange(48).view(1, 6, 8)
    assert at_grid(mask, 1) is mask
    assert torch.equal(at_grid(mask, 2), mask[:, 1::2, 1::2])
    assert at_grid(mask, 4).tolist() == [[[18, 22], [42, 46]]]  # rows 2 and 6, of which the last is 5
    # a ramp brought to the grid and back stays where it was, also where the stride does not divide the side
    ramp = torch.arange(41).expand(1, 41, 41)
    back = to_size(at_grid(ramp, 8)[:, None].float(), 8, (41, 41), (41, 41))
    assert (back[0, 0, 0, 4:37] - torch.arange(4, 37)).abs().max() <= 0.5
    images = torch.rand(1, 2, 5, 7)
    cells = over_cells(images, 4)
    assert cells.shape == (1, 2, 2, 2)
    torch.testing.assert_close(cells[0, :, 1, 1], images[0, :, 4:, 4:].mean((1, 2)))


# ---- losses


def test_the_cross_entropy_is_the_sum_over_labelled_pixels_written_out() -> None:
    logits, mask = random_maps()
    weights = torch.rand(CLASSES, dtype=torch.float64)
    total = 0.0
    for row, y, x in np.ndindex(*mask.shape):
        if (label := int(mask[row, y, x])) != IGNORED:
            scores = logits[row, :, y, x].tolist()
            total -= float(weights[label]) * (scores[label] - math.log(sum(math.exp(s) for s in scores)))
    assert float(cross_entropy(logits, mask, weights, False)) == pytest.approx(total / 2)
    assert float(cross_entropy(logits, mask, weights, True)) == pytest.approx(total / 2 / 64)


def test_the_dice_loss_is_zero_for_a_perfect_answer_and_written_out_for_any() -> None:
    logits, mask = random_maps()
    truth, there = one_hot(mask, CLASSES).double(), labelled(mask).double()
    assert float(dice(truth, truth)) == pytest.approx(0)
    answers = logits.softmax(1) * there
    wanted = []
    for one in range(CLASSES):
        t, p = truth[:, one], answers[:, one]
        if t.any():
            wanted.append(2 * float((t * p).sum()) / float((t + p).sum()))
    assert float(dice(answers, truth)) == pytest.approx(1 - np.mean(wanted))


def test_classes_weigh_by_the_median_of_the_frequencies() -> None:
    # class 0: 10 of 100 pixels of its images, class 1: 40 of 80, class 2: 20 of 100; class 3 occurs nowhere
    assert median_frequency((10, 40, 20, 0), (100, 80, 100, 0)) == pytest.approx([2.0, 0.4, 1.0, 1.0])


def test_classes_weigh_by_the_logarithm_of_their_share_and_a_pixel_weighs_one_on_average() -> None:
    pixels = (10, 70, 20)
    found = log_frequency(pixels, (100, 100, 100))
    assert np.dot(found, pixels) == pytest.approx(100)
    for one, n in zip(found, pixels, strict=True):
        assert one / found[0] == pytest.approx(math.log(1.02 + 0.1) / math.log(1.02 + n / 100))


def test_places_without_a_class_count_nothing_and_every_map_divides_by_all_its_places() -> None:
    losses, there = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]), torch.ones(2, 1, 2, 2)
    there[0, 0, 1] = 0
    game = segment(adversary={"network": {"kind": "per_pixel"}})
    assert float(game._over_places(losses, there)) == pytest.approx((1 + 2 + 5 + 6 + 7 + 8) / 8)
    assert float(game._over_places(torch.ones(2, 4, 4), there)) == pytest.approx(0.75)  # by interpolation
    assert float(game._over_places(torch.tensor([1.0, 2.0]), there)) == pytest.approx(1.5)
    there[0] = 0
    assert float(over_maps(torch.tensor([1.0, 2.0]), there)) == pytest.approx(1.0)


@pytest.mark.parametrize("network", [{"kind": "patch", "layers": 2}, {"kind": "small_fov", "output": "places"}])
def test_a_verdict_of_places_lies_where_they_look(network: dict[str, Any]) -> None:
    """A verdict that grows by the place that it is of, to the right, and a mask that does: each is brought to the other's grid."""
    game = segment(adversary={"network": network})
    assert game.adversary is not None
    maps = torch.zeros(1, 2, 40, 60)
    with torch.no_grad():
        shape = game.adversary.network.build(2, 3)(maps).shape
    first, step = game.adversary.network.places(60, shape[2])
    verdict = (first + step * torch.arange(shape[2])).expand(shape)
    inner = slice(math.ceil(first), int(first + step * (shape[2] - 1)) + 1)
    torch.testing.assert_close(game._at_pixels(verdict, maps)[0, 7, inner], torch.arange(60.0)[inner])
    there = torch.arange(60.0).expand(1, 1, 40, 60)
    assert float(game._over_places(torch.ones(shape), there)) == pytest.approx(float(verdict.mean()))


# ---- who learns what


def _gradients(at: Table, phase: str, batch: Batch) -> dict[str, list[Tensor | None]]:
    """Of every player, after the turn of one of them, before it steps."""
    kept: dict[str, list[Tensor | None]] = {}
    (found,) = [p for p in at.phases if p.player == phase]
    with at.players[phase].turn(0, BATCH) as turn:
        loss, _ = found.loss(at.players, batch, at.clock)
        turn.backward(loss)
        for name, player in at.players.items():
            kept[name] = [None if p.grad is None else p.grad.clone() for p in player.module.parameters()]
    return kept


@pytest.mark.parametrize("encoding", ["basic", "product", "scaling"])
@pytest.mark.parametrize("adversary", ["small_fov", "two_branch", "patch"])
def test_neither_player_gets_a_gradient_in_the_others_turn(scenes: Path, encoding: str, adversary: str) -> None:
    network = {"kind": adversary} | ({"layers": 1} if adversary == "patch" else {})
    game = segment(adversarial={"input": encoding}, adversary={"network": network})
    for mover, other in (("segmenter", "adversary"), ("adversary", "segmenter")):
        at = table(scenes, game)
        found = _gradients(at, mover, at.draw(0))
        assert all(g is not None and torch.isfinite(g).all() for g in found[mover])
        assert any(bool(g.any()) for g in found[mover] if g is not None)
        assert all(g is None for g in found[other])


def test_the_adversary_pulls_on_the_segmenter_through_its_probabilities(scenes: Path) -> None:
    with_it, without = (
        _gradients(at := table(scenes, segment(adversarial={"weight": weight})), "segmenter", at.draw(0))["segmenter"]
        for weight in (1000.0, 1e-9)
    )
    alone = _gradients(at := table(scenes, segment(adversary=None)), "segmenter", at.draw(0))["segmenter"]
    for one, other, third in zip(with_it, without, alone, strict=True):
        assert one is not None
        assert other is not None
        assert third is not None
        torch.testing.assert_close(other, third, rtol=1e-4, atol=1e-7)
    assert not all(torch.allclose(one, other) for one, other in zip(with_it, without, strict=True))  # type: ignore[arg-type]


class Shifted(nn.Module):
    """Answers as another module does, and by `by` differently."""

    def __init__(self, module: nn.Module, by: Tensor) -> None:
        super().__init__()
        self.module, self.by = module, by

    def forward(self, image: Tensor) -> Tensor:
        made: Tensor = self.module(image)
        return made + self.by


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adversarial": {"input": "scaling"}},
        {"adversarial": {"input": "product"}},
        {"adversary": {"network": {"kind": "two_branch"}}},
        {"adversary": {"network": {"kind": "patch", "width": 2, "layers": 1}}},
        {"adversary": {"network": {"kind": "per_pixel"}}},
        {"adversary": {"network": {"kind": "per_pixel"}}, "unlabelled": {"threshold": 1e-6, "adversarial": 0.0}},
    ],
    ids=["basic", "scaling", "product", "two_branch", "patch", "per_pixel", "unlabelled"],
)
def test_ignored_pixels_change_no_gradient(scenes: Path, options: dict[str, Any]) -> None:
    game = segment(augmentation=None, dice=1.0, **options)
    found = []
    for changed in (False, True):
        at = table(scenes, game)
        batch = at.draw(0)
        assert (batch["mask"] == IGNORED).any()
        with torch.no_grad():
            logits = at.players["segmenter"](batch["image"])
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        hidden = at_grid(batch["mask"], 2) == IGNORED
        if game.unlabelled is not None:  # of both images of a row: the segmenter's answers to both are changed
            hidden &= ~at_grid(batch.inside("unlabelled"), 2)
            assert hidden.any()

        segmenter = at.players["segmenter"]
        if changed:
            segmenter.module = segmenter.wrapped = Shifted(segmenter.module, 5 * noise * hidden[:, None])
        found += [_gradients(at, name, batch) for name in ("segmenter", "adversary")]
    for name, before, after in (("segmenter", found[0], found[2]), ("adversary", found[1], found[3])):
        for one, other in zip(before[name], after[name], strict=True):
            torch.testing.assert_close(one, other)


def test_without_the_adversary_the_segmenter_begins_and_reads_alike(scenes: Path) -> None:
    whole, alone = table(scenes, segment()), table(scenes, segment(adversary=None))
    for key, value in tensors(alone.players).items():
        assert np.array_equal(tensors(whole.players)[key], value)
    assert torch.equal(whole.draw(0)["image"], alone.draw(0)["image"])
    assert [phase.player for phase in alone.phases] == ["segmenter"]


def test_the_adversary_judges_the_maps_of_this_step_without_a_second_forward(scenes: Path) -> None:
    at = table(scenes, segment())
    seen = []
    at.players["segmenter"].module.register_forward_hook(lambda *_: seen.append(1))
    at.play(2)
    assert len(seen) == 2


def test_players_alternate_in_blocks_and_each_rests_in_the_others(scenes: Path) -> None:
    at = table(scenes, segment(adversarial={"block": 3}))
    moved = []
    for _ in range(9):
        before = tensors(at.players)
        at.play(1)
        moved.append(
            {key.split("/")[0] for key, value in tensors(at.players).items() if not np.array_equal(value, before[key])}
        )
    assert moved == 3 * [{"segmenter"}] + 3 * [{"adversary"}] + 3 * [{"segmenter"}]
    assert [in_block(500, 0, Clock(1, 10**6, step)) for step in (0, 499, 500, 999, 1000)] == [
        True,
        True,
        False,
        False,
        True,
    ]


def test_until_from_images_the_adversary_learns_and_is_not_felt(scenes: Path) -> None:
    game = segment(adversarial={"from_images": 2 * BATCH})
    at, alone = table(scenes, game), table(scenes, segment(adversary=None))
    for steps in range(1, 4):
        before = tensors(at.players)["adversary//0.0.weight"]
        at.play(1)
        alone.play(1)
        assert not np.array_equal(before, tensors(at.players)["adversary//0.0.weight"])
        same = all(np.array_equal(tensors(at.players)[key], value) for key, value in tensors(alone.players).items())
        assert same == (steps < 3)


def test_unlabelled_images_teach_only_where_the_adversary_is_sure(scenes: Path) -> None:
    for threshold, taught in ((1e-6, True), (1 - 1e-6, False)):
        game = segment(
            unlabelled={"threshold": threshold, "adversarial": 0.0},
            adversary={"network": {"kind": "per_pixel"}},
            augmentation={"crop": [64, 64]},
        )
        at = table(scenes, game)
        (phase,) = [p for p in at.phases if p.player == "segmenter"]
        _, values = phase.loss(at.players, at.draw(0), at.clock)
        assert (float(values["loss/segmenter/unlabelled"]) > 0) == taught


UNLABELLED = {
    "unlabelled": {"adversarial": 0.01, "threshold": 0.1},
    "adversary": {"network": {"kind": "patch", "width": 4, "layers": 1}, "optimizer": {"kind": "sgd"}},
    "augmentation": {"crop": [64, 64], "scale": [0.8, 1.25], "flip": True},
}


def test_a_run_with_unlabelled_images_is_described_trained_and_paired_with_its_baseline(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    path = recipe_of(tmp_path, scenes)
    overrides = [
        "game.adversary.network={kind: per_pixel, width: 4}",
        "game.augmentation.crop=[64, 64]",
        "game.unlabelled={from_images: 32}",
        "data.subset={samples: 12}",
        "data.unlabelled_transform={canvas: [64, 64], flip: true}",
        "data.shuffle=window",
        "run.images=48",
    ]
    described = gandist("describe", path, *overrides)
    assert described.code == 0, described.err
    assert gandist("train", path, *overrides).code == 0
    losses = {
        row["images"]: row["loss/segmenter/unlabelled"]
        for row in rows(tmp_path / "run")
        if "loss/segmenter/unlabelled" in row
    }
    assert min(losses) > 32
    alone = ["game.adversary=null", f"run.folder={tmp_path / 'alone'}"]
    assert gandist("train", path, *overrides, *alone).code == 0
    assert all("loss/segmenter/unlabelled" not in row for row in rows(tmp_path / "alone"))
    # Another dataset is scored in full, whatever subset the run learned from, and whether or not it has a split to learn from.
    names = Dataset(scenes).manifest.mask.names  # type: ignore[union-attr]
    shares = (("validation", 0.5), ("test", 0.5))
    packed(scenes_on_disk(tmp_path / "source", 8), tmp_path / "other", names=names, splits=shares)
    for split, given in (
        ("test", []),
        ("validation", ["game.scores={split: validation}"]),
        ("test", ["game.scores={boundary_tolerance: 0.01}"]),
    ):
        done = gandist(
            "evaluate", tmp_path / "run", f"data.path={tmp_path / 'other'}", *given, "--json", "--out", tmp_path
        )
        assert done.code == 0, done.err
        assert json.loads(done.out)["samples"] == Dataset(tmp_path / "other").spec(split).samples == 4


def _played(data: Path, options: dict[str, Any], steps: int) -> dict[str, np.ndarray]:
    at = table(data, segment(**options))
    at.play(steps)
    return tensors(at.players)


NORMLESS = {"network": {"kind": "farabet"}, "optimizer": {"kind": "sgd", "learning_rate": 0.01}}


@pytest.mark.parametrize(
    "options",
    [{"dice": 1.0}, {"class_weights": "median_frequency", "adversarial": {"input": "scaling"}}, UNLABELLED],
    ids=["dice", "weights", "unlabelled"],
)
def test_two_ranks_learn_what_one_process_learns(scenes: Path, options: dict[str, Any]) -> None:
    sides = {"segmenter": NORMLESS, "adversary": {"network": {"kind": "two_branch"}, "optimizer": {"kind": "sgd"}}}
    whole = _played(scenes, {**sides, **options}, 3)
    first, second = on_ranks(2, _played, scenes, {**sides, **options}, 3)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    for key, value in whole.items():
        assert np.array_equal(first[key], second[key])
        np.testing.assert_allclose(first[key], value, rtol=1e-3, atol=1e-5)


# ---- crops


def test_an_image_of_any_size_lies_on_its_canvas_and_the_rest_is_ignored(scenes: Path) -> None:
    stream = open_stream(scenes, parts=("image", "mask"), batch=16, transform={"canvas": [64, 64]})
    (batch,) = stream.read(0)
    stream.close()
    assert batch["image"].shape == (16, 3, 64, 64)
    extents = batch.extent("image")
    assert {tuple(extent) for extent in extents.tolist()} <= {*SIZES}
    assert len({tuple(extent) for extent in extents.tolist()}) > 2
    for image, mask, (height, width) in zip(batch["image"], batch["mask"], extents.tolist(), strict=True):
        assert (mask[height:] == IGNORED).all()
        assert (mask[:, width:] == IGNORED).all()
        assert (mask[:height, :width] != IGNORED).float().mean() > 0.9
        assert image[:, height:].abs().max().item() < 0.01 if height < 64 else True
        assert image[:, :height, :width].std() > 0.05


def test_a_canvas_that_is_too_small_is_refused_with_the_size_that_it_takes(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    path = recipe_of(tmp_path, scenes)
    taken = [max(side) for side in zip(*SIZES, strict=True)]
    said = gandist("describe", path, "data.transform.canvas=null").err
    assert f"`data.transform.canvas: {taken}`" in said
    failed = gandist("train", path, "data.transform.canvas=[64, 48]")
    assert failed.code == 2
    assert f"`canvas` is [64, 48], height and width, and images take {taken}" in failed.err
    assert not (tmp_path / "run").exists()
    assert gandist("describe", path, f"data.transform.canvas={taken}").code == 0
    # Of the smaller side 32, the largest are those of the most extreme proportion.
    shrunk = [resized(height, width, 32) for height, width in SIZES]
    canvas = [max(side) for side in zip(*shrunk, strict=True)]
    assert gandist("describe", path, "data.transform.size=32", f"data.transform.canvas={canvas}").code == 0
    canvas[1] -= 1
    assert gandist("describe", path, "data.transform.size=32", f"data.transform.canvas={canvas}").code == 2


def test_sizes_that_a_split_does_not_have_are_not_held_against_it(scenes: Path) -> None:
    manifest = Dataset(scenes).manifest
    for split, shards in manifest.splits.items():
        reader = open_reader(DataOptions(path=str(scenes), split=split))
        members = [reader.read(0, place, ("image",))["image"] for place in range(shards[0].samples)]
        found = {image_shape(data, suffix)[:2] for suffix, data in members}
        assert set(manifest.counts[split].sizes) <= found
        assert Dataset(scenes).spec(split).canvas == tuple(max(side) for side in zip(*found, strict=True))


def test_an_image_that_is_larger_than_the_canvas_is_named_where_nobody_noted_its_size(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    older = tmp_path / "older"
    shutil.copytree(scenes, older)
    text = json.loads((older / "dataset.json").read_text())
    for counts in text["counts"].values():
        del counts["sizes"]
    (older / "dataset.json").write_text(json.dumps(text))
    path = recipe_of(tmp_path, older)
    assert "`data.transform.canvas: [HEIGHT, WIDTH]`" in gandist("describe", path, "data.transform.canvas=null").err
    failed = gandist("train", path, "data.transform.canvas=[64, 48]")
    assert failed.code == 1
    assert "`canvas` is [64, 48], height and width, and images take [" in failed.err


class _Rows:
    """Rows of a batch by itself."""

    @staticmethod
    def of(
        images: Tensor, masks: Tensor, extents: Tensor | None = None, size: int | None = None, start: int = 0
    ) -> Batch:
        parts = {"image": images, "mask": masks} | ({"image" + EXTENT: extents} if extents is not None else {})
        return Batch(parts, 3, range(start, start + len(images)), size or len(images), 5, CPU)


def test_a_crop_without_chance_is_the_image_itself() -> None:
    images, masks = torch.randn(2, 3, 9, 12), torch.randint(5, (2, 9, 12))
    found, _, mask = views(PairOptions(flip=False), _Rows.of(images, masks), "image", "mask")
    torch.testing.assert_close(found, images, rtol=0, atol=1e-5)
    assert torch.equal(mask, masks)


def test_image_and_mask_move_together() -> None:
    masks = torch.randint(2, (64, 12, 12)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    options = PairOptions(crop=(40, 36), scale=(0.7, 1.5), stretch=0.2, degrees=20)
    found, _, mask = views(options, _Rows.of(masks[:, None].float() * 2 - 1, masks), "image", "mask")
    assert found.shape == (64, 1, 40, 36)
    known = mask != IGNORED
    assert (found[:, 0][~known] == 0).all()
    agree = ((found[:, 0] > 0) == (mask == 1))[known].float().mean()
    assert agree > 0.97  # they differ within half a pixel of an edge


def test_half_of_the_crops_are_mirrored_and_scales_lie_between_the_two_factors() -> None:
    ramp = torch.arange(101.0).expand(400, 1, 101, 101) / 50 - 1
    options = PairOptions(crop=(21, 21), scale=(0.5, 2.0))
    found, *_ = views(options, _Rows.of(ramp, torch.zeros(400, 101, 101, dtype=torch.int64)), "image", "mask")
    slope = (found[:, 0, 10, 15] - found[:, 0, 10, 5]) * 5  # pixels of the image for one of the crop
    assert 0.43 < (slope < 0).float().mean() < 0.57
    factors = 1 / slope.abs()
    assert factors.min() > 0.499
    assert factors.max() < 2.001
    assert factors.log2().abs().mean() == pytest.approx(0.5, abs=0.06)  # log-uniform


def test_a_crop_lies_within_a_larger_image_and_around_a_smaller_one() -> None:
    extents = torch.tensor([[40, 30]]).expand(50, 2)
    masks = torch.zeros(50, 40, 40, dtype=torch.int64)
    small, _, mask = views(
        PairOptions(crop=(20, 20)), _Rows.of(torch.ones(50, 1, 40, 40), masks, extents), "image", "mask"
    )
    assert (mask == 0).all()
    assert torch.allclose(small, torch.ones(()))
    large, _, mask = views(
        PairOptions(crop=(60, 60)), _Rows.of(torch.ones(50, 1, 40, 40), masks, extents), "image", "mask"
    )
    assert ((mask == 0).sum((1, 2)) == 40 * 30).all()
    assert torch.equal(large[:, 0] != 0, mask == 0)


def test_a_stretch_changes_the_ratio_of_the_sides_and_not_the_area() -> None:
    extents = torch.tensor([[50, 50]]).expand(200, 2)
    options = PairOptions(crop=(120, 120), stretch=0.5)
    batch = _Rows.of(torch.ones(200, 1, 50, 50), torch.zeros(200, 50, 50, dtype=torch.int64), extents)
    inside = views(options, batch, "image", "mask").inside
    heights, widths = inside.any(2).sum(1), inside.any(1).sum(1)
    ratio = widths / heights
    assert ratio.min() > 0.47
    assert ratio.max() < 1.55
    assert ratio.min() < 0.55 < 1.4 < ratio.max()
    torch.testing.assert_close((heights * widths).float(), torch.full((200,), 2500.0), rtol=0.04, atol=0)


def test_a_row_is_cropped_and_coloured_the_same_in_any_part_of_the_batch() -> None:
    images, masks = torch.randn(8, 3, 20, 24), torch.randint(5, (8, 20, 24))
    options = PairOptions(
        crop=(16, 16), scale=(0.5, 2), stretch=0.1, degrees=10, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1
    )
    whole = views(options, _Rows.of(images, masks), "image", "mask")
    for first, last in ((0, 4), (4, 8), (3, 5)):
        part = _Rows.of(images[first:last], masks[first:last], size=8, start=first)
        for one, other in zip(views(options, part, "image", "mask"), whole, strict=True):
            assert torch.equal(one, other[first:last])


# ---- answers


class Blocks(nn.Module):
    """Logits that depend on the mean colour of each cell of `stride` pixels."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        stride = self.stride
        whole = F.pad(images, (0, -width % stride, 0, -height % stride), mode="replicate")
        grey = F.avg_pool2d(whole.mean(1, keepdim=True), stride)
        return torch.cat([grey * 3, -grey], 1)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(5, 9), (33, 41), (32, 64)])
def test_logits_of_a_coarse_grid_come_back_to_their_places(stride: int, size: tuple[int, int]) -> None:
    height, width = size
    places = -(-height // stride), -(-width // stride)
    ramp = (torch.arange(places[1]) * stride + (stride - 1) / 2).expand(1, 1, *places)  # centres, in pixels
    found = to_size(ramp, stride, size, size)
    assert found.shape == (1, 1, height, width)
    inner = slice(stride, max(stride + 1, (places[1] - 1) * stride))
    torch.testing.assert_close(found[0, 0, 0, inner], torch.arange(width, dtype=torch.float32)[inner])


def test_flips_and_scales_and_windows_change_nothing_of_an_answer_that_does_not_depend_on_them() -> None:
    image = torch.full((1, 3, 40, 56), 0.3)
    plain = probabilities(Answers(Blocks(4), 4), image, InferenceOptions(), (40, 56))
    for options in (
        {"flip": True},
        {"scales": [0.5, 1.0, 2.0]},
        {"window": [16, 24]},
        {"window": [16, 24], "flip": True},
    ):
        found = probabilities(Answers(Blocks(4), 4), image, InferenceOptions.model_validate(options), (40, 56))
        torch.testing.assert_close(found, plain)
        torch.testing.assert_close(found.sum(1), torch.ones(1, 40, 56))


def test_with_flips_the_answer_of_a_mirrored_image_is_mirrored() -> None:
    torch.manual_seed(0)
    network, image = nn.Conv2d(3, 4, 5, padding=2), torch.randn(2, 3, 20, 30)
    for flip in (True, False):
        options = InferenceOptions(flip=flip)
        one, other = (probabilities(Answers(network, 1), seen, options, (20, 30)) for seen in (image, image.flip(3)))
        assert torch.allclose(one, other.flip(3), atol=1e-6) == flip


@pytest.mark.parametrize(("length", "window", "overlap"), [(100, 30, 0.5), (31, 30, 0.5), (97, 13, 0.0), (60, 20, 0.9)])
def test_windows_cover_an_image_and_overlap_enough(length: int, window: int, overlap: float) -> None:
    found = starts(length, window, overlap)
    assert found[0] == 0
    assert found[-1] == length - window
    assert all(0 < later - before <= max(1, math.ceil(window * (1 - overlap))) for before, later in pairwise(found))


def test_images_of_several_sizes_are_answered_at_their_own_in_any_company() -> None:
    source = np.random.default_rng(0)
    images = [source.integers(256, size=(*size, 3), dtype=np.uint8) for size in (*SIZES, *SIZES)]
    answers, transform = Answers(Blocks(2), 2), TransformOptions(size=24)
    together = answered(answers, images, transform, InferenceOptions(), CPU)
    for pixels, found in zip(images, together, strict=True):
        assert found.shape == (2, *pixels.shape[:2])
        torch.testing.assert_close(found, answered(answers, [pixels], transform, InferenceOptions(), CPU)[0])


# ---- whole runs

RECIPE = """\
data:
  path: {data}
  transform: {{canvas: [64, 64]}}
game:
  kind: segment
  segmenter:
    network: {{kind: unet, width: 4, blocks: [1, 1], decoder: 8}}
    optimizer: {{kind: adam, learning_rate: 3e-3, beta1: 0.9}}
    ema: {{half_life_images: 100}}
  adversary:
    network: {{kind: small_fov, light: true}}
    optimizer: {{kind: adam, learning_rate: 1e-4, beta1: 0.9}}
  adversarial: {{weight: 0.1}}
  augmentation: {{crop: [32, 32], scale: [0.8, 1.25]}}
  scores: {{train_samples: 5}}
run:
  folder: {folder}
  images: 64
  batch: 8
  log_every: 2
  sample_images: 32
  evaluate_images: 32
  save_images: 32
  precision: fp32
"""


def recipe_of(folder: Path, data: Path, name: str = "run") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(data=data, folder=folder / name))
    return path


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 64 images; not to be written to but for its evaluations."""
    folder = tmp_path_factory.mktemp("trained")
    done = run("train", recipe_of(folder, scenes), "run.trackers=[tensorboard, wandb]")
    assert done.code == 0, done.err
    return folder / "run"


def test_a_run_logs_scores_samples_and_what_each_player_loses(trained: Path) -> None:
    names = {name for row in rows(trained) for name in row}
    wanted = {"loss/segmenter/cross_entropy", "loss/segmenter/adversarial", "loss/adversary/real", "loss/adversary/fake",
              "accuracy/pixels", "score/mean_iou", "score/boundary_f", "score/train/mean_iou", "score/iou/background"}  # fmt: skip
    assert wanted <= names
    sheet = np.asarray(Image.open(trained / "samples" / "images_000000032.png"))
    assert sheet.shape[1] == 3 * sheet.shape[0] or sheet.shape[1] > sheet.shape[0]
    (picture,) = (trained / "evaluations").glob("images_000000064_*_worst.png")
    assert np.asarray(Image.open(picture)).std() > 10
    tables = {path.name.partition("_")[0] for path in (trained / "wandb").rglob("*.table.json")}
    assert tables == {"images", "classes"}
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("evaluation/worst")] == [32, 64]
    shown = events.Tensors("evaluation/classes/text_summary")[-1].tensor_proto.string_val[0].decode()
    (path,) = (trained / "evaluations").glob("images_000000064_*_classes.csv")
    with path.open(newline="") as file:
        listed = [*csv.DictReader(file)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    assert cells[0] == [*listed[0]]
    assert [row[0] for row in cells[2:]] == [row["class"] for row in listed]
    for row, other in zip(cells[2:], listed, strict=True):
        assert (float(row[1]) if row[1] else None) == (
            pytest.approx(float(other["iou"]), rel=1e-3) if other["iou"] else None
        )
    assert "tracker_failed" not in (trained / "log.jsonl").read_text()


def test_the_table_of_images_names_every_one_and_the_worst_first(trained: Path, scenes: Path) -> None:
    (path,) = (trained / "evaluations").glob("images_000000064_*_images.csv")
    with path.open(newline="") as file:
        found = [*csv.DictReader(file)]
    assert len(found) == Dataset(scenes).spec("test").samples == 7
    ious = [float(row["mean_iou"]) for row in found]
    assert ious == sorted(ious)
    assert all("scene_" in row["name"] for row in found)


def answers_of(
    run: Path, data: Path, split: str, gandist: Callable[..., Result], out: Path
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Truth and predicted mask of each image, through `gandist predict` and files alone."""
    done = gandist("predict", run, data, "--split", split, "--out", out)
    assert done.code == 0, done.err
    with (out / "predictions.csv").open(newline="") as file:
        listed = [*csv.DictReader(file)]
    pairs = []
    for row in listed:
        number = row["name"].rpartition("scene_")[2][:3]
        truth = np.asarray(Image.open(data.parent / "source" / "masks" / f"scene_{number}.png"))
        pairs.append((truth, np.asarray(Image.open(out / row["mask"]))))
    return pairs


def test_evaluate_agrees_with_a_brute_force_count_and_torchmetrics_over_the_masks_of_predict(
    trained: Path, scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    done = gandist("evaluate", trained, "--json", "--out", tmp_path / "scores")
    assert done.code == 0, done.err
    scores = json.loads(done.out)
    pairs = answers_of(trained, scenes, "test", gandist, tmp_path / "answers")
    assert len(pairs) == scores["samples"] == 7
    matrix = np.zeros((CLASSES, CLASSES), int)
    judge = MulticlassJaccardIndex(CLASSES, average="none", ignore_index=255)
    for truth, answer in pairs:
        assert truth.shape == answer.shape
        for t, a in zip(truth.ravel(), answer.ravel(), strict=True):
            if t != 255:
                matrix[t, a] += 1
        judge.update(torch.from_numpy(answer.astype(int)), torch.from_numpy(truth.astype(int)))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    ious = matrix.diagonal() / np.maximum(union, 1)
    present = union > 0
    assert scores["mean_iou"] == pytest.approx(ious[present].mean())
    assert scores["pixel_accuracy"] == pytest.approx(matrix.diagonal().sum() / matrix.sum())
    assert scores["class_accuracy"] == pytest.approx(
        np.mean([matrix[k, k] / matrix[k].sum() for k in range(CLASSES) if matrix[k].sum()])
    )
    torch.testing.assert_close(judge.compute()[present].double(), torch.from_numpy(ious[present]), rtol=1e-5, atol=1e-6)
    names = Dataset(scenes).manifest.mask.names  # type: ignore[union-attr]
    assert scores["iou"] == pytest.approx({names[k]: ious[k] for k in range(CLASSES) if present[k]})


def broken(scenes: Path, out: Path, split: str, number: int) -> Path:
    """The same dataset, and a flipped bit in the mask of one sample."""
    shutil.copytree(scenes, out)
    reader = open_reader(DataOptions(path=str(out), split=split))
    path, mask = Path(reader.where(number)), bytes(reader.members(number)["mask"][1])
    reader.close()
    data = bytearray(path.read_bytes())
    data[data.find(mask) + len(mask) // 2] ^= 1
    path.write_bytes(bytes(data))
    return out


def test_a_damaged_image_costs_the_scores_unless_it_may_be_passed_over(
    trained: Path, scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    data = f"data.path={broken(scenes, tmp_path / 'broken', 'test', 3)}"
    failed = gandist("evaluate", trained, data, "--json", "--out", tmp_path)
    assert failed.code == 1
    assert "`data.quarantine` 0 allows no more bad samples" in failed.err
    done = gandist("evaluate", trained, data, "data.quarantine=1", "--json", "--out", tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["samples"] == 6
    several = run("evaluate", trained, data, "data.quarantine=1", "--json", "--out", tmp_path, ranks=2)
    assert json.loads(next(line for line in several.out.splitlines() if line.startswith("{"))) == json.loads(done.out)


@pytest.mark.parametrize("ranks", [2, 3])
def test_scores_are_the_same_on_any_number_of_processes(
    trained: Path, tmp_path: Path, ranks: int, gandist: Callable[..., Result]
) -> None:
    overrides = ["game.scores.split=test", "data.split=train", "game.scores.train_samples=20"]
    one = gandist("evaluate", trained, *overrides, "--json", "--out", tmp_path / "one")
    several = run("evaluate", trained, *overrides, "--json", "--out", tmp_path / "several", ranks=ranks)
    assert several.code == 0, several.err
    assert json.loads(one.out) == json.loads(next(line for line in several.out.splitlines() if line.startswith("{")))
    tables = [next((tmp_path / name / "evaluations").glob("*_images.csv")).read_text() for name in ("one", "several")]
    assert tables[0] == tables[1]


def test_another_dataset_of_the_same_classes_is_scored_by_its_path(
    trained: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    scenes_on_disk(tmp_path / "source", 6, [(60, 30), (30, 61)])
    (tmp_path / "tree" / "test").mkdir(parents=True)
    for part in ("images", "masks"):
        (tmp_path / "source" / part).rename(tmp_path / "tree" / "test" / part)
    packed(tmp_path / "tree", tmp_path / "other", names=NAMES)
    done = gandist("evaluate", trained, f"data.path={tmp_path / 'other'}", "--json", "--out", tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["samples"] == 6
    few = gandist("evaluate", trained, f"data.path={tmp_path / 'other'}", "data.subset={samples: 3}", "--out", tmp_path)
    assert few.code == 2
    assert "`data.subset`: has no effect on scores" in few.err
    flipped = ["game.inference={flip: true}", "game.scores={boundary_tolerance: 0.01, split: test}"]
    done = gandist("evaluate", trained, f"data.path={tmp_path / 'other'}", *flipped, "--json", "--out", tmp_path)
    assert done.code == 0, done.err
    assert not any(name.startswith("train/") for name in json.loads(done.out))
    # under one split with another name, and images larger than the canvas of training
    scenes_on_disk(tmp_path / "larger", 3, [(64, 64)])
    for path in (tmp_path / "larger").rglob("*.png"):
        Image.open(path).resize((90, 70), Image.Resampling.NEAREST).save(path)
    packed(tmp_path / "larger", tmp_path / "train_alone", names=NAMES)
    done = gandist("evaluate", trained, f"data.path={tmp_path / 'train_alone'}", "--json", "--out", tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["protocol"]["split"] == "train"
    packed(tmp_path / "larger", tmp_path / "renamed", names=NAMES[::-1])
    refused = gandist("evaluate", trained, f"data.path={tmp_path / 'renamed'}", "--out", tmp_path)
    assert refused.code == 2
    assert "pack it with the same numbers and the same --names" in refused.err


def test_a_value_that_is_no_class_is_told_with_the_image_that_has_it(
    trained: Path, scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(scenes, other)
    manifest = json.loads((other / "dataset.json").read_text())
    manifest["mask"] |= {"classes": 9, "names": manifest["mask"]["names"][:9]}
    for counts in manifest["counts"].values():
        counts |= {"mask_pixels": [], "mask_present": []}
    (other / "dataset.json").write_text(json.dumps(manifest))
    failed = gandist("evaluate", trained, f"data.path={other}", "--out", tmp_path)
    assert failed.code == 1
    assert "scene_" in failed.err or ".tar: sample" in failed.err
    assert "and there are 9 classes" in failed.err


def test_what_a_run_learned_from_is_refused_whatever_is_said_of_its_data(
    trained: Path, gandist: Callable[..., Result]
) -> None:
    for more in ([], ["data.split=test"]):
        refused = gandist("evaluate", trained, "game.scores.split=train", *more)
        assert refused.code == 2
        assert "`game.scores.split`: train is what the run learns from" in refused.err


def test_names_of_strangers_become_files_that_every_system_has() -> None:
    taken: set[str] = set()
    found = [file_of(name, taken) for name in ("a.jpg", "a.png/x.jpg", "A.PNG", "../../etc/passwd", "scene.0012", "服.png", "/".join("d" * 40), "x\x00y\n.png", "")]  # fmt: skip
    assert found == ["a", "a_png/x", "A_2", "etc/passwd", "scene.0012", "服", "d/d/d/d/d/d/d/d", "x_y_", "image"]
    assert all(len(name) < 600 for name in found)


def test_a_resting_segmenter_reads_nothing(scenes: Path, tmp_path: Path) -> None:
    done = run("train", recipe_of(tmp_path, scenes), "game.adversary=null", "game.adversarial.block=3")
    assert done.code == 0, done.err
    assert rows(tmp_path / "run")[-1]["images"] == 64


def test_answers_of_predict_can_be_asked_for_otherwise(
    trained: Path, scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    wrong = gandist("predict", trained, scenes, "--inference", "{windw: [16, 16]}")
    assert wrong.code == 2
    assert "windw" in wrong.err
    for name, text in (("plain", "{}"), ("flipped", "{flip: true}")):
        assert gandist("predict", trained, scenes, "--out", tmp_path / name, "--inference", text).code == 0
    plain, flipped = ((tmp_path / name / "predictions.csv").read_text() for name in ("plain", "flipped"))
    assert plain != flipped


def test_a_segment_run_says_what_it_cannot_do(trained: Path, tmp_path: Path, gandist: Callable[..., Result]) -> None:
    for words, said in (
        (["export", trained, tmp_path / "out"], "`gandist predict` uses the segmenter"),
        (["sample", trained], "has no generator"),
    ):
        failed = gandist(*words)
        assert failed.code == 2
        assert said in failed.err


def test_a_run_that_stopped_goes_on_to_the_same_bytes(scenes: Path, tmp_path: Path) -> None:
    whole = run("train", recipe_of(tmp_path, scenes, "whole"))
    part = run("train", recipe_of(tmp_path, scenes, "part"), "run.images=32")
    rest = run("train", recipe_of(tmp_path, scenes, "part"))
    assert whole.code == part.code == rest.code == 0, (whole.err, part.err, rest.err)
    one, other = (tmp_path / name / "checkpoints" / "images_000000064" for name in ("whole", "part"))
    assert tensor_files(one) == tensor_files(other)


def test_masks_of_predict_are_palette_pngs_of_the_images_size_and_overlays_have_a_legend(
    trained: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    folder = tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    for number, size in enumerate([(97, 61), (30, 200)]):
        Image.fromarray(np.resize(scene(number).image, (*size, 3))).save(folder / f"photo {number}.png")
    Image.fromarray(scene(2).image).convert("L").save(folder / "grey.jpg")
    done = gandist("predict", trained, tmp_path / "photos", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    masks = sorted((tmp_path / "out" / "masks").rglob("*.png"))
    assert len(masks) == 3
    for path in masks:
        image = Image.open(path)
        assert image.mode == "P"
        overlay = Image.open(tmp_path / "out" / "overlays" / path.relative_to(tmp_path / "out" / "masks"))
        assert overlay.size[1] > image.size[1]
        shown = np.asarray(image)
        assert shown.max() < CLASSES
        colours = np.asarray(image.convert("RGB"))[0, 0]
        assert np.abs(colours - palette()[shown[0, 0]].mul(255).numpy()).max() <= 1
    assert "pixels by class: background" in done.out
    assert {Image.open(path).size for path in masks} == {(61, 97), (200, 30), (64, 64)}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.transform.canvas=null"], "the images of `data.path` differ in size; set `data.transform.canvas"),
        (["data.transform.crop=32"], "`canvas` has no effect beside `crop`"),
        (["game.adversary.network.kind=smal_fov"], "did you mean `small_fov`?"),
        (["game.segmenter.network.kind=dcgan"], "is not a network of this role (segmenter)"),
        (["game.adversarial.threshold=0.8"], "`threshold` has no effect unless `input` is `scaling`"),
        (["game.augmentation.scale=[2, 1]"], "the first factor must not be more than the second"),
        (
            ["game.augmentation.crop=[8, 8]", "game.adversary.network={kind: per_pixel}"],
            "needs label maps of 32 places",
        ),
        (["game.unlabelled={}"], "needs an adversary that judges places, and `small_fov` judges whole maps"),
        (["game.adversary.ema={}"], "has no effect: the adversary is dropped after training"),
        (["game.inference={overlap: 0.2}"], "`overlap` has no effect without `window`"),
        (["game.scores.split=validation"], "'validation' is not a split"),
        (["game.scores.train_samples=99"], "and the run learns from 28; use fewer"),
        (
            ["data.subset={per_class: 1}"],
            "`subset.per_class` chooses by class, and the dataset has no labels; use `subset.samples`",
        ),
        (["data.subset={samples: 99}"], "asks for 99, and the split has 28"),
        (
            ["data.subset={samples: 9}", "game.class_weights=median_frequency"],
            "nobody counted how often each class occurs",
        ),
        (["data.transform.range=[0, 1]"], "networks of the game segment take images in −1 … 1"),
        (["game.scores.boundary_tolerance=0.5"], "must be at most 0.05"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result], overrides: list[str], said: str
) -> None:
    failed = gandist("train", recipe_of(tmp_path, scenes), *overrides)
    assert failed.code == 2, failed.err
    assert said in failed.err
    assert not (tmp_path / "run").exists()


def test_a_file_with_other_weights_is_the_fault_of_the_recipe(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    path = tmp_path / "vgg.safetensors"
    save_file({"features.0.weight": torch.zeros(2, 3, 3, 3)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    network = f"{{kind: dilated8, weights: {{path: {path}, sha256: {digest}}}}}"
    failed = gandist("train", recipe_of(tmp_path, scenes), f"game.segmenter.network={network}")
    assert failed.code == 2, failed.err
    assert "`game.segmenter.network.weights`" in failed.err
    assert str(path) in failed.err


def test_what_was_answered_before_a_damaged_image_stays_listed(
    trained: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    for name in "abc":
        Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    failed = gandist("predict", trained, tmp_path, "--out", tmp_path / "out")
    assert failed.code == 1
    assert "d.png" in failed.err
    listed = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1:]
    assert [line.split(",")[1] for line in listed] == ["a.png", "b.png", "c.png"]
    assert all((tmp_path / "out" / line.split(",")[2]).is_file() for line in listed)


def test_inspect_shows_the_crops_that_the_players_see(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    sizes = []
    for crop in ("[32, 32]", "[16, 48]"):
        out = tmp_path / "sheet.png"
        assert (
            gandist(
                "inspect", recipe_of(tmp_path, scenes), f"game.augmentation.crop={crop}", "--draws", "0:1", "--out", out
            ).code
            == 0
        )
        sizes.append(Image.open(out).size)
    assert sizes[0][0] / sizes[0][1] == pytest.approx(2)
    assert sizes[1][0] / sizes[1][1] == pytest.approx(2 * (48 + LINE) / (16 + LINE))


def test_a_subset_without_labels_is_so_many_samples_chosen_by_its_seed(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    chosen = []
    for seed in (0, 0, 1):
        done = gandist(
            "inspect", recipe_of(tmp_path, scenes), f"data.subset={{samples: 5, seed: {seed}}}", "--draws", "0:3"
        )
        assert done.code == 0, done.err
        chosen.append(done.out)
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_paired_report_is_of_its_runs_and_goes_on(scenes: Path, tmp_path: Path) -> None:
    """One seed, then a second one beside it: differences, deviations and the interval are those of the runs."""
    path = recipe_of(tmp_path, scenes)

    def report(*more: object) -> subprocess.CompletedProcess[str]:
        words = [
            sys.executable,
            ROOT / "benchmarks" / "paired.py",
            path,
            "run.images=32",
            "run.evaluate_images=16",
            *more,
            "--jobs",
            2,
            "--out",
            tmp_path / "paired",
        ]
        return subprocess.run(
            [*map(str, words)], capture_output=True, text=True, env=ENVIRONMENT, timeout=200, check=False
        )

    first = report("--seeds", 1)
    assert first.returncode == 0, first.stderr
    assert "| mean_iou |" in first.stdout
    written = tmp_path / "paired" / "with_0" / "checkpoints" / "images_000000032" / "state.json"
    before = written.stat().st_mtime_ns
    both = report("--seeds", 2)
    assert both.returncode == 0, both.stderr
    assert written.stat().st_mtime_ns == before
    found = json.loads((tmp_path / "paired" / "paired.json").read_text())["scores"]["mean_iou"]
    finals = {}
    for arm in ("with", "without"):
        files = [
            next((tmp_path / "paired" / f"{arm}_{seed}" / "evaluations").glob("images_000000032*.json"))
            for seed in (0, 1)
        ]
        finals[arm] = [json.loads(file.read_text())["scores"]["mean_iou"] for file in files]
        assert found[arm]["values"] == finals[arm]
    differences = [a - b for a, b in zip(finals["with"], finals["without"], strict=True)]
    assert found["difference"]["mean"] == pytest.approx(np.mean(differences))
    assert found["difference"]["standard_deviation"] == pytest.approx(np.std(differences, ddof=1))
    assert found["difference"]["half_width"] == pytest.approx(12.706 * np.std(differences, ddof=1) / math.sqrt(2))
    assert Image.open(tmp_path / "paired" / "paired.png").size[0] > 500
    for wrong, why in ((["run.seed=1"], "is set for each run here"), (["--score", "errors"], "is none of mean_iou")):
        failed = report("--seeds", 1, *wrong)
        assert failed.returncode == 2
        assert why in failed.stderr
    for wrong, why in (
        (["game.adversarial.weight=5"], "is a run with another `game.adversarial`; name another folder"),
        (["game.inference.flip=true"], "is a run with another `game.inference`; name another folder"),
        (["--without", "game.dice=null"], "--without game.dice=null: changes nothing in this recipe"),
        (["--without", "game.scores.boundary_tolerance=0.01"], "changes `game.scores`"),
    ):
        other = report("--seeds", 1, *wrong)
        assert other.returncode == 2
        assert why in other.stderr
    packed(
        scenes_on_disk(tmp_path / "others", 35), tmp_path / "other", splits=(("train", 0.8), ("test", 0.2)), names=NAMES
    )
    other = report("--seeds", 2, "--at", 16, f"data.path={tmp_path / 'other'}")
    assert other.returncode == 2
    assert "is a run of another dataset than `data.path` names" in other.stderr
    early = report("--seeds", 2, "--at", 16)
    assert early.returncode == 0, early.stderr
    assert "after 16 images" in early.stdout
    assert json.loads((tmp_path / "paired" / "paired-at-16.json").read_text())["at_images"] == 16
    for more, why in (
        (["--seeds", 2, "--at", 17], "it has some at 16, 32"),
        (["--seeds", 3, "--at", 16], "no run to read"),
    ):
        failed = report(*more)
        assert failed.returncode == 1
        assert why in failed.stderr
        assert "Traceback" not in failed.stderr
    # Runs that were scored by other rules, or on other data than the other of their pair, are not averaged and not subtracted.
    (written,) = (tmp_path / "paired" / "with_1" / "evaluations").glob("images_000000016_*.json")
    text = written.read_text()
    for old, new, name in (
        ('"boundary_tolerance": 0.0075', '"boundary_tolerance": 0.01', "settings"),
        (f'"dataset": "{Dataset(scenes).digest}"', f'"dataset": "{64 * "0"}"', "dataset"),
    ):
        assert old in text
        written.write_text(text.replace(old, new))
        failed = report("--seeds", 2, "--at", 16)
        assert failed.returncode == 2
        assert f"were scored otherwise: `{name}`" in failed.stderr
    written.write_text(text[:-9])
    failed = report("--seeds", 2, "--at", 16)
    assert failed.returncode == 1
    assert "is no evaluation of this version" in failed.stderr
    written.unlink()
    failed = report("--seeds", 2, "--at", 16)
    assert failed.returncode == 1
    assert "the file of the scores at 16 images is not there" in failed.stderr


def scores_of(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["images"] for line in lines if "score/mean_iou" in line]


def test_one_image_is_refused_where_a_batch_norm_would_see_one_value(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    path = recipe_of(tmp_path, scenes)
    small = ["game.augmentation.crop=[4, 4]", "game.adversary=null", "run.images=2"]
    failed = gandist("train", path, *small, "run.batch=1")
    assert failed.code == 2
    assert "1 leaves one image to a batch norm of the segmenter" in failed.err
    assert not (tmp_path / "run").exists()
    assert gandist("train", path, *small, "run.batch=2", "run.evaluate_images=null").code == 0


def test_scores_that_a_stop_did_not_wait_for_are_made_up_once(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    words = ("train", recipe_of(tmp_path, scenes))
    run = tmp_path / "run"
    assert gandist(*words, "run.images=16", "run.evaluate_images=null").code == 0  # as if it had been killed there
    assert scores_of(run) == []
    assert gandist(*words, "run.images=32", "run.evaluate_images=16").code == 0
    assert scores_of(run) == [16, 32]
    for file in (run / "evaluations").glob("images_000000032*"):
        file.unlink()
    for expected in ([16, 32, 32], [16, 32, 32]):
        assert gandist(*words, "run.images=32", "run.evaluate_images=16").code == 0
        assert scores_of(run) == expected


def test_masks_and_counts_beyond_the_classes_of_the_dataset_are_told(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    shutil.copytree(scenes, tmp_path / "lie")
    written = json.loads((scenes / "dataset.json").read_text())
    words = ("train", recipe_of(tmp_path, tmp_path / "lie"), "run.evaluate_images=null")
    (tmp_path / "lie" / "dataset.json").write_text(
        json.dumps(written | {"mask": written["mask"] | {"classes": 2, "names": []}})
    )
    failed = gandist(*words)
    assert failed.code == 2
    assert "counts pixels of 11 classes, and masks have 2" in failed.err
    (tmp_path / "lie" / "dataset.json").write_text(
        json.dumps(written | {"mask": written["mask"] | {"classes": 2, "names": []}, "counts": {}})
    )
    failed = gandist(*words, f"run.folder={tmp_path / 'other'}")
    assert failed.code == 1
    assert re.search(r"has a mask with the value \d+, and there are 2 classes", failed.err)
    assert "Traceback" not in failed.err


def test_names_are_refused_before_anything_is_packed_and_a_wrong_number_of_them_costs_no_shard(
    tmp_path: Path, gandist: Callable[..., Result]
) -> None:
    source, out = scenes_on_disk(tmp_path / "source", 6), tmp_path / "out"
    for names, why in (("a,a,c", "two classes are called 'a'"), ("a,,c", "class 1 has no name")):
        refused = gandist("pack", source, out, "--names", names)
        assert refused.code == 2
        assert why in refused.err
        assert not out.exists()
    refused = gandist("pack", source, out, "--names", "a,b")
    assert refused.code == 2
    shard = next(out.glob("*.tar"))
    before = shard.stat().st_mtime_ns
    count = re.search(r"2 names for (\d+) classes", refused.err)
    assert count, refused.err
    names = ",".join(f"c{number}" for number in range(int(count[1])))
    assert gandist("pack", source, out, "--names", names).code == 0
    assert shard.stat().st_mtime_ns == before


def test_masks_without_their_images_and_the_run_of_another_game_are_refused(
    scenes: Path, tmp_path: Path, gandist: Callable[..., Result], fashion: Path, recipe: Callable[..., Path]
) -> None:
    source = scenes_on_disk(tmp_path / "source", 4)
    shutil.rmtree(source / "images")
    refused = gandist("pack", source, tmp_path / "out")
    assert refused.code == 2
    assert "4 masks, and no images" in refused.err
    assert gandist("train", recipe("gan", images=16)).code == 0
    refused = gandist("train", recipe_of(tmp_path, scenes), "--init-from", tmp_path / "gan")
    assert refused.code == 2
    assert "its players are generator, discriminator, and this recipe's are segmenter, adversary" in refused.err
    assert not (tmp_path / "run").exists()
