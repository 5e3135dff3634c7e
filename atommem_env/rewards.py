"""What an episode is worth: exact match, and terms that can be switched on beside it.

The setting `reward_terms` gives weights to terms by name; a term that has none counts nothing. A term is a share in [0, 1],
taken once, at the end, so that with weights w the reward lies between the sum of the negative weights and 1 + the sum of the
positive ones. The AtomMem paper (arXiv 2601.08323) has none.

    gym.make("AtomMem-Synthetic", reward_terms={"faults": -0.1, "evidence_stored": 0.2})     # in [-0.1, 1.2]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from atommem_env.tokens import get_tokenizer

if TYPE_CHECKING:
    from atommem_env.episode import Episode


def final_reward(episode: Episode) -> float:
    """The reward of an episode that is over: the mean exact match over its questions, plus the weighted terms."""
    em = sum(outcome.em for outcome in episode.outcomes) / len(episode.outcomes)
    return em + sum(weight * _TERMS[name](episode) for name, weight in episode.settings.reward_terms)


def _faults(episode: Episode) -> float:
    return episode.faulty_replies / episode.steps


def _reads(episode: Episode) -> float:
    return episode.reads / episode.steps


def _steps(episode: Episode) -> float:
    return episode.steps / episode.max_steps


def _memory_size(episode: Episode) -> float:
    count = get_tokenizer(episode.settings.tokenizer).count
    kept = count(episode.scratchpad) + sum(count(entry.text) for entry in episode.memory.entries())
    return min(1.0, kept / max(1, sum(map(count, episode.chunks))))


def _evidence_stored(episode: Episode) -> float:
    passages = sum(outcome.evidence for outcome in episode.outcomes)
    return sum(outcome.stored for outcome in episode.outcomes) / passages if passages else 1.0


# Their names, and what each is a share of, are in `types.REWARD_TERMS`, where settings are checked.
_TERMS: dict[str, Callable[[Episode], float]] = {
    "faults": _faults,
    "reads": _reads,
    "steps": _steps,
    "memory_size": _memory_size,
    "evidence_stored": _evidence_stored,
}
