"""Plots of evaluations, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

Curve = tuple[Sequence[float], Sequence[float]]


def spectra(real: list[float], fake: list[float], channels: int, path: Path) -> None:
    """Mean log magnitudes of real and generated signals, one panel a channel, from frequency 0 to half the sampling rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # importing it takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3 * channels), layout="constrained")
    FigureCanvasAgg(figure)
    bands = len(real) // channels
    for channel in range(channels):
        axes = figure.add_subplot(channels, 1, channel + 1)
        places = [0.5 * (band + 0.5) / bands for band in range(bands)]
        rows = slice(channel * bands, (channel + 1) * bands)
        axes.plot(places, real[rows], color="black", linewidth=1.2, label="real")
        axes.plot(places, fake[rows], color="tab:red", linewidth=1.0, label="generated")
        axes.set(xlim=(0, 0.5), ylabel="mean log magnitude" + (f", channel {channel}" if channels > 1 else ""))
        axes.legend(frameon=False)
    axes.set_xlabel("frequency (cycles a sample)")
    figure.savefig(path, dpi=150)


def learning_curves(curves: Mapping[str, Sequence[Curve]], what: str, path: Path) -> None:
    """Curves (places, values) by name: the mean of a name's curves at the places that all of them have, and their spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, several in curves.items():
        tables = [dict(zip(*curve, strict=True)) for curve in several]
        places = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        if not places:
            continue
        columns = [[table[place] for table in tables] for place in places]
        (line,) = axes.plot(places, [mean(column) for column in columns], label=name, linewidth=1.2)
        if len(tables) > 1:
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    bottom, top = axes.get_ylim()
    axes.set(xlabel="images", ylabel=what, yscale="log" if top > 3 * max(bottom, 1) else "linear")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}" if top > 3 else "{x:.2f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
