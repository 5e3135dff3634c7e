"""An episode and its record: begun, played, left and resumed, in a store on disk."""

from pathlib import Path

import pytest

from atommem_env.embedders import embed, get_embedder
from atommem_env.errors import OutOfRange, SettingError
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import INTERRUPTED
from atommem_env.store.session import EpisodeSession
from atommem_env.tasks.synthetic import SyntheticSource
from atommem_env.types import EpisodeSettings

SOURCE = SyntheticSource(num_docs=6)
SETTINGS = EpisodeSettings(chunk_tokens=64)
NAMES = {"env_id": "here", "index": 3, "task_seed": 5, "episode_seed": 7}


def reply(session: EpisodeSession, text: str) -> None:
    session.resolve(text, embed(get_embedder("hashing"), session.episode.submit(text)))


def test_an_episode_is_recorded_to_its_end(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    session = EpisodeSession.begin(store, SOURCE, SETTINGS, **NAMES)  # type: ignore[arg-type]
    while session.episode.stop_reason is None:
        assert not session.recorder.due
        reply(session, "<create_memory>Ada</create_memory><final_answer>Ada</final_answer>")
    assert not session.leave()
    store.write([session.recorder])
    (record,) = store.episodes()
    assert (record.env_id, record.index, record.task_seed, record.episode_seed) == ("here", 3, 5, 7)
    assert (record.status, record.steps) == (session.episode.stop_reason, session.episode.steps)
    assert record.settings["chunk_tokens"] == 64
    assert len(store.memory_at(record.episode_id, record.steps)) == len(session.episode.memory) > 1


def test_an_episode_that_was_left_is_resumed_where_it_was(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    session = EpisodeSession.begin(store, SOURCE, SETTINGS, **NAMES)  # type: ignore[arg-type]
    assert not session.leave(), "there is nothing to store yet"
    reply(session, "<create_memory>Ada</create_memory><read_memory>Ada</read_memory>")
    assert session.leave()
    store.write([session.recorder])
    resumed, record = EpisodeSession.resume(store, SOURCE, SETTINGS, session.recorder.episode_id)
    assert record.status == INTERRUPTED
    assert resumed.episode.observe() == session.episode.observe()
    while resumed.episode.stop_reason is None:
        reply(resumed, "<final_answer>Ada</final_answer>")
    store.write([resumed.recorder])
    with pytest.raises(SettingError, match="is over"):
        EpisodeSession.resume(store, SOURCE, SETTINGS, record.episode_id)


def test_a_task_that_is_not_there_begins_no_episode(tmp_path: Path) -> None:
    with pytest.raises(OutOfRange, match="index must be from 0 to 999999, got -1"):
        EpisodeSession.begin(MemoryStore(tmp_path), SOURCE, SETTINGS, **{**NAMES, "index": -1})  # type: ignore[arg-type]
