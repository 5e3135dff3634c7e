"""`eval.benchmarks.operations` in small: the same episodes, each operation gone, and each of them missed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eval.benchmarks import operations


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("figures") / "new" / "operations.json"
    operations.main(episodes=24, out=file)
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def test_what_is_dropped_is_not_done_and_all_the_rest_is(figures: dict[str, Any]) -> None:
    assert [tuple(result["without"]) for result in figures["results"]] == list(operations.WITHOUT)
    for result in figures["results"]:
        never = {name for name, count in result["operations"].items() if count == 0}
        pointless = {"update", "delete"} if {"create", "read"} & set(result["without"]) else set()
        assert set(result["without"]) <= never <= {*result["without"], *pointless}


def test_losing_create_read_or_both_that_change_entries_costs_20_points_and_no_loss_helps(
    figures: dict[str, Any],
) -> None:
    complete, create, read, update, delete, both = figures["results"]
    assert complete["em"] > 0.75
    assert min(result["lost"] for result in (create, read, both)) >= 0.2
    assert update["lost_ci95"][0] > 0
    assert delete["lost"] > 0
    assert complete["lost"] == 0


def test_the_difference_is_that_of_the_same_episodes() -> None:
    complete, without = operations.play((), 2), operations.play(("update",), 2)
    tasks = [[(rollout.task_id, rollout.seed) for rollout in rollouts] for rollouts in (complete, without)]
    assert tasks[0] == tasks[1]
    assert [rollout.turns[0].observation for rollout in complete] == [r.turns[0].observation for r in without]
    result = operations.compare(("update",), without, complete)
    assert result.lost == pytest.approx(sum(rollout.reward for rollout in complete) / 2 - result.em)
