"""The scores of label maps are what counting pixel by pixel gives, and obey the symmetries of an image."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from gandist.metrics.segmentation import boundary_counts, boundary_f, confusion, counts, image_scores, scores

K, IGNORE = 5, 255
NAMES = [f"class {number}" for number in range(K)]


def noise(seed: int, shape: tuple[int, ...] = (2, 13, 17), ignored: float = 0.0) -> Tensor:
    """Labels at random, a share of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE)


def field(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Smooth noise, (channels, H, W)."""
    coarse = torch.randn(1, channels, height // 5, width // 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="bilinear")[0]


def blobs(seed: int, height: int = 24, width: int = 31, classes: int = K, ignored: bool = False) -> Tensor:
    """Labels in regions of some 5 pixels, and regions of ignored pixels over them where asked for."""
    labels = field(seed, classes, height, width).argmax(0)
    return labels.masked_fill(field(seed + 1000, 1, height, width)[0] > 0.6, IGNORE) if ignored else labels


def halves(column: int, height: int = 240, width: int = 320) -> Tensor:
    """Class 0 to the left of a column and class 1 from it on."""
    return (torch.arange(width) >= column).long().expand(height, width)


def f_of(truth: Tensor, answer: Tensor, classes: int = K, tolerance: float = 0.0075) -> float | None:
    return boundary_f(boundary_counts(truth, answer, classes, IGNORE, tolerance)[None])


@pytest.mark.parametrize(("ignored", "ignore"), [(0.0, None), (0.0, IGNORE), (0.3, IGNORE), (0.0, 2)])
def test_counts_and_scores_are_those_of_a_loop_over_pixels(ignored: float, ignore: int | None) -> None:
    truth, answer = noise(0, ignored=ignored), noise(1)
    pairs = [(t, a) for t, a in zip(truth.flatten().tolist(), answer.flatten().tolist(), strict=True) if t != ignore]
    matrix = confusion(truth, answer, K, ignore)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[pairs.count((t, a)) for a in range(K)] for t in range(K)]

    both = [pairs.count((k, k)) for k in range(K)]
    true = [sum(t == k for t, _ in pairs) for k in range(K)]
    drawn = [sum(a == k for _, a in pairs) for k in range(K)]
    assert counts(truth, answer, K, ignore).tolist() == [both, true, drawn]
    ious = [both[k] / (true[k] + drawn[k] - both[k]) for k in range(K)]
    recalls = [both[k] / true[k] for k in range(K) if true[k]]
    assert scores(matrix, NAMES) == pytest.approx(
        {
            "mean_iou": sum(ious) / K,
            "pixel_accuracy": sum(both) / len(pairs),
            "class_accuracy": sum(recalls) / len(recalls),
            **{f"iou/{name}": iou for name, iou in zip(NAMES, ious, strict=True)},
        }
    )


def test_the_scores_are_those_of_torchmetrics() -> None:
    truth, answer = noise(0, ignored=0.3), noise(1)
    found = scores(confusion(truth, answer, K, IGNORE), NAMES)
    ious = MulticlassJaccardIndex(K, average="none", ignore_index=IGNORE)(answer, truth)
    assert [found[f"iou/{name}"] for name in NAMES] == pytest.approx(ious.tolist(), rel=1e-6)
    for name, metric in {
        "mean_iou": MulticlassJaccardIndex(K, average="macro", ignore_index=IGNORE),
        "pixel_accuracy": MulticlassAccuracy(K, average="micro", ignore_index=IGNORE),
        "class_accuracy": MulticlassAccuracy(K, average="macro", ignore_index=IGNORE),
    }.items():
        assert found[name] == pytest.approx(float(metric(answer, truth)), rel=1e-6), name


def test_the_matrix_of_two_images_is_the_sum_of_theirs() -> None:
    truth, answer = noise(0, ignored=0.3), noise(1)
    for count in (confusion, counts):
        parts = [count(truth[i], answer[i], K, IGNORE) for i in range(2)]
        assert torch.equal(count(truth, answer, K, IGNORE), parts[0] + parts[1])


def test_the_scores_of_the_counts_of_an_image_are_those_of_its_matrix() -> None:
    truth, answer = noise(0, (13, 17), ignored=0.3), noise(1, (13, 17))
    matrix = confusion(truth, answer, K, IGNORE)
    both, true, drawn = counts(truth, answer, K, IGNORE)
    assert torch.equal(both, matrix.diagonal())
    assert torch.equal(true, matrix.sum(1))
    assert torch.equal(drawn, matrix.sum(0))
    found, of_image = scores(matrix, NAMES), image_scores(counts(truth, answer, K, IGNORE))
    assert of_image == {name: found[name] for name in ("mean_iou", "pixel_accuracy")}


@pytest.mark.parametrize("count", [confusion, counts, boundary_counts])
def test_the_answer_at_ignored_pixels_changes_nothing(count: Callable[..., Tensor]) -> None:
    truth, answer = blobs(0, ignored=True), blobs(1)
    assert 0.05 < (truth == IGNORE).float().mean() < 0.5
    expected = count(truth, answer, K, IGNORE)
    for other in (torch.full_like(answer, 3), noise(2, tuple(answer.shape)), torch.full_like(answer, -7)):
        assert torch.equal(count(truth, answer.where(truth != IGNORE, other), K, IGNORE), expected)


def test_other_numbers_for_the_classes_permute_the_scores() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    truth, answer = blobs(0), blobs(1)
    found = scores(confusion(truth, answer, K, None), NAMES)
    names = [NAMES[order.tolist().index(number)] for number in range(K)]
    assert scores(confusion(order[truth], order[answer], K, None), names) == pytest.approx(found, rel=1e-14)
    expected = boundary_counts(truth, answer, K, None)
    assert torch.equal(boundary_counts(order[truth], order[answer], K, None)[order], expected)


def test_perfect_answers_have_scores_of_exactly_one() -> None:
    truth = blobs(0, ignored=True)
    answer = truth.where(truth != IGNORE, 0)
    assert set(scores(confusion(truth, answer, K, IGNORE), NAMES).values()) == {1.0}
    assert set(image_scores(counts(truth, answer, K, IGNORE)).values()) == {1.0}
    assert f_of(truth, answer) == 1.0


def test_a_class_that_is_nowhere_is_left_out_and_one_in_the_answer_alone_has_no_recall() -> None:
    truth, answer = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])
    assert scores(confusion(truth, answer, 4, None), ["a", "b", "c", "d"]) == {
        "mean_iou": 0.5,  # of 1, 1/2 and 0
        "pixel_accuracy": 0.75,
        "class_accuracy": 0.75,  # of 1 and 1/2
        "iou/a": 1.0,
        "iou/b": 0.5,
        "iou/c": 0.0,
    }
    assert image_scores(counts(truth, answer, 4, None)) == {"mean_iou": 0.5, "pixel_accuracy": 0.75}


def test_without_a_labelled_pixel_there_are_no_scores() -> None:
    truth, answer = torch.full((4, 6), IGNORE), torch.zeros(4, 6, dtype=torch.int64)
    assert scores(confusion(truth, answer, K, IGNORE), NAMES) == {}
    assert image_scores(counts(truth, answer, K, IGNORE)) == {}
    assert f_of(truth, answer) is None


@pytest.mark.parametrize("count", [confusion, counts, boundary_counts])
@pytest.mark.parametrize(("number", "ignore"), [(K, IGNORE), (-1, IGNORE), (IGNORE, None), (IGNORE, 0)])
def test_a_truth_that_is_no_class_is_refused(count: Callable[..., Tensor], number: int, ignore: int | None) -> None:
    truth = torch.ones(3, 4, dtype=torch.int64)
    truth[1, 2] = number
    with pytest.raises(ValueError, match=rf"the number {number}; use the numbers of the classes, 0 … {K - 1}"):
        count(truth, torch.zeros_like(truth), K, ignore)


@pytest.mark.parametrize("number", [K, -1])
def test_an_answer_that_is_no_class_is_a_fault_of_the_program(number: int) -> None:
    truth = torch.ones(3, 4, dtype=torch.int64)
    with pytest.raises(AssertionError, match="an answer is not in"):
        confusion(truth, torch.full_like(truth, number), K, IGNORE)


def naive_boundary(labels: np.ndarray, known: np.ndarray, number: int) -> list[tuple[int, int]]:
    height, width = labels.shape
    found = []
    for y, x in product(range(height), range(width)):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [(v, u) for v, u in around if 0 <= v < height and 0 <= u < width and known[v, u]]
        if known[y, x] and labels[y, x] == number and any(labels[place] != number for place in inside):
            found.append((y, x))
    return found


def naive_counts(truth: Tensor, answer: Tensor, tolerance: float) -> list[list[int]]:
    known, radius = (truth != IGNORE).numpy(), max(1.0, tolerance * math.hypot(*truth.shape))

    def near(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
        return sum(any(math.dist(one, other) <= radius for other in others) for one in some)

    found = []
    for number in range(K):
        drawn, wanted = (naive_boundary(labels.numpy(), known, number) for labels in (answer, truth))
        found.append([len(drawn), near(drawn, wanted), len(wanted), near(wanted, drawn)])
    return found


@pytest.mark.parametrize("tolerance", [0.0075, 0.04, 0.06, 0.1, 0.2])  # 1, 1.6, 2.4, 3.9 and 7.8 pixels
@pytest.mark.parametrize("ignored", [False, True])
def test_boundary_counts_and_f_are_those_of_all_pairs_of_pixels(tolerance: float, ignored: bool) -> None:
    images = [(blobs(seed, ignored=ignored), blobs(seed + 10)) for seed in range(3)]
    found = torch.stack([boundary_counts(*image, K, IGNORE, tolerance) for image in images])
    expected = [naive_counts(*image, tolerance) for image in images]
    assert found.dtype == torch.int64
    assert found.tolist() == expected

    values = []
    for rows in expected:
        of_classes = []
        for drawn, exact, wanted, recalled in rows:
            if exact and recalled:
                precision, recall = exact / drawn, recalled / wanted
                of_classes.append(2 * precision * recall / (precision + recall))
            elif drawn or wanted:
                of_classes.append(0.0)
        values.append(sum(of_classes) / len(of_classes))
    assert boundary_f(found) == pytest.approx(sum(values) / 3, rel=1e-12)
    assert 0 < sum(values) < 3


@pytest.mark.parametrize("pixels", [0, 1, 2, 3])
def test_a_boundary_shifted_by_no_more_than_the_radius_is_right(pixels: int) -> None:
    """0.0075 of the diagonal of 320 × 240 is 3 pixels."""
    assert f_of(halves(100), halves(100 + pixels), 2) == 1.0
    assert f_of(halves(100), halves(100 - pixels), 2) == 1.0


def test_a_boundary_shifted_by_more_than_the_radius_is_wrong() -> None:
    assert f_of(halves(100), halves(104), 2) == 0.0
    truth, answer = halves(100).clone(), halves(100).clone()
    answer[:60, 100:104] = 0  # a quarter of the contour
    found = f_of(truth, answer, 2)
    assert found is not None
    assert 0.7 < found < 0.8


def test_one_pixel_is_near_in_an_image_of_any_size() -> None:
    assert f_of(halves(10, 20, 24), halves(11, 20, 24), 2) == 1.0
    assert f_of(halves(10, 20, 24), halves(12, 20, 24), 2) == 0.0


def test_distances_are_euclidean() -> None:
    truth, near, far = (torch.zeros(240, 320, dtype=torch.int64) for _ in range(3))
    truth[100, 100] = near[102, 102] = far[103, 101] = 1  # at 2.8 and 3.2 pixels
    assert boundary_counts(truth, near, 2, None)[1].tolist() == [1, 1, 1, 1]
    assert boundary_counts(truth, far, 2, None)[1].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "move",
    [lambda image: image.T, lambda image: image.flip(0), lambda image: image.flip(1)],
    ids=["T", "flip 0", "flip 1"],
)
def test_a_flipped_or_transposed_image_has_the_same_counts(move: Callable[[Tensor], Tensor]) -> None:
    truth, answer = blobs(0, ignored=True), blobs(1)
    for count in (confusion, counts, boundary_counts):
        expected = count(truth, answer, K, IGNORE)
        assert torch.equal(count(move(truth), move(answer), K, IGNORE), expected)


def test_truth_and_answer_exchanged_exchange_precision_and_recall() -> None:
    truth, answer = blobs(0), blobs(1)
    expected = boundary_counts(truth, answer, K, None)[:, [2, 3, 0, 1]]
    assert torch.equal(boundary_counts(answer, truth, K, None), expected)
    assert f_of(truth, answer) == f_of(answer, truth)


def test_neither_the_border_of_an_image_nor_that_of_ignored_pixels_is_a_boundary() -> None:
    truth = torch.ones(12, 16, dtype=torch.int64)
    assert not boundary_counts(truth, truth, K, IGNORE).any()
    assert f_of(truth, truth) is None
    truth[3:6, 4:9] = IGNORE
    assert not boundary_counts(truth, truth, K, IGNORE).any()
    truth[:, 8:] = IGNORE
    assert not boundary_counts(truth, halves(8, 12, 16), K, IGNORE).any()  # the neighbours at column 8 are ignored


def test_images_of_one_row_one_column_and_one_pixel_are_counted() -> None:
    row = torch.tensor([[0, 0, 1, 1, 0]])
    expected = [[2, 2, 2, 2], [2, 2, 2, 2]]
    assert boundary_counts(row, row, 2, None).tolist() == expected
    assert boundary_counts(row.T, row.T, 2, None).tolist() == expected
    assert not boundary_counts(row[:, :1], row[:, :1], 2, None).any()


def test_boundary_f_is_a_mean_over_images_of_means_over_the_classes_with_a_boundary() -> None:
    half = [4, 2, 8, 4]  # P = R = 1/2
    third = [4, 1, 2, 1]  # P = 1/4, R = 1/2
    missed, invented, absent = [0, 0, 5, 0], [5, 0, 0, 0], [0, 0, 0, 0]
    images = torch.tensor([[half, third, absent], [half, missed, invented], [absent, absent, absent]])
    first, second = (1 / 2 + 1 / 3) / 2, 1 / 6
    assert boundary_f(images[:1]) == pytest.approx(first, rel=1e-15)
    assert boundary_f(images[1:]) == pytest.approx(second, rel=1e-15)
    assert boundary_f(images) == pytest.approx((first + second) / 2, rel=1e-15)
    assert boundary_f(images[2:]) is None
    assert boundary_f(images[:0]) is None


def test_the_order_of_the_images_changes_no_bit_of_the_boundary_f() -> None:
    images = torch.stack([boundary_counts(blobs(seed), blobs(seed + 100), K, None) for seed in range(40)])
    assert boundary_f(images) == boundary_f(images.flip(0)) == boundary_f(images.roll(7, 0))


def test_the_boundary_of_an_image_of_320_by_240_takes_30_ms_of_one_core_at_most() -> None:
    truth, answer = blobs(0, 240, 320, 8), blobs(1, 240, 320, 8)
    times = []
    for _ in range(5):
        start = time.process_time()  # of all threads: other work on the machine does not count
        boundary_counts(truth, answer, 8, IGNORE)
        times.append(time.process_time() - start)
    assert min(times) < 0.03
