"""Scores an answer as its dataset's own evaluation script does, and searches texts for evidence.

Sources: `hotpot_evaluate_v1.py` (HotpotQA, Yang et al. 2018), `2wikimultihop_evaluate_v1.1.py` (Ho et al. 2020) and the
answer metric of MuSiQue (Trivedi et al. 2022). All normalise case, punctuation, articles and spaces; they differ in two
corner cases:

- A "yes", "no" or "noanswer" that is only one of the two texts scores F1 0; MuSiQue has no such rule.
- Where both texts are empty after normalisation, exact match is 1, and F1 is 1 for MuSiQue, 0 for the others.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import partial

from atommem_env.errors import DataError, SettingError
from atommem_env.plugins import find_function
from atommem_env.types import Score, ScoringRule, Task

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_VERDICTS = frozenset(("yes", "no", "noanswer"))


def score(prediction: str, golds: Sequence[str], rule: str | ScoringRule) -> Score:
    """The score of an answer to one question: each metric is its maximum over that question's golds.

    Answers of "synthetic" and "files" are scored as HotpotQA's.

    Args:
        rule: a name of `RULES`, `module:attribute` of your own function, or the function.

    >>> score("the Eiffel tower, Paris", ("Paris", "Eiffel Tower"), "hotpotqa")
    Score(em=0.0, f1=0.8, precision=0.6666666666666666, recall=1.0)

    Raises:
        SettingError: there is no such rule, or a user-defined one does not return a `Score`.
        DataError: `golds` is empty, or a single text; a question without a gold is not graded.
    """
    if isinstance(golds, str) or not golds:
        raise DataError(f"golds must be a sequence of at least one answer, got {golds!r}; give gold and aliases.")
    result = get_rule(rule)(prediction, golds)
    if not isinstance(result, Score):
        raise SettingError(
            f"The scoring rule {rule!r} must return an atommem_env.Score, got {result!r} for {prediction!r}."
        )
    return result


def get_rule(rule: str | ScoringRule) -> ScoringRule:
    """The scoring rule of a name, `module:attribute`, or function.

    Raises:
        SettingError: there is no rule of that name, or it is not callable.
        PluginError: `module:attribute` names nothing.
    """
    expected = "module:attribute, or a function (prediction, golds) -> Score"
    return find_function(rule, RULES, "A scoring rule", expected)


def rule_of(task: Task) -> str | ScoringRule:
    """The scoring rule of a task: its own, else its dataset's, else HotpotQA's."""
    if task.scoring is not None:
        return task.scoring
    return task.dataset if task.dataset in RULES else "hotpotqa"


def holds(text: str, passage: str) -> bool:
    """Whether `text` contains `passage`; runs of whitespace in either count as one space, after a `<` as none, case matters.

    By a space after `<`, `agents.render_reply` stores a document that quotes the tags of a dialect.

    >>> holds("Ada was born in Turin.  She\\nmoved to Bern in 1907.", "She moved to Bern")
    True
    """
    if passage in text:
        return True
    words = passage.split()
    # Normalising copies the text: only do so where every word occurs, which is rare in a text without the passage.
    if all(word in text for word in words) and " ".join(words) in " ".join(text.split()):
        return True
    return "<" in passage and _without_gaps(passage) in _without_gaps(text)


def _without_gaps(text: str) -> str:
    return re.sub(r"<\s+", "<", " ".join(text.split()))


def _normalise(text: str) -> str:
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _best(prediction: str, golds: Sequence[str], *, musique: bool) -> Score:
    scores = [_score_one(_normalise(prediction), _normalise(gold), musique=musique) for gold in golds]
    return Score(*map(max, zip(*scores, strict=True)))


def _score_one(prediction: str, gold: str, musique: bool) -> tuple[float, float, float, float]:
    """(em, f1, precision, recall) of two normalised texts."""
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


_HOTPOTQA = partial(_best, musique=False)
RULES: dict[str, ScoringRule] = {
    "hotpotqa": _HOTPOTQA,
    "2wikimultihopqa": _HOTPOTQA,
    "musique": partial(_best, musique=True),
    "synthetic": _HOTPOTQA,
    "files": _HOTPOTQA,
}
