"""Label maps: what an adversary of Luc et al. 2016 sees, and losses over their pixels."""

from __future__ import annotations

from math import log
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gandist.data.stream import IGNORED
from gandist.losses import at_least_fp32, mean_over_ranks

Encoding = Literal["basic", "product", "scaling"]


def at_grid(mask: Tensor, stride: int) -> Tensor:
    """Class numbers (B, H, W) at the places of a grid (B, ⌈H/stride⌉, ⌈W/stride⌉): each takes the pixel in the middle of its cell.

    Where the stride does not divide a side, the last cells reach beyond it, and take its last pixel if their middle does too.
    """
    if stride == 1:
        return mask
    rows, columns = (
        (torch.arange(-(-side // stride), device=mask.device) * stride + stride // 2).clamp_max(side - 1)
        for side in mask.shape[1:]
    )
    return mask[:, rows[:, None], columns]


def over_cells(images: Tensor, stride: int) -> Tensor:
    """The means (B, C, ⌈H/stride⌉, ⌈W/stride⌉) of images (B, C, H, W) over the cells of the same grid, as far as there are pixels."""
    return images if stride == 1 else F.avg_pool2d(images, stride, ceil_mode=True)


def one_hot(mask: Tensor, classes: int) -> Tensor:
    """(B, K, h, w) of class numbers (B, h, w): 1 at the class, and 0 in all of them where the pixel is ignored."""
    return (mask[:, None] == torch.arange(classes, device=mask.device)[:, None, None]).float()


def labelled(mask: Tensor) -> Tensor:
    """(B, 1, h, w): 1 where a pixel has a class, 0 where it is ignored."""
    return (mask[:, None] != IGNORED).float()


def scaled(truth: Tensor, answers: Tensor, threshold: float) -> Tensor:
    """The truth (B, K, h, w), one-hot, as soft as the answers are: the right class gets the answer's probability s, or `threshold` τ
    where that is more, and the others share what is left in the answer's proportions (Luc et al. 2016, `scaling`).

    Above τ it is the answer itself, so that no share is ever divided by less than 1 − τ. Pixels without a class stay 0.
    """
    right = (truth * answers).sum(1, keepdim=True)  # (B, 1, h, w)
    share = torch.where(right >= threshold, 1.0, (1 - threshold) / (1 - right))
    there = truth.sum(1, keepdim=True)
    return there * torch.where(truth > 0, right.clamp_min(threshold), answers * share)


def product(maps: Tensor, images: Tensor) -> Tensor:
    """(B, K·C, h, w): each map (B, K, h, w) times each channel of the images (B, C, h, w) (Luc et al. 2016, `product`)."""
    return rearrange(maps[:, :, None] * images[:, None], "b k c h w -> b (k c) h w")


def cross_entropy(logits: Tensor, mask: Tensor, weights: Tensor | None, mean: bool) -> Tensor:
    """−Σ w log p of the right class over the labelled pixels of an image, the mean over images (Luc et al. 2016, equation 1).

    logits: (B, K, h, w); mask: (B, h, w); weights: (K,). With `mean` it is divided by all pixels of an image, ignored ones too, which is
    the same for every image: so a weight of another term means the same in both, up to that number, on any number of processes.
    """
    total = F.cross_entropy(at_least_fp32(logits), mask, weights, ignore_index=IGNORED, reduction="sum")
    return total / (len(mask) * (mask[0].numel() if mean else 1))


def dice(probabilities: Tensor, truth: Tensor) -> Tensor:
    """1 − the mean over classes of 2 Σ p t / (Σ p + Σ t), sums over the labelled pixels of the batch of all processes.

    probabilities, truth: (B, K, h, w), 0 where a pixel is ignored. Classes that the batch does not have count nowhere.
    """
    sums = torch.stack([(probabilities * truth).sum((0, 2, 3)), probabilities.sum((0, 2, 3)), truth.sum((0, 2, 3))])
    both, answered, there = mean_over_ranks(sums)
    present = (there > 0).float()
    overlap: Tensor = 2 * both / (answered + there).clamp_min(1e-6)
    mean: Tensor = overlap.sum() / present.sum().clamp_min(1)
    return 1 - mean


def log_frequency(pixels: tuple[int, ...], present: tuple[int, ...]) -> list[float]:
    """1 / log(1.02 + p) for a class of the share p of all labelled pixels (Paszke et al. 2016, ENet), so scaled that a pixel weighs 1 on
    average; from 50 for none to 1.4 for all, before."""
    total = max(1, sum(pixels))
    found = [1 / log(1.02 + n / total) for n in pixels]
    mean = sum(weight * n / total for weight, n in zip(found, pixels, strict=True)) or 1.0
    return [weight / mean for weight in found]


def median_frequency(pixels: tuple[int, ...], present: tuple[int, ...]) -> list[float]:
    """The weight of each class: the median of all frequencies over its own (Eigen and Fergus 2015).

    The frequency of a class is its pixels over all labelled pixels of the images that it occurs in; one that occurs nowhere weighs 1.
    """
    found = [p / n if p else 0.0 for p, n in zip(pixels, present, strict=True)]
    middle = median([f for f in found if f] or [1.0])
    return [middle / f if f else 1.0 for f in found]


CLASS_WEIGHTS = {"median_frequency": median_frequency, "log_frequency": log_frequency}
