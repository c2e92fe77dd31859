"""What was scored, for files, rows and lines of text."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from gandist.data.dataset import Spec
from gandist.game import Evaluation
from gandist.metrics.protocol import card
from gandist.pictures import captioned, save_png
from gandist.plots import spectra


def write_evaluation(folder: Path, images: int, found: Evaluation, channels: int = 1) -> Path:
    """Writes `evaluations/images_…_PROTOCOL.json`: the scores, and the card that says what they mean; beside it tables as CSV, pictures,
    and spectra as a plot.

    `channels` are those of a signal.
    """
    digest = card(found.protocol).digest()
    path = folder / "evaluations" / f"images_{images:09d}_{digest[:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"scores": found.scores, "protocol": found.protocol, "curves": found.curves}
    path.write_text(json.dumps({"images": images, **kept}, indent=1) + "\n")
    for name, table in found.tables.items():
        with path.with_name(f"{path.stem}_{name}.csv").open(
            "w", newline="", encoding="utf-8", errors="backslashreplace"
        ) as file:
            csv.writer(file, lineterminator="\n").writerows([table.columns, *table.rows])
    for name, panels in found.panels.items():
        save_png(captioned(panels.images, panels.captions), path.with_name(f"{path.stem}_{name}.png"))
    if "spectrum/real" in found.curves:
        spectra(found.curves["spectrum/real"], found.curves["spectrum/fake"], channels, path.with_suffix(".png"))
    return path


def channels(spec: Spec) -> int:
    """Of a signal; 1 for anything else."""
    return spec.signal.channels if spec.signal is not None else 1


def in_words(scores: dict[str, float]) -> str:
    """Scores for a line of text, without those of single classes."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if not name.startswith("iou/"))
