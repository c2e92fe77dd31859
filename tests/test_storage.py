"""Storage: the same bytes from a folder, from memory, over HTTP and from S3, whatever the network and the caller do."""

import base64
import gzip
import http.server
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gandist.data import cache as cache_module
from gandist.data import storage
from gandist.data.cache import Cache
from gandist.data.storage import Store, expand, is_remote, open_stream
from gandist.recipe import Failure, InputError

pytest.importorskip("aiohttp")

MIB = 1 << 20
NAME = "train-000000.tar"
DATA = np.random.default_rng(0).bytes(2 * MIB + 12345)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        if self.server.take("cut"):  # before the client knows of an answer
            sent = body[: len(body) // 2]
            self.close_connection = True
        else:
            sent = body
        self.send_response(status)
        if self.server.encoding:
            self.send_header("Content-Encoding", self.server.encoding)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(sent), 65536):
            self.wfile.write(sent[start : start + 65536])
            self.server.sent += len(sent[start : start + 65536])

    def do_HEAD(self) -> None:
        self.server.requests.append((self.path, None, self.client_address))
        self.answer(404)

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, self.headers.get("Range"), self.client_address))
        server.accepted.add(self.headers.get("Accept-Encoding", ""))
        if server.take("stall"):
            time.sleep(1.5)
        path = self.path.partition("?")[0]
        if path.startswith("http://"):
            path = "/" + path.split("/", 3)[3]
        if server.auth and self.headers.get("Authorization") != server.auth:
            return self.answer(401)
        if server.take("fail"):
            return self.answer(503)
        data = server.files.get(path)
        if data is None or server.gone:
            return self.answer(404)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not server.ranged or not asked:
            return self.answer(200, data)
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            return self.answer(416, Content_Range=f"bytes */{len(data)}")
        time.sleep(server.slow)
        return self.answer(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}")


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `fail`, `cut` and `stall` say how many of the next answers go wrong in that way."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"/data/{NAME}": DATA, "/data/empty": b"", "/data/one": b"1"}
        self.fail = self.cut = self.stall = self.sent = 0
        self.gone, self.ranged, self.slow, self.auth = False, True, 0.0, ""
        self.requests: list[tuple[str, str | None, object]] = []
        self.encoding, self.accepted = "", set[str]()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/data"

    def take(self, what: str) -> bool:
        with self.lock:
            left = getattr(self, what)
            setattr(self, what, max(left - 1, 0))
        return left > 0

    def handle_error(self, *_: object) -> None:
        pass  # the client went away, as it should


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    made = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    endpoint = "http://{}:{}".format(*made.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }.items():
            patch.setenv(key, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key=f"data/{NAME}", Body=DATA)
        client.put_object(Bucket="bucket", Key="data/empty", Body=b"")
        yield endpoint
    made.stop()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BACKOFF", 0.01)


@pytest.fixture(params=["folder", "file", "memory", "http", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "http":
        return Store.at(request.getfixturevalue("server").url)
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Store.at("s3://bucket/data/")
    locations = {"folder": str(tmp_path), "file": tmp_path.as_uri(), "memory": "memory://data"}
    made = Store.at(locations[request.param])
    made.write(NAME, DATA)
    made.write("empty", b"")
    return made


def test_a_range_is_the_slice_of_the_file_wherever_it_lies(store: Store, tmp_path: Path) -> None:
    size = len(DATA)
    assert store.size(NAME) == size
    draw = np.random.default_rng(1).integers
    spans = [
        (0, 1),
        (0, size),
        (size - 1, 1),
        (size, 0),
        (5, 0),
        *((int(draw(size)), int(draw(9999))) for _ in range(9)),
    ]
    spans = [(start, min(length, size - start)) for start, length in spans]
    for start, length in spans:
        assert store.range(NAME, start, length) == DATA[start : start + length]
    assert store.bytes_read == sum(length for _, length in spans)
    assert store.read(NAME, size) == DATA
    assert (store.size("empty"), store.read("empty", 0)) == (0, b"")
    store.fetch(NAME, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    store.fetch("empty", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""
    assert store.retries == 0


@pytest.mark.parametrize("chunk", [storage.CHUNK, 100_001])
def test_a_stream_is_the_file_from_its_begin_to_its_end(
    store: Store, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(storage, "CHUNK", chunk)
    with open_stream(store.name(NAME)) as stream:
        pieces = [stream.read(10), stream.read(0), stream.read(12345), stream.read(), stream.read()]
    assert b"".join(pieces) == DATA
    assert [len(piece) for piece in pieces[:3]] == [10, 0, 12345]
    with open_stream(store.name("empty")) as stream:
        assert stream.read() == b""


def test_what_is_not_there_or_too_long_or_beyond_the_end_is_said_with_its_name(store: Store) -> None:
    for call in (store.size, lambda name: store.read(name, 9), lambda name: open_stream(store.name(name))):
        with pytest.raises(InputError, match=r"absent\.tar.*(not there|No such file)"):
            call("absent.tar")
    with pytest.raises(InputError, match=rf"{NAME}: {len(DATA)} bytes are too long; the limit is 9"):
        store.read(NAME, 9)
    for start, length in ((len(DATA) - 5, 6), (len(DATA), 1), (len(DATA) + 7, 2)):
        with pytest.raises(Failure, match=rf"{NAME}: at byte {start}: "):
            store.range(NAME, start, length)


def test_a_file_that_is_gone_is_a_failure_that_names_it_soon(store: Store, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(Failure, match=r"away\.tar: at byte 7: (is gone; put it back|.*No such file)"):
        store.range("away.tar", 7, 5)
    retries = 0 if store.local else 2
    assert store.retries == retries
    assert time.monotonic() - begin < 3
    with pytest.raises(Failure, match=r"away\.tar: is (gone|not there)"):
        store.fetch("away.tar", tmp_path / "copy")
    assert {path.name for path in tmp_path.iterdir()} <= {NAME, "empty"}


def test_threads_share_a_store(store: Store) -> None:
    def look(number: int) -> bool:
        start = number * 54321 % (len(DATA) - 1000)
        return store.range(NAME, start, 1000) == DATA[start : start + 1000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(64)))
    assert store.bytes_read == 64_000


def answer_from_a_process(store: Store, queue: "multiprocessing.Queue[bytes]") -> None:
    queue.put(store.range(NAME, 17, 1000))


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_spawned_process_reads_from_the_store_it_was_handed(
    request: pytest.FixtureRequest, server: Server, kind: str
) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    server.auth = "Basic " + base64.b64encode(b"user:secret").decode()
    url = server.url.replace("//", "//user:secret@")
    store = Store.at(url if kind == "http" else "s3://bucket/data")
    assert store.range(NAME, 0, 1) == DATA[:1]  # loops and connections are open
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer_from_a_process, args=(store, queue))
    process.start()
    assert queue.get(timeout=60) == DATA[17:1017]
    process.join(60)


def test_a_server_that_fails_twice_costs_two_retries_and_no_error(server: Server, tmp_path: Path) -> None:
    store = Store.at(server.url)
    for retries, call in enumerate(
        (
            lambda: store.size(NAME) == len(DATA),
            lambda: store.range(NAME, 5, 50) == DATA[5:55],
            lambda: store.read(NAME, 1 << 30) == DATA,
            lambda: store.fetch(NAME, tmp_path / "copy") is None and (tmp_path / "copy").read_bytes() == DATA,
            lambda: open_stream(store.name(NAME)).read() == DATA,
        ),
        1,
    ):
        server.fail = 2
        assert call()
        assert store.retries == 2 * min(retries, 4)  # a stream has a store of its own
    server.fail = 99
    with pytest.raises(Failure, match=rf"{NAME}: at byte 5: cannot be read: 503.*tries: 5"):
        store.range(NAME, 5, 50)


def test_the_pauses_double_and_differ_between_ranks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pauses.append(seconds) if seconds else None)
    monkeypatch.setattr(storage, "BACKOFF", 0.2)
    store = Store.at(server.url)
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        server.fail = 5
        with pytest.raises(Failure):
            store.range(NAME, 5, 50)
    assert pauses[:4] == pauses[8:]
    assert not set(pauses[:4]) & set(pauses[4:8])
    assert all(0.5 <= pause / (0.2 * 2 ** (place % 4)) <= 1.5 for place, pause in enumerate(pauses))


def test_an_answer_cut_short_or_stalled_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "TIMEOUT", 0.3)
    store = Store.at(server.url)
    server.cut = 2
    assert store.range(NAME, 3, 300_000) == DATA[3:300_003]
    server.stall = 1
    assert store.range(NAME, 3, 300_000) == DATA[3:300_003]
    assert store.retries == 3
    server.cut = 99
    with pytest.raises(Failure, match=rf"{NAME}: at byte 3: cannot be read: .*tries: 5"):
        store.range(NAME, 3, 300)
    server.cut, server.stall = 0, 99
    begin = time.monotonic()
    with pytest.raises(Failure, match=rf"{NAME}: at byte 3: cannot be read: .*tries: 5"):
        store.range(NAME, 3, 300)
    assert time.monotonic() - begin < 5


def test_what_goes_away_after_it_was_there_is_tried_thrice(server: Server, tmp_path: Path) -> None:
    store = Store.at(server.url)
    assert store.size(NAME) == len(DATA)
    server.gone = True
    with pytest.raises(Failure, match=rf"{NAME}: at byte 0: is gone; put it back"):
        store.range(NAME, 0, 10)
    assert store.retries == 2
    assert len(server.requests) == 4
    with pytest.raises(InputError, match="is not there"):
        store.size(NAME)
    assert store.retries == 2  # what was never there is not waited for


def test_what_is_not_permitted_is_asked_for_once(server: Server) -> None:
    server.auth = "Basic nobody"
    store = Store.at(server.url)
    with pytest.raises(Failure, match="not permitted; check the credentials"):
        store.range(NAME, 0, 10)
    with pytest.raises(InputError, match="not permitted; check the credentials"):
        store.size(NAME)
    assert store.retries == 0


def test_a_connection_is_used_again(server: Server) -> None:
    store = Store.at(server.url)
    assert store.size(NAME)
    for start in range(20):
        store.range(NAME, start, 1000)
    assert len({client for _, _, client in server.requests}) == 1


def test_a_server_without_ranges_is_noticed_before_the_whole_file_is_read(server: Server) -> None:
    server.ranged = False
    server.files["/data/large"] = bytes(256 * MIB)
    store = Store.at(server.url)
    assert store.size("large") == 256 * MIB
    for start in (0, 5):
        with pytest.raises(InputError, match="sends whole files, not ranges; copy the files to a local folder"):
            store.range("large", start, 1000)
    assert server.sent < 64 * MIB  # what the sockets took
    assert store.retries == 0
    assert store.read(NAME, 1 << 30) == DATA  # a whole file needs no ranges
    with open_stream(store.name(NAME)) as stream:
        assert stream.read(5) + stream.read() == DATA
    stream = open_stream(store.name(NAME))
    server.cut = 2
    with pytest.raises(Failure, match=rf"{NAME}: at byte \d+: cannot be read"):
        open_stream(store.name(NAME)).read()
    stream.close()


def test_s3_that_throttles_is_asked_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server between: it answers as S3 does under load, then hands on to the real one."""
    import urllib.error
    import urllib.request

    asked: list[str] = []

    class Between(Handler):
        def do_GET(self) -> None:
            asked.append(self.command)
            if len(asked) <= 2:
                code = ("SlowDown", "InternalError")[len(asked) - 1]
                return self.answer((503, 500)[len(asked) - 1], f"<Error><Code>{code}</Code></Error>".encode())
            request = urllib.request.Request(s3 + self.path, headers=dict(self.headers), method=self.command)
            with urllib.request.urlopen(request) as answer:
                self.answer(answer.status, answer.read(), Content_Range=answer.headers.get("Content-Range", ""))
            return None

    with Server() as between:
        between.RequestHandlerClass = Between
        threading.Thread(target=between.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{between.server_port}")
        store = Store.at("s3://bucket/data")
        assert store.range(NAME, 11, 1000) == DATA[11:1011]
        assert (store.retries, len(asked)) == (2, 3)  # s3fs and botocore add no tries of their own
        between.shutdown()


def test_nothing_of_the_environment_of_fsspec_or_webdataset_changes_where_a_url_leads(
    server: Server, s3: str, tmp_path: Path
) -> None:
    with Server() as evil:
        threading.Thread(target=evil.serve_forever, args=(0.01,), daemon=True).start()
        lie = f"http://127.0.0.1:{evil.server_port}"
        (tmp_path / "evil.json").write_text(json.dumps({"http": {"client_kwargs": {"proxy": lie}}}))
        (tmp_path / "evil.ini").write_text(f"[s3]\nendpoint_url = {lie}\n[memory]\nskip_instance_cache = 1\n")
        environment = {
            **os.environ,
            "FSSPEC_CONFIG_DIR": str(tmp_path),
            "FSSPEC_S3": json.dumps({"endpoint_url": lie}),
            "FSSPEC_S3_ENDPOINT_URL": lie,
            "FSSPEC_HTTP": json.dumps({"client_kwargs": {"proxy": lie}}),
            "GOPEN_REWRITE": f"{server.url}={lie}",
        }

        def run(code: str) -> bytes:
            command = [sys.executable, "-c", code]
            return subprocess.run(command, env=environment, capture_output=True, timeout=120).stdout

        said = run(
            "import sys, fsspec\nfrom gandist.data.storage import Store, open_stream\n"
            f"for location in ({server.url!r}, 's3://bucket/data'):\n"
            f"    sys.stdout.buffer.write(Store.at(location).range({NAME!r}, 5, 10))\n"
            f"    sys.stdout.buffer.write(open_stream(location + '/{NAME}').read(10))\n"
            f"assert fsspec.config.conf['s3']['endpoint_url'] == {lie!r}\n"  # other libraries still have it
            "sys.stdout.buffer.write(b'done')\n"
        )
        assert said == 2 * (DATA[5:15] + DATA[:10]) + b"done"
        assert evil.requests == []
        for url in (f"{server.url}/{NAME}", f"s3://bucket/data/{NAME}"):  # and fsspec alone does go there
            asked = len(evil.requests)
            run(f"import fsspec\nprint(fsspec.open({url!r}).open().read(9))")
            assert len(evil.requests) > asked
        evil.shutdown()


def test_bytes_come_as_they_are_stored_whatever_the_server_calls_them(server: Server) -> None:
    data = gzip.compress(DATA)
    server.files["/data/a.tar.gz"], server.encoding = data, "gzip"
    store = Store.at(server.url)
    assert store.range("a.tar.gz", 100, 1000) == data[100:1100]
    assert store.read("a.tar.gz", 1 << 30) == data
    server.ranged = False
    assert open_stream(store.name("a.tar.gz")).read() == data
    assert server.accepted == {"identity"}


def test_a_file_is_replaced_not_written_over(store: Store, tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"old")
    with (tmp_path / "copy").open("rb") as old:
        store.fetch(NAME, tmp_path / "copy")
        assert old.read() == b"old"
    assert (tmp_path / "copy").read_bytes() == DATA


def test_a_proxy_of_the_environment_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    assert Store.at("http://nowhere.invalid/data").range(NAME, 5, 10) == DATA[5:15]


def failing(command: str) -> None:
    with open_stream(command, allow_pipe=True) as stream:
        stream.read()


def test_credentials_are_used_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.auth = "Basic " + base64.b64encode(b"user:pass/word").decode()
    url = server.url.replace("//", "//user:pass%2Fword@") + "?sig=s3cret"
    store = Store.at(url)
    assert store.range(NAME, 5, 10) == DATA[5:15]
    assert server.requests[-1][0] == f"/data/{NAME}?sig=s3cret"
    said = [store.location, store.name(NAME), repr(store), str(vars(Cache))]
    refused = url.replace(str(server.server_port), "1")
    calls = [
        lambda: store.size("absent"),
        lambda: store.range("absent", 0, 1),
        lambda: store.range(NAME, len(DATA), 1),
        lambda: store.read(NAME, 1),
        lambda: store.size("../up"),
        lambda: store.write(NAME, b""),
        lambda: Store.at(refused).size(NAME),
        lambda: Store.at(refused.replace(":1/", ":port/")),
        lambda: Store.at(url.replace("%2F", "/")),
        lambda: Store.at(url.replace("http://", "s3://")),
        lambda: Store.at(url.replace("http://", "ftp://")),
        lambda: Store.at("simplecache::" + url),
        lambda: Store.at(url + "::" + url),
        lambda: open_stream(url),
        lambda: open_stream("pipe:curl " + url),
        lambda: expand(url + "{"),
        lambda: expand(url + "*"),
        lambda: failing("pipe:echo " + url + " >/dev/null; exit 3"),
    ]
    for call in calls:
        try:
            call()
        except (InputError, Failure) as error:
            said.append(str(error))
    server.auth = "other"
    for call in (lambda: store.size(NAME), lambda: store.range(NAME, 0, 1)):
        with pytest.raises((InputError, Failure), match="not permitted") as refusal:
            call()
        said.append(str(refusal.value))
    assert len(said) == 4 + len(calls) + 2
    for text in said:
        assert not re.search("pass|s3cret|user:", text), text


def test_only_known_schemes_are_opened() -> None:
    assert [is_remote(text) for text in ("s3://a", "http://a/b", "S3://a", "gs://b")] == [True] * 4
    assert [is_remote(text) for text in ("/x", "x/y", "file:///x", "FILE:///x", "file:x", "pipe:x", "C", "")] == [
        False
    ] * 8
    assert {"file", "s3", "gs", "gcs", "az", "abfs", "http", "https", "memory"} == storage.SCHEMES
    for location, reason in {
        "ftp://host/x": "ftp:// is not read; known: abfs, az,",
        "simplecache::s3://bucket/x": "chained",
        "zip://a.tar::s3://bucket/x": "chained",
        "s3://bucket/x::http://host/y": "chained",
        "pipe:cat": "is a command",
        "file://host/x": "three slashes",
        "": "no folder",
        "a\0b": "no folder",
        "http:///x": "not a URL",
    }.items():
        with pytest.raises(InputError, match=reason):
            Store.at(location)
    assert Store.at("file:///a%20b/c").local == Path("/a b/c")
    assert Store.at("http://[::1]:8000/x").name("a b?#.tar") == "http://[::1]:8000/x/a%20b%3F%23.tar"


def test_a_missing_package_is_named_with_its_extra() -> None:
    hide = "import sys; sys.modules.update(dict.fromkeys(['s3fs', 'gcsfs', 'adlfs', 'aiohttp']))\n"
    code = hide + (
        "from gandist.data.storage import Store, InputError\n"
        "for scheme in ('s3', 'gs', 'gcs', 'az', 'abfs', 'http', 'https'):\n"
        "    try:\n        Store.at(scheme + '://host/x')\n    except InputError as error:\n        print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [re.search(r"gandist\[(\w+)\]", line)[1] for line in said] == ["s3", "gs", "gs", "az", "az", "http", "http"]


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a\0b"])
def test_a_name_that_leaves_the_folder_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    for call in (store.size, store.name, lambda n: store.range(n, 0, 1), lambda n: store.fetch(n, tmp_path / "x")):
        with pytest.raises(InputError, match="is not the name of a file in it"):
            call(name)


def test_http_is_not_written_to(server: Server) -> None:
    with pytest.raises(InputError, match="cannot be written over HTTP"):
        Store.at(server.url).write("a", b"")


def test_a_disk_that_cannot_be_written_is_a_failure(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="none/a: cannot be written: No such file"):
        Store.at(server.url).fetch(NAME, tmp_path / "none" / "a")
    with pytest.raises(Failure, match="/dev/full/a: cannot be written: Not a directory"):
        Store.at("/dev/full").write("a", b"")


def test_braces_stand_for_what_a_shell_makes_of_them() -> None:
    for pattern in (
        "x{000..127}.tar",
        "{a,b}-{1..3}{,x}",
        "{3..1}",
        "{08..11}",
        "x{a,bc,}",
        "s3://b/{0..2}/x?y={1,2}",
        "{5..5}",
    ):
        shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True).stdout
        assert expand(pattern) == shell.split("\n")[:-1]
    for plain in ("plain.tar", "/a/b c", "http://h/x?y", "pipe:cat *.tar"):
        assert expand(plain) == [plain]
    assert len(expand("{00000..99999}")) == 100_000


@pytest.mark.parametrize(
    "pattern",
    ["{", "}", "a}b{", "{a", "{}", "{a}", "{1..}", "{..2}", "{1..2..3..4}", "{{1..2}}", "{a,{b,c}}", "", "a\0b", "x" * 5000,
     "{0..100000}", "{1..999999999999999999}", "{1..9999999999999999999999}", "{1..1000}" * 2, "{1..99999}" * 400, "{a,b}" * 17, "{a,b}" * 700,
     "{" * 4000, "{a," * 1000 + "}" * 1000, "x" * 4000 + "{1..99999}"],
)  # fmt: skip
def test_malformed_braces_and_bombs_are_refused_at_once(pattern: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InputError) as refusal:
        expand(pattern)
    assert time.monotonic() - begin < 0.5
    assert len(str(refusal.value)) < 500


def test_a_local_pattern_is_globbed_in_order_and_a_remote_one_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]"
    folder.mkdir()
    for name in ("b2.tar", "b10.tar", "b1.tar", "c1.tar", "c.json"):
        (folder / name).touch()
    assert expand(f"{folder}/*.tar") == [f"{folder}/{n}.tar" for n in ("b1", "b10", "b2", "c1")]
    assert expand(f"{folder}/{{c,b}}?.tar") == [f"{folder}/{n}.tar" for n in ("c1", "b1", "b2")]
    assert expand(f"file://{folder}/b?.tar") == [f"{folder}/{n}.tar" for n in ("b1", "b2")]
    with pytest.raises(InputError, match="no file matches"):
        expand(f"{folder}/*.zip")
    with pytest.raises(InputError, match="local files alone"):
        expand("s3://bucket/*.tar")


def test_a_pipe_runs_where_it_is_allowed_and_nowhere_else(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for call in (open_stream, Store.at):
        with pytest.raises(InputError):
            call(f"pipe:touch {mark}")
    with pytest.raises(InputError, match="--allow-pipe on the command line"):
        open_stream(f"pipe:touch {mark}")
    assert not mark.exists()
    (tmp_path / "data").write_bytes(DATA)
    with open_stream(f"pipe:cat {tmp_path}/data | cat", allow_pipe=True) as stream:
        assert stream.read(3) + stream.read() == DATA


def test_a_command_that_fails_is_reported_and_one_not_read_out_is_ended() -> None:
    stream = open_stream("pipe:printf abc; exit 3", allow_pipe=True)
    assert stream.read() == b"abc"
    with pytest.raises(Failure, match="exit status 3"):
        stream.close()
    stream.close()  # once is enough
    for command in ("yes", "printf abc; sleep 100; exit 3"):
        begin = time.monotonic()
        with open_stream(f"pipe:{command}", allow_pipe=True) as stream:
            assert len(stream.read(2)) == 2
        assert time.monotonic() - begin < 2


@pytest.fixture
def shards(server: Server) -> dict[str, int]:
    made = {f"s{number}.tar": DATA[number : number + 1000] for number in range(6)}
    server.files |= {f"/data/{name}": data for name, data in made.items()}
    return dict.fromkeys(made, 1000)


def held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_cache_fetches_once_and_keeps_within_its_bound(
    server: Server, shards: dict[str, int], tmp_path: Path
) -> None:
    cache = Cache(Store.at(server.url), tmp_path / "cache", 3000)
    for name, size in shards.items():
        assert cache.path(name, size).read_bytes() == server.files[f"/data/{name}"]
        time.sleep(0.01)
    asked = len(server.requests)
    cache.path("s0.tar", 1000)  # used last, so the youngest
    assert len(server.requests) == asked
    cache.keep({"s1.tar"})
    assert held(cache.folder) == {"s1.tar", "s5.tar", "s0.tar"}
    cache.path("s2.tar", 1000)
    assert held(cache.folder) == {"s1.tar", "s0.tar", "s2.tar"}
    cache.keep(shards)
    for name in shards:  # what must be kept is kept, bound or not
        cache.path(name, 1000)
    assert held(cache.folder) == set(shards)
    cache.keep(())
    assert len(held(cache.folder)) == 3
    cache.close()


def test_a_file_of_another_size_is_fetched_anew_and_refused_when_the_store_has_none(
    server: Server, shards: dict[str, int], tmp_path: Path
) -> None:
    cache = Cache(Store.at(server.url), tmp_path / "cache", 10_000)
    cache.path("s0.tar", 1000).write_bytes(b"cut off")
    assert cache.path("s0.tar", 1000).read_bytes() == server.files["/data/s0.tar"]
    with pytest.raises(Failure, match=r"s0\.tar: 1000 bytes, not 999: it was replaced"):
        cache.path("s0.tar", 999)
    for name in ("../cache/s0.tar", "/s0.tar", ".gandist-cache", ".."):
        with pytest.raises(InputError, match="is not the name"):
            cache.path(name, 1000)


def test_a_half_written_file_is_never_taken_for_the_file_and_goes_with_time(
    server: Server, shards: dict[str, int], tmp_path: Path
) -> None:
    cache = Cache(Store.at(server.url), tmp_path / "cache", 10_000)
    server.cut = 99
    with pytest.raises(Failure):
        cache.path("s0.tar", 1000)
    assert held(cache.folder) == set()
    assert [path.name for path in cache.folder.iterdir()] == [".gandist-cache"]
    server.cut = 0
    half, fresh = cache.folder / ".s0.tar.1234.part", cache.folder / ".s1.tar.1234.part"
    half.write_bytes(b"half")
    fresh.write_bytes(b"half")
    os.utime(half, (1, 1))
    assert cache.path("s0.tar", 1000).read_bytes() == server.files["/data/s0.tar"]
    assert (half.exists(), fresh.exists()) == (False, True)


def test_all_that_open_a_new_cache_at_once_get_it(server: Server, tmp_path: Path) -> None:
    count = 8
    ready = threading.Barrier(count)

    def opened(number: int) -> None:
        ready.wait()
        Cache(Store.at(server.url), tmp_path / str(number), 1).close()

    for number in range(200):
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(opened, number) for _ in range(count)]:
                done.result()


def test_a_folder_with_other_files_is_not_taken_as_a_cache(server: Server, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other files; a cache needs a folder of its own"):
        Cache(Store.at(server.url), tmp_path, 1)
    with pytest.raises(InputError, match="cannot hold a cache"):
        Cache(Store.at(server.url), tmp_path / "thesis.tex", 1)


def fetch_in_a_process(
    url: str, folder: Path, gate: "multiprocessing.synchronize.Barrier", queue: "multiprocessing.Queue[bytes]"
) -> None:
    cache = Cache(Store.at(url), folder, 1 << 30)
    gate.wait(60)  # for the other process
    queue.put(cache.path(NAME, len(DATA)).read_bytes())


def no_locks(*_: object) -> None:
    raise OSError


@pytest.mark.parametrize("locks", [True, False])
def test_threads_that_want_a_file_at_once_fetch_it_once_on_a_disk_without_locks_too(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        monkeypatch.setattr(cache_module.fcntl, "flock", no_locks)
    server.slow = 0.1
    cache = Cache(Store.at(server.url), tmp_path / "cache", 1 << 30)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: cache.path(NAME, len(DATA)), range(8)))
    assert len(server.requests) == 2  # its size, and its one range
    assert {path.read_bytes() for path in paths} == {DATA}


def test_processes_that_want_a_file_at_once_fetch_it_once(server: Server, tmp_path: Path) -> None:
    server.slow = 0.3
    context = multiprocessing.get_context("spawn")
    gate, queue = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=fetch_in_a_process, args=(server.url, tmp_path / "c", gate, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) == DATA for _ in processes] == [True, True]
    for process in processes:
        process.join(60)
    assert held(tmp_path / "c") == {NAME}
    assert len(server.requests) == 2  # its size, and its one range


def test_two_fetches_of_one_file_without_a_lock_are_harmless(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CHUNK", 300_000)
    store = Store.at(server.url)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(store.fetch, NAME, tmp_path / "x") for _ in range(4)]:
            done.result()
    assert (tmp_path / "x").read_bytes() == DATA
    assert len(list(tmp_path.iterdir())) == 1


def wait_for(what: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_prefetching_fetches_ahead_as_far_as_there_is_room_and_keeps_errors_for_path(
    server: Server, shards: dict[str, int], tmp_path: Path
) -> None:
    cache = Cache(Store.at(server.url), tmp_path / "cache", 3500)
    cache.prefetch([("absent.tar", 5), *shards.items()])
    wait_for(lambda: cache._wanted.empty() and len(held(cache.folder)) == 3)
    assert held(cache.folder) == {"s0.tar", "s1.tar", "s2.tar"}
    with pytest.raises(Failure, match=r"absent\.tar: is gone"):
        cache.path("absent.tar", 5)
    cache.keep({"s2.tar"})
    cache.prefetch([("s4.tar", 1000), ("s5.tar", 1000)])
    wait_for(lambda: held(cache.folder) == {"s2.tar", "s4.tar", "s5.tar"})
    cache.close()
    assert not cache._thread.is_alive()  # type: ignore[union-attr]


def test_closing_a_cache_does_not_wait_for_the_whole_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CHUNK", 1000)
    server.slow = 0.1  # 200 s for the file
    cache = Cache(Store.at(server.url), tmp_path / "cache", 1 << 30)
    cache.prefetch([(NAME, len(DATA))])
    wait_for(lambda: len(server.requests) > 3)
    begin = time.monotonic()
    cache.close()
    cache.close()
    assert time.monotonic() - begin < 2
    assert held(cache.folder) == set()
