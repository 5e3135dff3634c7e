"""From rollouts to records, and from records to the numbers of a table."""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import atommem_env  # noqa: F401  (registers the environments)
from agents.rollout import play_episode
from atommem_env.errors import DataError
from atommem_env.tokens import get_tokenizer
from atommem_env.types import Observation, Reply, Rollout, Usage
from eval.metrics import bootstrap_ci95, episode_cost, episode_record, resampled_means, summarise, summarise_costs

BUILTIN = get_tokenizer("builtin")
USAGE = Usage(calls=2, prompt_tokens=10, completion_tokens=3, cached_tokens=4, dropped_tokens=5)


def played(usage: Usage | None = None) -> Rollout:
    """Two questions: of the first everything is known, the second is not answered."""

    def act(observation: Observation) -> Reply:
        if observation["step"] == 0:
            text = "<create_memory>one</create_memory><create_memory>two</create_memory><read_memory>one</read_memory>"
        elif observation["step"] == 1:
            text = "<delete_memory>m1</delete_memory><delete_memory>m9</delete_memory>"
        else:
            text = "<final_answer>yes</final_answer>"
        return Reply(text, usage=usage)

    env = gym.make("AtomMem-Synthetic", durability="off", num_docs=20, questions=2, chunk_tokens=120)
    return play_episode(env, act, seed=0)


def record(*ems: float, task: str = "t", kind: str = "bridge", hops: int = 2, **changes: Any) -> dict[str, Any]:
    """A finished episode with a question for each of `ems`."""
    made = episode_record(0, played(), BUILTIN)
    template = made["questions"][0] | {"kind": kind, "hops": hops, "evidence": 1, "stored": 1, "retrieved": 0}
    questions = [template | {"em": em, "f1": em} for em in ems]
    return made | {"task_id": task, "questions": questions, "reward": sum(ems) / len(ems)} | changes


def test_a_record_says_what_every_reply_did() -> None:
    rollout = played()
    made = episode_record(7, rollout, BUILTIN)
    steps, by_step = made["steps"], made["by_step"]
    assert (made["episode"], steps) == (7, len(rollout.turns))
    assert {len(values) for values in by_step.values()} == {steps}
    assert by_step["phase"] == ["read"] * (steps - 2) + ["answer"] * 2
    assert by_step["entries"][:3] == [2, 1, 1]
    assert (by_step["create"][:2], by_step["delete"][:2], by_step["read"][:2]) == ([2, 0], [0, 1], [1, 0])
    assert by_step["answer"][-2:] == [1, 1]
    assert by_step["faults"][1] == 1  # there is no m9
    for kind in ("create", "read", "update", "delete", "scratchpad", "answer"):
        assert sum(by_step[kind]) == made["operations"].get(kind, 0)
    assert sum(by_step["faults"]) == sum(made["faults"].values())
    assert made["retrievals"] == steps - 1  # the query is active from the second reply on
    assert [(one["kind"], one["hops"]) for one in made["questions"]] == [
        (outcome.kind, outcome.hops) for outcome in rollout.questions
    ]
    assert json.loads(json.dumps(made)) == made


@pytest.mark.parametrize("source", ["usage", "ids", "counted"])
def test_tokens_are_those_that_were_told_else_those_seen_else_counted(source: str) -> None:
    rollout = played(USAGE if source == "usage" else None)
    if source != "counted":
        replies = (dataclasses.replace(turn.reply, prompt_ids=(1,) * 8, completion_ids=(1,)) for turn in rollout.turns)
        turns = tuple(
            dataclasses.replace(turn, reply=reply) for turn, reply in zip(rollout.turns, replies, strict=True)
        )
        rollout = dataclasses.replace(rollout, turns=turns)
    made, steps = episode_record(0, rollout, BUILTIN), len(rollout.turns)
    shown = [value for value in rollout.turns[0].observation.values() if isinstance(value, str)]
    counted = (sum(map(BUILTIN.count, shown)), BUILTIN.count(rollout.turns[0].reply.text))
    first = {"usage": (10, 3), "ids": (8, 1), "counted": counted}[source]
    assert (made["by_step"]["prompt_tokens"][0], made["by_step"]["completion_tokens"][0]) == first
    assert made["tokens"] == {name: sum(made["by_step"][f"{name}_tokens"]) for name in ("prompt", "completion")}
    assert (made["calls"], made["dropped_tokens"]) == ((2 * steps, 5 * steps) if source == "usage" else (0, 0))
    assert episode_cost(0, rollout, 1.23456) == {
        "episode": 0,
        "seconds": 1.235,
        "cached_tokens": 4 * steps if source == "usage" else 0,
    }


def test_a_reply_that_asked_no_model_cost_no_tokens() -> None:
    made = episode_record(0, played(Usage()), BUILTIN)
    assert (made["calls"], made["tokens"]) == (0, {"prompt": 0, "completion": 0})


def test_the_interval_covers_the_mean_and_narrows() -> None:
    few, many = ([float(i % 2) for i in range(count)] for count in (20, 500))
    low, high = bootstrap_ci95(few, [1] * 20)
    assert low < 0.5 < high
    narrow = bootstrap_ci95(many, [1] * 500)
    # The normal approximation, worked out by hand: 0.5 ± 1.96 · 0.5 / sqrt(500).
    assert narrow == pytest.approx((0.456, 0.544), abs=0.004)


def test_resamples_are_distributed_as_if_all_of_them_were_listed() -> None:
    values, weights, clusters = [1.0, 0.0, 0.5, 1.0], [1, 2, 2, 4], ["a", "b", "a", "c"]
    # Independent of the function: every way of drawing three of the three tasks, each as likely as the others.
    tasks = [[0, 2], [1], [3]]
    expected = []
    for drawn in product(tasks, repeat=3):
        members = [member for task in drawn for member in task]
        total = sum(weights[member] for member in members)
        expected.append(sum(values[member] * weights[member] for member in members) / total)
    means = resampled_means(values, weights, clusters)
    assert means.shape == (10_000,)
    for value in set(np.round(expected, 9)):
        share = np.mean(np.isclose(expected, value))
        assert np.mean(np.isclose(means, value)) == pytest.approx(share, abs=0.02)
    assert np.isin(means.round(9), np.round(expected, 9)).all()


def test_episodes_of_a_task_are_one_draw() -> None:
    values = [1.0, 0.0] * 50
    apart = bootstrap_ci95(values, [1] * 100)
    together = bootstrap_ci95(values, [1] * 100, [f"task {index // 10}" for index in range(100)])
    assert together == (0.5, 0.5)  # each task has five of each
    assert apart[1] - apart[0] == pytest.approx(2 * 1.96 * 0.05, abs=0.02)
    alike = bootstrap_ci95(values, [1] * 100, [f"task {index % 2}" for index in range(100)])
    assert alike == (0.0, 1.0)  # two tasks, however often each was played


def test_the_same_episodes_in_another_grouping_of_labels_give_the_same_interval() -> None:
    values, weights = [0.2, 0.9, 0.4], [1, 3, 2]
    assert np.array_equal(resampled_means(values, weights, "xyz"), resampled_means(values, weights, "abc"))


def test_questions_weigh_the_same_whichever_task_they_are_of() -> None:
    summary = summarise([record(1, 1, 1, operations={"create": 3}), record(0, task="u", operations={"create": 1})])
    assert (summary["em"], summary["reward"], summary["questions"]) == (0.75, 0.5, 4)
    assert summary["evidence_recall"] == {"stored": 1.0, "retrieved": 0.0, "answered": 0.75}
    assert summary["operations"] == {"create": 2.0}


def test_questions_are_told_apart_by_kind_and_by_hops() -> None:
    records = [record(1, 0, kind="compare", hops=10), record(1, task="u", hops=2)]
    summary = summarise(records)
    lost = {"stored": 1.0, "retrieved": 0.0}
    assert summary["by_kind"] == {
        "bridge": {"questions": 1, "em": 1.0, "f1": 1.0, "evidence_recall": {**lost, "answered": 1.0}},
        "compare": {"questions": 2, "em": 0.5, "f1": 0.5, "evidence_recall": {**lost, "answered": 0.5}},
    }
    assert list(summary["by_hops"]) == ["2", "10"]  # in the order of numbers
    assert sum(one["questions"] for one in summary["by_hops"].values()) == summary["questions"]


def test_means_are_of_an_episode() -> None:
    first = record(1, calls=4, retrievals=2, dropped_tokens=10)
    second = record(1, task="u", calls=0, by_step=first["by_step"] | {"entries": [9, 5]})
    summary = summarise([first, second])
    assert (summary["calls"], summary["dropped_tokens"]) == (2.0, 5.0)
    assert summary["entries"] == (first["by_step"]["entries"][-1] + 5) / 2
    assert summary["tasks"] == 2


def test_what_a_run_took_is_the_wall_time_until_its_last_episode() -> None:
    costs = [{"episode": 0, "seconds": 9.0, "elapsed": 10.0, "cached_tokens": 6}]
    costs.append({"episode": 1, "seconds": 2.0, "elapsed": 4.0, "cached_tokens": 0})
    assert summarise_costs(costs, steps=30) == {"seconds": 5.0, "cached_tokens": 3.0, "steps_per_second": 3.0}


def test_records_of_an_earlier_version_are_refused() -> None:
    old = record(1)
    del old["by_step"]
    with pytest.raises(DataError, match="Run the evaluation again"):
        summarise([old])
