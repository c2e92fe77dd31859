"""What is done to an image, and to its mask alike, on its way into a batch. What is random is a function of the place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from gandist.constants import constant
from gandist.data.dataset import ImageSpec, PixelSize
from gandist.data.decode import MAX_PIXELS, Pixels
from gandist.data.order import Integers, uniform
from gandist.recipe import TransformOptions

GREY = 127  # of a canvas where there is no image: 0 in −1 … 1, but for half a step


def laid(pixels: Pixels, canvas: Pixels, fill: int) -> None:
    """Puts pixels (H, W, …) at the upper left of a canvas, and `fill` beside them; raises ValueError where they do not fit."""
    height, width = pixels.shape[:2]
    if pixels.shape == canvas.shape:
        canvas[:] = pixels
        return
    refuse_larger((canvas.shape[0], canvas.shape[1]), height, width)
    canvas[:height, :width] = pixels
    canvas[height:] = fill
    canvas[:height, width:] = fill


def moves(options: TransformOptions) -> bool:
    """Whether pixels move at all, or only change their values."""
    return bool(options.size or options.pad or options.crop or options.flip or options.canvas)


def moves_at_random(options: TransformOptions) -> bool:
    """Whether an image may come out otherwise when it is met again."""
    return options.flip or (options.crop is not None and options.crop_at == "random")


def result(options: TransformOptions, image: ImageSpec) -> ImageSpec:
    """The images that come out; raises ValueError where they cannot."""
    if options.mean is not None and len(options.mean) != image.channels:
        raise ValueError(f"`mean` has {len(options.mean)} values for images of {image.channels} channels")
    if options.size is not None and image.channels not in (1, 3):
        raise ValueError(f"`size` resizes images of 1 or 3 channels, and these have {image.channels}")
    height, width = image.height, image.width
    if height is not None and width is not None:
        height, width = sized(options, height, width)
    if options.crop is not None:
        height = width = options.crop
    if options.canvas is not None:
        if height is not None and width is not None:
            refuse_larger(options.canvas, height, width)
        height, width = options.canvas
    return ImageSpec(height=height, width=width, channels=image.channels)


def placed(options: TransformOptions, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of an image once it has its `size` and its `pad`."""
    height, width = resized(height, width, options.size)
    return height + 2 * options.pad, width + 2 * options.pad


def sized(options: TransformOptions, height: int, width: int) -> tuple[int, int]:
    """The same; raises ValueError where it cannot have that, or the `crop`."""
    height, width = placed(options, height, width)
    if options.pad >= min(height, width) - 2 * options.pad:
        inner = f"{width - 2 * options.pad}×{height - 2 * options.pad}"
        raise ValueError(f"`pad` {options.pad} is too much to mirror for images of {inner}")
    if options.crop is not None and options.crop > min(height, width):
        remedy = (
            f"set `size: {options.crop}` as well" if options.size is None else f"raise `size`, which is {options.size}"
        )
        raise ValueError(f"`crop` {options.crop} is larger than images of {width}×{height}; lower it, or {remedy}")
    return height, width


def refuse_misfits(options: TransformOptions, sizes: Iterable[PixelSize]) -> None:
    """Raises ValueError where one of several sizes cannot be cropped, mirrored or laid on the canvas."""
    found = [sized(options, *size) for size in sizes]
    if found and options.canvas is not None:
        refuse_larger(options.canvas, max(height for height, _ in found), max(width for _, width in found))


def values(options: TransformOptions, pixels: Tensor) -> Tensor:
    """Float images of uint8 ones, both (B, C, H, W)."""
    images = pixels.float()
    if options.mean is not None and options.std is not None:
        mean, std = (constant(tuple(v), images.device).view(1, -1, 1, 1) for v in (options.mean, options.std))
        return images.div_(255).sub_(mean).div_(std)
    low, high = options.range
    if (low, high) == (-1.0, 1.0):
        return images.div_(127.5).sub_(1)
    return images.mul_((high - low) / 255).add_(low)


def refuse_larger(canvas: tuple[int, int], height: int, width: int) -> None:
    """Raises ValueError where an image does not fit on the canvas."""
    if height > canvas[0] or width > canvas[1]:
        raise ValueError(
            f"`canvas` is [{canvas[0]}, {canvas[1]}], height and width, and images take [{height}, {width}]; enlarge it, or set a smaller `size` (in a run "
            "that was begun, with run.folder=NEW --init-from RUN)"
        )


def resized(height: int, width: int, size: int | None) -> tuple[int, int]:
    """(height, width) once the shorter side is `size` long."""
    if size is None:
        return height, width
    shorter = min(height, width)
    return _rounded(height * size, shorter), _rounded(width * size, shorter)


def _rounded(number: int, by: int) -> int:
    """Their ratio as the nearest whole number, the even one of two: exactly, so that images of one proportion come out alike."""
    whole, rest = divmod(number, by)
    return whole + (2 * rest > by or (2 * rest == by and whole % 2 == 1))


@dataclass(frozen=True)
class Moves:
    """Where the crop lies, in 0 … 1 of the room there is, and whether to flip: drawn for many places at once."""

    top: npt.NDArray[np.float64]
    left: npt.NDArray[np.float64]
    flip: npt.NDArray[np.bool_]

    @classmethod
    def draw(cls, options: TransformOptions, places: Integers, seed: int, purpose: str) -> Moves:
        """The moves of `places`: the same for any number of processes and workers."""
        at_random = options.crop is not None and options.crop_at == "random"
        half = np.full(len(places), 0.5)
        return cls(
            uniform(places, seed, f"{purpose}/top") if at_random else half,
            uniform(places, seed, f"{purpose}/left") if at_random else half,
            uniform(places, seed, f"{purpose}/flip") < 0.5 if options.flip else np.zeros(len(places), bool),
        )

    def apply(self, options: TransformOptions, row: int, pixels: Pixels, *, mask: bool = False) -> Pixels:
        """(H, W, C) or (H, W) pixels after the moves of a row; a mask keeps its values. Raises ValueError."""
        size = resized(pixels.shape[0], pixels.shape[1], options.size)
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"would become {size[1]}×{size[0]} pixels; the limit is {MAX_PIXELS}")
        if size != pixels.shape[:2]:
            flat = pixels.ndim == 3 and pixels.shape[2] == 1
            image = Image.fromarray(pixels[:, :, 0] if flat else pixels)
            how = Image.Resampling.NEAREST if mask else Image.Resampling.BILINEAR  # Pillow's smooths as it shrinks
            pixels = np.asarray(image.resize((size[1], size[0]), how))
            pixels = pixels[:, :, None] if flat else pixels
        if options.pad:
            border = [(options.pad, options.pad)] * 2 + [(0, 0)] * (pixels.ndim - 2)
            if options.pad >= min(pixels.shape[:2]):
                raise ValueError(
                    f"is {pixels.shape[1]}×{pixels.shape[0]}, too small to mirror {options.pad} pixels of it"
                )
            pixels = np.pad(pixels, border, mode="reflect")
        if options.crop is not None:
            room = pixels.shape[0] - options.crop, pixels.shape[1] - options.crop
            if min(room) < 0:
                raise ValueError(
                    f"is {pixels.shape[1]}×{pixels.shape[0]}, smaller than the crop of {options.crop}; "
                    "set `data.transform.size`"
                )
            top, left = int(self.top[row] * (room[0] + 1)), int(self.left[row] * (room[1] + 1))
            pixels = pixels[top : top + options.crop, left : left + options.crop]
        return pixels[:, ::-1] if self.flip[row] else pixels
