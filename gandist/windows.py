"""What a segmenter says of images of any size: whole or window by window, at several scales, and of their mirror images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from gandist.data.decode import Pixels
from gandist.data.transform import Moves, values
from gandist.losses import at_least_fp32
from gandist.recipe import Section, Side, TransformOptions

TOGETHER = 1 << 20  # pixels that are answered at once, where images are small enough for several


class InferenceOptions(Section):
    """How an image is answered: the mean of the probabilities over `scales` and, with `flip`, of the mirror image as well.

    With `window` (height, width) the network sees so much at a time, and the windows overlap by at least `overlap` of their size.
    """

    window: Annotated[tuple[Side, Side] | None, Field(strict=False)] = None
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    flip: bool = False
    scales: Annotated[
        tuple[Annotated[float, Field(strict=False, ge=0.1, le=8)], ...], Field(strict=False, min_length=1, max_length=8)
    ] = (1.0,)

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> InferenceOptions:
        if self.window is not None and min(self.window) < 16:
            raise ValueError(f"`window` {list(self.window)}: must be 16 pixels or more a side")
        if self.window is None and self.overlap != 0.5:
            raise ValueError("`overlap` has no effect without `window`; leave it out")
        if len({*self.scales}) < len(self.scales):
            raise ValueError(f"`scales` {list(self.scales)}: names one twice")
        return self


class Answers(NamedTuple):
    """A network that gives images (B, C, H, W) logits (B, K, ⌈H/stride⌉, ⌈W/stride⌉)."""

    module: Callable[[Tensor], Tensor]
    stride: int

    def of(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, K, *size) probabilities; the logits are brought there, bilinearly, before they become probabilities."""
        return to_size(self.module(images), self.stride, images.shape[2:], size).softmax(1)


def probabilities(answers: Answers, images: Tensor, options: InferenceOptions, size: tuple[int, int]) -> Tensor:
    """(B, K, *size) probabilities of the classes of each pixel, for images (B, C, H, W) that are shown at `size`."""
    total: Tensor | None = None
    for scale in options.scales:
        seen = images if scale == 1 else _resized(images, scale)
        for mirrored in (False, True)[: 1 + options.flip]:
            found = _whole_or_windows(answers, seen.flip(3) if mirrored else seen, options, size)
            found = found.flip(3) if mirrored else found
            total = found if total is None else total.add_(found)
    assert total is not None
    return total / (len(options.scales) * (1 + options.flip))


def _resized(images: Tensor, scale: float) -> Tensor:
    size = [max(1, round(side * scale)) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=scale < 1)


def _whole_or_windows(answers: Answers, images: Tensor, options: InferenceOptions, size: tuple[int, int]) -> Tensor:
    height, width = images.shape[2:]
    if options.window is None or (height <= options.window[0] and width <= options.window[1]):
        return answers.of(images, size)
    window = min(options.window[0], height), min(options.window[1], width)
    total: Tensor | None = None
    count = images.new_zeros(1, 1, height, width)
    for top in starts(height, window[0], options.overlap):
        for left in starts(width, window[1], options.overlap):
            place = ..., slice(top, top + window[0]), slice(left, left + window[1])
            found = answers.of(images[place], window)
            if total is None:
                total = found.new_zeros(len(images), found.shape[1], height, width)
            total[place] += found
            count[place] += 1
    assert total is not None
    found = total / count
    return found if (height, width) == size else F.interpolate(found, size, mode="bilinear")


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin so that they cover `length`, evenly, neighbours sharing at least `overlap` of a window."""
    pace = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // pace) + 1
    return [round(place * (length - window) / max(1, count - 1)) for place in range(count)]


def to_size(logits: Tensor, stride: int, seen: Sequence[int], size: Sequence[int]) -> Tensor:
    """Logits (B, K, ⌈H/stride⌉, ⌈W/stride⌉) of an image `seen` (H, W), for each pixel of it at `size`; in fp32.

    Where the stride does not divide the image, the last places reach beyond it, and what they say of there is cut off.
    """
    logits = at_least_fp32(logits)
    if stride > 1:
        whole = logits.shape[2] * stride, logits.shape[3] * stride
        logits = F.interpolate(logits, whole, mode="bilinear")[:, :, : seen[0], : seen[1]]
    return logits if [*logits.shape[2:]] == [*size] else F.interpolate(logits, [*size], mode="bilinear")


def as_seen(pixels: Pixels, transform: TransformOptions) -> Tensor:
    """(C, h, w) of an image (H, W, C) of any size as it looked in training, whole: its size and its values, and nothing random."""
    still = transform.model_copy(update={"pad": 0, "crop": None, "crop_at": "random", "flip": False, "canvas": None})
    seen = Moves.draw(still, np.zeros(1, np.uint64), 0, "whole").apply(still, 0, pixels)
    return values(still, torch.from_numpy(np.array(seen, order="C")).permute(2, 0, 1)[None])[0]


def answered(
    answers: Answers,
    images: Sequence[Pixels],
    transform: TransformOptions,
    options: InferenceOptions,
    device: torch.device,
) -> list[Tensor]:
    """Probabilities (K, H, W) of the pixels of each image (H, W, C) as it is stored; images of one size are answered together."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, pixels in enumerate(images):
        alike.setdefault(pixels.shape, []).append(place)
    found: dict[int, Tensor] = {}
    groups = (
        (shape, places[first : first + count])
        for shape, places in alike.items()
        for count in [max(1, TOGETHER // (shape[0] * shape[1]))]
        for first in range(0, len(places), count)
    )
    for shape, places in groups:
        seen = torch.stack([as_seen(images[place], transform) for place in places])
        seen = seen.to(device).contiguous(memory_format=torch.channels_last)
        for place, one in zip(places, probabilities(answers, seen, options, (shape[0], shape[1])), strict=True):
            found[place] = one
    return [found[place] for place in range(len(images))]
