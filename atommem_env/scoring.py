"""Scores an answer as its dataset's own evaluation script does, and finds evidence in texts.

Sources: `hotpot_evaluate_v1.py` (HotpotQA, Yang et al. 2018), `2wikimultihop_evaluate_v1.1.py` (Ho et al. 2020) and the
answer metric of MuSiQue (Trivedi et al. 2022). All fold case, punctuation, articles and spaces; they differ in two corners:

- A "yes", "no" or "noanswer" that is not the whole of both texts scores F1 0; MuSiQue knows no such rule.
- Where folding leaves nothing of both texts, exact match is 1, and F1 is 1 for MuSiQue, 0 for the others.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from atommem_env.errors import DataError, SettingError

DATASETS = ("hotpotqa", "2wikimultihopqa", "musique", "synthetic", "files")

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_VERDICTS = frozenset(("yes", "no", "noanswer"))


@dataclass(frozen=True, slots=True)
class Score:
    """How well a prediction matches; each metric lies in [0, 1]."""

    em: float  # 1 where the folded texts are equal
    f1: float  # harmonic mean of precision and recall
    precision: float  # share of the prediction's words that are in the gold
    recall: float  # share of the gold's words that are in the prediction


def score(prediction: str, golds: Sequence[str], dataset: str) -> Score:
    """The score of an answer to one question: for each metric by itself, the maximum over that question's golds.

    Answers of the datasets "synthetic" and "files" are scored as HotpotQA's. A question of "files" may have no gold; it scores 0.

    >>> score("the Eiffel tower, Paris", ("Paris", "Eiffel Tower"), "hotpotqa")
    Score(em=0.0, f1=0.8, precision=0.6666666666666666, recall=1.0)

    Raises:
        SettingError: `dataset` is none of `DATASETS`.
        DataError: `golds` is empty, and the dataset is not "files".
    """
    if dataset not in DATASETS:
        raise SettingError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}.")
    if dataset == "files" and not golds:
        return Score(0.0, 0.0, 0.0, 0.0)
    if isinstance(golds, str) or not golds:
        raise DataError(f"golds must be a sequence of at least one answer, got {golds!r}; give gold and aliases.")
    scores = [_score_one(_fold(prediction), _fold(gold), musique=dataset == "musique") for gold in golds]
    return Score(*map(max, zip(*scores, strict=True)))


def holds(text: str, passage: str) -> bool:
    """Whether `passage` stands in `text`, any run of whitespace in either counting as one space; case matters.

    >>> holds("Ada was born in Turin.  She\\nmoved to Bern in 1907.", "She moved to Bern")
    True
    """
    if passage in text:
        return True
    words = passage.split()
    # Folding copies the text: only where every word occurs, which for a long text without the passage is rare.
    return all(word in text for word in words) and " ".join(words) in " ".join(text.split())


def _fold(text: str) -> str:
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _score_one(prediction: str, gold: str, musique: bool) -> tuple[float, float, float, float]:
    """(em, f1, precision, recall) of two folded texts."""
    em = float(prediction == gold)
    if musique and not (prediction and gold):
        return em, em, em, em
    if not musique and not em and not _VERDICTS.isdisjoint((prediction, gold)):
        return 0.0, 0.0, 0.0, 0.0
    predicted, expected = prediction.split(), gold.split()
    shared = (Counter(predicted) & Counter(expected)).total()
    if not shared:
        return em, 0.0, 0.0, 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return em, 2 * precision * recall / (precision + recall), precision, recall
