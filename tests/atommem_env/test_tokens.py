"""Counting tokens agrees with finding them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import NAMES, load, texts

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


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(texts, st.integers(0, 40))
def test_a_text_is_cut_to_its_limit_by_any_tokenizer(name: str, text: str, limit: int) -> None:
    tokenizer = load(name)
    prefix = truncate(text, limit, tokenizer)
    assert text.startswith(prefix)
    assert tokenizer.count(prefix) <= limit
    if tokenizer.count(text) <= limit:
        assert prefix == text
    else:  # what a token more would add is a character that does not fit, or few tokens
        assert tokenizer.count(prefix) > limit - 12


def test_a_character_of_several_tokens_is_kept_whole_or_not_at_all() -> None:
    tokenizer = load("bytes")
    assert tokenizer.count("👩👩") == 8
    cut = [truncate("👩👩", limit, tokenizer) for limit in range(9)]
    assert cut == ["", "", "", "", "👩", "👩", "👩", "👩", "👩👩"]


def test_what_a_file_says_of_truncation_and_padding_does_not_count() -> None:
    tokenizer = load("lower")
    assert tokenizer.count("") == 0
    assert 4 < tokenizer.count("x y z, and more than four tokens") < 99
    assert tokenizer.count("\ud800") == tokenizer.count("\ufffd")
