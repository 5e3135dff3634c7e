"""What services say, in their words."""

from __future__ import annotations

import json

import pytest

from atommem_env.service_words import (
    codes_in,
    is_out_of_quota,
    is_overloaded,
    is_refused,
    is_too_long,
    named_in,
    prompt_lengths,
    reason_in,
)

TOO_LONG = [  # words, tokens of the prompt, most that it could have had (of a reply of 64 tokens)
    ("prompt is too long: 213423 tokens > 200000 maximum", 213423, 200000),  # Anthropic
    (
        "input length and `max_tokens` exceed context limit: 199990 + 64 > 200000, decrease input length or `max_tokens`",
        199990,
        199936,
    ),
    ("Input is too long for requested model.", None, None),  # Bedrock
    (
        "The model returned the following errors: Input is too long for requested model",
        None,
        None,
    ),
    (
        "The input token count (1200000) exceeds the maximum number of tokens allowed (1048575).",
        1200000,
        1048575,
    ),  # Gemini
    (
        "Unable to submit request because the input token count is 1200000 but model only supports up to 1048576.",
        1200000,
        1048576,
    ),
    (  # TGI
        (
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens and 64 "
            "`max_new_tokens`"
        ),
        5000,
        4032,
    ),
    ("Input validation error: `inputs` must have less than 1024 tokens. Given: 3000", 3000, 1024),
    ("the input length exceeds the context length", None, None),  # Ollama
    ("prompt too long; exceeded max context length by 12 tokens", None, None),
    (  # llama.cpp
        "request (9000 tokens) exceeds the available context size (8192 tokens), try increasing it",
        9000,
        8128,
    ),
    ("the request exceeds the available context size. try increasing the context size", None, None),
    (
        "input (600 tokens) is too large to process. increase the physical batch size (current batch size: 512)",
        600,
        None,
    ),
    ("Prompt contains 40000 tokens, too large for model with 32768 maximum context length", 40000, 32704),  # Mistral
    (
        "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 5000. Try using a shorter prompt",
        5000,
        4081,
    ),  # Cohere
    ("The prompt is too long: 9000, model maximum context length: 8191", 9000, 8127),  # Fireworks
    ("This model's maximum prompt length is 131072 but the request contains 537812 tokens.", 537812, 131072),  # xAI
    (
        "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 300000 tokens.",
        300000,
        272000,
    ),  # OpenAI
    ("The input (9000 tokens) is longer than the model's context length (8192 tokens).", 9000, 8128),  # SGLang
    (
        (
            "Requested token count exceeds the model's maximum context length of 8192 tokens. You requested a total of 9064: "
            "9000 tokens from the input messages and 64 tokens for the completion."
        ),
        9000,
        8128,
    ),
    ("Range of input length should be [1, 30720]", None, 30720),  # DashScope
    ("Prompt exceeds max length", None, None),  # Zhipu
    ("Please reduce the length of the messages or completion. context_length_exceeded", None, None),  # Groq
    (
        (
            "Trying to keep the first 9000 tokens when the context overflows. But the model is loaded with context length of "
            "only 4096 tokens, which is not enough."
        ),
        None,
        4032,
    ),  # LM Studio
    ("prompt length (9000) plus max_tokens exceeds max_seq_len", 9000, None),  # TensorRT-LLM
    ("Invalid 'messages[0].content': string too long. string_above_max_length", None, None),
]
NOT_TOO_LONG = [
    "max_tokens is too large: 9999. This model supports at most 4096 completion tokens",
    "Invalid request: max_tokens is too large: 9999",
    "temperature must be non-negative",
    "batch size is too large, it should not be larger than 10",
    "The model `m` does not exist",
    "Extra inputs are not permitted: seed",
    "Rate limit reached: too many requests",
]


@pytest.mark.parametrize(("words", "tokens", "room"), TOO_LONG)
def test_a_prompt_that_is_too_long_is_recognized_with_its_numbers(
    words: str, tokens: int | None, room: int | None
) -> None:
    assert is_too_long(words)
    assert not is_refused(words)
    assert not is_overloaded(words)
    assert prompt_lengths(words, 64) == (tokens, room)


@pytest.mark.parametrize("words", NOT_TOO_LONG)
def test_other_rejections_are_not_about_its_length(words: str) -> None:
    assert not is_too_long(words)
    assert not is_refused(words)


@pytest.mark.parametrize(
    "words",
    [
        "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
        "content_filter ResponsibleAIPolicyViolation",
        "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
        "Your request was rejected as a result of our safety system.",
        "Input data may contain inappropriate content. data_inspection_failed",
        "The prompt was blocked: PROHIBITED_CONTENT",
        "Your chosen model requires moderation and your input was flagged for violence.",
        "系统检测到输入或生成内容可能包含不安全或敏感内容 sensitive_words",
        "Guardrail intervened",
        "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO; blocked by content moderation",
    ],
)
def test_a_policy_on_content_is_recognized(words: str) -> None:
    assert is_refused(words)
    assert not is_too_long(words)


def test_an_overload_and_an_empty_purse_are_told_apart() -> None:
    assert is_overloaded("Overloaded overloaded_error")
    assert is_overloaded("Model m is currently loading")
    assert is_out_of_quota("You exceeded your current quota, please check your plan. insufficient_quota")
    assert not is_out_of_quota("Rate limit reached for requests")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": {"message": "no", "type": "t", "code": 1}}, "no"),
        ({"error": "no"}, "no"),
        ({"detail": "no"}, "no"),
        ({"message": "no", "code": 3}, "no"),
        ({"detail": [{"loc": ["body", "seed"], "msg": "Extra"}, {"loc": ["body", "n"], "msg": "Extra"}]}, None),
        ([{"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}], "no"),
        ({"error": {"message": "Provider returned error", "metadata": {"raw": '{"error": "no"}'}}}, None),
        ({"errors": ["no"]}, "no"),
        ({"code": 7}, '{"code": 7}'),
        ("no", '"no"'),
    ],
)
def test_a_reason_is_found_where_services_put_it(body: object, reason: str | None) -> None:
    special = {
        "detail": "body.seed: Extra | body.n: Extra",
        "error": "Provider returned error | no",
    }
    expected = reason or special[next(iter(body))]  # type: ignore[call-overload]
    assert reason_in(json.dumps(body)) == expected


@pytest.mark.parametrize(
    "body", ["[" * 100_000, '{"error":' * 5000, "9" * 5000, "\0", "", "<" * 20_000, '{"error": NaN}']
)
def test_no_body_is_too_odd_to_read(body: str) -> None:
    assert len(reason_in(body)) <= 20_000
    assert isinstance(codes_in(body), str)


def test_fields_are_named_as_words() -> None:
    fields = ["seed", "max_tokens", "logprobs"]
    assert named_in("body.seed: Extra", fields) == {"seed"}
    assert named_in("'max_tokens' is not supported; use 'max_completion_tokens'", fields) == {"max_tokens"}
    assert named_in("top_logprobs, seeds and max_tokens_total", fields) == set()
