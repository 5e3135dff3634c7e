"""Policies on the real datasets, which do not ship with the project."""

import asyncio
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents import load_policy
from agents.rollout import Driver, episode_specs
from atommem_env.types import Rollout

IDS = {"hotpotqa": "AtomMem-HotpotQA", "2wikimultihopqa": "AtomMem-2WikiMultiHopQA", "musique": "AtomMem-MuSiQue"}


def play(policy: str, folder: Path, episodes: int, dataset: str = "hotpotqa", **options: Any) -> list[Rollout]:
    files = {"data": str(folder / f"{dataset}_dev.jsonl.gz"), "corpus": str(folder / f"{dataset}_corpus.jsonl.gz")}
    driver = Driver.of(gym.make(IDS[dataset], durability="off", **files, **options))
    specs = episode_specs(len(driver.source), episodes, seed=0)
    return asyncio.run(driver.run(specs, load_policy(policy, driver.settings)))


@pytest.mark.parametrize("dataset", IDS)
@pytest.mark.parametrize("num_docs", [200, 800])
def test_the_oracle_answers_real_questions(dataset: str, num_docs: int, shared_data: Path) -> None:
    rollouts = play("oracle", shared_data, 5, dataset, num_docs=num_docs, questions=10)
    assert np.mean([rollout.reward for rollout in rollouts]) >= 0.97


def test_a_constant_earns_exactly_its_share_of_the_golds(shared_data: Path) -> None:
    driver = Driver.of(gym.make(IDS["hotpotqa"], data=str(shared_data / "hotpotqa_dev.jsonl.gz"), num_docs=50))
    specs = episode_specs(len(driver.source), 300, seed=0)
    golds = [driver.source.task(spec.index, spec.task_seed).questions[0].answers[0] for spec in specs]
    rewards = [rollout.reward for rollout in play("constant=yes", shared_data, 300, num_docs=50)]
    assert np.mean(rewards) == pytest.approx(np.mean([gold.lower() == "yes" for gold in golds]))
    assert np.mean(rewards) > 0


def test_fault_7_the_positions_that_leak_in_the_public_code_are_worth_no_more_than_random_ones(
    shared_data: Path,
) -> None:
    recall = {}
    for policy in ("fixed-position", "random-position"):
        outcomes = [o for rollout in play(policy, shared_data, 300, num_docs=200) for o in rollout.questions]
        recall[policy] = sum(o.stored for o in outcomes) / sum(o.evidence for o in outcomes)
    # Ten of 200 documents hold 5 % of the evidence; 300 tasks with about 2.4 passages each: standard error below 1 %.
    assert recall == pytest.approx(dict.fromkeys(recall, 0.05), abs=0.03)
