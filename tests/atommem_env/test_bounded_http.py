"""Answers without end, in size or in time, from a service on this machine."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from atommem_env.openai_client import Malformed, Outage, Rejected, Service, Unavailable

pytest.importorskip("openai", reason="needs the extra 'openai'")

MIB = 2**20
Script = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Answers each request by `script`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script: Script = lambda handler: None
        self.requests: list[tuple[str, str | None]] = []
        self.over = threading.Event()

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.requests.append((self.path, self.headers["Authorization"]))
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.script(self)

    do_GET = do_POST

    def head(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def ask(server: Server, **options: Any) -> Any:
    settings = {"patience": 0.3, "pauses": (0.01, 0.1), "timeout": 0.5, **options}
    service = Service("m", server.url, "sk-nobody-may-see-this", **settings)
    return asyncio.run(service.ask("/chat/completions", {"model": "m"}, lambda answer: answer))


def endless(piece: bytes, **headers: str) -> Script:
    def script(handler: Handler) -> None:
        handler.head(**headers)
        while not handler.server.over.is_set():
            handler.wfile.write(piece)

    return script


def sends(content: bytes, status: int = 200, **headers: str) -> Script:
    def script(handler: Handler) -> None:
        handler.head(status, Content_Length=str(len(content)), **headers)
        handler.wfile.write(content)

    return script


def bomb(megabytes: int, wbits: int) -> bytes:
    press = zlib.compressobj(9, wbits=wbits)
    return b"".join(press.compress(b" " * MIB) for _ in range(megabytes)) + press.flush()


@pytest.mark.parametrize(
    "script",
    [
        endless(b" " * 65536),
        endless(b" " * 65536, Content_Length=str(1200 * MIB)),
        sends(bomb(400, 31), Content_Encoding="gzip"),
        sends(bomb(400, 15), Content_Encoding="deflate"),
    ],
)
def test_a_body_without_end_is_rejected_before_it_fills_the_memory(script: Script, server: Server) -> None:
    server.script = script
    tracemalloc.start()
    try:
        with pytest.raises(Rejected, match="more than 16,777,216 bytes"):
            ask(server, timeout=20.0)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 200 * MIB
    assert len(server.requests) == 1


def drip_body(handler: Handler) -> None:
    handler.head()
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b" ")


def drip_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b"X")
        handler.wfile.flush()


def drip_lines(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b"X: y\r\n")
        handler.wfile.flush()


@pytest.mark.parametrize("script", [drip_body, drip_headers, drip_lines])
def test_an_answer_that_drips_ends_in_time(script: Script, server: Server) -> None:
    server.script = script
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"no complete answer within 0\.3 s"):
        ask(server, timeout=0.3)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("encoding", ["identity", "gzip", "x-gzip", "deflate"])
def test_an_answer_that_is_compressed_unasked_is_read(encoding: str, server: Server) -> None:
    press = {"identity": bytes, "deflate": zlib.compress}.get(encoding, gzip.compress)
    server.script = sends(press(b'{"a": 1}'), Content_Encoding=encoding)
    assert ask(server) == {"a": 1}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (sends(b"{}", Content_Encoding="br"), "compressed by 'br', which was not asked for"),
        (sends(b"{}", Content_Encoding="gzip, gzip"), "compressed by 'gzip, gzip'"),
        (sends(b"no gzip", Content_Encoding="gzip"), "damaged compressed data"),
    ],
)
def test_a_compression_that_cannot_be_read_is_rejected(script: Script, words: str, server: Server) -> None:
    server.script = script
    with pytest.raises(Rejected, match=words):
        ask(server)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, server: Server) -> None:
    server.script = sends(b"", status, Location="http://localhost:1/v1?key=sk-nobody-may-see-this")
    with pytest.raises(Rejected, match="redirects to http://localhost:1/v1, where neither") as caught:
        ask(server)
    assert "sk-" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body", [b"[" * MIB, b'{"a":' * 200_000, b"9" * 100_000, b"\xff\xfe\xfa", b"{}{}", b"data: {}\n\n", b"", b"\0" * 9]
)
def test_what_is_no_json_is_malformed_and_shown_in_part(body: bytes, server: Server) -> None:
    server.script = sends(body)
    with pytest.raises(Malformed, match="sent no JSON") as caught:
        ask(server)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "script",
    [
        sends(b"<html><title>502 Bad Gateway</title></html>", Content_Type="text/html"),
        sends(b"<!doctype html>", Content_Type="application/json"),
        sends(b"welcome", Content_Type="text/html; charset=utf-8"),
        sends(json.dumps({"error": {"message": "busy"}}).encode()),
        sends(json.dumps({"error": "busy"}).encode()),
        sends(json.dumps({"error": {"message": "busy", "code": 503}, "choices": []}).encode()),
        sends(json.dumps({"error": {"message": "busy", "code": "429"}}).encode()),
        sends(b"busy", 529),
        sends(json.dumps({"error": {"type": "overloaded_error"}}).encode(), 400),
    ],
)
def test_an_outage_is_waited_for_whatever_its_status(script: Script, server: Server) -> None:
    left = [script, script, sends(b'{"a": 1}')]
    server.script = lambda handler: left.pop(0)(handler)
    assert ask(server, patience=5.0) == {"a": 1}
    assert not left


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"message": "no such field", "code": 422}, 422),
        ({"message": "no", "type": "invalid_request_error"}, 400),
        ({"message": "no", "code": "invalid_api_key"}, 401),
        ({"message": "no", "code": "model_not_found"}, 404),
    ],
)
def test_a_rejection_with_status_200_is_one(error: dict[str, Any], status: int, server: Server) -> None:
    server.script = sends(json.dumps({"error": error}).encode())
    with pytest.raises(Rejected) as caught:
        ask(server)
    assert caught.value.status == status


def test_a_key_in_the_address_reaches_the_service_and_no_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server.script = sends(b"{}")
    server.url = server.url.replace("://", "://me:open-sesame@") + "?api-version=in-the-query"
    ask(server)
    (path, authorization) = server.requests[0]
    assert path == "/v1/chat/completions?api-version=in-the-query"
    assert authorization
    assert "HTTP Request" in caplog.text
    for secret in ("open-sesame", "in-the-query", "sk-nobody"):
        assert secret not in caplog.text


def test_a_forked_process_has_connections_of_its_own(server: Server) -> None:
    import multiprocessing

    from atommem_env.background import in_background_blocking

    server.script = sends(b'{"a": 1}')
    service = Service("m", server.url, None, patience=1, pauses=(0.1, 0.1), timeout=5.0)

    def once(answers: Any = None) -> Any:
        answer = in_background_blocking(service.ask("/x", {}, lambda answer: answer))
        if answers is not None:
            answers.put(answer)
        return answer

    assert once() == {"a": 1}
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=once, args=(answers,))
    child.start()
    assert answers.get(timeout=10) == {"a": 1}
    child.join(10)
    assert not child.exitcode
    assert once() == {"a": 1}


def test_what_one_attempt_says_is_one_line() -> None:
    failure = Service("m", "http://host/v1", None, patience=1, pauses=(1, 1)).failure(500, "two\nlines")
    assert isinstance(failure, Outage)
    assert str(failure) == "answered with status 500: two lines"
