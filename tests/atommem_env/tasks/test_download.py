"""Downloads, from a real server on this machine that does all that servers do."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import tyro

from atommem_env.errors import DataError, DatasetNotFound, SettingError
from atommem_env.tasks import download as module
from atommem_env.tasks.catalogue import open_dataset
from atommem_env.tasks.catalogue_commands import get_command
from atommem_env.tasks.download import HOMEPAGES, PUBLISHED, Published, download, find_published

CONTENT = bytes(range(256)) * 12_000  # 3 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers each request by the next of `script`; after the last one, as it should."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = []
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.requests: list[Message] = []

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.json"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(self.headers)
        self.close_connection = True
        (self.server.script.pop(0) if self.server.script else Handler.right)(self)

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def right(self, stop: int | None = None) -> None:
        """The file, or what is asked of it; `stop`: bytes after which the connection ends all the same."""
        content, asked = self.server.content, re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(asked[1]) if asked and self.headers["If-Range"] == self.server.etag else 0
        if start:
            self.head(
                206,
                len(content) - start,
                Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}",
                Accept_Ranges="bytes",
            )
        else:
            self.head(200, len(content))
        self.wfile.write(content[start : None if stop is None else start + stop])

    def log_message(self, *_: Any) -> None:
        pass


def status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler.head(code, 0)


def truncated(handler: Handler) -> None:
    handler.right(stop=1_500_000)


def reset(handler: Handler) -> None:
    """Sends half a megabyte and breaks the connection off, with RST instead of FIN."""
    handler.right(stop=500_000)
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def silent(handler: Handler) -> None:
    handler.right(stop=100)
    handler.wfile.flush()
    handler.rfile.read(1)  # until the other side gives up


def without_range(handler: Handler) -> None:
    handler.head(200, len(handler.server.content))
    handler.wfile.write(handler.server.content)


def another_range(handler: Handler) -> None:
    handler.head(206, 10, Content_Range=f"bytes 5-14/{len(handler.server.content)}")
    handler.wfile.write(handler.server.content[5:15])


def without_length(handler: Handler) -> None:
    handler.head(200, None, Connection="close")
    handler.wfile.write(handler.server.content)


def endless(handler: Handler) -> None:
    handler.head(200, None, Connection="close")
    try:
        while True:
            handler.wfile.write(bytes(1_000_000))
    except ConnectionError:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSES", (0.0, 0.01, 0.0, 0.01))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: Server, target: Path, **options: Any) -> Path:
    return download(server.url, target, **({"sha256": SHA256, "size": len(CONTENT)} | options))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    target = get(server, tmp_path / "new" / "file", progress=lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == ["file"]
    assert seen == sorted(seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    get(server, target)
    assert len(server.requests) == 1
    target.write_bytes(b"damaged since")
    assert get(server, target).read_bytes() == CONTENT


@pytest.mark.parametrize("broken", [truncated, silent])
def test_what_broke_off_is_gone_on_with(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Handler], None]
) -> None:
    if broken is silent:
        monkeypatch.setattr(module, "TIMEOUT", 1.0)
    server.script = [broken]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    first, second, *_ = server.requests
    assert first["Range"] is None
    assert second["If-Range"] == '"one"'
    assert int(second["Range"].removeprefix("bytes=").removesuffix("-")) >= 100
    assert names(tmp_path) == ["file"]


def test_a_connection_that_is_reset(server: Server, tmp_path: Path) -> None:
    server.script = [reset, reset]  # how much of it arrives is up to chance
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_a_later_call_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.script = [truncated, *[status(503)] * 9]
    with pytest.raises(DatasetNotFound, match=r"not be downloaded in 5 attempts.*1,500,000 bytes are saved"):
        get(server, tmp_path / "file")
    server.script = []
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == "bytes=1500000-"


@pytest.mark.parametrize("changed", ["etag", "no etag", "weak etag", "url"])
def test_another_file_is_begun_anew(server: Server, tmp_path: Path, changed: str) -> None:
    server.etag = {"no etag": None, "weak etag": 'W/"one"'}.get(changed, '"one"')
    server.script = [truncated, *[status(500)] * 9]
    with pytest.raises(DatasetNotFound):
        get(server, tmp_path / "file")
    server.script = []
    if changed == "etag":
        server.etag = '"two"'
    url = server.url + ("?mirror" if changed == "url" else "")
    assert download(url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert (server.requests[-1]["Range"] is None) == (changed != "etag")


@pytest.mark.parametrize("answer", [without_range, another_range, status(416)])
def test_a_server_that_cannot_go_on(server: Server, tmp_path: Path, answer: Callable[[Handler], None]) -> None:
    server.script = [truncated, answer]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests[1]["Range"] == "bytes=1500000-"
    assert names(tmp_path) == ["file"]


def test_errors_that_pass_are_waited_for_and_others_are_not(server: Server, tmp_path: Path) -> None:
    server.script = [status(500), status(429), status(503), reset]
    assert get(server, tmp_path / "a").read_bytes() == CONTENT
    for code in (403, 404, 410):
        server.script, before = [status(code)], len(server.requests)
        with pytest.raises(
            DatasetNotFound, match=rf"{server.url}: the server responded {code} .*--url URL.*atommem data import"
        ):
            get(server, tmp_path / "b")
        assert len(server.requests) == before + 1
    server.script, before = [status(502)] * 99, len(server.requests)
    with pytest.raises(DatasetNotFound, match=r"in 5 attempts: Bad Gateway"):
        get(server, tmp_path / "b")
    assert len(server.requests) == before + 5


def test_a_bad_connection_that_leads_somewhere_is_not_given_up(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT * 4
    server.script = [truncated] * 8
    sha256 = hashlib.sha256(server.content).hexdigest()
    assert download(server.url, tmp_path / "file", sha256).read_bytes() == server.content
    assert len(server.requests) == 9


@pytest.mark.parametrize("size", [len(CONTENT), None])
@pytest.mark.parametrize("answer", [Handler.right, without_length])
def test_other_bytes_leave_nothing(
    server: Server, tmp_path: Path, answer: Callable[[Handler], None], size: int | None
) -> None:
    server.content = CONTENT[:-1] + b"\0"
    server.script = [answer]
    with pytest.raises(DataError) as caught:
        get(server, tmp_path / "file", size=size)
    assert f"expected the SHA-256 {SHA256}, got {hashlib.sha256(server.content).hexdigest()}" in str(caught.value)
    assert names(tmp_path) == []


def test_a_resumed_file_of_other_bytes_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.script = [truncated, *[status(500)] * 9]
    with pytest.raises(DatasetNotFound):
        get(server, tmp_path / "file")
    server.content, server.script = bytes(len(CONTENT)), []  # under the same ETag
    with pytest.raises(DataError, match="Nothing of it is kept"):
        get(server, tmp_path / "file")
    assert names(tmp_path) == []
    server.content = CONTENT
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_file_of_another_size_is_not_fetched(server: Server, tmp_path: Path, difference: int) -> None:
    with pytest.raises(
        DataError, match=rf"expected a file of {len(CONTENT) + difference:,} bytes, .* {len(CONTENT):,}"
    ):
        get(server, tmp_path / "file", size=len(CONTENT) + difference)
    assert names(tmp_path) == []


def test_lies_about_the_length(server: Server, tmp_path: Path) -> None:
    def promises_more(handler: Handler) -> None:
        handler.head(200, len(CONTENT) + 10)
        handler.wfile.write(CONTENT)

    def promises_less(handler: Handler) -> None:
        handler.head(200, len(CONTENT) - 10)
        handler.wfile.write(CONTENT)

    server.script = [promises_more]
    assert get(server, tmp_path / "a", size=None).read_bytes() == CONTENT
    server.script = [promises_less]
    with pytest.raises(DataError, match="expected the SHA-256"):
        get(server, tmp_path / "b", size=None)
    server.script = [endless]
    with pytest.raises(DataError, match="expected the SHA-256"):
        get(server, tmp_path / "b")
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_seen_before(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(DatasetNotFound, match=r"needs 3,072,000 more bytes, .* has 1,000,000 free.*ATOMMEM_DATA"):
        get(server, tmp_path / "file")


def test_a_file_of_unknown_size_does_not_fill_the_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 8_000_000
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    server.script = [endless]
    with pytest.raises(
        DatasetNotFound, match=r"did not report the file's size, and sent more than the 4,\d{3},\d{3} bytes"
    ):
        get(server, tmp_path / "file", size=None)
    assert names(tmp_path) == []
    server.script = [without_length]
    assert get(server, tmp_path / "file", size=None).read_bytes() == CONTENT


def dripping(handler: Handler) -> None:
    handler.head(200, len(handler.server.content))
    try:
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.01)
    except ConnectionError:
        pass


def test_a_connection_that_drips_is_broken_off(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOW", (0.1, 1000))
    server.script, server.etag = [dripping], None
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 2
    server.script = [dripping] * 9
    with pytest.raises(DatasetNotFound, match=r"5 attempts: only \d+ bytes came in 0 s"):
        get(server, tmp_path / "other")


def test_a_password_in_the_address_is_sent_to_that_server_alone_and_never_shown(server: Server, tmp_path: Path) -> None:
    def redirect(handler: Handler) -> None:
        handler.head(302, 0, Location=handler.server.url.replace("127.0.0.1", "localhost"))

    url = server.url.replace("://", "://me:open-ses%40me@") + "?key=in-the-query"
    server.script = [redirect]
    assert download(url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    first, second = (request["Authorization"] for request in server.requests)
    assert first == f"Basic {base64.b64encode(b'me:open-ses@me').decode()}"
    assert second is None
    shown = []
    for script, size in ((status(403), None), (status(503), None), (Handler.right, 7), (endless, 9_000_000)):
        server.script = [script] * 9
        with pytest.raises((DatasetNotFound, DataError)) as caught:
            download(url, tmp_path / "other", SHA256, size)
        shown.append(str(caught.value))
    server.script = [truncated, status(403)]
    with pytest.raises(DatasetNotFound):
        download(url, tmp_path / "third", SHA256)
    shown += [path.read_text() for path in tmp_path.glob(".*.json")]
    assert len(shown) == 5
    assert not [text for text in shown if "ses" in text or "query" in text]
    with pytest.raises(SettingError, match="must begin with http") as rejected:
        find_published("hotpotqa", "dev", "ftp://me:open-sesame@host/file")
    assert "sesame" not in str(rejected.value)


def test_no_server(server: Server, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
        with pytest.raises(DatasetNotFound, match=r"in 5 attempts: .*refused"):
            download(url, tmp_path / "file", SHA256)


# ---------------------------------------------------------------------------------------------------------- the command


def questions(count: int) -> bytes:
    rows = [
        {
            "_id": f"q{number}",
            "question": f"What is {number}?",
            "answer": str(number),
            "type": "bridge",
            "context": [[f"T{number}", [f"{number} is {number}."]]],
            "supporting_facts": [[f"T{number}", 0]],
        }
        for number in range(count)
    ]
    return gzip.compress(json.dumps(rows).encode())


def test_get_imports_and_knows_what_it_has(
    server: Server, own_data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = questions(5)
    sha256 = hashlib.sha256(server.content).hexdigest()
    known = Published(server.url, len(server.content), sha256)
    monkeypatch.setitem(PUBLISHED, ("2wikimultihopqa", "dev"), known)
    tyro.cli(get_command, args=["2wikimultihopqa"])
    report = open_dataset("2wikimultihopqa", "dev").report
    assert (report.rows, [source.sha256 for source in report.sources]) == (5, [sha256])
    assert names(own_data_folder / "downloads") == []
    tyro.cli(get_command, args=["2wikimultihopqa"])
    assert len(server.requests) == 1  # known
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"title": "C", "text": "c"}\n')
    for _ in range(2):
        tyro.cli(get_command, args=["2wikimultihopqa", "--corpus", str(corpus)])
    assert len(server.requests) == 2
    assert open_dataset("2wikimultihopqa", "dev").report.corpus_documents == 1
    monkeypatch.setitem(PUBLISHED, ("2wikimultihopqa", "dev"), Published("http://127.0.0.1:1/", 3, sha256[::-1]))
    tyro.cli(get_command, args=["2wikimultihopqa", "--split", "mine", "--url", server.url, "--sha256", sha256.upper()])
    assert open_dataset("2wikimultihopqa", "mine").report.rows == 5


def test_a_wrong_file_changes_no_import(server: Server, own_data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.content = questions(5)
    sha256 = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setitem(PUBLISHED, ("hotpotqa", "dev"), Published("http://127.0.0.1:1/", len(server.content), sha256))
    get_command("hotpotqa", url=server.url)  # a mirror
    before = open_dataset("hotpotqa", "dev").report
    monkeypatch.setitem(PUBLISHED, ("hotpotqa", "dev"), Published(server.url, len(server.content), "0" * 64))
    with pytest.raises(DataError, match="expected the SHA-256 0000"):
        get_command("hotpotqa")
    server.content = b"<html>not a dataset</html>"
    with pytest.raises(DataError, match=r"hotpotqa-dev-\w{8}, line 1: not JSON"):
        get_command("hotpotqa", url=server.url, sha256=hashlib.sha256(server.content).hexdigest())
    assert open_dataset("hotpotqa", "dev").report == before


def test_nothing_is_fetched_without_a_known_hash() -> None:
    with pytest.raises(DatasetNotFound) as caught:
        find_published("2wikimultihopqa", "train")
    for part in (
        HOMEPAGES["2wikimultihopqa"],
        "atommem data import 2wikimultihopqa --split train FILE",
        "atommem data get 2wikimultihopqa --split train --url URL --sha256 HEX",
    ):
        assert part in str(caught.value)
    with pytest.raises(DatasetNotFound, match="No file with a known checksum"):
        find_published("musique", "test", url="https://example.org/test.jsonl")
    for options in ({"sha256": "0" * 64}, {"url": "https://a.b/c", "sha256": "xyz"}, {"url": "file:///etc/passwd"}):
        with pytest.raises(SettingError):
            find_published("hotpotqa", "dev", **options)  # type: ignore[arg-type]


def test_what_is_published_is_well_formed() -> None:
    assert {dataset for dataset, _ in PUBLISHED} == set(HOMEPAGES) == {"hotpotqa", "2wikimultihopqa", "musique"}
    for file in PUBLISHED.values():
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.url.startswith(("http://", "https://"))
        assert file.bytes > 10**7
    assert len({file.sha256 for file in PUBLISHED.values()}) == len(PUBLISHED)
