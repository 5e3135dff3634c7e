"""What services mean by the words of their errors; each has words of its own.

All functions take what `reason_in` and `codes_in` read from the body of an error, which has none of the prompt in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

# Where the words for people stand in an object, the best first; below each of them objects and lists may follow.
_REASONS = (
    "error",
    "errors",
    "message",
    "msg",
    "detail",
    "details",
    "reason",
    "error_description",
    "description",
    "title",
)
_CODES = "code", "type", "param", "status", "reason"  # where those for programs stand
_DEPTH = 6  # most objects inside one another that are looked into
_ITEMS = 8  # most of a list
_READ = 20_000  # characters of a text
_TOO_LONG = re.compile(
    r"context[ _](?:length|size|window|limit)|context_length_exceeded|exceed_context|max_model_len|max_seq_len"
    r"|(?:prompt|input|message|text|sequence|document)s?\b[^.;:]{0,60}\btoo (?:long|large)\b|request too large for model"
    r"|(?:prompt|input)s? exceeds? (?:the )?max(?:imum)? length"
    r"|input token count|input tokens exceed|too many (?:input |prompt )?tokens|maximum (?:prompt|sequence|input) length"
    r"|`?inputs`? tokens \+ `?max_new_tokens`? must be|`?inputs`? must have less than \d+ tokens"
    r"|longer than the (?:model|maximum)|number of tokens (?:in the prompt )?(?:allowed|cannot exceed)"
    r"|range of input length|reduce the length of the (?:messages|prompt|input)|string_above_max_length"
    r"|larger than the max context|must have at most \d+ tokens|token limit exceeded",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"content[ _-]?(?:filter|policy|moderation|safety|management)|contentfilter|responsible ?ai ?policy|usage polic"
    r"|safety (?:system|filter|setting|polic|guard|reason)"
    r"|blocked (?:by|due to|for) (?:our |the )?(?:safety|content)"
    r"|guardrail|moderation|prohibited_content|prompt was (?:blocked|flagged)|(?:input|request|prompt) (?:was|has been) flagged"
    r"|flagged (?:as|by|for)|(?:inappropriate|sensitive|unsafe|harmful) (?:content|information|words?)|data_?inspection_?failed"
    r"|sensitive_words|block_?reason",
    re.IGNORECASE,
)
_OVERLOADED = re.compile(
    r"overloaded|at capacity|over capacity|temporarily unavailable|(?:still|currently|is) loading", re.IGNORECASE
)
_OUT_OF_QUOTA = re.compile(
    r"insufficient[ _](?:quota|balance|credit|funds)|exceeded your current quota|credit balance|billing_hard_limit",
    re.IGNORECASE,
)
_UNKNOWN_FIELD = re.compile(
    r"unknown|unsupported|not supported|does(?:n't| not) support|unrecogni[sz]ed|extra|unexpected|not permitted|not allowed"
    r"|invalid (?:field|parameter|argument) name",
    re.IGNORECASE,
)
_SERVED_MODEL = re.compile(r"\bmodels?\b", re.IGNORECASE)
# How many tokens a prompt has, and how many it, or it and its reply, may have. Numbers may have separators.
_N = r"(\d[\d,_]*)"
_TOKENS = tuple(
    re.compile(words, re.IGNORECASE)
    for words in (
        rf"(?:contains|resulted in|\() ?{_N} (?:input tokens|tokens\b|in the messages)",
        rf"input length \({_N}\)",
        rf"\btoo long: {_N}(?: tokens)?",
        rf"exceed context limit: {_N} \+",
        rf"input token count (?:is |of )?\(?{_N}",
        rf"request contains {_N}",
        rf"given: {_N} `?inputs`? tokens",
        rf"must have less than \d+ tokens\. given: {_N}",
        rf"prompt (?:length|has|of) \(?{_N}",
        rf"(?:received|got) {_N}",
        rf"request \({_N} tokens\)",
        rf"{_N} tokens from the input",
    )
)
_WINDOW = tuple(
    re.compile(words, re.IGNORECASE)
    for words in (
        rf"context (?:length|size|window) ?(?:is |of |: |\()(?:only )?{_N}",
        rf"max_total_tokens={_N}",
        rf"max_new_tokens`? must be <= {_N}",
        rf"exceed context limit: \d+ \+ \d+ > {_N}",
        rf"for model with {_N} maximum context",
        rf"context length \({_N} tokens\)",
    )
)
_PROMPT_ROOM = tuple(  # of the prompt alone
    re.compile(words, re.IGNORECASE)
    for words in (
        rf"tokens > {_N} maximum",
        rf"maximum number of tokens allowed \({_N}\)",
        rf"only supports up to {_N}",
        rf"maximum prompt length is {_N}",
        rf"must have less than {_N} tokens",
        rf"in the prompt cannot exceed {_N}",
        rf"configured limit of {_N} tokens",
        rf"range of input length should be \[\d+, ?{_N}\]",
    )
)


def reason_in(body: str) -> str:
    """A service's words for people, in whatever form its error has.

    >>> reason_in('{"error": {"message": "no", "code": 400}}'), reason_in('[{"error": "no"}]'), reason_in("no\\n")
    ('no', 'no', 'no')
    >>> reason_in('{"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 7}]}')
    'body.seed: Extra inputs are not permitted'
    >>> reason_in("<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>")
    '502 Bad Gateway nginx'
    """
    answer = _parsed(body)
    words = list(dict.fromkeys(_words(answer, _DEPTH))) if isinstance(answer, dict | list) else []
    return " | ".join(words)[:_READ] or _plain(body)


def codes_in(body: str) -> str:
    """Its words for programs, separated by spaces.

    >>> codes_in('{"error": {"message": "no", "code": "content_filter", "innererror": {"code": "Blocked"}}, "status": 400}')
    '400 content_filter Blocked'
    """
    return " ".join(_codes(_parsed(body), _DEPTH))


def is_too_long(said: str) -> bool:
    """Whether a prompt does not fit into the model's window.

    >>> is_too_long("prompt is too long: 213423 tokens > 200000 maximum"), is_too_long("max_tokens must be positive")
    (True, False)
    """
    return _TOO_LONG.search(said) is not None


def is_refused(said: str) -> bool:
    """Whether a policy on content blocks this one prompt.

    >>> is_refused("The response was filtered … content management policy."), is_refused("Invalid API key")
    (True, False)
    """
    return _REFUSED.search(said) is not None


def is_overloaded(said: str) -> bool:
    """Whether the same request may be answered later."""
    return _OVERLOADED.search(said) is not None


def is_out_of_quota(said: str) -> bool:
    """Whether only paying helps, although the status is that of a limited rate."""
    return _OUT_OF_QUOTA.search(said) is not None


def is_unknown_field(said: str) -> bool:
    """Whether a field as such is rejected, rather than its value."""
    return _UNKNOWN_FIELD.search(said) is not None


def names_model(said: str) -> bool:
    """Whether a "not found" is about the model, rather than about the address."""
    return _SERVED_MODEL.search(said) is not None


def named_in(said: str, fields: Iterable[str]) -> set[str]:
    """Which fields of a request a rejection is about.

    >>> sorted(named_in("Unsupported parameter: 'seed'; use max_completion_tokens", ["seed", "max_tokens"]))
    ['seed']
    """
    return {field for field in fields if re.search(rf"(?<![\w-]){re.escape(field)}(?![\w-])", said)}


def prompt_lengths(said: str, max_new_tokens: int) -> tuple[int | None, int | None]:
    """The prompt's tokens, and the most that it could have had, as far as a service reports them.

    vLLM stops counting one token behind what there is room for, and then says "at least".

    >>> prompt_lengths("maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.", 256)
    (9000, 7936)
    >>> prompt_lengths("prompt is too long: 213,423 tokens > 200,000 maximum", 256)
    (213423, 200000)
    >>> prompt_lengths("maximum context length is 2048 tokens. However, you requested 48 output tokens and your prompt "
    ...                "contains at least 2001 input tokens, for a total of at least 2049 tokens.", 48)
    (None, 2000)
    """
    window, room = _first(_WINDOW, said), _first(_PROMPT_ROOM, said)
    if room is None and window is not None:
        room = max(window - max_new_tokens, 0)
    return _first(_TOKENS, said), room


def _first(patterns: tuple[re.Pattern[str], ...], said: str) -> int | None:
    for pattern in patterns:
        if match := pattern.search(said):
            digits = match[1].replace(",", "").replace("_", "")
            return int(digits) if len(digits) < 16 else None
    return None


def _parsed(body: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _words(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str) and value.strip():
        yield _plain(value)
    elif isinstance(value, list) and depth:
        for item in value[:_ITEMS]:
            yield from _words(item, depth - 1)
    elif isinstance(value, dict) and depth:
        location = value.get("loc")  # FastAPI's
        if isinstance(location, list) and isinstance(value.get("msg"), str):
            yield f"{'.'.join(str(part)[:40] for part in location[:_ITEMS])}: {value['msg']}"
            return
        for name in _REASONS:
            found = list(_words(value.get(name), depth - 1))
            if found:
                yield from found
                break
        metadata = value.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("raw"), str):  # of the service behind a router
            yield reason_in(metadata["raw"]) if metadata["raw"][:1] in "{[" and depth > 1 else _plain(metadata["raw"])


def _codes(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, list) and depth:
        for item in value[:_ITEMS]:
            yield from _codes(item, depth - 1)
    elif isinstance(value, dict) and depth:
        for name in _CODES:
            code = value.get(name)
            if isinstance(code, str | int) and not isinstance(code, bool):
                yield str(code)[:100] if isinstance(code, str) or abs(code) < 10**9 else ""
        for name, inner in list(value.items())[: 4 * _ITEMS]:
            if name not in _CODES:
                yield from _codes(inner, depth - 1)


def _plain(text: str) -> str:
    """A text without the marks of HTML, on one line."""
    text = text[:_READ]
    if re.match(r"\s*<(?:!doctype|html|head|body|\?xml)", text, re.IGNORECASE):
        text = re.sub(r"(?is)<(script|style)\b[^<]{0,5000}</\1>", " ", text)
        text = re.sub(r"<[^<>]{0,500}>", " ", text)
    return " ".join(text.split())
