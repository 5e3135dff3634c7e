"""The reply in an answer of a chat service; services write it in several forms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.models.thinking import without_thought
from atommem_env.dialects.tool_calls import reply_of
from atommem_env.openai_client import Malformed, Rejected, describe_answer
from atommem_env.types import Reply, Usage

_THOUGHTS = "reasoning", "reasoning_content", "thinking"  # fields of a message
_TEXT_PARTS = None, "text", "output_text"  # types of a part that belong to the reply
_LENGTH = "length", "max_tokens", "model_length", "max_output_tokens"  # reasons to end, in lower case
_FILTERED = (
    *("content_filter", "content_filtered", "safety", "recitation", "prohibited_content", "blocklist", "spii"),
    *("sensitive", "guardrail_intervened"),
)
_MOST = 2**53  # a count beyond that is none


class NoChoice(Malformed):
    """An answer that is sound, and has no reply in it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read."""

    reply: Reply
    is_thought_only: bool  # the model thought, and nothing stands outside the thought


def read_answer(answer: Any, temperature: float, thinking: bool = False) -> Answer:
    """The reply in the parsed JSON of an answer.

    The text is the message's content; a list of parts is joined. Calls of functions follow it, as the dialect `tool_calls`
    writes them. A refusal by the model is what it replied. Content may be missing where the choice says why it ended.

    Args:
        temperature: that was asked for.
        thinking: whether the model was asked to think.

    Raises:
        Malformed: there is no reply in it.
        Rejected: the service has filtered the reply.
    """
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if choices == []:
        raise NoChoice(f"sent no reply but {describe_answer(answer)}")
    choice = choices[0] if isinstance(choices, list) else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping) or choice.get("error"):
        raise Malformed(f"sent no reply but {describe_answer(answer)}")
    ended = str(choice.get("finish_reason") or "").lower()
    if ended in _FILTERED:
        raise Rejected(200, f"it ended the reply with the reason {ended!r}.", "content_filter")
    text, thought = _content(message)
    if (text is None and not (thought or ended)) or ended == "error":
        raise Malformed(f"sent no reply but {describe_answer(answer)}")
    truncated = ended in _LENGTH
    text = without_thought(text or "", opened=None, thinking=thinking and not thought, truncated=truncated)
    completion_ids = _ids(choice.get("token_ids"))
    logprobs = _logprobs(choice.get("logprobs"))
    prompt_ids = _ids(answer.get("prompt_token_ids"))
    # vLLM reports those at temperature 1, unless it was started otherwise; at 0 they are what `Reply` defines.
    sampled_from = temperature in (0, 1) and len(logprobs) == len(completion_ids)
    reply = Reply(
        text=text,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        logprobs=logprobs if sampled_from else (),
        stop="length" if truncated else "stop",
        usage=_usage(answer.get("usage"), prompt_ids, completion_ids),
    )
    return Answer(reply, thought and not text.strip())


def _content(message: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The text of a message, None where it has none, and whether it has a thought beside it."""
    content = message.get("content")
    texts: list[str] = []
    thought = any(message.get(name) for name in _THOUGHTS)
    for part in content if isinstance(content, list) else [content]:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, part)
        if isinstance(text, str) and kind in _TEXT_PARTS:
            texts.append(text)
        elif isinstance(part, Mapping):
            thought |= kind in ("thinking", "reasoning")
    calls = _calls(message)
    if calls or not "".join(texts):
        refusal = message.get("refusal")
        texts = [text for text in ("".join(texts), calls or refusal) if isinstance(text, str) and text] or texts
        text = "\n".join(texts)
    else:
        text = "".join(texts)
    # A lone surrogate, which JSON can spell, is no character, and no file can hold it.
    return text.encode("utf-8", "replace").decode() if texts else None, thought


def _calls(message: Mapping[str, Any]) -> str:
    """The calls of functions in a message, as text; those in a form of their own are left out."""
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, list) else [{"function": message.get("function_call")}]  # the API's earlier form
    functions = [call.get("function") for call in calls if isinstance(call, Mapping)]
    return reply_of(
        [
            {"function": {"name": function["name"], "arguments": function.get("arguments")}}
            for function in functions
            if isinstance(function, Mapping) and isinstance(function.get("name"), str)
        ]
    )


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids; none where the service does not report them as such."""
    counts = [_count(item) for item in value] if isinstance(value, list) else []
    ids = tuple(count for count in counts if count is not None)
    return ids if len(ids) == len(counts) else ()


def _logprobs(value: Any) -> tuple[float, ...]:
    content = value.get("content") if isinstance(value, Mapping) else None
    chances: list[float] = []
    for item in content if isinstance(content, list) else []:
        chance = item.get("logprob") if isinstance(item, Mapping) else None
        if not isinstance(chance, int | float) or not math.isfinite(chance):
            return ()
        chances.append(chance)
    return tuple(chances)


def _usage(value: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Usage:
    """The cost of a reply, as the service reports it, else by its tokens."""
    usage = value if isinstance(value, Mapping) else {}
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, Mapping) else None
    prompt = _count(usage.get("prompt_tokens")) or len(prompt_ids) or None
    completion = _count(usage.get("completion_tokens"))
    if completion is None and completion_ids:
        completion = len(completion_ids)
    return Usage(
        calls=1,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=None if cached is None or cached > (prompt or 0) else cached,
    )


def _count(value: Any) -> int | None:
    """A count, None where the value is none: negative, not whole, not a number.

    >>> [_count(value) for value in (7, 7.0, -1, True, "7", float("nan"), 0.5)]
    [7, 7, None, None, None, None, None]
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MOST or value != int(value):
        return None
    return int(value)
