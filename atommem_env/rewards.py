"""What an episode is worth: exact match, or a function of one's own, and terms that can be switched on beside it.

The setting `reward` names a function of the `EpisodeSummary`, paid once, at the end. Evaluation, the trainers and the Gymnasium
environment all pay what it says.

    def short(summary):
        return sum(outcome.em for outcome in summary.outcomes) / summary.steps

    gym.make("AtomMem-Synthetic", reward=short)     # atommem eval … --reward my_module:short

The setting `reward_terms` gives weights to terms by name; a term that has none counts nothing. A term is a share in [0, 1],
taken once, at the end, so that with weights w and exact match the reward lies between the sum of the negative weights and
1 + the sum of the positive ones. The AtomMem paper (arXiv 2601.08323) has none.

    gym.make("AtomMem-Synthetic", reward_terms={"faults": -0.1, "evidence_stored": 0.2})     # in [-0.1, 1.2]
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from atommem_env.errors import SettingError
from atommem_env.plugins import is_target, load_attribute, name_of, suggest
from atommem_env.tokens import get_tokenizer
from atommem_env.types import EpisodeSummary, Reward


def exact_match(summary: EpisodeSummary) -> float:
    """The mean exact match over the task's questions: the AtomMem paper's reward."""
    return sum(outcome.em for outcome in summary.outcomes) / len(summary.outcomes)


def f1(summary: EpisodeSummary) -> float:
    """The mean F1 over the task's questions."""
    return sum(outcome.f1 for outcome in summary.outcomes) / len(summary.outcomes)


REWARDS: dict[str, Reward] = {"exact_match": exact_match, "f1": f1}


def get_reward(reward: str | Reward) -> Reward:
    """The reward of the setting `reward`: a name, `module:attribute` of a function of one's own, or the function.

    Raises:
        SettingError: there is none of that name, or it cannot be called.
        PluginError: `module:attribute` names nothing.
    """
    if isinstance(reward, str) and reward in REWARDS:
        return REWARDS[reward]
    found: Any = _load(reward) if isinstance(reward, str) and is_target(reward) else reward
    if isinstance(found, str) or not callable(found):
        raise SettingError(
            f"reward must be one of {', '.join(REWARDS)}, module:attribute, or a function of an EpisodeSummary, got {reward!r}"
            f"{suggest(str(reward), REWARDS) or '.'}"
        )
    given: Reward = found
    return given


_load = cache(load_attribute)


def final_reward(summary: EpisodeSummary) -> float:
    """What an episode that is over is worth: its reward, plus the weighted terms.

    Raises:
        SettingError: a reward of one's own is not a finite number.
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
    kept = count(summary.scratchpad) + sum(count(entry.text) for entry in summary.entries)
    return min(1.0, kept / max(1, sum(map(count, summary.chunks))))


def _evidence_stored(summary: EpisodeSummary) -> float:
    passages = sum(outcome.evidence for outcome in summary.outcomes)
    return sum(outcome.stored for outcome in summary.outcomes) / passages if passages else 1.0


# Their names, and what each is a share of, are in `types.REWARD_TERMS`, where settings are checked.
_TERMS: dict[str, Reward] = {
    "faults": _faults,
    "reads": _reads,
    "steps": _steps,
    "memory_size": _memory_size,
    "evidence_stored": _evidence_stored,
}
