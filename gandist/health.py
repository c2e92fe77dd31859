"""Health: what a row of the log says about the game, told early, once, and with what to try."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

PATIENCE = 3  # rows in a row that must say the same: one may be chance


class Symptom(NamedTuple):
    """Something wrong with a game: its name, what was measured, and what to try."""

    name: str
    finding: str
    advice: str


class Health:
    """Counts symptoms over rows; a symptom is told when it has lasted, and again only after it was gone."""

    def __init__(self) -> None:
        self._lasted: Counter[str] = Counter()

    def told(self, symptoms: Iterable[Symptom]) -> list[Symptom]:
        """The symptoms of a row that have now lasted for `PATIENCE` rows."""
        found = {symptom.name: symptom for symptom in symptoms}
        self._lasted = Counter({name: self._lasted[name] + 1 for name in found})
        return [symptom for name, symptom in found.items() if self._lasted[name] == PATIENCE]
