"""A chat model behind a service, spoken to over HTTP: one that fails, lies, hangs, dies and comes back as a test wants."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import atommem_env  # noqa: F401  registers the environments
from agents.chat_policy import ChatPolicy, Sampling
from agents.models import openai_api
from agents.models.openai_api import OpenAIModel
from agents.rollout import Driver, EpisodeSpec
from atommem_env import openai_client
from atommem_env.errors import MissingDependency, ModelError, PromptTooLong, ReplyRefused, SettingError
from atommem_env.types import Message, Reply, Rollout, Usage

CHAT: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who lives in Rome?"}]
KEY = "sk-nobody-may-see-this"
DEAD, SILENT, HALF, HALF_JSON, EMPTY = "closed", "silent", "half a body", "half of the JSON", "an empty body"
Distortion = Callable[[dict[str, Any]], Any]


class Service(ThreadingHTTPServer):
    """Replies with what it was asked, a letter a token; counts as tokens of a prompt its words."""

    request_queue_size = 64  # connections that wait; with fewer the kernel lets one wait for a second

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.server_address[1]
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.failures: list[int | str] = []  # of the next answers: a status, or one of the above
        self.distort: Distortion = lambda answer: answer
        self.rejects: Callable[[dict[str, Any]], str] = lambda body: ""
        self.refuses = 0  # the status of a refusal by its policy on content
        self.knows_ids = True
        self.window = 10**9
        self.busy = self.busiest = 0
        self.pause = 0.0
        self.over = threading.Event()
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            failure = self.server.failures.pop(0) if self.server.failures else 200
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        time.sleep(self.server.pause)
        with self.server.lock:
            self.server.busy -= 1
        if failure == SILENT:
            self.server.over.wait(30)
        if failure in (DEAD, SILENT):
            return
        if isinstance(failure, int) and failure != 200:
            self._send(failure, {"error": {"message": f"no, because; {KEY}"}})
            return
        tokens = sum(len(message["content"].split()) for message in body["messages"])
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 1000
        if self.server.refuses:
            said = "The prompt triggered the content management policy."
            self._send(self.server.refuses, {"error": {"message": said, "code": "content_filter"}})
        elif rejection := self.server.rejects(body):
            self._send(400, {"error": {"message": rejection, "code": 400}})
        elif tokens + limit > self.server.window:
            said = (
                f"This model's maximum context length is {self.server.window} tokens. However, you requested {limit} output "
                f"tokens and your prompt contains {tokens} input tokens, for a total of {tokens + limit} tokens."
            )
            self._send(400, {"error": {"message": said, "type": "BadRequestError", "code": 400}})
        else:
            self._send(200, self.server.distort(self._answer(body, tokens, limit)), failure)

    def _answer(self, body: dict[str, Any], tokens: int, limit: int) -> dict[str, Any]:
        said = body["messages"][-1]["content"]
        text = f"<read_memory>{hash_of(said)} {body.get('seed')}</read_memory>"
        ids, cut = [ord(letter) for letter in text][:limit], len(text) > limit
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(map(chr, ids)), "reasoning": None},
            "finish_reason": "length" if cut else "stop",
            "logprobs": None,
        }
        usage = {"prompt_tokens": tokens, "completion_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": 2}}
        answer = {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}
        if self.server.knows_ids:
            choice["token_ids"] = ids if body.get("return_token_ids") else None
            answer["prompt_token_ids"] = list(range(tokens)) if body.get("return_token_ids") else None
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": chr(one), "logprob": -one / 100} for one in ids]}
        return answer

    def _send(self, status: int, answer: Any, how: int | str = 200) -> None:
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if how == HALF_JSON:
            content = content[: len(content) // 2]
        elif how == EMPTY:
            content = b""
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if how == HALF else content)

    def log_message(self, *args: object) -> None:
        pass


def hash_of(text: str) -> int:
    return sum(map(ord, text)) % 9973


@contextmanager
def serving(port: int = 0) -> Iterator[Service]:
    with Service(port) as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield service
        finally:
            service.over.set()
            service.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="needs the extra 'openai'")
    monkeypatch.setattr(openai_api, "_PATIENCE", 0.8)
    monkeypatch.setattr(openai_api, "_PAUSES", (0.02, 0.1))
    monkeypatch.setattr(openai_client, "_UNREPORTED", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with serving() as service:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{service.port}/v1")
        yield service


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def ask(model: OpenAIModel, chat: list[Message] = CHAT, **settings: Any) -> Reply:
    wanted = {"max_new_tokens": 200, "temperature": 0.0, "thinking": False, "seed": 7, **settings}
    reply: Reply = asyncio.run(model.complete(chat, **wanted))
    return reply


EXPECTED = f"<read_memory>{hash_of('Who lives in Rome?')} 7</read_memory>"


# --------------------------------------------------------------------------------------------------- what is sent, and reported


def test_a_reply_is_recorded_as_it_was_sampled(service: Service) -> None:
    reply = ask(OpenAIModel("org/m"))
    ids = tuple(map(ord, EXPECTED))
    assert reply == Reply(
        EXPECTED, tuple(range(6)), ids, tuple(-one / 100 for one in ids), "stop", Usage(1, 6, len(ids), 2)
    )
    (asked,) = service.asked
    assert asked == {
        "model": "org/m",
        "messages": CHAT,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 200,
        "seed": 7,
        "logprobs": True,
        "return_token_ids": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert service.keys == {f"Bearer {KEY}"}


def test_a_reply_that_was_truncated_says_so(service: Service) -> None:
    reply = ask(OpenAIModel("m"), max_new_tokens=5)
    assert (reply.text, reply.stop, len(reply.completion_ids)) == (EXPECTED[:5], "length", 5)


def test_logprobs_that_are_not_those_sampled_from_are_left_out(service: Service) -> None:
    model = OpenAIModel("m")
    assert [len(ask(model, temperature=value).logprobs) > 0 for value in (0.0, 0.7, 1.0)] == [True, False, True]


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<think>Is it Ada? Yes.</think>\n\nAda", "Ada"),
        ("Is it Ada? Yes.\n</think>\n\nAda", "Ada"),  # the template had opened it
        ("<think>Is it Ada? Or", ""),
        ("What <think> and </think> mean", "What <think> and </think> mean"),
    ],
)
def test_what_was_thought_is_no_reply(content: str, text: str, thinking: bool, service: Service) -> None:
    def distort(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["message"]["content"] = content
        return answer

    service.distort = distort
    reply = ask(OpenAIModel("m"), thinking=thinking)
    assert reply.text == text
    assert len(reply.completion_ids) == len(EXPECTED)
    assert service.asked[-1]["chat_template_kwargs"] == {"enable_thinking": thinking}


@pytest.mark.parametrize(("content", "text"), [("Ada", "Ada"), ("", ""), (None, "")])
@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_a_service_may_tell_thoughts_apart(field: str, content: str | None, text: str, service: Service) -> None:
    def distort(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["message"] = {"role": "assistant", "content": content, field: "Is it Ada?"}
        return answer

    service.distort = distort
    assert ask(OpenAIModel("m")).text == text
    assert len(service.asked) == 1


def test_a_service_that_ignores_what_it_does_not_know_will_do(service: Service) -> None:
    service.knows_ids = False
    service.distort = lambda answer: {**answer, "usage": None}
    assert ask(OpenAIModel("m")) == Reply(EXPECTED, usage=Usage(1, None, None, None))


@pytest.mark.parametrize(
    ("fields", "still"),
    [
        (("return_token_ids", "logprobs"), {"top_k", "chat_template_kwargs", "max_tokens"}),
        (("return_token_ids", "chat_template_kwargs", "top_k"), {"max_tokens"}),
        (("return_token_ids", "chat_template_kwargs", "max_tokens"), {"max_completion_tokens"}),
    ],
)
@pytest.mark.parametrize("no_system", [False, True])
def test_what_a_service_rejects_is_detected_once_and_left_out(
    no_system: bool, fields: tuple[str, ...], still: set[str], service: Service
) -> None:
    def rejects(body: dict[str, Any]) -> str:
        if no_system and body["messages"][0]["role"] == "system":
            return "Only user and assistant roles are supported!"
        return f"Extra inputs are not permitted: {fields}" if set(fields) & set(body) else ""

    service.rejects = rejects
    model = OpenAIModel("m")

    async def several() -> list[Reply]:
        wanted = {"max_new_tokens": 200, "temperature": 0.0, "thinking": False, "seed": 7}
        return await asyncio.gather(*(model.complete(CHAT, **wanted) for _ in range(5)))

    replies = run(several())
    said = "Be brief.\n\nWho lives in Rome?" if no_system else "Who lives in Rome?"
    assert {reply.text for reply in replies} == {f"<read_memory>{hash_of(said)} 7</read_memory>"}
    assert {reply.completion_ids for reply in replies} == {()}
    rejected = [body for body in service.asked if rejects(body)]
    assert len(service.asked) == len(rejected) + 5
    assert len(rejected) < 8
    assert still <= set(service.asked[-1])
    assert not set(fields) & set(service.asked[-1])


def strict(*accepted: str, words: str = "body.{}: Extra inputs are not permitted") -> Callable[[dict[str, Any]], str]:
    """Rejects each field but those, the first one first."""
    return lambda body: next((words.format(name) for name in body if name not in accepted), "")


@pytest.mark.parametrize(
    ("accepted", "left_out"),
    [
        (("model", "messages", "max_tokens", "temperature", "top_p"), {"seed", "top_k", "logprobs"}),
        (("model", "messages", "max_completion_tokens", "seed"), {"temperature", "max_tokens"}),
        (("model", "messages"), {"max_tokens", "max_completion_tokens", "seed", "temperature"}),
    ],
)
def test_fields_that_are_rejected_by_name_are_left_out_with_one_warning(
    accepted: tuple[str, ...], left_out: set[str], service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.rejects = strict(*accepted)
    model = OpenAIModel("m")
    for _ in range(3):
        ask(model)
    assert set(service.asked[-1]) == set(accepted)
    assert not service.rejects(service.asked[-2])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "does not accept" in warning
    assert all(name in warning for name in left_out)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (
            "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) is supported.",
            "temperature",
        ),
        ("temperature and top_p cannot both be specified for this model. Please use only one.", "top_p"),
        ("seed must be less than or equal to 2147483647", "seed"),
        (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.",
            "max_tokens",
        ),
    ],
)
def test_a_value_that_is_rejected_later_is_left_out_then(said: str, field: str, service: Service) -> None:
    model = OpenAIModel("m")
    ask(model)
    service.rejects = lambda body: said if field in body else ""
    ask(model, temperature=0.7)
    ask(model, temperature=0.7)
    first, rejected, other, again = service.asked
    assert set(first) == set(rejected)
    assert (
        set(other)
        == set(again)
        == set(first) - {field} | ({"max_completion_tokens"} if field == "max_tokens" else set())
    )


def test_a_limit_that_is_too_large_is_an_error_rather_than_no_limit(service: Service) -> None:
    service.rejects = lambda body: (
        "max_tokens is too large: 99. This model supports at most 64"
        if "max_tokens" in body
        else "max_completion_tokens is too large: 99."
    )
    with pytest.raises(ModelError, match="max_tokens is too large: 99"):
        ask(OpenAIModel("m"), max_new_tokens=99)
    assert all("max_tokens" in body or "max_completion_tokens" in body for body in service.asked)


@pytest.mark.parametrize("field", ["seed", "temperature"])
def test_a_service_that_gives_no_reason_is_asked_for_less_and_less(field: str, service: Service) -> None:
    service.rejects = lambda body: "Bad Request" if field in body else ""
    model = OpenAIModel("m")
    ask(model)
    before = len(service.asked)
    ask(model)
    assert len(service.asked) == before + 1
    assert service.asked[-1]["max_tokens"] == 200


@pytest.mark.parametrize(("seed", "sent"), [(2**31 - 1, 2**31 - 1), (2**31, 0), (2**32 - 1, 2**31 - 1), (None, None)])
def test_seeds_are_sent_below_two_to_the_31st(seed: int | None, sent: int | None, service: Service) -> None:
    ask(OpenAIModel("m"), seed=seed)
    assert service.asked[-1].get("seed") == sent


def test_a_template_without_a_system_role_is_detected_also_after_chats_that_have_none(service: Service) -> None:
    service.rejects = lambda body: "System role not supported" if body["messages"][0]["role"] == "system" else ""
    model = OpenAIModel("m")
    ask(model, CHAT[1:])
    for _ in range(2):
        assert ask(model).completion_ids
    assert [len(body["messages"]) for body in service.asked] == [1, 2, 1, 1]
    assert service.asked[-1]["messages"] == [{"role": "user", "content": "Be brief.\n\nWho lives in Rome?"}]


# ------------------------------------------------------------------------------------------------------------- what is rejected


@pytest.mark.parametrize("status", [401, 403, 404, 413])
def test_a_rejection_is_reported_at_once_and_without_the_key(status: int, service: Service) -> None:
    service.failures = [status]
    with pytest.raises(ModelError, match=rf"status {status}: no, because; ….*vllm serve org/m") as caught:
        ask(OpenAIModel("org/m"))
    assert len(service.asked) == 1
    assert KEY not in f"{caught.value!r}{caught.value.__cause__}"


def test_a_request_that_is_wrong_in_every_form_is_rejected_with_the_services_words(service: Service) -> None:
    service.rejects = lambda body: "roads must not be empty"
    model = OpenAIModel("m")
    with pytest.raises(ModelError, match=r"rejected the request: roads must not be empty\."):
        ask(model)
    service.rejects = lambda body: ""
    ask(model)
    service.rejects, before = lambda body: "roads must not be empty", len(service.asked)
    with pytest.raises(ModelError, match="roads"):
        ask(model)
    assert len(service.asked) == before + 1


def test_a_prompt_beyond_the_window_is_reported_with_both_numbers(service: Service) -> None:
    service.window = 100
    long: list[Message] = [{"role": "user", "content": "boat " * 51}]
    model = OpenAIModel("m")
    assert ask(model, long, max_new_tokens=49).text
    with pytest.raises(PromptTooLong, match="maximum context length is 100 tokens") as caught:
        ask(model, long, max_new_tokens=50)
    assert (caught.value.tokens, caught.value.room) == (51, 50)
    assert len(service.asked) == 2


@pytest.mark.parametrize(
    ("said", "tokens", "room"),
    [
        (  # vLLM 0.29
            (
                "This model's maximum context length is 2048 tokens. However, you requested 64 output tokens and your prompt "
                "contains at least 1985 input tokens, for a total of at least 2049 tokens. Please reduce the length …"
            ),
            None,
            1984,
        ),
        (
            (
                "This model's maximum context length is 2048 tokens. However, you requested 64 output tokens and your prompt "
                "contains 90000 characters (more than 19840 characters, which is the upper bound for 1984 input tokens)."
            ),
            None,
            1984,
        ),
        ("max_tokens=64 cannot be greater than max_model_len=max_total_tokens=48. Please request fewer", None, 0),
        ("Input length (5000) exceeds model's maximum context length (4096).", 5000, 4032),
        (  # OpenAI
            (
                "This model's maximum context length is 4097 tokens. However, you requested 4200 tokens (4136 in the messages, "
                "64 in the completion). Please reduce the length of the messages or completion."
            ),
            4136,
            4033,
        ),
        (
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
            9000,
            8128,
        ),
    ],
)
def test_services_say_in_many_words_that_a_prompt_is_too_long(
    said: str, tokens: int | None, room: int, service: Service
) -> None:
    service.rejects = lambda body: said
    with pytest.raises(PromptTooLong) as caught:
        ask(OpenAIModel("m"), max_new_tokens=64)
    assert (caught.value.tokens, caught.value.room) == (tokens, room)
    assert len(service.asked) == 1


@pytest.mark.parametrize("status", [400, 403, 200])
def test_a_prompt_that_a_policy_blocks_is_refused_alone(status: int, service: Service) -> None:
    def distort(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0] |= {"finish_reason": "content_filter"}
        return answer

    model = OpenAIModel("m")
    ask(model)
    if status == 200:
        service.distort = distort
    else:
        service.refuses = status
    with pytest.raises(ReplyRefused, match=r"will not answer this prompt: .*content"):
        ask(model)
    service.distort, service.refuses = lambda answer: answer, 0
    assert ask(model).text == EXPECTED
    assert len(service.asked) == 3


def test_a_prompt_to_which_no_answer_has_a_choice_is_refused_alone(service: Service) -> None:
    service.distort = lambda answer: {**answer, "choices": []}
    with pytest.raises(ReplyRefused, match=r"the last of 4 answers to this prompt\."):
        ask(OpenAIModel("m"))


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_replies_of_thought_alone_are_reported_once_and_counted(
    field: str, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    def distort(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["message"] = {"role": "assistant", "content": "", field: "Is it Ada?"}
        return answer

    service.distort = distort
    model = OpenAIModel("m")
    assert [ask(model).text for _ in range(3)] == [""] * 3
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "replied by reasoning alone" in warning
    assert model.notices["thought_only"] == 3


@pytest.mark.parametrize(
    ("words", "read", "truncated"), [(6000, 10, True), (6000, 6000, False), (6000, 0, False), (300, 10, False)]
)
def test_a_prompt_that_is_read_in_part_is_reported_once_and_counted(
    words: int, read: int, truncated: bool, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    def distort(answer: dict[str, Any]) -> dict[str, Any]:
        answer["usage"]["prompt_tokens"] = read
        return answer

    service.distort, service.knows_ids = distort, False
    model = OpenAIModel("m")
    for _ in range(2):
        ask(model, [{"role": "user", "content": "boat " * words}])
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == truncated
    assert model.notices["prompt_truncated"] == 2 * truncated
    assert not truncated or "read 10 tokens of a prompt of 30,000 characters" in warnings[0]


@pytest.mark.parametrize("hostile", ["wide", "wider", "deep", "page"])
def test_an_answer_that_is_hostile_is_one_line_of_an_error(hostile: str, service: Service) -> None:
    service.distort = {
        "wide": lambda answer: {**answer, "choices": [{"message": {"content": None, "x": "y" * 9_000_000}}]},
        "wider": lambda answer: {**answer, "x": "y" * 20_000_000},
        "deep": lambda answer: "[" * 1_000_000,
        "page": lambda answer: f"<html>{'welcome ' * 100_000}</html>",
    }[hostile]
    with pytest.raises(ModelError) as caught:
        ask(OpenAIModel("m"))
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "failures", [[500], [503, 429], [DEAD, 502], [HALF], [HALF_JSON, EMPTY], [408, DEAD, HALF, 500, DEAD]]
)
def test_a_passing_failure_costs_no_reply_and_changes_nothing_of_what_is_sent(
    failures: list[int | str], service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.failures = list(failures)
    assert ask(OpenAIModel("m")).text == EXPECTED
    assert len(service.asked) == len(failures) + 1
    assert all(body == service.asked[0] for body in service.asked)
    started, ended = (record.getMessage() for record in caplog.records if record.name == openai_client.__name__)
    assert "openai:m" in started
    assert "answers again" in ended


def test_an_outage_of_a_moment_is_not_reported(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openai_client, "_UNREPORTED", 60.0)
    service.failures = [429, DEAD]
    assert ask(OpenAIModel("m")).text == EXPECTED
    assert not caplog.records


@pytest.mark.parametrize("failure", [500, 429, DEAD])
def test_an_outage_longer_than_the_patience_is_an_error(
    failure: int | str, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.failures = [failure] * 1000
    model = OpenAIModel("org/m")
    with pytest.raises(ModelError, match=rf"127\.0\.0\.1:{service.port}/v1 .*lasted for .*vllm serve org/m") as caught:
        ask(model)
    assert len(service.asked) > 2
    assert KEY not in str(caught.value) + caplog.text
    assert len(caplog.records) == 1
    before = len(service.asked)
    time.sleep(0.2)  # the first call may have given up a pause before its patience ended
    with pytest.raises(ModelError):  # once more is tried, without patience, until an answer comes
        ask(model)
    assert len(service.asked) == before + 1
    service.failures = []
    assert ask(model).text == EXPECTED


def test_silence_is_an_outage(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "_TIMEOUT", 0.2)
    service.failures = [SILENT]
    assert ask(OpenAIModel("m")).text == EXPECTED
    assert len(service.asked) == 2


def test_a_service_that_is_not_there_is_reported_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:{KEY}@127.0.0.1:{port}/v1")
    with pytest.raises(ModelError, match=rf"at http://127\.0\.0\.1:{port}/v1 .*does not answer") as caught:
        ask(OpenAIModel("m"))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "distort",
    [
        lambda answer: {**answer, "choices": []},
        lambda answer: {**answer, "choices": None},
        lambda answer: {"object": "chat.completion"},
        lambda answer: {**answer, "choices": [{"message": {"role": "assistant", "content": None}}]},
        lambda answer: {**answer, "choices": [{"message": {"role": "assistant", "content": 7}}]},
        lambda answer: {**answer, "choices": [{"message": {"role": "assistant"}, "finish_reason": "error"}]},
        lambda answer: {**answer, "choices": [["Ada"]]},
        lambda answer: {**answer, "choices": {"0": "Ada"}},
        lambda answer: "[]",
        lambda answer: "null",
    ],
)
def test_an_answer_without_a_reply_is_asked_for_again_and_then_an_error(distort: Distortion, service: Service) -> None:
    service.distort = distort
    with pytest.raises(ModelError, match=r"sent no reply but .* the last of 4 answers"):
        ask(OpenAIModel("m"))
    assert len(service.asked) == 4


def test_no_more_requests_at_a_time_than_it_says(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "_CONCURRENT", 3)
    service.pause = 0.02
    model = OpenAIModel("m")

    async def many() -> list[Reply]:
        wanted = {"max_new_tokens": 9, "temperature": 0.0, "thinking": False, "seed": 7}
        return await asyncio.gather(*(model.complete(CHAT, **wanted) for _ in range(12)))

    assert len(run(many())) == 12
    assert service.busiest == 3


def test_a_call_that_is_cancelled_leaves_the_others_alone(service: Service) -> None:
    model = OpenAIModel("m")
    ask(model)
    service.failures = [SILENT]

    async def main() -> str:
        wanted = {"max_new_tokens": 200, "temperature": 0.0, "thinking": False, "seed": 7}
        silent = asyncio.create_task(model.complete(CHAT, **wanted))
        while service.failures:
            await asyncio.sleep(0.01)
        other = asyncio.create_task(model.complete(CHAT, **wanted))
        silent.cancel()
        with pytest.raises(asyncio.CancelledError):
            await silent
        return (await other).text

    assert run(main()) == EXPECTED


# -------------------------------------------------------------------------------------------------------------- in a whole run


def play(replied: Callable[[], None] = lambda: None) -> list[Rollout]:
    driver = Driver.of(gym.make("AtomMem-Synthetic", num_docs=6, chunk_tokens=64, durability="off"))
    policy = ChatPolicy(OpenAIModel("m"), driver.settings, Sampling(temperature=0.7))
    specs = [EpisodeSpec(index, index, index) for index in range(6)]
    rollouts: list[Rollout] = run(driver.run(specs, policy, in_flight=4, replied=replied))
    return rollouts


def test_no_failure_becomes_a_reply(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "_PATIENCE", 30.0)
    monkeypatch.setattr(openai_api, "_TRIES", 10)
    expected = play()
    replies = len(service.asked)
    assert replies > 20
    kinds = [500, DEAD, 200, HALF, 200, 503, EMPTY, 200, HALF_JSON, 200, 200, 429]
    service.failures, service.asked = kinds * (replies // 6), []
    assert play() == expected
    assert len(service.asked) > 1.3 * replies


def test_a_service_killed_and_started_again_costs_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "_PATIENCE", 30.0)
    with serving() as first:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{first.port}/v1")
        expected = play()

    def restart() -> None:
        with serving(first.port):
            half.wait()
        time.sleep(0.3)
        with serving(first.port):
            over.wait()

    half, over, count = threading.Event(), threading.Event(), iter(range(10**6))
    thread = threading.Thread(target=restart)
    thread.start()
    try:
        found = play(lambda: half.set() if next(count) == 12 else None)
    finally:
        half.set()
        over.set()
        thread.join()
    assert found == expected


def test_a_key_reaches_no_folder_no_log_and_no_repr(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from agents.models.load import load_model
    from eval.options import EvalConfig
    from eval.run import evaluate

    for logger in ("agents", "atommem_env", "openai"):
        caplog.set_level(logging.DEBUG, logger)
    load_model.cache_clear()
    service.failures = [500]
    words = {"env_id": "AtomMem-Synthetic", "policy": "openai:m", "episodes": 2, "num_docs": 6, "out": tmp_path / "run"}
    evaluate(EvalConfig(**words))
    model = load_model("openai:m")
    load_model.cache_clear()
    assert KEY not in f"{model!r} {vars(model)} {caplog.text}"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 2
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert f"Bearer {KEY}" in service.keys


# ------------------------------------------------------------------------------------------------------------------ without it


def test_without_an_address_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SettingError, match=r"OPENAI_BASE_URL.*vllm serve org/m"):
        OpenAIModel("org/m")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingDependency, match=r"'openai:m'.*pip install 'atommem\[openai\]'"):
        OpenAIModel("m")
