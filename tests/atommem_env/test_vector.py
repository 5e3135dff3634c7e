"""The vector environment: what it returns is what Gymnasium's own, over single environments, returns; only faster."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from agents.baselines.sanity import Random
from atommem_env.embedders.hashing import HashingEmbedder
from atommem_env.errors import EmbeddingError, StoreError
from atommem_env.store.memory_store import MemoryStore
from atommem_env.types import EpisodeSettings
from atommem_env.vector import AtomMemVectorEnv

SMALL: dict[str, Any] = {"num_docs": 6, "hops": [1], "chunk_tokens": 60}


class Counting(HashingEmbedder):
    """Counts its calls, and fails on request."""

    def __init__(self) -> None:
        super().__init__(32)
        self.calls = 0
        self.broken = False

    def embed(self, texts: Sequence[str], kind: Any) -> Any:
        if self.broken:
            raise EmbeddingError("no answer")
        self.calls += 1
        return super().embed(texts, kind)


def make(num_envs: int, **options: Any) -> Any:
    return gym.make_vec("AtomMem-Synthetic", num_envs=num_envs, **SMALL | {"durability": "off"} | options)


def peers(num_envs: int, mode: AutoresetMode, **options: Any) -> list[Any]:
    """Ours, and Gymnasium's over as many single environments."""
    theirs = gym.make_vec(
        "AtomMem-Synthetic",
        num_envs=num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
        **SMALL | {"durability": "off"} | options,
    )
    return [make(num_envs, autoreset_mode=mode, **options), theirs]


def plain(value: Any) -> Any:
    """With arrays as lists, so that it can be compared."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return plain(value.tolist()) if isinstance(value, np.ndarray) else value


def replies(observations: Any, step: int) -> tuple[str, ...]:
    """What a policy that does all sorts of things says to each; the same for the same observations."""
    acts = [Random(EpisodeSettings()).begin(1000 * step + number, None) for number in range(len(observations["phase"]))]
    return tuple(
        str(act({name: values[number] for name, values in observations.items()}))  # type: ignore[arg-type]
        for number, act in enumerate(acts)
    )


@pytest.mark.parametrize("mode", AutoresetMode)
def test_it_returns_what_gymnasiums_own_returns(mode: AutoresetMode) -> None:
    ours, theirs = peers(3, mode, questions=1)
    seen = []
    for vector in (ours, theirs):
        observation, info = vector.reset(seed=[3, 11, 4])
        returned = [plain((observation, info))]
        for step in range(40):
            observation, *rest = vector.step(replies(observation, step))
            returned.append(plain((observation, *rest)))
            ended = rest[1] | rest[2]
            if mode is AutoresetMode.DISABLED and ended.any():
                observation, info = vector.reset(options={"reset_mask": ended})
                returned.append(plain((observation, info)))
        vector.close()
        seen.append(returned)
    assert sum(any(item[2]) for item in seen[0] if len(item) == 5) > 3, "episodes must have ended on the way"
    assert seen[0] == seen[1]
    assert json.dumps(seen[0], default=str) == json.dumps(seen[1], default=str)


def test_it_is_what_make_vec_gives_and_its_spaces_hold_what_it_returns() -> None:
    env = make(2)
    assert isinstance(env, AtomMemVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.single_observation_space.contains({name: values[0] for name, values in observation.items()})
    assert env.action_space.contains(env.action_space.sample())
    again = gym.make_vec(pickle.loads(pickle.dumps(env.spec)))
    assert plain(again.reset(seed=0)) == plain(env.reset(seed=0))


def test_a_step_embeds_once_for_each_kind_of_text_however_many_write() -> None:
    embedder = Counting()
    env = make(8, embedder=embedder)
    env.reset(seed=0)
    env.step(tuple(f"<create_memory>number {n}</create_memory><read_memory>{n}</read_memory>" for n in range(8)))
    assert embedder.calls == 2
    env.step(("",) * 8)
    assert embedder.calls == 2


def test_an_embedding_that_fails_leaves_every_environment_as_it_was() -> None:
    embedder = Counting()
    env, whole = make(3, embedder=embedder), make(3, embedder=Counting())
    for each in (env, whole):
        each.reset(seed=0)
    actions = ("<create_memory>a</create_memory>", "", "<create_memory>b</create_memory>")
    embedder.broken = True
    with pytest.raises(EmbeddingError):
        env.step(actions)
    embedder.broken = False
    assert plain(env.step(actions)) == plain(whole.step(actions))


def test_stepping_before_reset_is_gymnasiums_own_error() -> None:
    with pytest.raises(gym.error.ResetNeeded):
        make(2).step(("", ""))


@pytest.mark.parametrize("durability", ["episode", "step"])
def test_what_is_kept_is_what_single_environments_keep(tmp_path: Path, durability: str) -> None:
    for number, vector in enumerate(peers(3, AutoresetMode.SAME_STEP, durability=durability, store=tmp_path / "0")):
        if number:
            vector.close()
            vector = peers(3, AutoresetMode.SAME_STEP, durability=durability, store=tmp_path / "1")[1]
        observation, _ = vector.reset(seed=7)
        for step in range(12):
            observation, *_ = vector.step(replies(observation, step))
        vector.close()
    stored = []
    for number in range(2):
        store = MemoryStore(tmp_path / str(number))
        stored.append(
            sorted(
                (
                    record.env_id,
                    record.task_id,
                    record.task_seed,
                    record.status,
                    record.reward,
                    store.replies(record.episode_id),
                    [
                        [entry.text for entry in store.memory_at(record.episode_id, step).entries()]
                        for step in range(record.steps + 1)
                    ],
                )
                for record in store.episodes()
            )
        )
    assert len(stored[0]) >= 4
    assert {item[3] for item in stored[0]} >= {"interrupted"}
    assert stored[0] == stored[1]


def test_a_commit_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(2, durability="step", store=tmp_path)
    env.reset(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "write", _no_room)
        with pytest.raises(StoreError):
            env.step(("<create_memory>first</create_memory>",) * 2)
    env.step(("<create_memory>second</create_memory>",) * 2)
    env.close()
    store = MemoryStore(tmp_path)
    assert [len(store.replies(record.episode_id)) for record in store.episodes()] == [2, 2]


def _no_room(self: MemoryStore, recorders: Any) -> None:
    raise StoreError("no room")
