"""Writes RESULTS.md from the JSON files that the benchmarks wrote, so that no figure in it is typed.

python benchmarks/results.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
Found = dict[str, Any]
SHORT = {"Intel(R) Xeon(R) Processor": "Intel Xeon"}


def table(head: Iterable[str], rows: Iterable[Iterable[str]], numbers: int) -> list[str]:
    """A Markdown table whose last `numbers` columns stand to the right."""
    names = [*head]
    rule = ["---"] * (len(names) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(cells)} |" for cells in (names, rule, *rows)]


def machine(found: Found) -> str:
    """Device, cores and torch in a few words."""
    if not found.get("machine"):  # a report on runs of elsewhere
        began = found["began_on"][0]
        return f"{began['device']}, torch {began['torch']}"
    here = found["machine"]
    name = SHORT.get(here.get("device", "CPU"), here.get("device", "CPU"))
    cores = "" if name.startswith("NVIDIA") else f", {here['cores']} cores"
    return f"{name}{cores}{', ' + here['capability'] if cores and 'capability' in here else ''}, torch {found['versions']['torch']}"


def step_row(name: str, found: Found) -> list[str]:
    """One line of the table of steps."""
    setting = found["setting"]
    size = f", {setting['size']} px" if setting.get("size") else ""
    speed, peak = found["images_per_second"], found["gflops_of_a_matrix_product"]
    low, high = found["ratio_quartiles"]
    graphs = " as graphs" if found.get("graphs") == "yes" else ""
    return [
        f"[{name}](results/{name}.json)",
        machine(found),
        f"{setting['network']}{size}, batch {setting['batch']}",
        found["precision"] + graphs,
        f"{speed['plain']:,.0f}",
        f"{speed['trainer']:,.0f}",
        f"{found['ratio']:.2f} ({low:.2f} … {high:.2f})",
        f"{found['gflops']['trainer'] / peak[found['precision']]:.1%}",
    ]


def paired_row(name: str, found: Found) -> list[str]:
    """One line of the table of pairs."""
    score = next(iter(found["scores"]))
    entry = found["scores"][score]
    difference, half = entry["difference"], entry["difference"]["half_width"]

    def words(part: Found, sign: str = "") -> str:
        deviation = part["standard_deviation"]
        return f"{part['mean']:{sign}.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")

    interval = "one pair" if half is None else f"{difference['mean'] - half:+.4f} … {difference['mean'] + half:+.4f}"
    at = f", after {found['at_images']:,} images" if found.get("at_images") else ""
    count = len(found["seeds"])
    return [
        f"[{name}](results/{name}.json)",
        machine(found),
        f"{found['recipe']}, without: {' '.join(found['without'])}{at}",
        f"{score}, {count} seed{'s' * (count > 1)}",
        words(entry["without"]),
        words(entry["with"]),
        words(difference, "+"),
        interval,
    ]


def checkpoint_row(name: str, found: Found) -> list[str]:
    """One line of the table of checkpoints."""

    def milliseconds(part: str) -> str:
        return f"{1000 * median(found['seconds'][part]):,.0f} ({found['ratios_to_bare'][part]:.1f}×)"

    return [
        f"[{name}](results/{name}.json)",
        machine(found),
        f"{found['setting']['network']}, width {found['setting']['width']}",
        f"{found['bytes'] / 2**20:.0f}",
        milliseconds("save"),
        milliseconds("restore"),
    ]


def scale_row(name: str, found: Found) -> list[str]:
    """One line of the table of processes: the most of them that were run."""
    setting = found["setting"]
    gpu = found["machine"]["device"].startswith("NVIDIA")

    def efficiency(kind: str) -> str:
        one, most = found[kind]["1"], max(found[kind].values(), key=lambda count: count["ranks"])
        ideal = one["images_per_second"] * (most["ranks"] if gpu else 1)  # cores are shared by all processes
        return f"{one['images_per_second']:,.0f} → {most['images_per_second']:,.0f} ({most['images_per_second'] / ideal:.1%})"

    most = max(found["weak"].values(), key=lambda count: count["ranks"])
    return [
        f"[{name}](results/{name}.json)",
        machine(found),
        f"{setting['network']}, {setting['size']} px, batch {setting['batch']}, {most['precision']}",
        f"1 → {most['ranks']}",
        efficiency("weak"),
        efficiency("strong"),
        f"{most['bytes_per_step'] / most['weights_bytes']:.3f}",
    ]


HEADS = {
    "step": [
        "file", "machine", "networks", "precision", "plain loop, images/s", "gandist, images/s", "ratio (quartiles)", "of a matrix product",
    ],
    "checkpoint": ["file", "machine", "players", "MiB", "save, ms (of bare)", "restore, ms (of bare)"],
    "scale": [
        "file", "machine", "networks", "processes", "batch for each, images/s (efficiency)", "batch for all, images/s (efficiency)", "bytes reduced, of the weights",
    ],
    "paired": ["file", "machine", "recipe", "score", "without", "with", "difference", "95 % interval"],
}  # fmt: skip
TITLES = {
    "checkpoint": "Checkpoints: checked, synced, read again and compared; against bare safetensors of the same tensors",
    "step": "Steps: the full trainer against a plain fp32 loop of the same networks, in turns",
    "scale": "Processes: one that has all cores against several that share them",
    "paired": "Pairs: the same runs with and without one part",
}
ROWS: dict[str, Callable[[str, Found], list[str]]] = {
    "step": step_row,
    "scale": scale_row,
    "paired": paired_row,
    "checkpoint": checkpoint_row,
}


def written(folder: Path) -> str:
    """The page."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = [
        "# Measured",
        "",
        "Made by `python benchmarks/results.py` from the files in `benchmarks/results`, which the benchmarks wrote; nothing here is typed.",
    ]
    for kind, row in ROWS.items():
        rows = [row(name, one) for name, one in found.items() if one["benchmark"] == kind]
        lines += ["", f"## {TITLES[kind]}", "", *table(HEADS[kind], rows, 3 if kind in ("checkpoint", "scale") else 4)]
    others = [name for name, one in found.items() if one["benchmark"] not in ROWS]
    lines += ["", "## Other files", "", *(f"* [{name}](results/{name}.json)" for name in others)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where the page is not what the files say"
    )
    arguments = parser.parse_args()
    page, text = HERE / "RESULTS.md", written(HERE / "results")
    if not arguments.check:
        page.write_text(text)
    elif not page.exists() or page.read_text() != text:
        sys.exit(f"{page}: is not what the files in results say; run python benchmarks/results.py")


if __name__ == "__main__":
    main()
