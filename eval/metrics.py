"""From finished episodes to the numbers of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atommem_env.env import count_results
from atommem_env.errors import DataError
from atommem_env.tokens import Tokenizer
from atommem_env.types import OperationKind, Rollout, Turn, Usage

SCHEMA_VERSION = 3  # of a run folder; 2 can be read as well
_RESAMPLES = 10_000


def episode_record(position: int, rollout: Rollout, tokenizer: Tokenizer) -> dict[str, Any]:
    """One episode as a line of `episodes.jsonl`: everything that `summarise` needs, and nothing that depends on timing.

    Tokens are as reported by a model, else counted by the environment's tokenizer over observations and replies.
    `retrievals` are the turns with an active query, each of which searches the memory. In `by_step` each list has one item
    per reply; `entries` is the size of the memory after it, the other numbers count what that reply did.
    """
    usages = [turn.reply.usage or Usage() for turn in rollout.turns]
    by_step: dict[str, list[Any]] = {}
    entries = 0
    operations: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for turn in rollout.turns:
        counts = count_results(turn.results)
        done = {str(kind): counts["operations"].get(kind, 0) for kind in OperationKind}
        operations.update(counts["operations"])
        faults.update(counts["faults"])
        entries += done["create"] - done["delete"]
        prompt, completion = _tokens(turn, tokenizer)
        step = {
            "phase": turn.observation["phase"],
            "entries": entries,
            **done,
            "faults": sum(counts["faults"].values()),
        }
        for name, value in {**step, "prompt_tokens": prompt, "completion_tokens": completion}.items():
            by_step.setdefault(name, []).append(value)
    return {
        "episode": position,
        "task_id": rollout.task_id,
        "task_digest": rollout.task_digest,
        "seed": rollout.seed,
        "steps": len(rollout.turns),
        "reward": rollout.reward,
        "stop_reason": str(rollout.stop_reason),
        "replies_truncated": sum(turn.reply.stop == "length" for turn in rollout.turns),
        "operations": dict(sorted(operations.items())),
        "faults": dict(sorted(faults.items())),
        "tokens": {kind: _total(by_step[f"{kind}_tokens"]) for kind in ("prompt", "completion")},
        "calls": sum(usage.calls for usage in usages),
        "retrievals": sum(turn.observation["query"] != "" for turn in rollout.turns),
        "dropped_tokens": sum(usage.dropped_tokens for usage in usages),
        "questions": [
            {
                "id": outcome.question_id,
                "kind": outcome.kind,
                "hops": outcome.hops,
                "prediction": outcome.prediction,
                "em": outcome.em,
                "f1": outcome.f1,
                "evidence": outcome.evidence,
                "stored": outcome.stored,
                "retrieved": outcome.retrieved,
            }
            for outcome in rollout.questions
        ],
        "by_step": by_step,
    }


def episode_cost(position: int, rollout: Rollout, seconds: float) -> dict[str, Any]:
    """One episode as a line of `costs.jsonl`: what depends on timing and on a model's service.

    A run adds `elapsed`, its wall time until the episode ended, without interruptions.

    Args:
        seconds: wall time of the episode, which others are played in parallel with.
    """
    cached = _total([turn.reply.usage.cached_tokens for turn in rollout.turns if turn.reply.usage])
    return {"episode": position, "seconds": round(seconds, 3), "cached_tokens": cached}


def _total(counts: Sequence[int | None]) -> int | None:
    """The sum; None where one of them was not measured.

    >>> _total([1, 2]), _total([1, None]), _total([])
    (3, None, 0)
    """
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _tokens(turn: Turn, tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """(prompt tokens, completion tokens) of a turn; None: the model's service does not say."""
    reply = turn.reply
    if reply.usage:
        return reply.usage.prompt_tokens, reply.usage.completion_tokens
    if reply.prompt_ids:
        return len(reply.prompt_ids), len(reply.completion_ids)
    prompt = sum(tokenizer.count(value) for value in turn.observation.values() if isinstance(value, str))
    return prompt, tokenizer.count(reply.text)


def resampled_means(values: Sequence[float], weights: Sequence[float], clusters: Sequence[str]) -> NDArray[np.float64]:
    """The weighted mean in each of 10,000 resamples of whole clusters, drawn with replacement from a fixed seed.

    Episodes of one task are one cluster: their outcomes are correlated, and treating them as independent would make the
    interval too narrow.

    Args:
        values: [E] the mean of each episode.
        weights: [E] its number of questions.
        clusters: [E] its task.

    Returns:
        [10000]; their spread estimates that of the mean.

    Task "a" has two episodes, one of them right, and task "b" one that is wrong. A resample is a and a (mean 1/2), a and b
    (1/3) or b and b (0); none has half of a task:

    >>> means = resampled_means([1.0, 0.0, 0.0], [1, 1, 1], ["a", "a", "b"])
    >>> sorted(set(means.round(2).tolist()))
    [0.0, 0.33, 0.5]
    """
    value, weight = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    index_of = {name: number for number, name in enumerate(dict.fromkeys(clusters))}  # in order of appearance
    index = [index_of[name] for name in clusters]
    # [C] each cluster's contribution to the mean's numerator and to its denominator
    total, weight = np.bincount(index, value * weight), np.bincount(index, weight)
    rng = np.random.default_rng(0)
    share = np.full(len(index_of), 1 / len(index_of))
    # [1000, C] how often each cluster is in each resample; in ten parts, because C can be thousands
    parts = (rng.multinomial(len(index_of), share, size=_RESAMPLES // 10) for _ in range(10))
    return np.concatenate([(counts @ total) / (counts @ weight) for counts in parts])


def bootstrap_ci95(
    values: Sequence[float],
    weights: Sequence[float],
    clusters: Sequence[str] | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """The 95 % interval of the weighted mean: percentiles of `resampled_means`.

    Where all clusters agree, resampling always gives the same mean. There the interval is that of Clopper and Pearson (1934)
    for n of n successes: with probability at least 95 % less than the share s = 1 − 0.025^(1/n) of all tasks is otherwise.

    Args:
        clusters: [E]; None: each episode has a different task.
        bounds: of a value.

    >>> [round(end, 3) for end in bootstrap_ci95([1.0, 1.0, 1.0], [1, 1, 1])]
    [0.292, 1.0]
    """
    names = [str(index) for index in range(len(values))] if clusters is None else clusters
    if len(set(values)) == 1:
        value, (least, most) = values[0], bounds
        share = 1 - 0.025 ** (1 / len(set(names)))
        return value - share * (value - least), value + share * (most - value)
    low, high = np.percentile(resampled_means(values, weights, names), [2.5, 97.5])
    return float(low), float(high)


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table's numbers over all episodes. Rates are in [0, 1]; counts are means per episode; None is not measured.

    Questions without a gold are in no mean: `questions` counts the graded ones, `ungraded` the others.

    `by_kind` and `by_hops` split the questions by the dataset's own types and by their reasoning steps.

    Raises:
        DataError: the episodes were recorded by an earlier version.
    """
    if any("by_step" not in record for record in records):
        raise DataError(
            f"Expected records of schema 2 or {SCHEMA_VERSION}, got older ones without by_step. Run the evaluation again."
        )
    graded = [[one for one in record["questions"] if one["em"] is not None] for record in records]
    questions = [question for some in graded for question in some]

    def mean(count: Callable[[dict[str, Any]], float]) -> float:
        return round(sum(map(count, records)) / len(records), 4)

    def means(field: str) -> dict[str, float | None]:
        names = sorted({name for record in records for name in record[field]})
        totals = {name: _total([record[field].get(name, 0) for record in records]) for name in names}
        return {name: None if total is None else round(total / len(records), 4) for name, total in totals.items()}

    def split(name: str) -> dict[str, dict[str, Any]]:
        values = sorted({question[name] for question in questions})
        return {str(value): _scores([one for one in questions if one[name] == value]) for value in values}

    scored = [(record["task_id"], some) for record, some in zip(records, graded, strict=True) if some]
    ems = [sum(question["em"] for question in some) / len(some) for _, some in scored]
    interval = bootstrap_ci95(ems, [len(some) for _, some in scored], [task for task, _ in scored]) if scored else None
    scores = _scores(questions)
    return {
        "episodes": len(records),
        "tasks": len({record["task_id"] for record in records}),
        "questions": scores["questions"],
        "ungraded": sum(len(record["questions"]) for record in records) - len(questions),
        "em": scores["em"],
        "em_ci95": None if interval is None else [round(end, 4) for end in interval],
        "f1": scores["f1"],
        "reward": mean(lambda record: record["reward"]),
        "evidence_recall": scores["evidence_recall"],
        "by_kind": split("kind"),
        "by_hops": split("hops"),
        "operations": means("operations"),
        "faults": means("faults"),
        "stop_reasons": dict(sorted(Counter(record["stop_reason"] for record in records).items())),
        "replies_truncated": sum(record["replies_truncated"] for record in records),
        "tokens": means("tokens"),
        "calls": mean(lambda record: record["calls"]),
        "retrievals": mean(lambda record: record["retrievals"]),
        "dropped_tokens": mean(lambda record: record["dropped_tokens"]),
        "entries": mean(lambda record: record["by_step"]["entries"][-1]),  # at the end
        "steps": mean(lambda record: record["steps"]),
    }


def summarise_costs(costs: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The cost of a run: `seconds` is its wall time divided by its episodes, `cached_tokens` the mean per episode.

    Args:
        costs: of all its episodes.
        steps: of all its episodes together.
    """
    seconds = max(cost["elapsed"] for cost in costs)
    cached = _total([cost["cached_tokens"] for cost in costs])
    return {
        "seconds": round(seconds / len(costs), 4),
        "cached_tokens": None if cached is None else round(cached / len(costs), 4),
        "steps_per_second": round(steps / max(seconds, 1e-3), 2),  # `elapsed` is rounded to milliseconds
    }


def _scores(questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The number of some questions, and their means.

    `evidence_recall` shows where evidence was lost: the share of passages that were in the memory or scratchpad when their
    question was resolved (`stored`), that the policy had in view (`retrieved`), and whose question it got right (`answered`).
    """
    passages = sum(question["evidence"] for question in questions)

    def share(count: int) -> float | None:
        return round(count / passages, 4) if passages else None

    def mean(name: str) -> float | None:
        return round(sum(question[name] for question in questions) / len(questions), 4) if questions else None

    return {
        "questions": len(questions),
        "em": mean("em"),
        "f1": mean("f1"),
        "evidence_recall": {
            "stored": share(sum(question["stored"] for question in questions)),
            "retrieved": share(sum(question["retrieved"] for question in questions)),
            "answered": share(sum(question["evidence"] for question in questions if question["em"] == 1)),
        },
    }
