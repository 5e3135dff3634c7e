"""The reward of an episode: exact match or your own function, and optional weighted terms.

The setting `reward` names a function of the `EpisodeSummary`, whose value is paid once, at the end. Evaluation, the trainers
and the Gymnasium environment all use it.

    def short(summary):
        return exact_match(summary) / summary.steps

    gym.make("AtomMem-Synthetic", reward=short)     # atommem eval … --reward my_module:short

A question without a gold is not graded: its `em` and `f1` are None, and it is left out of every reward and term.

The setting `reward_terms` gives weights to terms by name; other terms do not count. A term is a share in [0, 1], computed
once, at the end, so that with exact match the reward lies between the sum of the negative weights and 1 + the sum of the
positive ones. The AtomMem paper (arXiv 2601.08323) uses no terms.

    gym.make("AtomMem-Synthetic", reward_terms={"faults": -0.1, "evidence_stored": 0.2})     # in [-0.1, 1.2]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from atommem_env.errors import SettingError
from atommem_env.plugins import find_function, name_of
from atommem_env.tokens import get_tokenizer
from atommem_env.types import EpisodeSummary, Reward


def exact_match(summary: EpisodeSummary) -> float:
    """The mean exact match over the task's graded questions, the AtomMem paper's reward; 0 where none is graded."""
    return _mean([outcome.em for outcome in summary.outcomes])


def f1(summary: EpisodeSummary) -> float:
    """The mean F1 over the task's graded questions; 0 where none is graded."""
    return _mean([outcome.f1 for outcome in summary.outcomes])


def _mean(grades: Sequence[float | None]) -> float:
    graded = [grade for grade in grades if grade is not None]
    return sum(graded) / len(graded) if graded else 0.0


REWARDS: dict[str, Reward] = {"exact_match": exact_match, "f1": f1}


def get_reward(reward: str | Reward) -> Reward:
    """The reward of the setting `reward`: a name, `module:attribute` of your own function, or the function.

    Raises:
        SettingError: there is no reward of that name, or it is not callable.
        PluginError: `module:attribute` names nothing.
    """
    return find_function(reward, REWARDS, "reward", "module:attribute, or a function of an EpisodeSummary")


def final_reward(summary: EpisodeSummary) -> float:
    """The reward of a finished episode: the value of its reward function, plus the weighted terms.

    Raises:
        SettingError: a user-defined reward is not a finite number.
    """
    settings = summary.settings
    reward = get_reward(settings.reward)(summary)
    if not (isinstance(reward, (int, float, np.number)) and math.isfinite(reward)):
        raise SettingError(f"The reward {name_of(settings.reward)} must be a finite number, got {reward!r}.")
    return float(reward) + sum(weight * _TERMS[name](summary) for name, weight in settings.reward_terms)


def _faults(summary: EpisodeSummary) -> float:
    return summary.faulty_replies / summary.steps


def _reads(summary: EpisodeSummary) -> float:
    return summary.reads / summary.steps


def _steps(summary: EpisodeSummary) -> float:
    return summary.steps / summary.max_steps


def _memory_size(summary: EpisodeSummary) -> float:
    count = get_tokenizer(summary.settings.tokenizer).count
    stored = count(summary.scratchpad) + sum(count(entry.text) for entry in summary.entries)
    return min(1.0, stored / max(1, sum(map(count, summary.chunks))))


def _evidence_stored(summary: EpisodeSummary) -> float:
    graded = [outcome for outcome in summary.outcomes if outcome.em is not None]
    passages = sum(outcome.evidence for outcome in graded)
    return sum(outcome.stored for outcome in graded) / passages if passages else 1.0


# `types.REWARD_TERMS`, where settings are checked, says what each is a share of.
_TERMS: dict[str, Reward] = {
    "faults": _faults,
    "reads": _reads,
    "steps": _steps,
    "memory_size": _memory_size,
    "evidence_stored": _evidence_stored,
}
