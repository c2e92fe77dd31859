"""How a benchmark ends: its table for a reader, its JSON, and a plot beside that."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

Result = dict[str, Any]


class Plot(NamedTuple):
    """What a result looks like: bars of medians, by name, with a line over the middle half of the values."""

    what: str
    bars: Mapping[str, Sequence[float]]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return ordered[quarter], median(ordered), ordered[-1 - quarter]


def draw(plot: Plot, title: str, path: Path) -> None:
    """The plot as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # importing it takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.4 * len(plot.bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    found = [quartiles(values) for values in plot.bars.values()]
    middles = [middle for _, middle, _ in found]
    spread = [[middle - low for low, middle, _ in found], [high - middle for _, middle, high in found]]
    drawn = axes.barh([*plot.bars], middles, xerr=spread, color="tab:blue", error_kw={"linewidth": 1})
    axes.bar_label(drawn, [f"{middle:,.0f}" if middle >= 10 else f"{middle:.3g}" for middle in middles], padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(plot.what)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def report(
    measure: Callable[[argparse.Namespace, Path], Result],
    table: Callable[[Result], str],
    plotted: Callable[[Result], Plot],
    arguments: argparse.Namespace,
) -> None:
    """Measures in a folder of its own, prints the table, and writes JSON and PNG where the JSON was asked for."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    print(table(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        machine = result["machine"]
        title = f"{result['benchmark']}: {machine.get('device', 'CPU')}, torch {result['versions']['torch']}"
        draw(plotted(result), title, arguments.json.with_suffix(".png"))
