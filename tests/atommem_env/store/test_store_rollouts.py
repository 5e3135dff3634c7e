"""The store under `agents.rollout.Driver`: many episodes in flight, committed in groups."""

from __future__ import annotations

import asyncio
from pathlib import Path

import gymnasium as gym
import pytest

import atommem_env  # noqa: F401  # registers the environments
from agents.rollout import Driver, EpisodeSpec
from atommem_env.errors import StoreError
from atommem_env.store.memory_store import MemoryStore
from atommem_env.types import Observation

pytest.importorskip("lancedb")

SPECS = [EpisodeSpec(index, 3, index) for index in range(6)]


def policy(observation: Observation) -> str:
    if observation["phase"] == "answer":
        return "<final_answer>nobody</final_answer>"
    return f"<create_memory>{observation['chunk'][:40]}</create_memory><read_memory>{observation['step']}</read_memory>"


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("durability", ["episode", "step"])
def test_what_was_played_is_there(tmp_path: Path, durability: str, thread: bool) -> None:
    env = gym.make("AtomMem-Synthetic", store=tmp_path, durability=durability)
    driver = Driver.of(env, embed_in_thread=thread)
    groups: list[int] = []
    write = driver.store.write

    def counted(recorders: list[object]) -> None:
        groups.append(len(recorders))
        write(recorders)  # type: ignore[arg-type]

    driver.store.write = counted  # type: ignore[method-assign,assignment]
    rollouts = asyncio.run(driver.run(SPECS, policy, in_flight=4))
    store = MemoryStore(tmp_path)
    records = {record.index: record for record in store.episodes()}
    assert sorted(records) == list(range(6))
    for spec, rollout in zip(SPECS, rollouts, strict=True):
        record = records[spec.index]
        assert (record.status, record.steps) == (rollout.stop_reason, len(rollout.turns))
        assert store.replies(record.episode_id) == [turn.reply.text for turn in rollout.turns]
    replies = sum(len(rollout.turns) for rollout in rollouts)
    assert sum(groups) == (replies if durability == "step" else 6)
    assert max(groups) > 1
    env.close()


def test_an_error_of_the_store_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    env = gym.make("AtomMem-Synthetic", store=tmp_path / "file" / "memory", durability="step")
    with pytest.raises(StoreError, match="this user can write"):
        asyncio.run(Driver.of(env).run(SPECS, policy, in_flight=4))
    env.unwrapped.episode = None  # type: ignore[attr-defined]
    env.close()
