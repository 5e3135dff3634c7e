"""Search by words: Okapi BM25 over an inverted index, and its fusion with another ranking.

Sources: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009); Cormack, Clarke and Büttcher,
"Reciprocal Rank Fusion Outperforms Condorcet and Individual Rank Learning Methods" (SIGIR 2009).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

K1 = 1.5  # saturation of the term frequency: the lower, the sooner further occurrences of a word count less
B = 0.75  # length normalisation: 0 none, 1 full
RANK_OFFSET = 60  # the k of reciprocal rank fusion: the higher, the less the first ranks differ

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, case folded; without stemming or stop words.

    >>> words("Ada's boats, in TURIN")
    ['ada', 's', 'boats', 'in', 'turin']
    """
    return _WORD.findall(text.casefold())


class BM25Index:
    r"""An inverted index of texts by number; rankings depend on the texts alone, not on the order in which they were added.

    A text's score is a sum over the words w of the query, repeated ones each time,

        idf(w) · tf / (tf + k1 · (1 − b + b · length / mean length)),    idf(w) = ln(1 + (N − n + 0.5) / (n + 0.5)),

    where w occurs tf times in the text, which has `length` words, and in n of the N texts. That is BM25 of Robertson and
    Zaragoza (2009); the 1 in the logarithm keeps the weight of a word that more than half of the texts share positive.

    >>> index = BM25Index()
    >>> for number, text in enumerate(["Ada lives in Turin.", "Ben lives in Oslo.", "Oslo, Oslo!"], start=1):
    ...     index.add(number, text)
    >>> index.ranking("Who lives in Oslo?")
    [2, 1, 3]
    """

    def __init__(self) -> None:
        self._postings: defaultdict[str, dict[int, int]] = defaultdict(dict)  # word → text number → occurrences
        self._lengths: dict[int, int] = {}
        self._total = 0  # words in all texts

    def add(self, number: int, text: str) -> None:
        """Adds a text under an unused number."""
        counts = Counter(words(text))
        for word, count in counts.items():
            self._postings[word][number] = count
        self._lengths[number] = counts.total()
        self._total += counts.total()

    def remove(self, number: int, text: str) -> None:
        """Removes the text that was added under that number."""
        for word in set(words(text)):
            del self._postings[word][number]
            if not self._postings[word]:
                del self._postings[word]
        self._total -= self._lengths.pop(number)

    def ranking(self, query: str) -> list[int]:
        """The numbers of all texts that share a word with `query`, best first; ties by number, lowest first."""
        scores: defaultdict[int, float] = defaultdict(float)
        for word, repeats in Counter(words(query)).items():
            postings = self._postings.get(word, {})
            rarity = repeats * math.log1p((len(self._lengths) - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, count in postings.items():
                length = self._lengths[number] * len(self._lengths) / self._total  # of the mean
                scores[number] += rarity * count / (count + K1 * (1 - B + B * length))
        return sorted(scores, key=lambda number: (-scores[number], number))


def fuse(rankings: Sequence[Sequence[int]]) -> list[int]:
    """All numbers of some rankings by the sum of 1 / (60 + rank), rank from 1; ties by number, lowest first.

    A number missing from a ranking gets nothing from it.

    >>> fuse([[1, 2, 3], [3, 2]])
    [3, 2, 1]
    """
    scores: defaultdict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, number in enumerate(ranking, start=1):
            scores[number] += 1 / (RANK_OFFSET + rank)
    return sorted(scores, key=lambda number: (-scores[number], number))
