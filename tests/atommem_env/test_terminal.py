"""What reaches a terminal."""

from __future__ import annotations

import pytest

from atommem_env.terminal import printable


@pytest.mark.parametrize("code", [0, 7, 8, 0x0B, 0x0D, 0x1B, 0x7F, 0x80, 0x9B, 0x9F])
def test_control_characters_are_shown(code: int) -> None:
    assert printable(f"a{chr(code)}b") == f"a\\x{code:02x}b"


@pytest.mark.parametrize("code", [0x061C, 0x200E, 0x200F, 0x202A, 0x202E, 0x2066, 0x2069, 0xD800, 0xDFFF])
def test_direction_marks_and_lone_surrogates_are_shown(code: int) -> None:
    assert printable(f"a{chr(code)}b") == f"a\\u{code:04x}b"
    printable(chr(code)).encode()


def test_other_text_stays() -> None:
    text = "Łódź, 東京, 👩‍👩‍👧, \u00a0 tab\tand\nnewline, [bold] and \\x1b as typed"
    assert printable(text) == text
