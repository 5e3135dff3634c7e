"""Splits a context into the chunks that a policy reads one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from atommem_env.tokens import Tokenizer
from atommem_env.types import Document

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def chunk_documents(documents: Sequence[Document], limit: int, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Packs whole documents, in order, into chunks of at most `limit` tokens (title lines included).

    A document that does not fit into the rest of a chunk starts the next one, so that no sentence is split. A document longer
    than a chunk is split between sentences, and a sentence longer than a chunk between tokens; each piece has the title.

    >>> from atommem_env.tokens import BuiltinTokenizer
    >>> chunk_documents([Document("A", "One two."), Document("B", "Three."), Document("C", "Four five.")], 7, BuiltinTokenizer())
    ('A\\nOne two.\\n\\nB\\nThree.', 'C\\nFour five.')
    """
    chunks: list[str] = []
    parts: list[str] = []
    used = 0
    for document in documents:
        for text, size in _pieces(document, limit, tokenizer):
            if parts and used + size > limit:
                chunks.append("\n\n".join(parts))
                parts, used = [], 0
            parts.append(text)
            used += size
    if parts:
        chunks.append("\n\n".join(parts))
    return tuple(chunks)


def _pieces(document: Document, limit: int, tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """The document as (text with title, tokens), in pieces of at most `limit` tokens unless its title alone exceeds that."""
    whole = f"{document.title}\n{document.text}"
    size = tokenizer.count(whole)
    if size <= limit:
        yield whole, size
        return
    title_size = tokenizer.count(document.title)
    room = max(1, limit - title_size)
    sentences: list[str] = []
    used = 0
    for sentence in _SENTENCE_END.split(document.text):
        for part in _split_by_tokens(sentence, room, tokenizer):
            part_size = tokenizer.count(part)
            if sentences and used + part_size > room:
                yield f"{document.title}\n{' '.join(sentences)}", title_size + used
                sentences, used = [], 0
            sentences.append(part)
            used += part_size
    if sentences:
        yield f"{document.title}\n{' '.join(sentences)}", title_size + used


def _split_by_tokens(text: str, limit: int, tokenizer: Tokenizer) -> Iterator[str]:
    starts = [start for start, _ in tokenizer.spans(text)][::limit]
    for index, start in enumerate(starts):
        piece = text[start : starts[index + 1] if index + 1 < len(starts) else len(text)].rstrip()
        if piece:
            yield piece
