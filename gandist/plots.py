"""Plots of evaluations, for people."""

from __future__ import annotations

from pathlib import Path


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
