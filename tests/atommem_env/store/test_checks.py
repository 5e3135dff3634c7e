"""Stores whose tables do not fit together, files that are damaged, and stores of schema 1."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import pytest

import atommem_env  # noqa: F401  # registers the environments
from atommem_env.env import AtomMemEnv
from atommem_env.errors import StoreError
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.tables import TABLES, VERSION_KEY

lancedb = pytest.importorskip("lancedb")

REPLY = "<create_memory>Ada lives in Rome.</create_memory><read_memory>Where is Ada?</read_memory>"


@contextmanager
def environment(folder: Path, durability: str = "episode") -> Iterator[AtomMemEnv]:
    env = gym.make("AtomMem-Synthetic", store=folder, num_docs=6, chunk_tokens=64, durability=durability)
    assert isinstance(env.unwrapped, AtomMemEnv)
    yield env.unwrapped
    env.close()


def finish(env: AtomMemEnv) -> None:
    """Plays an episode to its end."""
    ended = False
    while not ended:
        *_, terminated, truncated, _ = env.step(REPLY + "<final_answer>Rome</final_answer>")
        ended = terminated or truncated


def play(folder: Path, seed: int) -> str:
    """Plays an episode; its id."""
    with environment(folder) as env:
        env.reset(seed=seed)
        finish(env)
        return env.episode_id


@pytest.mark.parametrize("table", ["turns", "journal", "entries"])
@pytest.mark.parametrize("durability", ["episode", "step"])
def test_a_table_that_is_older_than_the_others_is_noticed(tmp_path: Path, durability: str, table: str) -> None:
    first = play(tmp_path / "store", seed=0)
    with environment(tmp_path / "store", durability) as env:
        env.reset(seed=1)
        env.step(REPLY)
        shutil.copytree(tmp_path / "store", tmp_path / "before")
        env.step(REPLY)
        finish(env)
        second = env.episode_id
    assert MemoryStore(tmp_path / "store").check() == 0
    assert len(MemoryStore(tmp_path / "before").episodes()) == (2 if durability == "step" else 1)
    assert MemoryStore(tmp_path / "before").check() == 0
    shutil.rmtree(tmp_path / "store" / f"{table}.lance")
    shutil.copytree(tmp_path / "before" / f"{table}.lance", tmp_path / "store" / f"{table}.lance")
    store = MemoryStore(tmp_path / "store")
    message = f"{tmp_path / 'store'} is damaged or incomplete: of episode {second} the table '{table}' has"
    with pytest.raises(StoreError, match=message):
        store.check()
    for read in (store.replies, store.changes, store.vectors):
        with pytest.raises(StoreError, match=message):
            read(second)
    assert len(store.memory_at(first, 3)) == 3  # the other one is complete


def test_replies_of_an_episode_that_is_not_listed_are_counted(tmp_path: Path) -> None:
    play(tmp_path / "store", seed=0)
    shutil.copytree(tmp_path / "store", tmp_path / "before")
    play(tmp_path / "store", seed=1)
    shutil.rmtree(tmp_path / "store" / "episodes.lance")
    shutil.copytree(tmp_path / "before" / "episodes.lance", tmp_path / "store" / "episodes.lance")
    store = MemoryStore(tmp_path / "store")
    assert (len(store.episodes()), store.check()) == (1, 1)


@pytest.mark.parametrize("part", ["", "_versions"])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_is_missing_or_without_a_version_is_an_error(tmp_path: Path, table: str, part: str) -> None:
    episode = play(tmp_path, seed=0)
    shutil.rmtree(tmp_path / f"{table}.lance" / part)
    store = MemoryStore(tmp_path)
    if (table, part) == ("journal", ""):  # nothing is created after it
        with pytest.raises(StoreError, match=f"of episode {episode} the table 'journal' has 0 changes and searches"):
            store.check()
        return
    message = f"The table '{table}' of the memory store in {tmp_path} is missing"
    with pytest.raises(StoreError, match=message):
        store.check()
    with pytest.raises(StoreError, match=message):
        play(tmp_path, seed=1)


def test_entries_that_are_not_those_of_the_journal_are_noticed(tmp_path: Path) -> None:
    episode = play(tmp_path, seed=0)
    lancedb.connect(tmp_path).open_table("entries").update(
        where="entry_id = 'm2'", values={"text": "Ada lives in Oslo."}
    )
    store = MemoryStore(tmp_path)
    assert len(store.memory_at(episode, 1)) == 1
    with pytest.raises(StoreError, match="not those that its changes lead to"):
        store.memory_at(episode, store.episode(episode).steps)


def test_settings_that_are_no_json_are_an_error_that_names_the_table(tmp_path: Path) -> None:
    play(tmp_path, seed=0)
    lancedb.connect(tmp_path).open_table("episodes").update(where="true", values={"settings": "{"})
    with pytest.raises(StoreError, match=f"Cannot read the table 'episodes' of the memory store in {tmp_path}"):
        MemoryStore(tmp_path).episodes()


def test_a_store_of_schema_1_is_read_and_written(tmp_path: Path) -> None:
    first = play(tmp_path, seed=0)
    connection = lancedb.connect(tmp_path)
    for name in TABLES:
        rows = connection.open_table(name).to_arrow()
        rows = rows.drop_columns(["changes"]) if name == "turns" else rows
        connection.create_table(name, rows.replace_schema_metadata({VERSION_KEY: "1"}), mode="overwrite")
    second = play(tmp_path, seed=1)
    store = MemoryStore(tmp_path)
    assert [record.episode_id for record in store.episodes()] == [first, second]
    assert store.check() == 0
    assert "changes" not in connection.open_table("turns").schema.names
    connection.open_table("turns").delete(f"episode_id = '{second}' AND step = 2")
    with pytest.raises(StoreError, match=f"of episode {second} the table 'turns' has"):
        store.check()
