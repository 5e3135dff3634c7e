"""Embeddings without a model: hashed words and spellings. Quick, the same everywhere, and good enough to learn with."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import SettingError
from atommem_env.types import EmbeddingKind

_WORD = re.compile(r"\w{1,64}")  # a longer word counts as several
_BLOCK = 4096  # words worked on at a time, so that a long text needs little memory
_STOP_WEIGHT = 0.1
_STOP_WORDS = frozenset(
    _WORD.findall(
        "a about after all also an and any are as at be been before but by can could did do does for from had has have he "
        "her him his how i if in into is it its me more most my no not of on one or other our she so some such than that the "
        "their them then there these they this to up was we were what when where which while who whom whose why will with "
        "would you your"
    )
)


class HashingEmbedder:
    """Signed feature hashing (Weinberger et al. 2009) of words and of their letter trigrams.

    A word contributes √(times it occurs), a tenth of it for an English stop word, and its trigrams together as much again: so
    that inflected, misspelled and compound words meet too. Cosines reflect shared words, not meaning. Queries are embedded as
    documents are.

    >>> texts = ["Ada cooks in Rome", "ada, in ROME, is cooking!", "Bo sails"]
    >>> vectors = HashingEmbedder().embed(texts, "document")
    >>> bool(vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2])
    True

    Raises:
        SettingError: `dimension` is less than 1.
    """

    name = "hashing"

    def __init__(self, dimension: int = 256) -> None:
        if dimension < 1:
            raise SettingError(f"dimension must be at least 1, got {dimension}.")
        self.dimension = dimension

    def embed(self, texts: Sequence[str], kind: EmbeddingKind) -> NDArray[np.float32]:
        """The unit vectors [len(texts), dimension] of `texts`, in order; `kind` changes nothing."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            row[:] = self._vector(text)
        return vectors

    def _vector(self, text: str) -> NDArray[np.float64]:
        counts = list(Counter(_WORD.findall(text.lower())).items())
        total = np.zeros(self.dimension)
        for start in range(0, len(counts), _BLOCK):
            hashes, weights = _features(counts[start : start + _BLOCK])
            signs = np.where(hashes >> np.uint64(63), 1.0, -1.0)
            slots = (hashes % np.uint64(self.dimension)).astype(np.intp)
            total += np.bincount(slots, signs * weights, self.dimension)
        length = np.sqrt(np.square(total).sum())
        if length == 0:  # no word at all: some direction all the same, since a zero vector has no cosine
            total[0] = length = 1.0
        return total / length


def _features(counts: Sequence[tuple[str, int]]) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Hashes and weights [words + letters] of different words and how often they occur.

    A trigram is a letter with its neighbours, a space where the word ends: "ada" has the trigrams " ad", "ada" and "da ".
    """
    words = [word for word, _ in counts]
    lengths = np.array([len(word) for word in words])
    weights = np.sqrt([count for _, count in counts]) * [_STOP_WEIGHT if word in _STOP_WORDS else 1.0 for word in words]
    codes = np.frombuffer(f" {' '.join(words)} ".encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    # 21 bits hold a character, so that different trigrams have different numbers, and bit 63 distinguishes them from words.
    trigrams = codes[:-2] << np.uint64(42) | codes[1:-1] << np.uint64(21) | codes[2:] | np.uint64(1 << 63)
    trigrams = trigrams[codes[1:-1] != ord(" ")]
    whole = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    return _mixed(np.concatenate([whole, trigrams])), np.concatenate(
        [weights, np.repeat(weights / np.sqrt(lengths), lengths)]
    )


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads numbers over all 64 bits, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ numbers >> np.uint64(shift)) * np.uint64(factor)
    return numbers ^ numbers >> np.uint64(31)
