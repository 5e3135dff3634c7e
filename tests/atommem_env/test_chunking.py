"""Chunks hold all that the documents hold, in order, within their limit."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import NAMES, load, texts

from atommem_env.chunking import chunk_documents
from atommem_env.tokens import BuiltinTokenizer
from atommem_env.types import Document


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def reference(documents: list[Document], limit: int) -> list[str]:
    """The same, written down plainly: every piece that must stay together first, then packing."""
    pieces: list[str] = []
    for document in documents:
        whole = f"{document.title}\n{document.text}"
        if len(tokens(whole)) <= limit:
            pieces.append(whole)
            continue
        room = max(1, limit - len(tokens(document.title)))
        atoms: list[str] = []
        for sentence in re.split(r"(?<=[.!?])\s+", document.text):
            starts = [match.start() for match in re.finditer(r"\w+|[^\w\s]", sentence)][::room]
            ends = [*starts[1:], len(sentence)]
            atoms += [sentence[start:end].rstrip() for start, end in zip(starts, ends, strict=False)]
        groups: list[list[str]] = []
        for atom in atoms:
            if groups and len(tokens(" ".join([*groups[-1], atom]))) <= room:
                groups[-1].append(atom)
            else:
                groups.append([atom])
        pieces += [f"{document.title}\n{' '.join(group)}" for group in groups]
    chunks: list[list[str]] = []
    for piece in pieces:
        if chunks and sum(len(tokens(one)) for one in [*chunks[-1], piece]) <= limit:
            chunks[-1].append(piece)
        else:
            chunks.append([piece])
    return ["\n\n".join(chunk) for chunk in chunks]


_words = st.lists(st.sampled_from(["Ada", "lives", "in", "Rome.", "Why?", "é–中", "...", "\n\n", "a.b"]), max_size=25)
_documents = st.builds(Document, _words.map(lambda words: " ".join(words[:3])), _words.map(" ".join))


@settings(max_examples=150, deadline=None)
@given(st.lists(_documents, max_size=6), st.integers(1, 30))
def test_chunks_are_those_of_the_plain_way(documents: list[Document], limit: int) -> None:
    chunks = chunk_documents(documents, limit, BuiltinTokenizer())
    assert list(chunks) == reference(documents, limit)
    titles = max((len(tokens(document.title)) for document in documents), default=0)
    assert all(len(tokens(chunk)) <= max(limit, titles + 1) for chunk in chunks)
    words = tokens(" ".join(chunks))
    for document in documents:
        text = iter(words)
        assert all(token in text for token in tokens(document.text))  # in order


_hostile = st.builds(Document, texts.map(lambda text: text[:6]), texts)


@pytest.mark.parametrize("name", ["builtin", *NAMES])
@settings(max_examples=100, deadline=None)
@given(st.lists(_hostile, max_size=6), st.integers(1, 90))
def test_chunks_hold_their_limit_by_any_tokenizer(name: str, documents: list[Document], limit: int) -> None:
    tokenizer = load(name)
    chunks = chunk_documents(documents, limit, tokenizer)
    # A title, and after it a token or the largest character with what joins it, may be too long by themselves.
    heads = [tokenizer.count(f"{document.title}\n") for document in documents]
    for chunk in chunks:
        assert tokenizer.count(chunk) <= max([limit, *(head + 12 for head in heads if head + 12 > limit)])
    kept = iter("".join("".join(chunks).split()))
    for document in documents:
        if document.text.strip():
            assert all(character in kept for character in "".join(document.text.split()))  # in order


def test_a_piece_is_counted_as_it_is_shown() -> None:
    tokenizer = load("merged")  # " Rome" is one token, "Rome" more
    document = Document("Ada", " Rome.AdaAdaAdaAdaAdaAdaAdaAdaRome.é–中")
    assert max(map(tokenizer.count, chunk_documents([document], 20, tokenizer))) <= 20


@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_is_as_full_as_its_limit_allows(name: str) -> None:
    tokenizer = load(name)
    documents = [Document(f"Ada {number}", "Ada lives in Rome. " * (1 + number % 4)) for number in range(60)]
    for limit in (64, 200):
        chunks = chunk_documents(documents, limit, tokenizer)
        pieces = [piece for chunk in chunks for piece in chunk.split("\n\n")]
        assert max(map(tokenizer.count, chunks)) <= limit
        start = 0
        for chunk in chunks[:-1]:
            start += len(chunk.split("\n\n"))
            assert tokenizer.count(f"{chunk}\n\n{pieces[start]}") > limit
