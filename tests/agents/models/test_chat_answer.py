"""Answers of chat services, in the forms that they have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agents.models.chat_answer import NoChoice, read_answer
from atommem_env.dialects.tool_calls import ToolCallsDialect
from atommem_env.openai_client import Malformed, Rejected
from atommem_env.types import OperationKind, Reply, Usage

CALL = {"id": "1", "type": "function", "function": {"name": "read_memory", "arguments": '{"query": "Ada"}'}}
WRITTEN = '<tool_call>\n{"name": "read_memory", "arguments": {"query": "Ada"}}\n</tool_call>'


def answer(message: Any, ended: Any = "stop", **fields: Any) -> Any:
    return {"choices": [{"index": 0, "message": message, "finish_reason": ended}], **fields}


def read(message: Any, ended: Any = "stop", thinking: bool = False, **fields: Any) -> Reply:
    return read_answer(answer(message, ended, **fields), 0.0, thinking).reply


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "Ada"}, "Ada"),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": [{"type": "text", "text": "A"}, {"type": "text", "text": "da"}]}, "Ada"),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "?"}]},
                    {"type": "text", "text": "Ada"},
                ]
            },
            "Ada",
        ),
        ({"content": [{"type": "output_text", "text": "Ada"}, {"type": "image_url", "image_url": {}}]}, "Ada"),
        ({"content": ["A", "da"]}, "Ada"),
        ({"content": {"type": "text", "text": "Ada"}}, "Ada"),
        ({"content": []}, ""),
        ({"content": None, "refusal": "I will not."}, "I will not."),
        ({"content": "Ada", "refusal": None}, "Ada"),
        ({"content": None, "tool_calls": [CALL]}, WRITTEN),
        ({"content": "", "tool_calls": [CALL, CALL]}, f"{WRITTEN}\n{WRITTEN}"),
        ({"content": "Let me see.", "tool_calls": [CALL]}, f"Let me see.\n{WRITTEN}"),
        ({"content": None, "function_call": CALL["function"]}, WRITTEN),
        ({"content": "Ada", "tool_calls": [], "function_call": None}, "Ada"),
        ({"content": "Ada", "tool_calls": [None, 7, {"function": None}, {"function": {"arguments": "{}"}}]}, "Ada"),
        ({"content": "Ada", "tool_calls": "none"}, "Ada"),
        ({"content": "A\ud83dda"}, "A?da"),
    ],
)
def test_what_is_meant_decides_not_one_form(message: dict[str, Any], text: str) -> None:
    assert read(json.loads(json.dumps(message))).text == text


def test_calls_of_functions_become_operations_of_the_dialect() -> None:
    (operation,) = ToolCallsDialect().parse(read({"content": None, "tool_calls": [CALL]}).text)
    assert (getattr(operation, "kind", None), getattr(operation, "text", None)) == (OperationKind.READ, "Ada")


@pytest.mark.parametrize("ended", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": "Ad"}, {"content": "", "reasoning": "?"}])
def test_a_reply_without_room_is_truncated(ended: str, message: dict[str, Any]) -> None:
    reply = read(message, ended)
    assert (reply.text, reply.stop) == (message.get("content") or "", "length")


@pytest.mark.parametrize(
    ("message", "ended", "thinking", "text"),
    [
        (
            {"content": "Is it <final_answer>Ada</final_answer>? I"},
            "length",
            True,
            "",
        ),  # the template opened the thought
        ({"content": "Is it <final_answer>Ada</final_answer>? I"}, "stop", True, None),
        ({"content": "Is it <final_answer>Ada</final_answer>? I"}, "length", False, None),
        ({"content": "<final_answer>Ada</fin", "reasoning_content": "Ada?"}, "length", True, None),  # of the reply
        ({"content": "Ada?</think><final_answer>Ada</fin"}, "length", True, "<final_answer>Ada</fin"),
        ({"content": "<think><final_answer>Bo</final_answer>"}, "length", False, ""),
    ],
)
def test_a_draft_in_a_thought_that_was_cut_is_no_reply(
    message: dict[str, str], ended: str, thinking: bool, text: str | None
) -> None:
    reply = read(message, ended, thinking)
    assert reply.text == (message["content"] if text is None else text)
    assert reply.stop == ended


@pytest.mark.parametrize("ended", ["content_filter", "SAFETY", "RECITATION", "sensitive"])
def test_a_filtered_reply_is_no_reply(ended: str) -> None:
    with pytest.raises(Rejected):
        read({"content": "Ad"}, ended)


@pytest.mark.parametrize(
    "odd",
    [
        None,
        7,
        "Ada",
        [],
        {},
        {"choices": None},
        {"choices": [None]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": "Ada"}, "error": {"message": "no"}}]},
        answer({"content": None}, None),
        answer({"content": 7}, None),
        answer({"content": [{"type": "image_url"}]}, None),
        answer({"content": None}, "error"),
    ],
)
def test_an_answer_without_a_reply_is_malformed(odd: Any) -> None:
    with pytest.raises(Malformed, match="sent no reply but") as caught:
        read_answer(odd, 0.0)
    assert len(str(caught.value)) < 400


def test_an_answer_without_a_choice_is_sound() -> None:
    with pytest.raises(NoChoice):
        read_answer({"choices": [], "usage": {}}, 0.0)


@pytest.mark.parametrize(
    ("message", "alone"),
    [
        ({"content": None, "reasoning": "?"}, True),
        ({"content": " \n", "reasoning_content": "?"}, True),
        ({"content": [{"type": "thinking", "thinking": "?"}]}, True),
        ({"content": "Ada", "reasoning": "?"}, False),
        ({"content": None, "reasoning": "?", "tool_calls": [CALL]}, False),
        ({"content": None}, False),
    ],
)
def test_a_reply_that_is_a_thought_alone_says_so(message: dict[str, Any], alone: bool) -> None:
    assert read_answer(answer(message), 0.0).is_thought_only is alone


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        [7],
        "many",
        7,
        {},
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": -1, "completion_tokens": -7, "prompt_tokens_details": {"cached_tokens": -3}},
        {"prompt_tokens": True, "completion_tokens": "3", "prompt_tokens_details": [4]},
        {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
        {"prompt_tokens": 10**400, "completion_tokens": 0.5, "prompt_tokens_details": {"cached_tokens": 1}},
        {"prompt_tokens": {}, "completion_tokens": [], "prompt_tokens_details": {"cached_tokens": {}}},
    ],
)
def test_counts_that_are_none_are_not_reported(usage: Any) -> None:
    assert read({"content": "Ada"}, usage=usage).usage == Usage(1, None, None, None)


def test_counts_that_are_reported_count() -> None:
    usage = {"prompt_tokens": 7.0, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    assert read({"content": "Ada"}, usage=usage).usage == Usage(1, 7, 3, 2)
    usage["prompt_tokens_details"] = {"cached_tokens": 8}  # more than there were
    assert read({"content": "Ada"}, usage=usage).usage == Usage(1, 7, 3, None)


@pytest.mark.parametrize(
    ("ids", "logprobs", "prompt"),
    [
        ([1, -2], [{"logprob": -0.5}] * 2, ["1"]),
        ({"0": 1}, [{"logprob": float("nan")}], 7),
        ([1, True], [{"logprob": None}], [[1]]),
        ([1.5], [None], {"a": 1}),
        ("12", "none", "12"),
    ],
)
def test_ids_and_logprobs_that_are_none_are_left_out(ids: Any, logprobs: Any, prompt: Any) -> None:
    odd = answer({"content": "Ada"}, prompt_token_ids=prompt)
    odd["choices"][0] |= {"token_ids": ids, "logprobs": {"content": logprobs}}
    reply = read_answer(odd, 1.0).reply
    assert (reply.prompt_ids, reply.completion_ids, reply.logprobs) == ((), (), ())
