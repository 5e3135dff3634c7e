"""BM25 and rank fusion against the formulas, written out."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atommem_env.bm25 import BM25Index, fuse, words

texts = st.lists(st.sampled_from(["ada", "Rome", "rome,", "lives", "in", "the"]), max_size=6).map(" ".join)


def bm25(query: str, text: str, collection: list[str]) -> float:
    mean = sum(len(words(other)) for other in collection) / len(collection)
    score = 0.0
    for word in words(query):
        holders = sum(word in words(other) for other in collection)
        tf = words(text).count(word)
        if tf:
            idf = math.log(1 + (len(collection) - holders + 0.5) / (holders + 0.5))
            score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(words(text)) / mean))
    return score


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=12), texts)
def test_the_ranking_is_that_of_the_formula_and_equals_go_by_age(collection: list[str], query: str) -> None:
    index = BM25Index()
    for number, text in enumerate(collection):
        index.add(number, text)
    ranking = index.ranking(query)
    assert sorted(ranking) == [
        number for number, text in enumerate(collection) if not set(words(text)).isdisjoint(words(query))
    ]
    scores = [bm25(query, collection[number], collection) for number in ranking]
    assert all(better >= worse - 1e-12 for better, worse in itertools.pairwise(scores))
    for first, second in itertools.pairwise(ranking):
        if sorted(words(collection[first])) == sorted(words(collection[second])):
            assert first < second


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, max_size=8), st.lists(texts, max_size=8), texts)
def test_what_was_added_and_removed_leaves_no_trace(remaining: list[str], removed: list[str], query: str) -> None:
    index, fresh = BM25Index(), BM25Index()
    for number, text in enumerate(removed):
        index.add(100 + number, text)
    for number, text in reversed(list(enumerate(remaining))):
        index.add(number, text)
    for number, text in enumerate(removed):
        index.remove(100 + number, text)
    for number, text in enumerate(remaining):
        fresh.add(number, text)
    assert index.ranking(query) == fresh.ranking(query)
    assert index.__dict__ == fresh.__dict__


def test_rare_words_weigh_more_and_long_texts_less() -> None:
    index = BM25Index()
    for number, text in enumerate(["the boat", "the house", "the garden", "the boat " + "and so on " * 9, "Zoë"]):
        index.add(number, text)
    assert index.ranking("the boat") == [0, 3, 1, 2]
    assert index.ranking("ZOË!") == [4]
    assert index.ranking("") == index.ranking("ship") == []


@given(
    st.lists(st.permutations(range(6)).flatmap(lambda order: st.integers(0, 6).map(lambda n: order[:n])), max_size=3)
)
def test_fusion_adds_the_reciprocals_of_ranks(rankings: list[list[int]]) -> None:
    scores = {
        number: sum(1 / (61 + r.index(number)) for r in rankings if number in r) for r in rankings for number in r
    }
    fused = fuse(rankings)
    assert sorted(fused) == sorted(scores)
    assert [scores[number] for number in fused] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-15)


def test_equals_in_a_fusion_go_by_age() -> None:
    assert fuse([[5, 2], [2, 5]]) == [2, 5]
    assert fuse([]) == fuse([[]]) == []
