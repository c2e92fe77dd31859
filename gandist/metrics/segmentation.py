"""Scores of label maps, from integer counts: sums over images and processes do not round, in whatever order.

The confusion matrix is that of torchmetrics. Its scores are not used: it gives a class that occurs nowhere an IoU of 0, and
has no boundary F-score. That is of Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from gandist.recipe import InputError


def _labelled(truth: Tensor, answer: Tensor, classes: int, ignore: int | None) -> Tensor:
    """Where the truth has a class, (…) bool."""
    assert truth.shape == answer.shape, (truth.shape, answer.shape)
    known = torch.ones_like(truth, dtype=torch.bool) if ignore is None else truth != ignore
    strange = truth[known & ((truth < 0) | (truth >= classes))]
    if len(strange):
        ignored = "" if ignore is None else f", or {ignore} where a pixel is to be ignored"
        raise InputError(
            f"a label map has the number {int(strange[0])}; use the numbers of the classes, 0 … {classes - 1}{ignored}"
        )
    assert not (known & ((answer < 0) | (answer >= classes))).any(), f"an answer is not in 0 … {classes - 1}"
    return known


def confusion(truth: Tensor, answer: Tensor, classes: int, ignore: int | None) -> Tensor:
    """Labelled pixels by class of the truth (rows) and of the answer (columns), (K, K) int64, of maps (…).

    At pixels where the truth is `ignore` the answer may be any number. Raises InputError, a ValueError, where the truth is
    neither a class nor `ignore`.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # importing it takes 2 s

    known = _labelled(truth, answer, classes, ignore)
    # its own check sorts all pixels and sees no number out of range
    matrix: Tensor = multiclass_confusion_matrix(answer[known], truth[known], classes, validate_args=False)
    return matrix


def sizes(matrix: Tensor) -> Tensor:
    """Pixels per class (3, K) of a confusion matrix: where truth and answer agree, in the truth, in the answer."""
    return torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def counts(truth: Tensor, answer: Tensor, classes: int, ignore: int | None) -> Tensor:
    """Pixels per class, (3, K) int64: where truth and answer agree, in the truth, in the answer; of labelled pixels alone."""
    return sizes(confusion(truth, answer, classes, ignore))


def _ious(counts: Tensor) -> Tensor:
    """Intersection over union in float64 (K,), NaN for a class in neither truth nor answer."""
    both, truth, answer = counts.cpu().double()  # (K,) each
    ious: Tensor = both / (truth + answer - both)
    return ious


def image_scores(counts: Tensor) -> dict[str, float]:
    """`mean_iou`, over the classes in truth or answer, and `pixel_accuracy` of counts (3, K); {} without a labelled pixel."""
    both, truth, _ = counts.sum(1).tolist()
    return {"mean_iou": float(_ious(counts).nanmean()), "pixel_accuracy": both / truth} if truth else {}


def scores(matrix: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The scores of a confusion matrix (K, K): those of `image_scores`, `class_accuracy` and `iou/NAME` of each class.

    `class_accuracy` is the mean recall over the classes in the truth. A class in neither truth nor answer has no IoU: it is
    not in the mean, and not in the result. {} without a labelled pixel.
    """
    found_sizes = sizes(matrix)
    found = image_scores(found_sizes)
    if found:
        both, truth, _ = found_sizes.cpu().double()  # (K,) each
        found["class_accuracy"] = float((both / truth).nanmean())  # NaN for a class that is not in the truth
        ious = zip(names, _ious(found_sizes).tolist(), strict=True)
        found |= {f"iou/{name}": iou for name, iou in ious if not math.isnan(iou)}
    return found


def _contour(labels: Tensor, known: Tensor) -> Tensor:
    """The class of each boundary pixel and −1 elsewhere, (H, W).

    A boundary pixel is labelled and has a labelled 4-neighbour of another class, so that a contour is two pixels wide, one for
    each class. The border of the image is none, nor is that of an ignored region.
    """
    edge = torch.zeros_like(known)
    for axis in (0, 1):
        (one, other), (one_known, other_known), (one_edge, other_edge) = (
            (pixels.narrow(axis, 0, pixels.shape[axis] - 1), pixels.narrow(axis, 1, pixels.shape[axis] - 1))
            for pixels in (labels, known, edge)
        )
        change = (one != other) & one_known & other_known
        one_edge |= change
        other_edge |= change
    return labels.where(edge, -1)


def boundary_counts(
    truth: Tensor, answer: Tensor, classes: int, ignore: int | None, tolerance: float = 0.0075
) -> Tensor:
    """Boundary pixels per class of one image (H, W), (K, 4) int64: in the answer, near the truth, in the truth, near the answer.

    Near is what has a boundary pixel of its class in the other map no farther, from centre to centre, than `tolerance` times
    the diagonal, or than 1 pixel if that is more: with a diagonal under 134 the 0.0075 of the paper would ask for equality.
    Raises InputError as `confusion` does.
    """
    known = _labelled(truth, answer, classes, ignore)
    height, width = truth.shape
    # squared, with room for rounding: 3 pixels of an image of 320 × 240 are near
    reach = max(1.0, tolerance**2 * (height**2 + width**2) * (1 + 1e-9))
    margin = math.isqrt(int(reach))
    steps = range(-margin, margin + 1)
    disk = [dy * (width + 2 * margin) + dx for dy, dx in product(steps, steps) if dy**2 + dx**2 <= reach]
    drawn, wanted = (F.pad(_contour(labels, known), (margin,) * 4, value=-1).flatten() for labels in (answer, truth))
    columns = []
    for contour, other in ((drawn, wanted), (wanted, drawn)):
        places = (contour >= 0).nonzero()[:, 0]  # (M,)
        labels = contour[places]
        near = torch.zeros_like(labels, dtype=torch.bool)
        for offset in disk:
            near |= other[places + offset] == labels
        columns += [torch.bincount(labels, minlength=classes), torch.bincount(labels[near], minlength=classes)]
    return torch.stack(columns, 1)


def boundary_f(counts: Tensor) -> float | None:
    """The F-score of boundaries of counts (N, K, 4), of Csurka et al. 2013.

    2PR / (P + R) of each image and class with a boundary in truth or answer (0 where one has none), averaged over the classes
    of an image and then over images; one without any boundary is left out, and None is returned if that is all of them.
    """
    drawn, exact, wanted, recalled = counts.cpu().double().unbind(-1)  # (N, K) each
    precision, recall = exact / drawn.clamp(min=1), recalled / wanted.clamp(min=1)
    # both are 0 or none is, as near goes both ways
    f = 2 * precision * recall / (precision + recall).where(precision > 0, 1.0)
    present = ((drawn + wanted) > 0).sum(1)  # (N,)
    images = (f.sum(1) / present)[present > 0].tolist()
    return math.fsum(images) / len(images) if images else None  # fsum: in whatever order
