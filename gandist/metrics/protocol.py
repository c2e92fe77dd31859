"""Protocol: the card that a score carries, so that only scores of one definition are compared."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Annotated, Any, ClassVar

from pydantic import Field

from gandist.recipe import InputError, Section

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class Card(Section):
    """How scores came about. All but `scores` and `versions` define them: `digest` is of those, and they must be equal."""

    scores: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)]
    dataset: Name  # its digest
    transform: Name  # of the data, on the way to the network
    split: Name
    ema: bool  # whether the average weights were judged
    precision: Name = "fp32"  # that they computed in
    settings: dict[str, int | float | str] = {}  # of the scores: neighbours, subsets, splits …
    versions: dict[str, str] = {}

    loose: ClassVar[frozenset[str]] = frozenset({"scores", "versions"})

    def defining(self) -> dict[str, Any]:
        """What defines the scores, as plain values."""
        return self.model_dump(mode="json", exclude=set(self.loose))

    def digest(self) -> str:
        """SHA-256 of what defines the scores."""
        return hashlib.sha256(json.dumps(self.defining(), sort_keys=True).encode()).hexdigest()


class Protocol(Card):
    """Of a generator: its samples beside real ones."""

    features: Name  # the network's name, the SHA-256 of its weights, and what it does to samples first
    features_digest: Name
    resize: Name
    reals: Count
    fakes: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]  # of the noise and the subsets, not of the training
    truncation: Annotated[float, Field(ge=0, strict=False)] | None = None
    labels: Name | None = None  # how the classes of the samples are chosen; None: there are none


class Tested(Card):
    """Of a network that answers, such as a classifier: its answers beside the right ones, of every sample."""

    samples: Count


def card(values: object) -> Card:
    """The card that a mapping describes; raises ValidationError."""
    kind = Tested if isinstance(values, dict) and "samples" in values else Protocol
    return values if isinstance(values, Card) else kind.model_validate(values)


def installed() -> dict[str, str]:
    """The versions of the packages whose arithmetic is in a score."""
    return {name: version(name) for name in ("gandist", "torch", "torchmetrics")}


def differences(a: Card, b: Card) -> list[str]:
    """Each field that keeps two scores from being compared, with both values."""
    first, second = a.defining(), b.defining()
    if type(a) is not type(b):
        return [f"one is of a {'generator' if isinstance(a, Protocol) else 'classifier'}, and the other is not"]
    found = [f"`{name}` {first[name]!r} and {second[name]!r}" for name in first if first[name] != second[name]]
    if not set(a.scores) & set(b.scores):
        found.insert(0, f"`scores` {list(a.scores)} and {list(b.scores)}, of which none is the same")
    return found


def refuse_comparison(a: Card, b: Card) -> list[str]:
    """Raises InputError naming each difference between two protocols; returns warnings of other versions."""
    if found := differences(a, b):
        raise InputError(f"these scores cannot be compared: {'; '.join(found)}. Evaluate one of them as the other was")
    names = sorted(a.versions.keys() | b.versions.keys())
    pairs = [(name, a.versions.get(name, "none"), b.versions.get(name, "none")) for name in names]
    return [f"{name} {one} and {other}: scores may differ by rounding" for name, one, other in pairs if one != other]
