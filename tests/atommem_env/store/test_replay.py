import dataclasses
from pathlib import Path

import pytest

from atommem_env.embedders import embed, get_embedder
from atommem_env.episode import Episode
from atommem_env.errors import SettingError, StoreError
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.replay import initial_episode, replay
from atommem_env.types import EpisodeSettings, Observation, Task

SETTINGS = EpisodeSettings(chunk_tokens=8, retrieval="random", top_k=1, operations=("create", "read", "delete"))
SEED = 3


class OneTask:
    dataset = "hotpotqa"

    def __init__(self, task: Task) -> None:
        self.only = task

    def __len__(self) -> int:
        return 1

    def task(self, index: int, seed: int) -> Task:
        return self.only


def play(task: Task, store: MemoryStore) -> tuple[str, list[Observation]]:
    """Plays and commits an episode: its id, and what was seen after each reply."""
    episode = Episode(task, SETTINGS, SEED)
    recorder = store.begin(
        env_id="here",
        task_id=task.id,
        index=0,
        task_seed=1,
        episode_seed=SEED,
        settings=dataclasses.asdict(SETTINGS),
    )
    seen = []
    while episode.stop_reason is None:
        reply = f"<create_memory>step {episode.steps} \ud800</create_memory><read_memory>Ada</read_memory>"
        if episode.phase == "answer":
            reply = "<final_answer>Rome</final_answer><delete_memory>m1</delete_memory>"
        result = episode.resolve(embed(get_embedder("hashing"), episode.submit(reply)))
        recorder.record(episode.steps, reply, result)
        seen.append(result.observation)
    recorder.end(episode.stop_reason, episode.reward, episode.memory)
    store.write([recorder])
    return recorder.episode_id, seen


def test_an_episode_is_seen_again_as_it_was(task: Task, tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    episode_id, seen = play(task, store)
    episode = initial_episode(store.episode(episode_id), OneTask(task), SETTINGS)
    steps = []
    for reply, result in replay(episode, store, episode_id):
        assert reply == store.replies(episode_id)[len(steps)]
        assert episode.observe() == result.observation  # the episode stands where the step left it
        steps.append(result.observation)
    assert steps == seen
    assert episode.stop_reason == "answered"


def test_another_task_and_other_settings_are_refused(task: Task, tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    record = store.episode(play(task, store)[0])
    with pytest.raises(SettingError, match="other settings of top_k"):
        initial_episode(record, OneTask(task), dataclasses.replace(SETTINGS, top_k=2))
    with pytest.raises(SettingError, match="of task hand/1, not of hand/2"):
        initial_episode(record, OneTask(dataclasses.replace(task, id="hand/2")), SETTINGS)


def test_data_that_changed_under_the_same_name_are_noticed(task: Task, tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    episode_id, _ = play(task, store)
    shorter = dataclasses.replace(task, documents=task.documents[:1], questions=task.questions[:1])
    episode = initial_episode(store.episode(episode_id), OneTask(shorter), SETTINGS)
    with pytest.raises(StoreError, match="does not fit"):
        list(replay(episode, store, episode_id))


def test_settings_with_nested_tuples_are_recognised(task: Task, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, reward_terms=(("faults", -0.1),))
    store = MemoryStore(tmp_path)
    recorder = store.begin(
        env_id="here", task_id=task.id, index=0, task_seed=1, episode_seed=SEED, settings=dataclasses.asdict(settings)
    )
    recorder.end("interrupted", 0.0, Episode(task, settings, SEED).memory)
    store.write([recorder])
    record = store.episode(recorder.episode_id)
    assert initial_episode(record, OneTask(task), settings).settings == settings
    with pytest.raises(SettingError, match="other settings of reward_terms"):
        initial_episode(record, OneTask(task), SETTINGS)
