"""Log: JSONL is the record, trackers are mirrors that may fail, the progress bar is for the eyes."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gandist.game import Table
from gandist.pictures import save_png

QUIET_SECONDS = 10.0  # between two lines of progress where there is no terminal


class Meter:
    """Means of values since they were last read; they stay on the device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._vectors: dict[tuple[str, ...], tuple[Tensor, int]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds detached scalars."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_vector(self, names: tuple[str, ...], sums: Tensor, count: int) -> None:
        """Adds sums (names,) of `count` values each, in one operation."""
        if (kept := self._vectors.get(names)) is None:
            self._vectors[names] = sums.clone(), count
        else:
            self._vectors[names] = kept[0].add_(sums), kept[1] + count

    def read(self) -> dict[str, float]:
        """The means over steps and ranks, which every rank must ask for; starts anew."""
        for names, (sums, count) in self._vectors.items():
            for name, value in zip(names, sums.unbind(), strict=True):
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + count
        self._vectors = {}
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        read = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return read


class Tracker(Protocol):
    """Where rows and pictures are mirrored to."""

    def row(self, values: dict[str, float]) -> None: ...

    def picture(self, name: str, picture: npt.NDArray[np.uint8], images: int) -> None: ...

    def table(self, name: str, table: Table, images: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases, with images as the axis. Offline unless a mode or a key is set, which is decided before it starts."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        import os

        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gandist"),
            name=folder.name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=str(folder),
            config=config,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")

    def row(self, values: dict[str, float]) -> None:
        self._run.log(values)

    def picture(self, name: str, picture: npt.NDArray[np.uint8], images: int) -> None:
        self._run.log({name: self._wandb.Image(picture.squeeze()), "images": images})

    def table(self, name: str, table: Table, images: int) -> None:
        rows = [list(row) for row in table.rows]
        self._run.log({name: self._wandb.Table(columns=list(table.columns), data=rows), "images": images})

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard event files in the run's folder, with images as the step."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("recipe", "```\n" + json.dumps(config, indent=1) + "\n```")

    def row(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, int(values["images"]))

    def picture(self, name: str, picture: npt.NDArray[np.uint8], images: int) -> None:
        self._writer.add_image(name, picture, images, dataformats="HWC")

    def table(self, name: str, table: Table, images: int) -> None:
        lines = [[_cell(value) for value in row] for row in table.rows]
        head = [list(table.columns), ["---"] * len(table.columns)]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *lines]), images)

    def close(self) -> None:
        self._writer.close()


def _cell(value: str | float | None) -> str:
    """A value in a Markdown table, whatever a stranger called it."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isprintable() and letter != "|" else "?" for letter in text)


TRACKERS: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}


class Log:
    """The record of a run, on rank 0: `log.jsonl`, one JSON object a line, and its mirrors."""

    def __init__(self, folder: Path, run_id: str, trackers: tuple[str, ...], config: dict[str, Any]) -> None:
        self.folder = folder
        self._file: IO[str] = (folder / "log.jsonl").open("a", buffering=1, encoding="utf-8")
        self._lost = 0
        self._trackers: dict[str, Tracker] = {}
        for name in trackers:
            self._mirror(name, partial(self._start, name, run_id, config))

    def _start(self, name: str, run_id: str, config: dict[str, Any]) -> None:
        self._trackers[name] = TRACKERS[name](self.folder, run_id, config)

    def _mirror(self, name: str, act: Callable[[], object]) -> None:
        """A tracker that fails costs its mirror, a line on the screen and a row of the record, never the run."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever a third party's service raises
            self._trackers.pop(name, None)
            self.event("tracker_failed", tracker=name, error=f"{type(error).__name__}: {error}")
            print(f"gandist: {name} failed and is left out from here on: {error}", file=sys.stderr)

    def _write(self, values: dict[str, Any]) -> None:
        """A line of the record; a disk that is full costs lines, said once, and never the run."""
        try:
            self._file.write(json.dumps(values) + "\n")
        except OSError as error:
            if not self._lost:
                print(f"gandist: {self._file.name}: {error.strerror}; rows are lost from here on", file=sys.stderr)
            self._lost += 1

    def event(self, name: str, **values: Any) -> None:
        """A row that is no measurement: a start, a checkpoint, a failure."""
        self._write({"event": name, **values})

    def row(self, values: dict[str, float]) -> None:
        """A row of measurements; `images` is its place."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._write(finite)
        for name, tracker in list(self._trackers.items()):
            self._mirror(name, partial(tracker.row, values))

    def picture(self, name: str, picture: npt.NDArray[np.uint8], images: int) -> None:
        """Writes `NAME/images_….png` and mirrors it; a disk that is full costs the picture."""
        path = self.folder / name / f"images_{images:09d}.png"
        try:
            save_png(picture, path)
        except OSError as error:
            print(f"gandist: {path}: {error.strerror or error}; the picture is lost", file=sys.stderr)
        self.mirror_picture(name, picture, images)

    def mirror_picture(self, name: str, picture: npt.NDArray[np.uint8], images: int) -> None:
        """Shows the trackers a picture."""
        for key, tracker in list(self._trackers.items()):
            self._mirror(key, partial(tracker.picture, name, picture, images))

    def mirror_table(self, name: str, table: Table, images: int) -> None:
        """Shows the trackers a table."""
        for key, tracker in list(self._trackers.items()):
            self._mirror(key, partial(tracker.table, name, table, images))

    def close(self) -> None:
        """Closes the mirrors and the record."""
        for name, tracker in list(self._trackers.items()):
            self._mirror(name, tracker.close)
        with contextlib.suppress(OSError):  # what could not be written was said when it was tried
            self._file.close()


class Bar:
    """Images done, images a second and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._shown, self._total = shown, total
        self._said = self._began = time.monotonic()
        self._first = done
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}% · {task.fields[speed]} images/s ·"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left"),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=total, completed=done, speed="–")

    def update(self, done: int) -> None:
        """Moves to `done` images."""
        now = time.monotonic()
        speed = (done - self._first) / max(now - self._began, 1e-9)
        self._progress.update(self._task, completed=min(done, self._total), speed=f"{speed:,.0f}")
        if self._shown and not self._console.is_terminal and now - self._said >= QUIET_SECONDS:
            self._said = now
            left = max(0, self._total - done) / max(speed, 1e-9)
            self.say(f"{done:,}/{self._total:,} images · {speed:,.0f} images/s · {left / 60:.1f} min left")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._shown:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._progress.stop()
