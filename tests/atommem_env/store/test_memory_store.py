"""The store against working memories, other clients, other processes, crashes and full disks."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atommem_env.errors import EmbeddingError, SettingError, StoreError
from atommem_env.memory import WorkingMemory, unit
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import Recorder
from atommem_env.types import Mutation, Observation, OperationKind, StepResult, Vector

lancedb = pytest.importorskip("lancedb")

DIMENSION = 8


def begin(store: MemoryStore, index: int = 0) -> Recorder:
    return store.begin(
        env_id="AtomMem-Synthetic",
        task_id=f"task {index}",
        index=index,
        task_seed=3,
        episode_seed=4,
        settings={"top_k": 6, "operations": ("create", "read")},
    )


def step_result(mutations: list[Mutation], text: str = "") -> StepResult:
    observation = Observation(
        phase="read",
        questions="Who?",
        question="",
        chunk="…",
        scratchpad=f"pad {text}",
        query=f"query {text}",
        retrieved="",
        notice=f"notice {text}",
        step=1,
        steps_left=1,
    )
    return StepResult(observation, 0.0, False, False, (), tuple(mutations))


class Player:
    """Random operations on a working memory, recorded as an episode records them."""

    def __init__(self, recorder: Recorder, seed: int) -> None:
        self.recorder = recorder
        self.rng = np.random.default_rng(seed)
        self.memory = WorkingMemory()
        self.history = [self.memory.snapshot()]  # after each step
        self.replies: list[str] = []
        self.vectors: dict[tuple[str, str], Vector] = {}

    def play(self, steps: int, write_to: MemoryStore | None = None) -> None:
        for _ in range(steps):
            step = len(self.replies) + 1
            self.replies.append(f"reply {step} “quoted’ ' \x00")
            self.recorder.record(step, self.replies[-1], step_result(self.operate(), str(step)))
            self.history.append(self.memory.snapshot())
            if write_to:
                write_to.write([self.recorder])

    def operate(self) -> list[Mutation]:
        mutations = []
        for _ in range(self.rng.integers(0, 5)):
            vector = unit(self.rng.standard_normal(DIMENSION))
            ids = [entry.id for entry in self.memory.entries()]
            kind = self.rng.choice([str(kind) for kind in ("create", "create", "update", "delete", "read")])
            target = str(self.rng.choice(ids)) if ids else ""
            text = f"text {self.rng.integers(1_000_000_000)}"
            if kind == "create":
                mutations.append(Mutation(OperationKind.CREATE, self.memory.create(text, vector), text, vector))
            elif kind == "read":
                mutations.append(Mutation(OperationKind.READ, "", text, vector))
            elif target and kind == "update":
                self.memory.update(target, text, vector)
                mutations.append(Mutation(OperationKind.UPDATE, target, text, vector))
            elif target:
                self.memory.delete(target)
                mutations.append(Mutation(OperationKind.DELETE, target, "", None))
        for mutation in mutations:
            if mutation.vector is not None:
                kind = "query" if mutation.kind is OperationKind.READ else "document"
                self.vectors[kind, mutation.text] = mutation.vector
        return mutations

    def check(self, store: MemoryStore) -> None:
        """Everything that the store says of this episode."""
        episode_id = self.recorder.episode_id
        assert store.episode(episode_id).steps == len(self.replies)
        assert store.replies(episode_id) == self.replies
        vectors = store.vectors(episode_id)
        assert vectors.keys() == self.vectors.keys()
        assert all(np.array_equal(vectors[key], vector) for key, vector in self.vectors.items())  # type: ignore[index]
        for step, snapshot in enumerate(self.history):
            then, live = store.memory_at(episode_id, step), WorkingMemory.restore(snapshot)
            assert then.entries() == live.entries()
            if live.entries():
                assert then.vectors().tobytes() == live.vectors().tobytes()
        assert then.create("next", np.ones(DIMENSION)) == live.create("next", np.ones(DIMENSION))
        if store.episode(episode_id).status == "interrupted" and store.durability == "step":
            return  # its entries are written when it ends
        rows = [row for row in plain_rows(store.folder, "entries") if row["episode_id"] == episode_id]
        assert [(row["entry_id"], row["text"]) for row in rows] == [(e.id, e.text) for e in self.memory.entries()]
        if rows:
            assert np.array_equal(np.array([row["vector"] for row in rows], dtype=np.float32), self.memory.vectors())


def commit(store: MemoryStore, recorder: Recorder, status: str, reward: float, memory: WorkingMemory) -> None:
    """An episode's end, written by itself."""
    recorder.end(status, reward, memory)
    store.write([recorder])


def plain_rows(folder: Path, table: str) -> list[dict[str, Any]]:
    """What a client reads that knows nothing of us."""
    rows: list[dict[str, Any]] = lancedb.connect(folder).open_table(table).to_arrow().to_pylist()
    return rows


def played(store: MemoryStore, seed: int = 0, steps: int = 12, status: str = "answered") -> Player:
    player = Player(begin(store, seed), seed)
    player.play(steps)
    commit(store, player.recorder, status, 0.5, player.memory)
    return player


# --------------------------------------------------------------------------------------------------- what it gives back


def test_everything_comes_back_as_of_any_step_also_in_a_second_store(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "new" / "folder")
    players = [played(store, seed) for seed in range(2)]
    for reader in (store, MemoryStore(store.folder)):
        for player in players:
            player.check(reader)


def test_the_record_of_an_episode(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    players = [played(store, seed, steps=2, status="step_budget") for seed in range(12)]
    records = store.episodes()
    assert [record.episode_id for record in records] == [player.recorder.episode_id for player in players]
    record = records[7]
    assert record == store.episode(record.episode_id)
    assert (record.env_id, record.task_id, record.index) == ("AtomMem-Synthetic", "task 7", 7)
    assert (record.task_seed, record.episode_seed, record.status, record.reward, record.steps) == (
        3,
        4,
        "step_budget",
        0.5,
        2,
    )
    assert record.settings == {"top_k": 6, "operations": ["create", "read"]}
    assert record.committed_at.utcoffset() == timedelta(0)


def test_an_episode_without_any_vector(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    recorder = begin(store)
    recorder.record(1, "nothing", step_result([]))
    commit(store, recorder, "unanswered", 0.0, WorkingMemory())
    assert store.replies(recorder.episode_id) == ["nothing"]
    assert store.vectors(recorder.episode_id) == {}
    assert len(store.memory_at(recorder.episode_id, 1)) == 0
    assert store.search(np.ones(DIMENSION), 3) == []


def test_search_in_one_episode_and_in_all(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    players = [played(store, seed) for seed in range(3)]
    query = np.random.default_rng(9).standard_normal(DIMENSION)
    one = players[1]
    results = store.search(query, 3, one.recorder.episode_id)
    assert [entry.entry_id for entry in results] == one.memory.search(query, 3)
    scores = {
        (player.recorder.episode_id, entry.id): float(vector @ unit(query))
        for player in players
        for entry, vector in zip(player.memory.entries(), player.memory.vectors(), strict=True)
    }
    results = store.search(query, 5)
    assert [(hit.episode_id, hit.entry_id) for hit in results] == sorted(scores, key=lambda key: -scores[key])[:5]
    assert results[0].score == pytest.approx(max(scores.values()), abs=1e-5)
    with pytest.raises(EmbeddingError):
        store.search(np.zeros(DIMENSION), 1)
    with pytest.raises(StoreError, match="8-dimensional"):
        store.search(np.ones(DIMENSION + 1), 1)


def test_replies_with_lone_surrogates_come_back_exactly_and_can_be_read_by_any_client(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    recorder, memory, vector = begin(store), WorkingMemory(), unit(np.ones(DIMENSION))
    memory.create("a\udfff", vector)
    replies = ["good \ud800 bad", "\ud83d\ude00 half and half", "whole 😀\x00"]
    for step, reply in enumerate(replies, 1):
        mutations = [Mutation(OperationKind.CREATE, "m1", "a\udfff", vector)] if step == 1 else []
        recorder.record(step, reply, step_result(mutations, "\ud800"))
    commit(store, recorder, "answered", 1.0, memory)
    assert store.replies(recorder.episode_id) == replies
    assert plain_rows(tmp_path, "turns")[0]["reply"] == "good \ufffd bad"
    assert plain_rows(tmp_path, "entries")[0]["text"] == "a\ufffd"


def test_unknown_episodes_and_steps(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    assert store.episodes() == []
    player = played(store)
    for episode_id in ("none", "' OR 1=1 --"):
        with pytest.raises(StoreError, match="No episode"):
            store.episode(episode_id)
    for step in (-1, 13):
        with pytest.raises(StoreError, match="12 replies"):
            store.memory_at(player.recorder.episode_id, step)


# --------------------------------------------------------------------------------------------------- resuming, crashing


def test_an_interrupted_episode_goes_on_twice(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    other = played(store, seed=5)
    player = played(store, status="interrupted")
    for status in ("interrupted", "answered"):
        player.recorder = MemoryStore(tmp_path).resume(player.recorder.episode_id)
        player.play(7)
        commit(store, player.recorder, status, 1.0, player.memory)
        player.check(store)
    other.check(store)
    assert len(plain_rows(tmp_path, "episodes")) == 2  # the old rows are gone
    assert [row["step"] for row in plain_rows(tmp_path, "turns")[12:]] == list(range(1, 27))
    journal = [row["seq"] for row in plain_rows(tmp_path, "journal") if row["episode_id"] == player.recorder.episode_id]
    assert journal == list(range(1, len(journal) + 1))
    with pytest.raises(StoreError, match="is over"):
        store.resume(player.recorder.episode_id)


# ------------------------------------------------------------------------------------------------- step by step, in groups


def test_each_step_is_there_when_write_has_returned(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path, "step")
    players = [Player(begin(store, seed), seed) for seed in range(4)]
    for steps in range(1, 6):
        for player in players:
            player.play(1)
            assert player.recorder.due
        store.write([player.recorder for player in players])
        for player in players:
            assert not player.recorder.due
        players[steps % 4].check(MemoryStore(tmp_path, "step"))
        assert {record.status for record in store.episodes()} == {"interrupted"}
        assert {record.steps for record in store.episodes()} == {steps}
    for player in players[:2]:
        player.play(1)
        player.recorder.end("answered", 0.25, player.memory)
    players[2].play(2)
    store.write([player.recorder for player in players])
    for player in players:
        player.check(MemoryStore(tmp_path, "step"))
    assert [record.status for record in store.episodes()].count("answered") == 2
    assert len(plain_rows(tmp_path, "episodes")) == 4  # the rows of the beginning are gone
    for table, key in (("turns", "step"), ("journal", "seq")):
        rows = [(row["episode_id"], row[key]) for row in plain_rows(tmp_path, table)]
        assert len(rows) == len(set(rows))


def test_a_group_is_one_commit_a_table(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    players = [Player(begin(store, seed), seed) for seed in range(8)]
    for player in players:
        player.play(3)
        player.recorder.end("answered", 0.5, player.memory)
    store.write([player.recorder for player in players] * 2)  # saying it twice changes nothing
    store.write([player.recorder for player in players])
    for player in players:
        player.check(store)
    for name in ("episodes", "turns", "journal", "entries"):
        assert lancedb.connect(tmp_path).open_table(name).stats()["fragment_stats"]["num_fragments"] == 1


def test_what_is_due_rests_on_the_durability(tmp_path: Path) -> None:
    for durability, after_a_reply, after_the_end in (("off", 0, 0), ("episode", 0, 1), ("step", 1, 1)):
        store = MemoryStore(tmp_path / durability, durability)
        player = Player(begin(store), 0)
        assert not player.recorder.due
        player.play(1)
        assert player.recorder.due == after_a_reply
        store.write([player.recorder])
        assert len(store.episodes()) == after_a_reply
        player.recorder.end("answered", 0.5, player.memory)
        assert player.recorder.due == after_the_end
        store.write([player.recorder])
        assert len(store.episodes()) == after_the_end
        assert not player.recorder.due


@pytest.mark.parametrize("crash_at", ["journal", "turns", "entries", "episodes", "delete"])
@pytest.mark.parametrize("after", [False, True])
def test_a_failed_write_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: str, after: bool
) -> None:
    """`after`: the rows were written, and the error came later."""
    store = MemoryStore(tmp_path, "step")
    players = [Player(begin(store, seed), seed) for seed in (9, 5, 7)]
    for player in players:
        player.play(6, write_to=store)
    assert len(players[0].memory)
    table_type = type(lancedb.connect(tmp_path).open_table("turns"))
    add, delete = table_type.add, table_type.delete

    def cut_add(table: Any, data: Any) -> None:
        if table.name != crash_at or after:
            add(table, data)
        if table.name == crash_at:
            raise RuntimeError("the disk went away")

    def cut_delete(table: Any, where: str) -> None:
        if crash_at != "delete" or after:
            delete(table, where)
        if crash_at == "delete":
            raise RuntimeError("the disk went away")

    for player in players:
        player.play(1)
    players[0].recorder.end("answered", 0.5, players[0].memory)
    with monkeypatch.context() as patch:
        patch.setattr(table_type, "add", cut_add)
        patch.setattr(table_type, "delete", cut_delete)
        with pytest.raises(StoreError, match="disk went away"):
            store.write([player.recorder for player in players])
    for record in MemoryStore(tmp_path).episodes():  # whole steps, whatever was written
        assert record.steps in (6, 7)
        player = next(player for player in players if player.recorder.episode_id == record.episode_id)
        entries = store.memory_at(record.episode_id, record.steps).entries()
        assert entries == WorkingMemory.restore(player.history[record.steps]).entries()
    for player in players[1:]:
        player.play(1)
    store.write([player.recorder for player in players])
    for player in players:
        player.check(MemoryStore(tmp_path, "step"))
    assert len(store.search(np.ones(DIMENSION), 99)) == len(players[0].memory)
    assert len(plain_rows(tmp_path, "episodes")) == 3


def test_a_step_whose_turn_is_missing_does_not_count_and_is_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore(tmp_path, "step")
    player = Player(begin(store), 1)
    player.play(3, write_to=store)
    lost = Player(begin(MemoryStore(tmp_path, "off")), 1)  # the same episode, as it would have gone on
    lost.play(3)
    add = (table_type := type(lancedb.connect(tmp_path).open_table("turns"))).add

    def killed(table: Any, data: Any) -> None:
        if table.name == "turns":
            raise RuntimeError("killed")
        add(table, data)

    player.play(1)
    with monkeypatch.context() as patch:
        patch.setattr(table_type, "add", killed)
        with pytest.raises(StoreError, match="killed"):
            store.write([player.recorder])
    again = MemoryStore(tmp_path, "step")
    lost.recorder = again.resume(player.recorder.episode_id)
    lost.rng = np.random.default_rng(77)  # another step 4 than the one that was cut short
    lost.play(2, write_to=store)
    lost.check(again)
    lost.recorder.end("answered", 1.0, lost.memory)
    again.write([lost.recorder])
    lost.check(MemoryStore(tmp_path))


def test_a_folder_in_use_keeps_what_others_read_and_the_last_one_tidies_up(tmp_path: Path) -> None:
    stores = [MemoryStore(tmp_path) for _ in range(2)]
    for seed in range(12):
        played(stores[seed % 2], seed, steps=2)

    def files(name: str) -> int:
        return sum(path.is_file() for path in (tmp_path / f"{name}.lance").rglob("*"))

    before = files("turns")
    stores[0].close()
    assert files("turns") >= before > 10  # the other one may be reading any of them
    assert len(stores[1].episodes()) == 12
    stores[1].close()
    assert all(files(name) <= 10 for name in ("episodes", "turns", "journal", "entries"))
    assert len(MemoryStore(tmp_path).episodes()) == 12


def test_nothing_is_deleted_while_another_process_uses_the_folder(tmp_path: Path) -> None:
    store, other = MemoryStore(tmp_path), MemoryStore(tmp_path)
    for seed in range(12):
        played(store if seed else other, seed, steps=2)
    before = set(tmp_path.rglob("*"))
    store.optimize()
    assert before < set(tmp_path.rglob("*"))
    assert lancedb.connect(tmp_path).open_table("turns").stats()["fragment_stats"]["num_fragments"] == 1
    other.close()
    store.optimize()
    assert not before <= set(tmp_path.rglob("*"))
    assert len(store.episodes()) == 12


def test_what_a_client_without_our_lock_is_about_to_commit_is_not_deleted(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    for seed in range(3):
        played(store, seed, steps=2)
    unreferenced = tmp_path / "turns.lance" / "data" / "0123.lance"
    unreferenced.write_bytes(b"written, and not yet committed")
    store.optimize()
    assert lancedb.connect(tmp_path).open_table("turns").stats()["fragment_stats"]["num_fragments"] == 1
    assert unreferenced.exists()


@pytest.mark.parametrize("days", [8, -8])
def test_with_a_wrong_clock_nothing_is_compacted_or_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    store = MemoryStore(tmp_path)
    for seed in range(12):
        played(store, seed, steps=2)
    before = set(tmp_path.rglob("*"))
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + days * 86_400)
    store.optimize()
    store.close()
    assert set(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    store.optimize()
    assert set(tmp_path.rglob("*")) != before
    assert len(store.episodes()) == 12


def test_a_checkpoint_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[Path] = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(Path(os.readlink(f"/proc/self/fd/{file}"))), fsync(file)))
    store = MemoryStore(tmp_path / "memory")
    played(store)
    store.checkpoint()
    there = {path.resolve() for path in (tmp_path / "memory").rglob("*")}
    assert synced == there | {(tmp_path / "memory").resolve(), tmp_path.resolve()}
    assert len(there) > 12


def test_search_over_thousands_of_entries_is_exact_and_passes_over_what_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    store = MemoryStore(tmp_path)
    vectors: dict[tuple[str, str], Vector] = {}
    recorders = []
    for index in range(40):
        memory = WorkingMemory()
        rows = unit(rng.standard_normal((75, DIMENSION)))
        created = [Mutation(OperationKind.CREATE, memory.create("text", vector), "text", vector) for vector in rows]
        recorders.append(recorder := begin(store, index))
        recorder.record(1, "75 creates", step_result(created))
        recorder.end("answered", 1.0, memory)
        vectors |= {
            (recorder.episode_id, entry.id): vector
            for entry, vector in zip(memory.entries(), memory.vectors(), strict=True)
        }
    store.write(recorders)
    queries = unit(rng.standard_normal((3, DIMENSION)))
    crashed = begin(store)  # leaves entries behind that are the nearest of all, of an episode that is not there
    memory = WorkingMemory()
    for _ in range(30):
        for query in queries:
            memory.create("of nobody", query)
    table_type = type(lancedb.connect(tmp_path).open_table("entries"))
    add = table_type.add
    with monkeypatch.context() as patch:
        patch.setattr(table_type, "add", lambda table, data: None if table.name == "episodes" else add(table, data))
        commit(store, crashed, "answered", 1.0, memory)
    keys, matrix = list(vectors), np.stack(list(vectors.values()))
    for query in queries:
        results = [(hit.episode_id, hit.entry_id) for hit in store.search(query, 20)]
        assert results == [keys[row] for row in np.argsort(-(matrix @ query))[:20]]
        inside = store.search(query, 9, recorders[7].episode_id)
        own = [row for row in np.argsort(-(matrix @ query)) if keys[row][0] == recorders[7].episode_id]
        assert [(hit.episode_id, hit.entry_id) for hit in inside] == [keys[row] for row in own[:9]]


@pytest.mark.parametrize("crash_at", ["turns", "journal", "entries", "episodes", "delete"])
def test_a_commit_that_is_cut_short_leaves_the_old_state_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: str
) -> None:
    store = MemoryStore(tmp_path)
    player = played(store, status="interrupted")
    table_type = type(lancedb.connect(tmp_path).open_table("turns"))
    add, delete = table_type.add, table_type.delete

    def cut_add(table: Any, *args: Any, **kwargs: Any) -> Any:
        if table.name == crash_at:
            raise RuntimeError("the disk is full")
        return add(table, *args, **kwargs)

    def cut_delete(table: Any, where: str) -> Any:
        if crash_at == "delete":
            raise RuntimeError("the disk is full")
        return delete(table, where)

    monkeypatch.setattr(table_type, "add", cut_add)
    monkeypatch.setattr(table_type, "delete", cut_delete)
    first, memory, vector = store.resume(player.recorder.episode_id), WorkingMemory(), unit(np.ones(DIMENSION))
    change = Mutation(OperationKind.CREATE, memory.create("new", vector), "new", vector)
    first.record(13, "a reply that counts only if its episodes row was written", step_result([change]))
    with pytest.raises(StoreError, match="disk is full"):
        commit(store, first, "interrupted", 0.0, memory)
    monkeypatch.undo()
    reader = MemoryStore(tmp_path)
    assert len(reader.episodes()) == 1
    if crash_at == "delete":
        assert reader.episodes()[0].steps == 13
        assert len(reader.replies(player.recorder.episode_id)) == 13
        assert [hit.text for hit in reader.search(vector, 9, player.recorder.episode_id)] == ["new"]
    else:
        assert reader.replies(player.recorder.episode_id) == player.replies
        assert len(reader.search(np.ones(DIMENSION), 99, player.recorder.episode_id)) == len(player.memory)
        player.recorder = reader.resume(player.recorder.episode_id)
        player.play(3)
        commit(store, player.recorder, "answered", 1.0, player.memory)
        assert MemoryStore(tmp_path).replies(player.recorder.episode_id) == player.replies
        assert len(reader.memory_at(player.recorder.episode_id, 15)) == len(player.memory)


def test_a_commit_can_be_tried_again(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    store = MemoryStore(tmp_path / "folder")
    player = Player(begin(store), 0)
    player.play(5)
    with pytest.raises(StoreError, match="durability='off'"):
        commit(store, player.recorder, "answered", 1.0, player.memory)
    (tmp_path / "folder").unlink()
    commit(store, player.recorder, "answered", 1.0, player.memory)
    player.check(store)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_the_recorder_refuses_what_would_damage_the_record(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    recorder = begin(store)
    with pytest.raises(StoreError, match="got reply 2"):
        recorder.record(2, "too early", step_result([]))
    with pytest.raises(SettingError, match="status"):
        commit(store, recorder, "bored", 0.0, WorkingMemory())
    commit(store, recorder, "interrupted", 0.0, WorkingMemory())
    for again in (
        lambda: commit(store, recorder, "answered", 0.0, WorkingMemory()),
        lambda: recorder.record(1, "late", step_result([])),
    ):
        with pytest.raises(StoreError, match="was committed"):
            again()
    with pytest.raises(StoreError, match="64 bits"):
        store.begin(env_id="", task_id="", index=0, task_seed=2**64, episode_seed=0, settings={})


def test_vectors_of_another_dimension_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    player = played(store)
    memory = WorkingMemory()
    memory.create("a", np.ones(DIMENSION + 1))
    with pytest.raises(StoreError, match="holds 8-dimensional vectors, got 9"):
        commit(store, begin(store), "answered", 0.0, memory)
    assert len(plain_rows(tmp_path, "entries")) == len(player.memory)
    assert len(plain_rows(tmp_path, "episodes")) == 1


@pytest.mark.parametrize("version", ["3", None])
@pytest.mark.parametrize("table", ["episodes", "journal"])
def test_tables_of_a_newer_version_or_of_somebody_else_are_not_touched(
    tmp_path: Path, table: str, version: str | None
) -> None:
    pa = pytest.importorskip("pyarrow")
    metadata = {"atommem_schema_version": version} if version else None
    schema = pa.schema([("episode_id", pa.string())], metadata=metadata)
    lancedb.connect(tmp_path).create_table(table, schema=schema)
    store = MemoryStore(tmp_path)
    memory = WorkingMemory()
    memory.create("a", [1.0])
    with pytest.raises(StoreError, match="Upgrade atommem" if version else "not one of AtomMem's"):
        commit(store, begin(store), "answered", 0.0, memory)
    assert plain_rows(tmp_path, table) == []
    assert [path.stem for path in tmp_path.iterdir()] == [table]


def test_every_table_says_its_schema_version(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    played(store)
    store.close()
    for table in ("episodes", "turns", "journal", "entries"):
        assert lancedb.connect(tmp_path).open_table(table).schema.metadata[b"atommem_schema_version"] == b"2"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = MemoryStore(tmp_path / "file" / "memory")
    with pytest.raises(StoreError, match="this user can write"):
        commit(store, begin(store), "answered", 0.0, WorkingMemory())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    player = played(MemoryStore(tmp_path / "memory"))
    for path in (tmp_path / "memory", *(tmp_path / "memory").rglob("*")):
        path.chmod(0o500 if path.is_dir() else 0o400)
    store = MemoryStore(tmp_path / "memory")
    player.check(store)
    with pytest.raises(StoreError, match="this user can write"):
        played(store, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no limit on the size of files")
def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path) -> None:
    done = run(
        """
        import resource, sys
        import numpy as np
        from atommem_env.errors import StoreError
        from atommem_env.memory import WorkingMemory
        from atommem_env.store.memory_store import MemoryStore
        store = MemoryStore(sys.argv[1])
        def end(texts):
            memory = WorkingMemory()
            for text in texts:
                memory.create(text, np.ones(8))
            recorder = store.begin(env_id="", task_id="", index=0, task_seed=0, episode_seed=0, settings={})
            recorder.end("answered", 1.0, memory)
            return recorder
        store.write([end(["small"])])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        large = end([str(number) * 1000 for number in range(200)])
        try:
            store.write([large])
        except StoreError as error:
            assert "Free some space" in str(error), error
        else:
            sys.exit("written on a full disk")
        assert len(MemoryStore(sys.argv[1]).episodes()) == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        store.write([large])
        assert len(store.episodes()) == 2 and len(store.search(np.ones(8), 300)) == 201
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("durability", ["steps", "", "Episode"])
def test_durabilities_that_do_not_exist(tmp_path: Path, durability: str) -> None:
    with pytest.raises(SettingError, match="off, episode, step"):
        MemoryStore(tmp_path, durability)


# --------------------------------------------------------------------------------------------------- off, cheap, shared


def test_durability_off_makes_nothing(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "memory", "off")
    played(store)
    assert store.episodes() == []
    store.optimize()
    store.close()
    assert not (tmp_path / "memory").exists()


def test_making_and_reading_an_empty_store_makes_no_folder(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "memory")
    begin(store)
    assert store.episodes() == []
    assert store.search([1.0], 1) == []
    store.close()
    assert not (tmp_path / "memory").exists()


def test_pickled_before_and_after_use(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path, "episode")
    early = pickle.loads(pickle.dumps(store))
    player = played(store)
    for copy in (early, pickle.loads(pickle.dumps(store))):
        assert (copy.folder, copy.durability) == (tmp_path, "episode")
        player.check(copy)


def test_closing_and_going_on(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    players = []
    for seed in range(3):
        players.append(played(store, seed))
        store.close()
    for player in players:
        player.check(store)


def test_files_are_joined_every_64_commits(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    memory = WorkingMemory()
    memory.create("a", [1.0, 0.0])
    for index in range(64):
        commit(store, begin(store, index), "answered", 0.0, memory)
    assert len(store.episodes()) == len(plain_rows(tmp_path, "entries")) == 64
    assert lancedb.connect(tmp_path).open_table("episodes").stats()["fragment_stats"]["num_fragments"] == 1
    for index in range(12):
        commit(store, begin(store, index), "answered", 0.0, memory)
    store.close()
    for name in ("episodes", "journal", "entries"):
        assert sum(path.is_file() for path in (tmp_path / f"{name}.lance").rglob("*")) <= 10


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )


def test_a_plain_client_in_another_process_reads_all_four_tables(tmp_path: Path) -> None:
    player = played(MemoryStore(tmp_path))
    done = run(
        """
        import json, sys, lancedb
        tables = {n: lancedb.connect(sys.argv[1]).open_table(n) for n in ("episodes", "turns", "journal", "entries")}
        print(json.dumps({"counts": {n: t.count_rows() for n, t in tables.items()},
                          "entries": tables["entries"].to_arrow().column("text").to_pylist(),
                          "status": tables["episodes"].to_arrow().column("status").to_pylist()}))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["entries"] == [entry.text for entry in player.memory.entries()]
    assert said["status"] == ["answered"]
    assert said["counts"]["turns"] == 12


def test_importing_and_making_a_store_does_not_import_lancedb() -> None:
    done = run(
        """
        import sys
        from atommem_env.store.memory_store import MemoryStore
        MemoryStore("nowhere").begin(env_id="", task_id="", index=0, task_seed=0, episode_seed=0, settings={})
        assert not {"lancedb", "pyarrow"} & set(sys.modules), "imported"
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_in_a_child_forked_after_lancedb_was_used_it_says_so(tmp_path: Path) -> None:
    done = run(
        """
        import os, sys
        from atommem_env.errors import StoreError
        from atommem_env.memory import WorkingMemory
        from atommem_env.store.memory_store import MemoryStore
        def play(store):
            recorder = store.begin(env_id="", task_id="", index=0, task_seed=0, episode_seed=0, settings={})
            recorder.end("answered", 0.0, WorkingMemory())
            store.write([recorder])
        store = MemoryStore(sys.argv[1])
        if (child := os.fork()) == 0:  # before: allowed
            play(store)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(store.episodes()) == 1
        if (child := os.fork()) == 0:
            for attempt in (store, MemoryStore(sys.argv[1])):
                try:
                    play(attempt)
                except StoreError as error:
                    assert "spawn" in str(error)
                else:
                    os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(store.episodes()) == 1
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def commit_many(folder: Path, durability: str, seeds: range, barrier: Any) -> None:
    """In a separate process; all start to create the tables at the same moment."""
    store = MemoryStore(folder, durability)
    players = [Player(begin(store, seed), seed) for seed in seeds]
    barrier.wait(60)
    for group in (players[:1], players[1:5], players[5:]):
        for step in range(4):
            for player in group:
                player.play(1)
                if step == 3:
                    player.recorder.end("answered", 1.0, player.memory)
            store.write([player.recorder for player in group])
        store.optimize()  # while the others write
    store.close()


@pytest.mark.parametrize("durabilities", [("episode", "episode"), ("step", "step", "episode")])
def test_processes_that_begin_at_the_same_time_lose_and_double_nothing(
    tmp_path: Path, durabilities: tuple[str, ...]
) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(durabilities))
    workers = [
        context.Process(target=commit_many, args=(tmp_path, durability, range(n * 20, n * 20 + 20), barrier))
        for n, durability in enumerate(durabilities)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    count = 20 * len(workers)
    store = MemoryStore(tmp_path)
    records = store.episodes()
    assert sorted(record.index for record in records) == list(range(count))
    turns = [(row["episode_id"], row["step"]) for row in plain_rows(tmp_path, "turns")]
    assert len(turns) == len(set(turns)) == 4 * count
    assert len(plain_rows(tmp_path, "episodes")) == count
    expected: dict[int, Player] = {}
    for seed in range(count):
        expected[seed] = Player(begin(MemoryStore(tmp_path, "off"), seed), seed)
        expected[seed].play(4)
    total = 0
    for record in records:
        live = expected[record.index]
        total += len(live.memory)
        assert store.memory_at(record.episode_id, 4).entries() == live.memory.entries()
    assert len(plain_rows(tmp_path, "entries")) == total
