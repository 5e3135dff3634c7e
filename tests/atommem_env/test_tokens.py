"""Counting tokens agrees with finding them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atommem_env.tokens import BuiltinTokenizer, truncate

_TOKENIZER = BuiltinTokenizer()
_mixed = st.text(st.sampled_from("ab_0 .,-é·–中、\t\n\x1c\x85\xa0\u2028\u3000\ud800²ªµ"), max_size=12)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), _mixed))
def test_count_is_the_number_of_spans(text: str) -> None:
    spans = list(_TOKENIZER.spans(text))
    assert _TOKENIZER.count(text) == len(spans)
    assert "".join(text[start:end] for start, end in spans) == "".join(text.split())


@pytest.mark.parametrize("neighbour", ["", "a", ".", " ", "中"])
def test_every_character_of_latin_1_is_counted_as_it_is_found(neighbour: str) -> None:
    for number in range(256):
        for text in (neighbour + chr(number), chr(number) + neighbour):
            assert _TOKENIZER.count(text) == sum(1 for _ in _TOKENIZER.spans(text)), repr(text)


@given(_mixed, st.integers(0, 12))
def test_cut_keeps_as_many_tokens_as_fit(text: str, limit: int) -> None:
    prefix = truncate(text, limit, _TOKENIZER)
    assert text.startswith(prefix)
    assert _TOKENIZER.count(prefix) == min(limit, _TOKENIZER.count(text))
