"""Splits a context into the chunks that a policy reads one at a time."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from atommem_env.tokens import Tokenizer
from atommem_env.types import Document

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def chunk_documents(documents: Sequence[Document], limit: int, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Packs whole documents, in order, into chunks of at most `limit` tokens (titles and separators included).

    A document that does not fit into the rest of a chunk starts the next one, so that no sentence is split. A document longer
    than a chunk is split between sentences, and a sentence longer than a chunk between tokens; each piece has the title. A piece
    has at least one token, or one character, beside the title: only where these alone are too long does a chunk exceed the limit.

    >>> from atommem_env.tokens import BuiltinTokenizer
    >>> chunk_documents([Document("A", "One two."), Document("B", "Three."), Document("C", "Four five.")], 7, BuiltinTokenizer())
    ('A\\nOne two.\\n\\nB\\nThree.', 'C\\nFour five.')
    """
    pieces = [piece for document in documents for piece in _pieces(document, limit, tokenizer)]
    return tuple(text for text, _ in _join(pieces, "", "\n\n", limit, tokenizer))


def _pieces(document: Document, limit: int, tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """The document as (text with title, tokens), whole or in pieces as `chunk_documents` says."""
    head = f"{document.title}\n"
    whole = head + document.text
    size = tokenizer.count(whole)
    if size <= limit:
        yield whole, size
        return
    room = max(1, limit - tokenizer.count(head))
    parts = [
        (part, tokenizer.count(part))
        for sentence in _SENTENCE_END.split(document.text)
        for part in _split_by_tokens(sentence, room, head, limit, tokenizer)
    ]
    yield from _join(parts, head, " ", limit, tokenizer)


def _join(
    parts: Sequence[tuple[str, int]], head: str, separator: str, limit: int, tokenizer: Tokenizer
) -> Iterator[tuple[str, int]]:
    """`head` and as many of the next parts as fit, but at least one, until all are used: (text, tokens) of each.

    Where the tokenizer is not additive, sums of tokens are a first guess at what fits, and the texts are counted.
    """
    used = tokenizer.count(head)
    if not tokenizer.additive:
        parts = [(text, tokenizer.count(separator + text)) for text, _ in parts]
    start = 0
    while start < len(parts):
        end, size = start + 1, used + parts[start][1]
        while end < len(parts) and size + parts[end][1] <= limit:
            size += parts[end][1]
            end += 1
        if not tokenizer.additive:

            def fits(end: int, start: int = start) -> bool:
                return tokenizer.count(head + separator.join(text for text, _ in parts[start:end])) <= limit

            end = _last_that_fits(end, fits, range(start + 1, len(parts) + 1))
        yield head + separator.join(text for text, _ in parts[start:end]), size
        start = end


def _last_that_fits(guess: int, fits: Callable[[int], bool], among: range) -> int:
    """The largest number that fits, searched for from a guess upwards or downwards; the smallest where none does."""
    if not fits(guess):
        return next((number for number in range(guess - 1, among[0], -1) if fits(number)), among[0])
    return next((number - 1 for number in range(guess + 1, among[-1] + 1) if not fits(number)), among[-1])


def _split_by_tokens(text: str, room: int, head: str, limit: int, tokenizer: Tokenizer) -> Iterator[str]:
    """The text in pieces of at most `room` tokens, so that with `head` before each none exceeds `limit`."""
    starts = [start for start, _ in tokenizer.spans(text)]
    cuts = starts[::room] if tokenizer.additive else _cuts(text, starts, room, head, limit, tokenizer)
    for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=False):
        if piece := text[begin:end].strip():
            yield piece


def _cuts(text: str, starts: Sequence[int], room: int, head: str, limit: int, tokenizer: Tokenizer) -> list[int]:
    """Where the pieces begin if several tokens can be one character, and a piece can have other tokens than the whole text."""
    before = {0: 0}  # the first character of a token → how many tokens there are before it
    for number, start in enumerate(starts):
        before.setdefault(start, number)
    places, numbers = [*before, len(text)], [*before.values(), len(starts)]
    cuts, begin = [], 0
    while begin < len(before):
        cuts.append(places[begin])

        def fits(end: int, begin: int = begin) -> bool:
            return tokenizer.count(head + text[places[begin] : places[end]].strip()) <= limit

        guess = max(bisect_right(numbers, numbers[begin] + room) - 1, begin + 1)
        begin = _last_that_fits(guess, fits, range(begin + 1, len(places)))
    return cuts
