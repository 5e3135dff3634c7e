"""The store against live memories, other clients, other processes, and everything that can be in its way."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atommem_env.errors import EmbeddingError, SettingError, StoreError
from atommem_env.memory import WorkingMemory, unit
from atommem_env.store import MemoryStore, Recorder
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
    """Random operations on a live memory, recorded as an episode records them."""

    def __init__(self, recorder: Recorder, seed: int) -> None:
        self.recorder = recorder
        self.rng = np.random.default_rng(seed)
        self.memory = WorkingMemory()
        self.history = [self.memory.snapshot()]  # after each step
        self.replies: list[str] = []
        self.vectors: dict[tuple[str, str], Vector] = {}

    def play(self, steps: int) -> None:
        for _ in range(steps):
            step = len(self.replies) + 1
            self.replies.append(f"reply {step} “quoted’ ' \x00")
            self.recorder.record(step, self.replies[-1], step_result(self.operate(), str(step)))
            self.history.append(self.memory.snapshot())

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
        kept = store.vectors(episode_id)
        assert kept.keys() == self.vectors.keys()
        assert all(np.array_equal(kept[key], vector) for key, vector in self.vectors.items())  # type: ignore[index]
        for step, snapshot in enumerate(self.history):
            then, live = store.memory_at(episode_id, step), WorkingMemory.restore(snapshot)
            assert then.entries() == live.entries()
            if live.entries():
                assert then.vectors().tobytes() == live.vectors().tobytes()
        assert then.create("next", np.ones(DIMENSION)) == live.create("next", np.ones(DIMENSION))
        rows = [row for row in plain_rows(store.folder, "entries") if row["episode_id"] == episode_id]
        assert [(row["entry_id"], row["text"]) for row in rows] == [(e.id, e.text) for e in self.memory.entries()]
        if rows:
            assert np.array_equal(np.array([row["vector"] for row in rows], dtype=np.float32), self.memory.vectors())


def plain_rows(folder: Path, table: str) -> list[dict[str, Any]]:
    """What a client reads that knows nothing of us."""
    rows: list[dict[str, Any]] = lancedb.connect(folder).open_table(table).to_arrow().to_pylist()
    return rows


def played(store: MemoryStore, seed: int = 0, steps: int = 12, status: str = "answered") -> Player:
    player = Player(begin(store, seed), seed)
    player.play(steps)
    player.recorder.commit(status, 0.5, player.memory)
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
    recorder.commit("unanswered", 0.0, WorkingMemory())
    assert store.replies(recorder.episode_id) == ["nothing"]
    assert store.vectors(recorder.episode_id) == {}
    assert len(store.memory_at(recorder.episode_id, 1)) == 0
    assert store.search(np.ones(DIMENSION), 3) == []


def test_search_in_one_episode_and_in_all(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    players = [played(store, seed) for seed in range(3)]
    query = np.random.default_rng(9).standard_normal(DIMENSION)
    one = players[1]
    found = store.search(query, 3, one.recorder.episode_id)
    assert [entry.entry_id for entry in found] == one.memory.search(query, 3)
    scores = {
        (player.recorder.episode_id, entry.id): float(vector @ unit(query))
        for player in players
        for entry, vector in zip(player.memory.entries(), player.memory.vectors(), strict=True)
    }
    found = store.search(query, 5)
    assert [(hit.episode_id, hit.entry_id) for hit in found] == sorted(scores, key=lambda key: -scores[key])[:5]
    assert found[0].score == pytest.approx(max(scores.values()), abs=1e-5)
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
    recorder.commit("answered", 1.0, memory)
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
        player.recorder.commit(status, 1.0, player.memory)
        player.check(store)
    other.check(store)
    assert len(plain_rows(tmp_path, "episodes")) == 2  # the old rows are gone
    assert [row["step"] for row in plain_rows(tmp_path, "turns")[12:]] == list(range(1, 27))
    journal = [row["seq"] for row in plain_rows(tmp_path, "journal") if row["episode_id"] == player.recorder.episode_id]
    assert journal == list(range(1, len(journal) + 1))
    with pytest.raises(StoreError, match="is over"):
        store.resume(player.recorder.episode_id)


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
        first.commit("interrupted", 0.0, memory)
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
        player.recorder.commit("answered", 1.0, player.memory)
        assert MemoryStore(tmp_path).replies(player.recorder.episode_id) == player.replies
        assert len(reader.memory_at(player.recorder.episode_id, 15)) == len(player.memory)


def test_a_commit_can_be_tried_again(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    store = MemoryStore(tmp_path / "folder")
    player = Player(begin(store), 0)
    player.play(5)
    with pytest.raises(StoreError, match="durability='off'"):
        player.recorder.commit("answered", 1.0, player.memory)
    (tmp_path / "folder").unlink()
    player.recorder.commit("answered", 1.0, player.memory)
    player.check(store)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_the_recorder_refuses_what_would_damage_the_record(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    recorder = begin(store)
    with pytest.raises(StoreError, match="got number 2"):
        recorder.record(2, "too early", step_result([]))
    with pytest.raises(SettingError, match="status"):
        recorder.commit("bored", 0.0, WorkingMemory())
    recorder.commit("interrupted", 0.0, WorkingMemory())
    for again in (
        lambda: recorder.commit("answered", 0.0, WorkingMemory()),
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
        begin(store).commit("answered", 0.0, memory)
    assert len(plain_rows(tmp_path, "entries")) == len(player.memory)
    assert len(plain_rows(tmp_path, "episodes")) == 1


@pytest.mark.parametrize("version", ["2", None])
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
        begin(store).commit("answered", 0.0, memory)
    assert plain_rows(tmp_path, table) == []
    assert [path.stem for path in tmp_path.iterdir()] == [table]


def test_every_table_says_its_schema_version(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    played(store)
    store.close()
    for table in ("episodes", "turns", "journal", "entries"):
        assert lancedb.connect(tmp_path).open_table(table).schema.metadata[b"atommem_schema_version"] == b"1"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="this user can write"):
        begin(MemoryStore(tmp_path / "memory")).commit("answered", 0.0, WorkingMemory())


@pytest.mark.parametrize("durability", ["step", "", "Episode"])
def test_durabilities_that_do_not_exist(tmp_path: Path, durability: str) -> None:
    with pytest.raises(SettingError, match="off, episode"):
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
        begin(store, index).commit("answered", 0.0, memory)
    assert len(store.episodes()) == len(plain_rows(tmp_path, "entries")) == 64
    assert lancedb.connect(tmp_path).open_table("episodes").stats()["fragment_stats"]["num_fragments"] == 1


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
        from atommem_env.store import MemoryStore
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
        from atommem_env.store import MemoryStore
        begin = dict(env_id="", task_id="", index=0, task_seed=0, episode_seed=0, settings={})
        store = MemoryStore(sys.argv[1])
        if (child := os.fork()) == 0:  # before: allowed
            store.begin(**begin).commit("answered", 0.0, WorkingMemory())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(store.episodes()) == 1
        if (child := os.fork()) == 0:
            for attempt in (store, MemoryStore(sys.argv[1])):
                try:
                    attempt.begin(**begin).commit("answered", 0.0, WorkingMemory())
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


def commit_many(folder: Path, seeds: range, barrier: Any) -> None:
    """In a process of its own; all start to make the tables at the same moment."""
    store = MemoryStore(folder)
    players = [Player(begin(store, seed), seed) for seed in seeds]
    for player in players:
        player.play(4)
    barrier.wait(60)
    for player in players:
        player.recorder.commit("answered", 1.0, player.memory)
        if player.recorder.episode_id[0] in "01":  # now and then, while the others write
            store.optimize()
    store.close()


def test_processes_that_begin_at_the_same_time_lose_and_double_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [
        context.Process(target=commit_many, args=(tmp_path, range(n * 20, n * 20 + 20), barrier)) for n in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    store = MemoryStore(tmp_path)
    records = store.episodes()
    assert sorted(record.index for record in records) == list(range(40))
    turns = [(row["episode_id"], row["step"]) for row in plain_rows(tmp_path, "turns")]
    assert len(turns) == len(set(turns)) == 160
    expected: dict[int, Player] = {}
    for seed in range(40):
        expected[seed] = Player(begin(MemoryStore(tmp_path, "off"), seed), seed)
        expected[seed].play(4)
    total = 0
    for record in records:
        live = expected[record.index]
        total += len(live.memory)
        assert store.memory_at(record.episode_id, 4).entries() == live.memory.entries()
    assert len(plain_rows(tmp_path, "entries")) == total
