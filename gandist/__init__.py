"""gandist trains networks that play against each other: any number of processes, stopped at any moment, one result."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from gandist.exported import Exported

__version__ = "0.1.0"


def load(folder: str | Path) -> Exported:
    """The generator or discriminator of a folder that `gandist export` wrote; see `gandist.exported.load`."""
    from gandist.exported import load as read  # here, so that importing gandist imports no torch

    return read(folder)
