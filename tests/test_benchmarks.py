"""What the benchmarks wrote is what their page says, and a figure that fell is told from noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"
BASE = RESULTS / "step-cpu-amx.json"


def call(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "benchmarks" / program), *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def changed(tmp_path: Path, **changes: Any) -> Path:
    """The base with other values."""
    found = json.loads(BASE.read_text())
    for name, value in changes.items():
        found[name] = found[name] | value if isinstance(value, dict) else value
    (tmp_path / "new.json").write_text(json.dumps(found))
    return tmp_path / "new.json"


def test_the_page_of_results_is_what_the_files_say() -> None:
    done = call("results.py", "--check")
    assert done.returncode == 0, done.stderr


LOWER = float(json.loads(BASE.read_text())["ratio_quartiles"][0])


@pytest.mark.parametrize(
    ("share", "code"), [([1.03, 1.05], 0), ([4.0, 4.4], 0), ([0.9, 0.95], 0), ([0.8, 0.88], 1), ([0.2, 0.3], 1)]
)
def test_a_ratio_fell_where_its_better_quarter_is_below_the_worse_one_of_before_by_the_margin(
    tmp_path: Path, share: list[float], code: int
) -> None:
    quartiles = [LOWER * part for part in share]
    done = call("compare.py", BASE, changed(tmp_path, ratio=sum(quartiles) / 2, ratio_quartiles=quartiles))
    assert done.returncode == code, done.stderr
    assert f"ratio {json.loads(BASE.read_text())['ratio']:.2f} →" in (done.stderr if code else done.stdout)


def test_the_margin_is_what_it_is_told(tmp_path: Path) -> None:
    new = changed(tmp_path, ratio=0.92 * LOWER, ratio_quartiles=[0.9 * LOWER, 0.95 * LOWER])
    assert call("compare.py", BASE, new, "--margin", "0").returncode == 1
    assert call("compare.py", BASE, new, "--margin", "1").returncode == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "fp32"}, "precision 'bf16' and 'fp32'"),
        ({"machine": {"device": "AMD EPYC"}}, "device 'Intel(R) Xeon(R) Processor' and 'AMD EPYC'"),
        ({"setting": {"batch": 1}}, "batch 64 and 1"),
        ({"machine": {"busy_with_others": 0.3}}, "30% of what the cores did was other work"),
        ({"benchmark": "data"}, "benchmark 'step' and 'data'"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    done = call("compare.py", BASE, changed(tmp_path, **changes))
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ratio_quartiles": [1, "a"]}', '{"ratio_quartiles": [2, 1]}', None])
def test_what_is_no_figure_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "new.json"
    if text is not None:
        path.write_text(text)
    done = call("compare.py", BASE, path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"compare: {path}: ")
