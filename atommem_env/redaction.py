"""Takes keys and passwords out of whatever is shown or logged."""

from __future__ import annotations

import base64
import html
import json
import logging
import re
from collections.abc import Iterable, Iterator
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

_PIECE = 6  # characters of a secret in a row that are not shown
_HIDDEN = "…"
# A word of which the middle is masked, as services write keys: sk-ab******yz.
_MASKED = re.compile(r"[\w-]*(?:[*•…]+|\.{2,}|[xX]{4,})[\w*•…-]*")


class Secrets:
    """What must not be shown; also a filter for loggers, which hides it in their records.

    Args:
        url: an address; a name without a password, a password, and the values of the query are secrets.
        keys: those that are not in the address; None and "" are none.
    """

    def __init__(self, url: str, *keys: str | None) -> None:
        secrets = {text for text in (*keys, *_in_address(url)) if text}
        self._ends = {(text[:2], text[-2:]) for text in secrets if len(text) >= 2 + _PIECE}
        spelled = {form for text in secrets for form in _spellings(text)}
        pieces = {form[i : i + _PIECE] for form in spelled for i in range(max(len(form) - _PIECE, 0) + 1)}
        # Overlapping pieces are one match: (?=…) looks for a piece at each character, of which one is consumed.
        whole = sorted(map(re.escape, spelled | pieces), key=len, reverse=True)
        self._pattern = re.compile("|".join(whole), re.IGNORECASE) if whole else None

    def hide(self, text: str) -> str:
        """The text without secrets: spelled in any way that they come in, in part, or masked."""
        if self._pattern is None:
            return text
        text = _MASKED.sub(lambda match: _HIDDEN if self._is_masked(match[0]) else match[0], text)
        covered = [False] * len(text)
        start = 0
        while match := self._pattern.search(text, start):
            covered[match.start() : match.end()] = [True] * (match.end() - match.start())
            start = match.start() + 1  # the next piece may overlap with this one
        return re.sub("\0+", _HIDDEN, "".join("\0" if hidden else c for c, hidden in zip(text, covered, strict=True)))

    def filter(self, record: logging.LogRecord) -> bool:
        """Hides secrets in a record; all records pass."""
        message = record.getMessage()
        if (safe := self.hide(message)) != message:
            record.msg, record.args = safe, ()
        return True

    def _is_masked(self, word: str) -> bool:
        return any(word.startswith(first) or word.endswith(last) for first, last in self._ends)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_HIDDEN})"


def without_secrets(url: str) -> str:
    """An address without the password, or the key, that it may hold.

    >>> without_secrets("https://me:secret@host:8000/v1?key=secret"), without_secrets("me:secret@host/v1")
    ('https://host:8000/v1', 'host/v1')
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    # A password may hold a slash that should have been written as %2F.
    if "@" in path and "@" not in host and ":" in host:
        host, slash, path = rest.rpartition("@")[2].partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _in_address(url: str) -> Iterator[str]:
    parts = urlsplit(url)
    userinfo = parts.netloc.rpartition("@")[0]
    name, _, password = userinfo.partition(":")
    yield from (password or name, unquote(password or name))
    if password:
        yield base64.b64encode(unquote(userinfo).encode()).decode()
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        yield value or key
    yield parts.fragment


def _spellings(secret: str) -> Iterable[str]:
    encoded = secret.encode("utf-8", "replace")
    escaped = json.dumps(secret)[1:-1]
    return {
        secret,
        quote(secret, safe="", errors="replace"),
        quote(secret, errors="replace"),
        quote_plus(secret, errors="replace"),
        escaped,
        escaped.replace("/", "\\/"),
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        html.escape(secret),
        base64.b64encode(encoded).decode(),
    }
