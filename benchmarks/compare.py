"""Whether a figure fell: two JSON files of one benchmark, the older one first.

    python benchmarks/compare.py benchmarks/results/step-cpu-amx.json NEW.json [--margin 0.1]

What is compared is the ratio to the plain loop of the same run, since the machine's own pace falls on both alike. It fell where the better
quarter of the new rounds is below the worse quarter of the old ones by more than the margin. Exit codes: 0 it did not fall, 1 it fell, 2 the two
cannot be compared: another benchmark, setting, precision or kind of machine, or one that was busy with other work, which costs threads that wait
for each other more than it takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trials import Help, finish

from gandist.recipe import InputError

BUSY = 0.1
SAME = ("benchmark", "game", "precision", "graphs")
SAME_SETTING = ("network", "layers", "size", "width", "batch")  # rounds and steps are how long it was measured


def read(path: Path) -> dict[str, Any]:
    """A file of benchmarks/step.py; raises InputError for any other."""
    try:
        found = json.loads(path.read_text())
        low, high = found["ratio_quartiles"]
        assert 0 < low <= high
        assert isinstance(found["setting"], dict)
        assert isinstance(found["machine"], dict)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a JSON file of benchmarks/step.py") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise InputError(
            f"{path}: is no JSON file of benchmarks/step.py, which has a ratio and its quartiles"
        ) from None
    return dict(found)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps them from being compared; a key that only one has was added later, and says nothing."""
    pairs = [(name, old, new) for name in SAME]
    pairs += [(name, old["setting"], new["setting"]) for name in SAME_SETTING]
    pairs += [(name, old["machine"], new["machine"]) for name in ("device", "capability", "threads")]
    return [
        f"{name} {a[name]!r} and {b[name]!r}" for name, a, b in pairs if name in a and name in b and a[name] != b[name]
    ]


def compare(old: dict[str, Any], new: dict[str, Any], margin: float) -> tuple[bool, str]:
    """Whether the ratio fell, and a sentence; raises InputError where the two cannot be compared."""
    if different := differences(old, new):
        raise InputError(f"cannot be compared: {'; '.join(different)}; measure both on one kind of machine")
    if (others := new["machine"].get("busy_with_others", 0.0)) > BUSY:
        raise InputError(
            f"cannot be compared: {others:.0%} of what the cores did was other work; measure again on a quiet machine"
        )
    floor = old["ratio_quartiles"][0] * (1 - margin)
    best = new["ratio_quartiles"][1]
    fell = best < floor
    return fell, (
        f"ratio {old['ratio']:.2f} → {new['ratio']:.2f}: its upper quartile {best:.2f} is {'below' if fell else 'not below'} {floor:.2f}, the "
        f"lower quartile {old['ratio_quartiles'][0]:.2f} less {margin:.0%}"
    )


def measure(arguments: argparse.Namespace) -> int:
    """Prints the comparison; the exit code."""
    if not 0 <= arguments.margin < 1:
        raise InputError(f"--margin {arguments.margin}: must be from 0 to below 1")
    fell, text = compare(read(arguments.old), read(arguments.new), arguments.margin)
    print(text, file=sys.stderr if fell else sys.stdout)
    return int(fell)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--margin", type=float, default=0.1, help="of the old figure, on top of the spread of both")
    arguments = parser.parse_args()
    finish("compare", lambda: measure(arguments))


if __name__ == "__main__":
    main()
