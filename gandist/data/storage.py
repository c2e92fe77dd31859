"""Where a dataset's files lie: a local folder or a remote one, read in ranges, with retries and plain errors."""

from __future__ import annotations

import glob
import io
import itertools
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import fsspec.asyn
import fsspec.config

from gandist.recipe import Failure, InputError
from gandist.seeding import derive

SCHEMES = frozenset({"file", "s3", "gs", "gcs", "az", "abfs", "http", "https", "memory"})
EXTRAS = {"gcs": "gs", "abfs": "az", "https": "http"}  # where the extra is not named as the scheme
MAX_NAMES = 100_000
MAX_TEXT = 1 << 26  # characters of all expanded names together
CHUNK = 8 << 20
TIMEOUT = 30.0  # seconds to connect, and without a byte
TRIES = 5
GONE_TRIES = 3  # of a file that was there: an object store may hide it for a moment
BACKOFF = 0.2  # seconds before the second try; then twice as long each time

T = TypeVar("T")


def redact(text: str) -> str:
    """`text` with the credentials and queries (a signature is a credential) of its URLs taken out."""
    text = re.sub(r"(?<=://)([^/\s:]*:\S*|[^/\s]*)@", "…@", text)  # a raw / in a password as well
    return re.sub(r"(://[^\s?]*\?)[^\s'\")]+", r"\1…", text)


def refuse_secrets(location: str, why: str) -> None:
    """Raises InputError for a URL with a password or a signature."""
    if redact(location) != location:
        raise InputError(
            f"{redact(location)}: {why}, and this URL holds a credential; put it into the environment (AWS_…, GOOGLE_…) or ~/.netrc"
        )


def is_remote(location: str) -> bool:
    """Whether `location` is a URL of anything but a local file."""
    return re.match(r"(?!file:)[A-Za-z][\w+.-]*(://|::)", location, re.I) is not None


def _local(location: str) -> Path:
    """The path that a plain name or a `file:` URL says; raises InputError for another machine's."""
    parts = re.fullmatch(r"file:(?://([^/]*))?(.*)", location, re.I | re.S)
    if parts is None:
        return Path(location)
    if parts[1] not in (None, "", "localhost"):
        raise InputError(f"{location}: a file: URL has three slashes before its path (file:///data), or none")
    return Path(unquote(parts[2]))


def _choices(inner: str) -> Sequence[str]:
    """What one pair of braces stands for; raises ValueError where it stands for nothing or for too much."""
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inner)
    if not numbers:
        if "," not in inner:
            raise ValueError("braces hold a range {000..127} or a list {a,b}")
        return inner.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if abs(last - first) >= MAX_NAMES:
        raise ValueError(f"{{{inner}}} is more than {MAX_NAMES} names")
    padded = any(len(text) > 1 and text.startswith("0") for text in numbers.groups())
    width = max(map(len, numbers.groups())) if padded else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def _braces(pattern: str) -> list[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)  # every second one stood in braces
    if any(set(part) & set("{}") for part in parts):
        raise ValueError("braces must come in pairs, and not one in another")
    choices: list[Sequence[str]] = []
    count = 1
    for place, part in enumerate(parts):
        choices.append(_choices(part) if place % 2 else [part])
        count *= len(choices[-1])
        if count > MAX_NAMES or count * len(pattern) > MAX_TEXT:  # before the next range is written out
            raise ValueError(f"stands for more than {MAX_NAMES} names, or {MAX_TEXT} characters of them; give fewer")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def expand(pattern: str) -> list[str]:
    """The names that braces (`{000..127}`, `{a,b}`) and, in a local path, `*` and `?` stand for; at most 100,000."""
    if not pattern or len(pattern) > 4096 or "\0" in pattern:
        raise InputError(f"{redact(pattern)[:80]!r}: a name has 1 to 4096 characters, none of them NUL")
    try:
        names = _braces(pattern)
    except ValueError as error:
        raise InputError(f"{redact(pattern)[:200]}: {error}") from None
    found: list[str] = []
    for name in names:
        if name.startswith("pipe:") or not re.search(r"\*" if is_remote(name) else r"[*?]", name):
            found.append(name)
            continue
        if is_remote(name):
            raise InputError(f"{redact(name)}: `*` works for local files alone; write the numbers as {{000..127}}")
        wild = str(_local(name)).replace("[", "[[]")  # `*` and `?` alone are wild
        matches = sorted(itertools.islice(glob.iglob(wild), MAX_NAMES + 1))
        if not matches:
            raise InputError(f"{name}: no file matches")
        found += matches
        if len(found) > MAX_NAMES:
            raise InputError(f"{redact(pattern)[:200]}: stands for more than {MAX_NAMES} names; give fewer")
    return found


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of any client: aiohttp, botocore, gcsfs and azure each keep it elsewhere."""
    while error is not None:
        response = getattr(error, "response", None)
        found: Any = next((getattr(error, n) for n in ("status", "status_code", "code") if hasattr(error, n)), None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code"))
            if re.search("Throttl|SlowDown|RequestTimeout$|TooManyRequests|LimitExceeded", code):
                return 429
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(found, int) and 400 <= found < 600:
            return found
        error = error.__cause__ or error.__context__
    return None


# By name, since none of these packages need be installed: aiohttp, botocore, azure-core, google-auth.
_CONNECTION = {
    "ClientConnectionError",
    "ClientPayloadError",
    "HTTPClientError",
    "IncompleteRead",
    "ResponseParserError",
}
_CONNECTION |= {"ServiceRequestError", "ServiceResponseError", "TransportError"}


def _missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or _status(error) in (404, 410)


def _transient(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if not _CONNECTION.isdisjoint(kind.__name__ for kind in type(error).__mro__):
        return True  # before the status: aiohttp calls a body cut short a 400
    status = _status(error) or 0
    return status in (408, 429) or status >= 500


def _filesystem(scheme: str, url: str) -> Any:
    """A filesystem of our own for one store."""
    options: dict[str, Any] = {}
    try:
        kind = fsspec.get_filesystem_class(scheme)
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            # trust_env: proxies. The bytes as they are stored: a tar.gz that a server labels as encoded stays one.
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True, "auto_decompress": False}}
    except ImportError:
        extra = EXTRAS.get(scheme, scheme)
        raise InputError(f"{scheme}:// needs a package that is missing: pip install 'gandist[{extra}]'") from None
    if scheme == "s3":  # tries are counted in one place, here: botocore and s3fs would multiply them to 125
        once = {"retries": {"total_max_attempts": 1}, "connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
        options = {"config_kwargs": once}
    elif scheme in ("az", "abfs"):  # the account, where the URL names it
        options = kind._get_kwargs_from_urls(url)
    # fsspec fills in what FSSPEC_* variables and the files of ~/.config/fsspec say: another endpoint, a proxy, a class
    # for the client. None of that is read, so that a URL means what it says wherever it is opened. What the clients
    # themselves read stays: AWS_* (AWS_ENDPOINT_URL too), GOOGLE_*, AZURE_*, *_proxy. GOPEN_REWRITE is webdataset's
    # and is never asked. The configuration is exchanged, not cleared: other libraries of the process may count on it.
    with _CONFIGURATION:
        kept, fsspec.config.conf = fsspec.config.conf, {}
        try:
            made = kind(skip_instance_cache=True, use_listings_cache=False, **options)
        except (ValueError, OSError) as error:  # an account or a key that the environment does not name
            raise InputError(f"{scheme}://: {redact(str(error))[:300]}") from None
        finally:
            fsspec.config.conf = kept
    if scheme == "s3":
        made.retries = 1
    return made


_CONFIGURATION = threading.Lock()


class _Short(ConnectionError):
    """Fewer bytes came than were asked for."""


@contextmanager
def aside(to: Path) -> Iterator[BinaryIO]:
    """A file of another name that takes the name `to` when all is written, and is removed when not."""
    part = to.with_name(f".{to.name}.{secrets.token_hex(6)}.part")
    try:
        with part.open("xb") as file:
            yield file
        part.replace(to)
    except OSError as error:
        raise Failure(f"{to}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            part.unlink()


class Store:
    """A folder, local or remote; threads may share it."""

    def __init__(self, location: str) -> None:
        self.retries = 0
        self.bytes_read = 0
        self.local: Path | None = None
        self._url = location
        self.location = redact(location)  # for messages; the credentials stay in _url
        self._counting = threading.Lock()
        if "\0" in location or not location:
            raise InputError(f"{self.location!r} is no folder")
        if location.startswith("pipe:"):
            raise InputError("pipe: is a command, not a folder; it can only be streamed")
        if not is_remote(location):
            self.local = _local(location)
            return
        scheme, _, rest = location.partition("://")
        scheme = scheme.lower()
        if "::" in re.sub(r"\[[^]]*\]", "", location):  # [::1] is an address
            raise InputError(f"{self.location}: chained URLs (a::b) are not read; name the folder itself")
        if scheme not in SCHEMES:
            raise InputError(f"{scheme}:// is not read; known: {', '.join(sorted(SCHEMES))}")
        self._http = scheme in ("http", "https")
        host = rest.partition("/")[0]
        if self._http:
            try:
                sound = bool(urlsplit(location).hostname) and urlsplit(location).port != 0
            except ValueError:
                sound = False
            if not sound:  # the text is not shown: what stands before a raw / may be half a password
                raise InputError(f"{scheme}://…: not a URL; in a user's secret, write / : @ as %2F %3A %40")
        elif "@" in host and (scheme not in ("az", "abfs") or ":" in host):  # abfs://container@account…
            raise InputError(f"{self.location}: credentials in the URL are not read; set them in the environment")
        self._fs = _filesystem(scheme, location)

    @classmethod
    def at(cls, location: str) -> Store:
        """The folder at `location`; raises InputError where it is not one we read, or where its package is missing."""
        return cls(location)

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return Store.at, (self._url,)  # a spawned process makes its own connections

    def _full(self, name: str) -> str:
        if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{self.location}: {name!r} is not the name of a file in it")
        if self.local is not None:
            return str(self.local / name)
        if not self._http:
            return f"{self._url.rstrip('/')}/{name}"
        parts = urlsplit(self._url)  # a query, as of a signature for the folder, stays behind the name
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))

    def name(self, name: str) -> str:
        """The full path or URL of a file, for messages: without credentials."""
        return redact(self._full(name))

    def _retried(
        self, url: str, call: Callable[[], T], at: int | None = None, there: bool = True, tries: int | None = None
    ) -> T:
        """What `call` returns; `there`: the file is known to be there, so that its absence is a failure."""
        what = redact(url) if at is None else f"{redact(url)}: at byte {at}"
        for attempt in itertools.count(1):
            try:
                return call()
            except (InputError, Failure):
                raise
            except Exception as error:
                if isinstance(error, TypeError | AttributeError | NameError | AssertionError):
                    raise  # a fault of the program
                missing, transient = _missing(error), _transient(error)
                if attempt >= (tries or (TRIES if transient else GONE_TRIES if missing and there else 1)):
                    kind = Failure if there or transient else InputError
                    if missing:
                        reason = "is gone; put it back, and run the same command again" if there else "is not there"
                    elif isinstance(error, PermissionError) or _status(error) in (401, 403):
                        reason = "not permitted; check the credentials"
                    else:
                        said = str(error).strip().split("\n")[0] or "no answer in time"
                        reason = f"cannot be read: {redact(said)[:300]} ({type(error).__name__}, tries: {attempt})"
                    raise kind(f"{what}: {reason}") from None
            with self._counting:
                self.retries += 1
            rank = os.environ.get("RANK", "0")  # ranks that fail together must not come back together
            chance = derive(int(rank) if rank.isdigit() else 0, f"retry/{url}", at or 0, attempt) / 2**63
            time.sleep(BACKOFF * 2 ** (attempt - 1) * (0.5 + chance))
        raise AssertionError

    def _wait(self, coroutine: Callable[..., Any], *arguments: Any, length: int = 0) -> Any:
        # A bound on the whole as well, at 64 KiB/s, since a server may send a byte now and then.
        return fsspec.asyn.sync(self._fs.loop, coroutine, *arguments, timeout=TIMEOUT + length / 2**16)

    # fsspec's own HTTP calls read a whole body before they look at the status, and call every error of `info`
    # FileNotFoundError; so its session and its loop are used, and the answers are looked at here.
    async def _get(self, url: str, span: str | None) -> Any:
        session = await self._fs.set_session()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={span}"} if span else {})}
        answer = await session.get(self._fs.encode_url(url), headers=headers)
        if answer.status != 416:
            answer.raise_for_status()
        return answer

    async def _ask(self, url: str) -> tuple[int | None, bool]:
        answer = await self._get(url, "0-0")
        try:
            ranged = answer.status != 200
            total = answer.headers.get("Content-Range", "").rpartition("/")[2] if ranged else answer.content_length
            if answer.content_length == 1:
                await answer.read()  # to its end, so that the connection can be used again
            return (int(total) if str(total).isdigit() else None), ranged
        finally:
            answer.close()

    async def _part(self, url: str, start: int, length: int) -> bytes:
        answer = await self._get(url, f"{start}-{start + length - 1}")
        try:
            if answer.status == 416:
                return b""
            if answer.status == 200 and (start or answer.content_length != length):
                raise InputError(
                    f"{redact(url)}: the server sends whole files, not ranges; copy the files to a local folder, "
                    "or serve them with one that knows HTTP Range"
                )
            if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise Failure(f"{redact(url)}: at byte {start}: the server sent another range")
            data = bytearray()
            while len(data) < length and (chunk := await answer.content.read(length - len(data))):
                data += chunk
            return bytes(data)
        finally:
            answer.close()

    def _length(self, url: str, there: bool) -> tuple[int | None, bool]:
        """(bytes of a file if its server says so, whether ranges of it can be read)."""

        def ask() -> tuple[int | None, bool]:
            if self._http:
                found: tuple[int | None, bool] = self._wait(self._ask, url)
                return found
            info = self._wait(self._fs._info, url) if self._fs.async_impl else self._fs.info(url)
            if info.get("type") == "directory":
                raise FileNotFoundError(url)
            return info.get("size"), True

        return self._retried(url, ask, there=there)

    def _size(self, name: str, there: bool) -> int:
        url = self._full(name)
        if self.local is None:
            size, _ = self._length(url, there)
            if size is None:
                raise InputError(f"{redact(url)}: the server does not say how long it is; copy it to a local folder")
            return size
        kind = Failure if there else InputError
        try:
            if (self.local / name).is_file():
                return (self.local / name).stat().st_size
        except OSError as error:
            raise kind(f"{url}: {error.strerror}") from None
        raise kind(f"{url}: is not there")

    def size(self, name: str) -> int:
        """The bytes of a file; raises InputError when it is not there."""
        return self._size(name, there=False)

    def read(self, name: str, limit: int) -> bytes:
        """A whole file; raises InputError when it is not there or longer than `limit`."""
        size = self.size(name)
        if size > limit:
            raise InputError(f"{self.name(name)}: {size} bytes are too long; the limit is {limit}")
        return self.range(name, 0, size)

    def range(self, name: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`, or Failure that names the file and the place."""
        return self._range(self._full(name), start, length)

    def _range(self, url: str, start: int, length: int) -> bytes:
        assert start >= 0 <= length, (start, length)
        if not length:
            return b""

        def ask() -> bytes:
            if self._http:
                data: bytes = self._wait(self._part, url, start, length, length=length)
            elif self._fs.async_impl:
                data = self._wait(lambda: self._fs._cat_file(url, start=start, end=start + length), length=length)
            else:
                data = self._fs.cat_file(url, start=start, end=start + length)
            if len(data) != length:
                raise _Short(f"cut off: {len(data)} of {length} bytes")
            return data

        data = self._retried(url, ask, start) if self.local is None else _read_local(url, start, length)
        with self._counting:
            self.bytes_read += length
        return data

    def fetch(self, name: str, to: Path, expected: int | None = None, stop: threading.Event | None = None) -> None:
        """The whole file, of `expected` bytes, to the local path `to`, which never holds half of it; `stop` breaks it off."""
        size = self._size(name, there=True)
        if expected not in (None, size):
            raise Failure(f"{self.name(name)}: {size} bytes, not {expected}: it was replaced or cut off")
        with aside(to) as file:
            for start in range(0, size, CHUNK):
                if stop is not None and stop.is_set():
                    raise Failure(f"{self.name(name)}: not fetched: the cache was closed")
                file.write(self.range(name, start, min(CHUNK, size - start)))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file whole; raises InputError over HTTP, which has no way to."""
        url = self._full(name)
        if self.local is not None:
            with aside(self.local / name) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        elif self._http:
            raise InputError(f"{redact(url)}: cannot be written over HTTP; name a local folder or an object store")
        else:
            self._retried(url, lambda: self._fs.pipe_file(url, data), there=False)


def _read_local(path: str, start: int, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise Failure(f"{path}: at byte {start}: cannot be read: {error.strerror}") from None
    if len(data) != length:
        raise Failure(f"{path}: at byte {start}: cut off: {len(data)} of {length} bytes")
    return data


class _Stream(io.RawIOBase):
    """Bytes of `more(position)` until it returns none; `done` is called once, at the end."""

    def __init__(self, more: Callable[[int], bytes], done: Callable[[], None] = lambda: None) -> None:
        self._more, self._done, self._at, self._left = more, done, 0, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")
        self._left = self._left or memoryview(self._more(self._at))
        count = min(len(into), len(self._left))
        into[:count], self._left = self._left[:count], self._left[count:]
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._done()


def _command(command: str) -> BinaryIO:
    """The output of a shell command; closing raises Failure when it failed, and ends it when it was not read out."""
    shell = ["/bin/sh", "-c", command]
    process = subprocess.Popen(shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    output, ended = process.stdout, False

    def more(_: int) -> bytes:
        nonlocal ended
        data = os.read(output.fileno(), 1 << 20)
        ended = not data
        return data

    def done() -> None:
        output.close()
        try:
            code = process.wait(TIMEOUT if ended else 0)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if ended and code:  # what was cut short by the reader may well have failed to write on
            raise Failure(f"pipe:{redact(command)[:200]}: the command failed with exit status {code}")

    return io.BufferedReader(_Stream(more, done))


def open_stream(url: str, *, allow_pipe: bool = False) -> BinaryIO:
    """One file from its begin to its end: a path, a URL or, where allowed, the output of `pipe:command`."""
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise InputError(f"{redact(url)[:80]!r} runs a command; give --allow-pipe on the command line to allow it")
        return _command(url.removeprefix("pipe:"))
    store = Store.at(url)
    if store.local is not None:
        if store.local.exists() and not store.local.is_file():
            raise InputError(f"{store.local}: is not a plain file")
        try:
            return store.local.open("rb")
        except OSError as error:
            raise InputError(f"{store.local}: cannot be read: {error.strerror}") from None
    size, ranged = store._length(url, there=False)
    if ranged and size is not None:
        known = size
        return io.BufferedReader(_Stream(lambda at: store._range(url, at, min(CHUNK, known - at))))
    # One answer from its begin to its end: such a server cannot go on from where it was cut off.
    answer = store._retried(url, lambda: store._wait(store._get, url, None), there=False)

    def more(at: int) -> bytes:
        data: bytes = store._retried(url, lambda: store._wait(answer.content.read, 1 << 20), at, tries=1)
        return data

    return io.BufferedReader(_Stream(more, lambda: store._fs.loop.call_soon_threadsafe(answer.close)))
