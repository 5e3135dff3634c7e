"""What an episode is worth: exact match, and terms that can be switched on beside it.

The setting `reward_terms` gives weights to terms by name; a term that has none counts nothing. A term is a share in [0, 1],
taken once, at the end, so that with weights w the reward lies between the sum of the negative weights and 1 + the sum of the
positive ones. The AtomMem paper (arXiv 2601.08323) has none.

    gym.make("AtomMem-Synthetic", reward_terms={"faults": -0.1, "evidence_stored": 0.2})     # in [-0.1, 1.2]
"""

from __future__ import annotations

from atommem_env.tokens import get_tokenizer
from atommem_env.types import EpisodeSummary, Reward


def final_reward(summary: EpisodeSummary) -> float:
    """The reward of an episode that is over: the mean exact match over its questions, plus the weighted terms."""
    em = sum(outcome.em for outcome in summary.outcomes) / len(summary.outcomes)
    return em + sum(weight * _TERMS[name](summary) for name, weight in summary.settings.reward_terms)


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
