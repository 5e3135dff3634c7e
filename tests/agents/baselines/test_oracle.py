"""Perfect readers: what a memory can reach, and what simple rules of storing are worth."""

from __future__ import annotations

from typing import Any

import pytest
from playing import SPECS, make_driver, mean_reward, play

from agents.baselines import oracle


def test_the_oracle_reaches_the_top() -> None:
    assert mean_reward(play("oracle")) == 1.0
    assert mean_reward(play("oracle", questions=3, num_docs=40)) == 1.0


@pytest.mark.parametrize(
    "broken",
    [{"operations": ["create"]}, {"operations": ["read"]}, {"retrieval": "random", "top_k": 1, "scratchpad": False}],
)
def test_the_oracle_fails_where_memory_is_broken(broken: dict[str, Any]) -> None:
    source = make_driver(**broken).source
    possible = [spec for spec in SPECS if len(source.task(spec.index, spec.task_seed).questions[0].evidence) > 1]
    assert len(possible) > 5
    assert mean_reward(play("oracle", possible, **broken)) == 0.0


def test_the_oracle_gathers_more_evidence_than_one_search_shows() -> None:
    assert mean_reward(play("oracle", top_k=1, replies_per_question=8)) == 1.0


def test_append_all_stores_everything() -> None:
    for rollout in play("perfect-rag", SPECS[:6]):
        assert all(outcome.stored == outcome.evidence for outcome in rollout.questions)


def test_position_policies_keep_ten_documents() -> None:
    task = make_driver().source.task(0, 0)
    for keep in (oracle.keep_leaked_positions, oracle.keep_random_positions):
        kept = list(keep(task, 3))
        titles = {(document.title, document.text) for document in task.documents}
        assert {(passage.title, passage.text) for passage in kept} <= titles
    assert len(list(oracle.keep_random_positions(task, 3))) == 10
    assert list(oracle.keep_random_positions(task, 3)) != list(oracle.keep_random_positions(task, 4))
