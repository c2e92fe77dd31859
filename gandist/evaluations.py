"""What was scored, for files, rows and lines of text."""

from __future__ import annotations

import json
from pathlib import Path

from gandist.data.dataset import Spec
from gandist.game import Evaluation
from gandist.metrics.protocol import card
from gandist.plots import spectra


def write_evaluation(folder: Path, images: int, found: Evaluation, channels: int = 1) -> Path:
    """Writes `evaluations/images_…_PROTOCOL.json`: the scores, and the card that says what they mean; spectra as a plot.

    `channels` are those of a signal.
    """
    digest = card(found.protocol).digest()
    path = folder / "evaluations" / f"images_{images:09d}_{digest[:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, **found._asdict()}, indent=1) + "\n")
    if "spectrum/real" in found.curves:
        spectra(found.curves["spectrum/real"], found.curves["spectrum/fake"], channels, path.with_suffix(".png"))
    return path


def channels(spec: Spec) -> int:
    """Of a signal; 1 for anything else."""
    return spec.signal.channels if spec.signal is not None else 1


def in_words(scores: dict[str, float]) -> str:
    """Scores for a line of text."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
