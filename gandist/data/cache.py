"""Cache: whole files of a remote dataset on the local disk, bounded, shared by the threads and processes of a machine."""

from __future__ import annotations

import fcntl
import os
import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gandist.data.storage import Store
from gandist.recipe import Failure, InputError

MARK = ".gandist-cache"
STALE = 3600.0  # seconds after which nobody writes a half-written file any more


class Cache:
    """Whole remote files in a local folder of this dataset alone; threads and processes may share it."""

    def __init__(self, store: Store, folder: Path, bytes_limit: int) -> None:
        self.store, self.folder, self.bytes_limit = store, folder, bytes_limit
        self._kept: frozenset[str] | None = None
        self._guard, self._locks = threading.Lock(), dict[str, threading.Lock]()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._wanted: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # `keep` removes files: not a stranger's. The mark is looked for last: a process beside this one writes it first.
            if any(folder.iterdir()) and not (folder / MARK).exists():
                raise InputError(f"{folder}: holds other files; a cache needs a folder of its own")
            (folder / MARK).touch()
        except OSError as error:
            raise InputError(f"{folder}: cannot hold a cache: {error.strerror}") from None

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        path = self.folder / f".{name}.lock"
        with lock, path.open("ab") as file:
            with suppress(OSError):  # no locks on this disk, or the file was just removed: two may fetch, harmlessly
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _holds(self, name: str, size: int) -> bool:
        try:
            os.utime(self.folder / name)  # used now: `keep` removes what was not used for longest
            return (self.folder / name).stat().st_size == size
        except OSError:
            return False

    def path(self, name: str, size: int) -> Path:
        """The local path of a file of `size` bytes, fetched where it is missing or of another size."""
        if name.startswith(".") or "/" in name:
            raise InputError(f"{self.store.location}: {name!r} is not the name of a file in it")
        if not self._holds(name, size):
            try:
                with self._alone(name):
                    if not self._holds(name, size):
                        self._make_room(size, name)
                        self.store.fetch(name, self.folder / name, size, self._stop)
            except OSError as error:
                raise Failure(f"{self.folder}: cannot be written: {error.strerror}") from None
        return self.folder / name

    def prefetch(self, names_sizes: Sequence[tuple[str, int]]) -> None:
        """Fetches files in a background thread, as far as there is room; is silent about errors: `path` meets them."""
        with self._guard:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._work, name="gandist-prefetch", daemon=True)
                self._thread.start()
        for wanted in names_sizes:
            self._wanted.put(wanted)

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None and not self._stop.is_set():
            name, size = wanted
            with suppress(InputError, Failure, OSError):
                if not self._holds(name, size) and self._make_room(size, name):
                    self.path(name, size)

    def _make_room(self, size: int, name: str = "") -> bool:
        """Whether `size` more bytes fit, after the removal of what was not used for longest and need not be kept."""
        files = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process may remove it meanwhile
                stat = entry.stat()
                if not entry.name.startswith("."):
                    files.append((stat.st_mtime_ns, stat.st_size, entry.name))
                elif entry.name.endswith(".part") and time.time() - stat.st_mtime > STALE:
                    os.unlink(entry.path)  # of a process that was killed
        total = size + sum(found for _, found, other in files if other != name)
        for _, found, other in sorted(files):
            if total > self.bytes_limit and self._kept is not None and other != name and other not in self._kept:
                (self.folder / other).unlink(missing_ok=True)
                total -= found
        return total <= self.bytes_limit

    def forget(self, name: str) -> None:
        """Removes a file, so that `path` fetches it anew."""
        (self.folder / name).unlink(missing_ok=True)

    def keep(self, names: Collection[str]) -> None:
        """Removes files beyond the limit, those not used for longest first, and never one of `names`, now or later."""
        self._kept = frozenset(names)
        self._make_room(0)

    def close(self) -> None:
        """Ends the prefetching with the range that is being read; the files stay."""
        self._stop.set()
        self._wanted.put(None)
        if self._thread is not None:
            self._thread.join(5)
