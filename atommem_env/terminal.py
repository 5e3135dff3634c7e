"""Text from data on a terminal."""

from __future__ import annotations

import re

import rich.markup

# C0 and C1 control characters but tab and newline, what changes the direction of writing, and lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
)


def printable(text: str) -> str:
    r"""The text, with the characters that would control a terminal, reorder a line or cannot be encoded written as escapes.

    >>> printable("\x1b[31mred\x07\tand\nplain, \u202egnp.exe, é, \ud800")
    '\\x1b[31mred\\x07\tand\nplain, \\u202egnp.exe, é, \\ud800'
    """
    return _UNPRINTABLE.sub(_escape, text.replace("\r\n", "\n"))


def escape(text: str) -> str:
    r"""`printable`, and no markup of rich's, for what is printed among markup.

    >>> escape("[red]\x1b")
    '\\[red]\\x1b'
    """
    return rich.markup.escape(printable(text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
