"""Text of unknown origin made safe to print: what a document, a policy or a file's name says cannot control a terminal."""

from __future__ import annotations

import re

# C0 but tab and line feed, DEL and C1; lone surrogates; marks that change the direction of what follows
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""`text` with control characters, bidirectional marks and lone surrogates as visible escapes.

    Tabs and ends of lines stay, those of Windows as "\n". For rich, wrap the result in `rich.text.Text`, or print it with
    `markup=False`: square brackets stay as they are.

    >>> printable("title \x1b]0;pwned\x07 and \u202egnp.exe")
    'title \\x1b]0;pwned\\x07 and \\u202egnp.exe'
    """
    return _UNSAFE.sub(lambda match: _escape(ord(match[0])), text.replace("\r\n", "\n"))


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
