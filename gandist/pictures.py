"""Pictures: samples of any shape on one sheet, images as they are, signals as curves, points and numbers as plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import Tensor

from gandist.data.dataset import Spec
from gandist.palette import palette

Picture = npt.NDArray[np.uint8]

VIEW = 512  # pixels of a grid's side that small images are magnified to, by whole factors
LINES = 16  # more, where panels have lines between them
SHOWN, PLOTTED = 64, 4096  # samples of a sheet, and of one that plots them: 64 points tell nothing of a distribution
GAP = 2  # empty pixels around a curve, so that neighbours do not run into each other
SHEET = 800  # pixels of the width of a sheet with captions
GROUND = ("background", "void")  # names of classes that an overlay leaves as they are
LEGEND = 16  # pixels of a line of it
CAPTION, LETTER = 28, 6  # pixels of two lines of text, and of a letter's width
MARGIN = 40  # pixels around a plot, for its numbers
FAINT, MIDDLE = 50, 150  # grey values of lines behind a plot, and of its numbers


def plots(shape: tuple[int, ...]) -> bool:
    """Whether samples of this shape are points of a plane or single numbers, all of which go into one plot."""
    return shape in ((1, 1), (2, 1))


def shown(spec: Spec) -> int:
    """How many samples of such data a sheet is made of, where nobody says."""
    signal = spec.signal if spec.image is None else None
    return PLOTTED if signal is not None and plots((signal.channels, signal.length)) else SHOWN


def sheet(samples: Tensor, columns: int | None = None, *, turns: int = 1, like: Tensor | None = None) -> Picture:
    """(H, W, C) picture of images (N, C, H, W) in −1 … 1 or signals (N, C, L), in rows of `columns`.

    Points (N, 2, 1) are one scatter plot and numbers (N, 1, 1) one histogram. Where the samples take turns in `turns` classes,
    each class has a row. Signals are drawn to the scale of `like` where that is given, so that several sheets have the same.
    """
    if samples.ndim == 3:
        samples = samples.detach().nan_to_num(0, 0, 0)  # of a run that has diverged
    if plots(tuple(samples.shape[1:])):
        return (scatter if samples.shape[1] == 2 else histogram)(samples, samples if like is None else like)
    images = samples if samples.ndim == 4 else curves(samples, like=like)
    if 1 < turns <= len(images):
        columns = -(-len(images) // turns)
        empty = images.new_full((turns * columns - len(images), *images.shape[1:]), -1)
        images = rearrange(torch.cat([images, empty]), "(n t) c h w -> (t n) c h w", t=turns)
    return grid(images, columns)


def grid(images: Tensor, columns: int | None = None, magnify: bool = True) -> Picture:
    """(H, W, C) picture of images (N, C, H, W) in −1 … 1, in rows of `columns`, small ones magnified."""
    count, channels, height, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    empty = images.new_full((rows * columns - count, *images.shape[1:]), -1)
    pixels = torch.cat([images, empty]).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    factor = max(1, (VIEW + LINES) // (height * max(rows, columns))) if magnify else 1
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if channels not in (1, 3):
        pixels = pixels[:, :1]
    return rearrange(pixels, "(r c) k h w -> (r h) (c w) k", c=columns).cpu().numpy()


def captioned(
    images: Tensor | Sequence[Tensor], captions: Sequence[str], columns: int | None = None, side: int = 96
) -> Picture:
    """(H, W, 3) picture of images (C, H, W) in −1 … 1, each `side` pixels high or more, with a caption of two lines below it.

    Images of several sizes lie at the upper left of tiles as large as the largest. Without `columns` a row is about 800 pixels wide.
    """
    factor = max(1, -(-side // max(image.shape[1] for image in images)))
    tiles = [grid(image[None], 1, magnify=False) for image in images]
    height, width = (factor * max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    columns = min(columns or max(2, SHEET // (width + GAP)), len(tiles))
    cell = width + GAP, height + CAPTION
    whole = Image.new("RGB", (columns * cell[0], -(-len(tiles) // columns) * cell[1]), (24, 24, 24))
    draw = ImageDraw.Draw(whole)
    for place, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = place % columns * cell[0], place // columns * cell[1]
        picture = Image.fromarray(tile[:, :, 0] if tile.shape[2] == 1 else tile)
        size = tile.shape[1] * factor, tile.shape[0] * factor
        whole.paste(picture.resize(size, Image.Resampling.NEAREST), (left, top))
        lines = [line[: width // LETTER] for line in caption.split("\n")]
        draw.multiline_text((left + 2, top + height + 1), "\n".join(lines), fill=(230, 230, 230), spacing=0)
    return np.asarray(whole)


def overlay(pixels: Picture, mask: Picture, names: Sequence[str]) -> Picture:
    """(H', W', 3): an image (H, W, C) under the colours of its mask (H, W), dark where classes meet, and below it which is which."""
    factor = max(1, -(-VIEW // (2 * max(mask.shape))))
    shown = pixels if pixels.shape[2] in (1, 3) else pixels[:, :, :1]
    image = np.broadcast_to(shown, (*mask.shape, 3)).astype(np.float32)
    colours = palette().numpy() * 255
    ground = np.isin(mask, [number for number, name in enumerate(names) if name in GROUND])[:, :, None]
    mixed = np.where(ground, image, 0.55 * image + 0.45 * colours[mask])
    edge = np.zeros(mask.shape, bool)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    mixed[edge] *= 0.4
    drawn = Image.fromarray(mixed.round().astype(np.uint8)).resize((mask.shape[1] * factor, mask.shape[0] * factor), 0)
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=len(names))).tolist()
    places, left, top = [], GAP, 0
    for number in present:
        width = LEGEND + LETTER * len(names[number]) + 3 * GAP
        if left + width > drawn.width and left > GAP:
            left, top = GAP, top + LEGEND
        places.append((left, top))
        left += width
    whole = Image.new("RGB", (drawn.width, drawn.height + top + LEGEND), (24, 24, 24))
    whole.paste(drawn)
    draw = ImageDraw.Draw(whole)
    for number, (left, top) in zip(present, places, strict=True):
        red, green, blue = (int(value) for value in colours[number].round())
        draw.rectangle((left, drawn.height + top + 3, left + 10, drawn.height + top + 13), fill=(red, green, blue))
        draw.text((left + 14, drawn.height + top + 2), names[number], fill=(230, 230, 230))
    return np.asarray(whole)


def save_png(picture: Picture, path: Path) -> None:
    """Writes an (H, W, 1 or 3) picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(path)


def save_video(frames: list[Picture], path: Path, seconds: float) -> None:
    """Writes frames of (H, W, 1 or 3) as an endless WebP, forth and back, so that its end is its beginning; no pixel is changed."""
    there = [Image.fromarray(frame[:, :, 0] if frame.shape[2] == 1 else frame).convert("RGB") for frame in frames]
    first, *others = [*there, *there[-2:0:-1]]
    first.save(path, "WEBP", save_all=True, append_images=others, duration=round(1000 * seconds), loop=0, lossless=True)


def unit_range(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in −1 … 1: as they are, or from lowest to highest where they were normalised by mean and deviation."""
    low, high = images.amin(), images.amax()
    return images if low >= -1 and high <= 1 else (images - low) / (high - low) * 2 - 1


def curves(signals: Tensor, height: int = 64, width: int = 128, like: Tensor | None = None) -> Tensor:
    """(B, 1, height, width) drawings of signals (B, C, L), one channel below the other, in −1 and 1.

    A channel has one scale for all signals, or that of `like`, so that a quiet one looks quiet. A column goes from the least to
    the greatest of the values that fall into it: one value of each would show beats that are not there.
    """
    signals, like = signals.detach().double().cpu(), (signals if like is None else like).detach().double().cpu()
    low, high = like.amin((0, 2))[:, None], like.amax((0, 2))[:, None]
    channels, length = signals.shape[1:]
    height, width = height - 2 * GAP, width - 2 * GAP
    if length < width:
        signals, length = F.interpolate(signals, width, mode="linear", align_corners=True), width
    values = ((signals - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    values = torch.where(high > low, values, 0.5)
    column = torch.arange(length) * width // length
    last = (torch.arange(1, width + 1) * length + width - 1) // width - 1  # the last value of each column
    within = repeat(column, "l -> b c l", b=len(values), c=channels)
    bounds = []
    for how in ("amin", "amax"):
        found = values.new_zeros(len(values), channels, width).scatter_reduce(
            2, within, values, how, include_self=False
        )
        before = torch.cat([found[:, :, :1], values[:, :, last[:-1]]], 2)  # each column begins where the last one ended
        bounds.append(torch.minimum(found, before) if how == "amin" else torch.maximum(found, before))
    edges = torch.linspace(0, height, channels + 1).round().long()
    drawn = torch.full((len(values), 1, height, width), -1.0)
    for channel, (top, bottom) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        if bottom == top:
            continue  # more channels than pixels: some are not shown
        place = torch.arange(top, bottom).view(1, -1, 1)
        upper, lower = (((1 - b[:, None, channel]) * (bottom - top - 1)).round().long() + top for b in reversed(bounds))
        drawn[:, 0, top:bottom][(place >= upper) & (place <= lower)] = 1.0
    return F.pad(drawn, (GAP, GAP, GAP, GAP), value=-1.0)


def scatter(points: Tensor, like: Tensor) -> Picture:
    """(H, W, 1) plot of points (N, 2, 1) of a plane, both axes alike, over the square that holds `like`."""
    places, around = (p.detach().double().cpu().numpy()[:, :, 0] for p in (points, like))
    low, high = around.min(0), around.max(0)
    middle, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-6, 1e-6 * float(abs(around).max())) * 1.05
    plot = Plot(*((float(m - half), float(m + half)) for m in middle))
    across, down = plot.column(places[:, 0]), plot.row(places[:, 1])
    for right, under in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):  # a lone point is seen as well
        plot.mark(across + right, down + under)
    return plot.picture


def histogram(numbers: Tensor, like: Tensor) -> Picture:
    """(H, W, 1) histogram of numbers (N, 1, 1) over the range of `like`, in 64 bars as high as their density."""
    values, around = (n.detach().double().cpu().numpy().ravel() for n in (numbers, like))
    low, high = float(around.min()), float(around.max())
    if high - low <= 1e-6 * max(abs(low), abs(high), 1.0):
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    counts, edges = np.histogram(values, 64, (low, high))
    density = counts / (len(values) * (edges[1] - edges[0]))
    plot = Plot((low, high), (0.0, max(float(density.max()), 1e-9) * 1.05))
    across, tops = plot.column(edges), plot.row(density)
    for left, right, top in zip(across[:-1].tolist(), across[1:].tolist(), tops.tolist(), strict=True):
        plot.picture[top + 1 : MARGIN + VIEW, left : right - 1] = 255  # nothing at all where the density is 0
    return plot.picture


class Plot:
    """A black square with faint lines at round numbers, and these numbers beside it; what is drawn into it is up to the caller."""

    def __init__(self, across: tuple[float, float], up: tuple[float, float]) -> None:
        self.across, self.up = across, up
        image = Image.new("L", (VIEW + 2 * MARGIN, VIEW + 2 * MARGIN))
        draw = ImageDraw.Draw(image)
        first, last = MARGIN, MARGIN + VIEW - 1
        for number in _round_numbers(*across):
            (column,) = self.column(np.array([number])).tolist()
            draw.line((column, first, column, last), fill=FAINT)
            draw.text((column, last + MARGIN // 3), f"{number:g}", fill=MIDDLE, anchor="mm")
        for number in _round_numbers(*up):
            (row,) = self.row(np.array([number])).tolist()
            draw.line((first, row, last, row), fill=FAINT)
            draw.text((first - 4, row), f"{number:g}", fill=MIDDLE, anchor="rm")
        draw.rectangle((first - 1, first - 1, last + 1, last + 1), outline=MIDDLE)
        self.picture: Picture = np.array(image)[:, :, None]

    def column(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Where values of the horizontal axis lie in the picture."""
        return MARGIN + _pixels(values, self.across)

    def row(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Where values of the vertical axis lie in the picture; it points up."""
        return MARGIN + VIEW - 1 - _pixels(values, self.up)

    def mark(self, columns: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> None:
        """Makes pixels white, but for those outside."""
        inside = (np.minimum(columns, rows) >= MARGIN) & (np.maximum(columns, rows) < MARGIN + VIEW)
        self.picture[rows[inside], columns[inside]] = 255


def _pixels(values: npt.NDArray[np.float64], axis: tuple[float, float]) -> npt.NDArray[np.int64]:
    """0 … VIEW−1 for values on the axis; what lies far off it comes to lie just off it."""
    share = (values - axis[0]) / (axis[1] - axis[0])
    pixels: npt.NDArray[np.int64] = np.rint(share.clip(-1, 2) * (VIEW - 1)).astype(np.int64)
    return pixels


def _round_numbers(low: float, high: float) -> list[float]:
    """At most seven multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = power * next(n for n in (1, 2, 5, 10, 20) if n * power >= (high - low) / 6)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
