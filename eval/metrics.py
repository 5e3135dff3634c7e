"""From finished episodes to the numbers of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from atommem_env.env import count_results
from atommem_env.tokens import Tokenizer
from atommem_env.types import Rollout

SCHEMA_VERSION = 1
_RESAMPLES = 10_000


def episode_record(position: int, rollout: Rollout, tokenizer: Tokenizer) -> dict[str, Any]:
    """One episode as a line of `episodes.jsonl`; everything that `summarise` needs, and nothing that the clock decides.

    Tokens are those that a model reported, else counted by the environment's tokenizer over observations and replies.
    """
    operations: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    prompt = completion = 0
    for turn in rollout.turns:
        counts = count_results(turn.results)
        operations.update(counts["operations"])
        faults.update(counts["faults"])
        if turn.reply.prompt_ids:
            prompt += len(turn.reply.prompt_ids)
            completion += len(turn.reply.completion_ids)
        else:
            prompt += sum(tokenizer.count(value) for value in turn.observation.values() if isinstance(value, str))
            completion += tokenizer.count(turn.reply.text)
    return {
        "episode": position,
        "task_id": rollout.task_id,
        "seed": rollout.seed,
        "steps": len(rollout.turns),
        "reward": rollout.reward,
        "stop_reason": str(rollout.stop_reason),
        "replies_cut": sum(turn.reply.stop == "length" for turn in rollout.turns),
        "operations": dict(sorted(operations.items())),
        "faults": dict(sorted(faults.items())),
        "tokens": {"prompt": prompt, "completion": completion},
        "questions": [
            {
                "id": outcome.question_id,
                "prediction": outcome.prediction,
                "em": outcome.em,
                "f1": outcome.f1,
                "evidence": outcome.evidence,
                "stored": outcome.stored,
                "retrieved": outcome.retrieved,
            }
            for outcome in rollout.questions
        ],
    }


def bootstrap_ci95(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of the weighted mean when whole tasks are resampled, 10,000 times, with a fixed seed.

    Args:
        values: [E] a mean for each episode.
        weights: [E] how many questions it has.

    >>> bootstrap_ci95([1.0, 1.0, 1.0], [1, 1, 1])
    (1.0, 1.0)
    """
    value, weight = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    rng = np.random.default_rng(0)
    # [E] counts of each episode in a resample, drawn as one multinomial row for each of the resamples: small in memory.
    counts = rng.multinomial(len(value), np.full(len(value), 1 / len(value)), size=_RESAMPLES)
    means = (counts @ (value * weight)) / (counts @ weight)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table's numbers over all episodes. Rates are in [0, 1]; operations, faults and tokens are means an episode.

    `evidence_recall` says where evidence was lost: the share of passages that stood in the memory or scratchpad when their
    question was settled (`stored`), that the policy had in view (`retrieved`), and whose question it got right (`answered`).
    """
    questions = [question for record in records for question in record["questions"]]
    passages = sum(question["evidence"] for question in questions)

    def per_episode(field: str) -> dict[str, float]:
        total: Counter[str] = Counter()
        for record in records:
            total.update(record[field])
        return {name: round(total[name] / len(records), 4) for name in sorted(total)}

    def share(count: float) -> float | None:
        return round(count / passages, 4) if passages else None

    def mean(name: str) -> float:
        return round(sum(question[name] for question in questions) / len(questions), 4)

    ems = [sum(question["em"] for question in record["questions"]) / len(record["questions"]) for record in records]
    low, high = bootstrap_ci95(ems, [len(record["questions"]) for record in records])
    return {
        "episodes": len(records),
        "tasks": len({record["task_id"] for record in records}),
        "questions": len(questions),
        "em": mean("em"),
        "em_ci95": [round(low, 4), round(high, 4)],
        "f1": mean("f1"),
        "reward": round(sum(record["reward"] for record in records) / len(records), 4),
        "evidence_recall": {
            "stored": share(sum(question["stored"] for question in questions)),
            "retrieved": share(sum(question["retrieved"] for question in questions)),
            "answered": share(sum(question["evidence"] for question in questions if question["em"] == 1)),
        },
        "operations": per_episode("operations"),
        "faults": per_episode("faults"),
        "stop_reasons": dict(sorted(Counter(record["stop_reason"] for record in records).items())),
        "replies_cut": sum(record["replies_cut"] for record in records),
        "tokens": per_episode("tokens"),
        "steps": round(sum(record["steps"] for record in records) / len(records), 4),
    }
