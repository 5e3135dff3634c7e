"""The working memory against a naive one, and its promises on ties, copies and vectors."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from atommem_env.bm25 import BM25Index, fuse
from atommem_env.errors import EmbeddingError, EpisodeStateError, SettingError
from atommem_env.memory import WorkingMemory, unit
from atommem_env.types import Entry, Vector

DIMENSION = 8
# Small whole numbers: many vectors are equal or have equal cosines, so that ties are common.
vectors = st.lists(st.integers(-2, 2), min_size=DIMENSION, max_size=DIMENSION).filter(any)
texts = st.lists(st.sampled_from(["Ada", "rome", "Rome,", "lives", "in"]), max_size=4).map(" ".join)


class NaiveMemory:
    """Lists and a loop, in float64."""

    def __init__(self) -> None:
        self.created = 0
        self.rows: list[tuple[str, str, Vector]] = []

    def search(self, query: list[int], k: int) -> list[str]:
        direction = unit(query)
        scored = [(-np.einsum("i,i->", vector, direction), int(name[1:])) for name, _, vector in self.rows]
        return [f"m{number}" for _, number in sorted(scored)[:k]]

    def by_words(self, query: str) -> list[int]:
        index = BM25Index()
        for name, text, _ in self.rows:
            index.add(int(name[1:]), text)
        return index.ranking(query)

    def hybrid(self, query: str, direction: list[int]) -> list[int]:
        return fuse([[int(name[1:]) for name in self.search(direction, len(self.rows))], self.by_words(query)])


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = WorkingMemory(capacity=40)
        self.naive = NaiveMemory()

    @precondition(lambda self: not self.memory.full)
    @rule(vector=vectors, text=texts, copies=st.integers(1, 12))
    def create(self, vector: list[int], text: str, copies: int) -> None:
        for _ in range(min(copies, 40 - len(self.memory))):
            self.naive.created += 1
            name = f"m{self.naive.created}"
            assert self.memory.create(text, vector) == name
            self.naive.rows.append((name, text, unit(vector)))

    @precondition(lambda self: self.naive.rows)
    @rule(data=st.data(), vector=vectors, text=texts)
    def update(self, data: st.DataObject, vector: list[int], text: str) -> None:
        index = data.draw(st.integers(0, len(self.naive.rows) - 1))
        name = self.naive.rows[index][0]
        self.memory.update(name, text, vector)
        self.naive.rows[index] = (name, text, unit(vector))

    @precondition(lambda self: self.naive.rows)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name, _, _ = self.naive.rows.pop(data.draw(st.integers(0, len(self.naive.rows) - 1)))
        self.memory.delete(name)
        assert name not in self.memory

    @rule()
    def go_on_with_a_fork(self) -> None:
        self.memory = self.memory.fork()

    @rule()
    def go_on_with_a_restored_snapshot(self) -> None:
        self.memory = WorkingMemory.restore(pickle.loads(pickle.dumps(self.memory.snapshot())))

    @rule(query=vectors, k=st.integers(1, 50))
    def search(self, query: list[int], k: int) -> None:
        ids = self.memory.search(query, k)
        assert ids == self.naive.search(query, k)
        assert ids == WorkingMemory.restore(self.memory.snapshot()).search(query, k)
        assert ids == self.memory.fork().search(query, k)

    @rule(query=texts, vector=vectors, k=st.integers(1, 50))
    def search_with_words(self, query: str, vector: list[int], k: int) -> None:
        assert self.memory.search_words(query, k) == [f"m{number}" for number in self.naive.by_words(query)[:k]]
        assert self.memory.search_hybrid(query, vector, k) == [
            f"m{number}" for number in self.naive.hybrid(query, vector)[:k]
        ]

    @invariant()
    def holds_the_same(self) -> None:
        assert self.memory.entries() == tuple(Entry(name, text) for name, text, _ in self.naive.rows)
        assert len(self.memory) == len(self.naive.rows)
        assert self.memory.full == (len(self.naive.rows) == 40)
        if self.naive.rows:
            assert np.array_equal(self.memory.vectors(), np.stack([vector for _, _, vector in self.naive.rows]))


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_equal_rows_keep_their_order_wherever_they_lie() -> None:
    rng = np.random.default_rng(0)
    memory = WorkingMemory()
    twin = rng.standard_normal(1024)
    for index in range(301):
        memory.create(str(index), twin if index % 3 else rng.standard_normal(1024))
    query = rng.standard_normal(1024)
    before = [name for name in memory.search(query, 301) if int(name[1:]) > 150]
    for number in range(1, 151):
        memory.delete(f"m{number}")
    assert memory.search(query, 151) == before
    for k in (1, 6, 50, 120):  # the k-th score falls among the equals, too
        assert memory.search(query, k) == before[:k]
        assert WorkingMemory.restore(memory.snapshot()).search(query, k) == before[:k]
        assert memory.fork().search(query, k) == before[:k]


def test_a_fork_that_searches_by_words_is_independent() -> None:
    memory = WorkingMemory()
    memory.create("red boat", [1, 0])
    assert memory.search_words("boat", 9) == ["m1"]
    fork = memory.fork()
    fork.create("boat", [0, 1])
    fork.update("m1", "house", [1, 0])
    assert (memory.search_words("boat", 9), fork.search_words("boat", 9)) == (["m1"], ["m2"])
    memory.delete("m1")
    assert (memory.search_words("boat house", 9), fork.search_words("house", 9)) == ([], ["m1"])


def test_hybrid_search_finds_what_either_search_ranks_high() -> None:
    memory = WorkingMemory()
    for text, vector in (("near", [1.0, 0.0]), ("far", [0.0, 1.0]), ("far boat", [0.1, 1.0]), ("nearer", [1.0, 0.1])):
        memory.create(text, vector)
    assert memory.search([1, 0.2], 4) == ["m4", "m1", "m3", "m2"]
    assert memory.search_words("boat", 4) == ["m3"]
    assert memory.search_hybrid("boat", [1, 0.2], 4) == ["m3", "m4", "m1", "m2"]  # 1/63 + 1/61, 1/61, 1/62, 1/64


def test_fork_and_snapshot_are_independent() -> None:
    memory = WorkingMemory(2)
    memory.create("a", [1, 0])
    fork, snapshot = memory.fork(), memory.snapshot()
    fork.update("m1", "b", [0, 1])
    fork.create("c", [1, 1])
    assert memory.entries() == (Entry("m1", "a"),)
    assert memory.vectors().tolist() == [[1, 0]]
    restored = WorkingMemory.restore(snapshot)
    restored.update("m1", "d", [0, 1])
    assert WorkingMemory.restore(snapshot).vectors().tolist() == [[1, 0]]


def test_ids_are_never_used_twice_even_after_everything_is_deleted() -> None:
    memory = WorkingMemory()
    memory.create("a", [1, 0])
    memory.delete("m1")
    memory = WorkingMemory.restore(memory.snapshot()).fork()
    assert memory.vectors().shape == (0, 2)
    assert memory.search([1, 0], 3) == memory.search_words("a", 3) == memory.search_hybrid("a", [1, 0], 3) == []
    assert memory.create("b", [1, 0]) == "m2"


def test_capacity() -> None:
    memory = WorkingMemory(1)
    memory.create("a", [1, 0])
    assert memory.full
    with pytest.raises(EpisodeStateError, match="full"):
        memory.create("b", [1, 0])
    memory.delete("m1")
    assert not memory.full


@pytest.mark.parametrize(
    "bad", [[0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")], [1e300, 1.0], [1.0, 0.0, 0.0], [[1.0, 0.0]], [], 3.0]
)
def test_a_bad_vector_changes_nothing(bad: object) -> None:
    memory = WorkingMemory()
    memory.create("a", [1, 0])
    for attempt in (memory.create, lambda text, vector: memory.update("m1", text, vector)):
        with pytest.raises(EmbeddingError):
            attempt("b", bad)  # type: ignore[arg-type]
    with pytest.raises(EmbeddingError):
        memory.search(bad, 1)  # type: ignore[arg-type]
    assert memory.entries() == (Entry("m1", "a"),)
    assert memory.vectors().tolist() == [[1, 0]]
    assert memory.create("b", [0, 1]) == "m2"


def test_unknown_ids_and_a_senseless_k() -> None:
    memory = WorkingMemory()
    for attempt in (lambda: memory.get("m1"), lambda: memory.delete("m1"), lambda: memory.update("m1", "a", [1])):
        with pytest.raises(KeyError):
            attempt()
    with pytest.raises(SettingError, match="k must be"):
        memory.search([1], 0)


values32 = st.floats(-1e30, 1e30).map(lambda value: float(np.float32(value)))


@given(st.lists(values32, min_size=1, max_size=40).filter(lambda row: any(abs(value) > 1e-30 for value in row)))
def test_unit_is_idempotent_bit_for_bit(values: list[float]) -> None:
    once = unit(values)
    assert abs(float(np.linalg.norm(once.astype(np.float64))) - 1) < 1e-6
    assert unit(once).tobytes() == once.tobytes()
    assert unit([values, values])[1].tobytes() == once.tobytes()


def test_a_row_of_unit_length_stays_bit_for_bit_beside_others_that_are_scaled() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 7))
    once = unit(rows)
    scaled = unit(np.concatenate([once, 3 * rows]))
    assert scaled[:50].tobytes() == once.tobytes()
    assert np.allclose(scaled[50:], once)


def test_unit_vectors_are_float32_whatever_comes() -> None:
    for given_ in ([1, 0], np.array([1.0, 0.0]), np.array([[1, 0]]), np.zeros((0, 3)), np.zeros((0, 3), np.float32)):
        assert unit(given_).dtype == np.float32
        assert unit(given_).shape == np.shape(given_)
    empty = WorkingMemory().vectors()
    assert (empty.shape, empty.dtype) == ((0, 0), np.float32)


@pytest.mark.parametrize(
    ("stored", "vector", "message"),
    [
        (True, [1.0, 0.0, 0.0], "Expected a vector of shape [2] in this memory, got [3]; use one embedder."),
        (False, [[1.0, 0.0]], "Expected a vector of shape [D] in this memory, got [1, 2]; use one embedder."),
        (True, [], "Expected vectors of shape [D] or [n, D], got (0,); check the embedder."),
        (True, [0, 0], "Expected vectors with a direction, got one that is zero; check the embedder."),
        (
            True,
            [1, float("inf")],
            "Expected finite vectors, got one with an infinite or NaN value; check the embedder.",
        ),
    ],
)
def test_what_is_wrong_with_a_vector_is_said(stored: bool, vector: list[float], message: str) -> None:
    memory = WorkingMemory()
    if stored:
        memory.create("a", [1, 0])
    with pytest.raises(EmbeddingError, match=f"^{re.escape(message)}$"):
        memory.create("b", vector)


def test_a_search_by_words_needs_a_k() -> None:
    with pytest.raises(SettingError, match=r"^k must be at least 1, got 0\.$"):
        WorkingMemory().search_words("Ada", 0)
