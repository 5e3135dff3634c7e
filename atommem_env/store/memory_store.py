"""The durable store: what episodes did and stored, in a LanceDB folder that many episodes and processes share.

Four tables, each with the schema version in its metadata and readable by any LanceDB client:

| table      | a row is                                                                           |
|------------|------------------------------------------------------------------------------------|
| `episodes` | an episode: with durability "step" from its first reply on, else from its end      |
| `turns`    | a reply and what the policy was shown after it                                     |
| `journal`  | a change to the memory, or a query, with its vector                                |
| `entries`  | an entry that was in the memory at the end, with its vector                        |

Rows are appended under the id of a `writer`, and count only if the episode's row in `episodes` lists it. Of several writers
with a turn for a step the last one counts; journal rows of other writers for that step are ignored. The order of writing,
`journal` and `entries`, then `turns`, then `episodes`, makes every crash leave whole steps and whole episodes. A writer's id
is used until an error, or until the episode ends or is resumed; then a new writer takes over.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from atommem_env.errors import SettingError, StoreError
from atommem_env.memory import WorkingMemory, unit
from atommem_env.paths import remove_with, temporary_folder
from atommem_env.store.checks import check_tables
from atommem_env.store.connection import StoreTables, forked_after_lancedb
from atommem_env.store.failures import RESTORE, convert_errors, ignore_conflicts
from atommem_env.store.folder_lock import FolderLock
from atommem_env.store.recorder import INTERRUPTED, Commit, EpisodeRecord, Recorder, batches_of, dimensions_of
from atommem_env.store.tables import (
    SCHEMA_VERSION,
    TABLES,
    reader_of,
    replace_surrogates,
    schema_of,
)
from atommem_env.types import EmbeddingKind, OperationKind, Vector

DURABILITIES = ("off", "episode", "step")
_OPTIMIZE_EVERY = 64  # commits, each of which leaves a few small files a table
_MOST_PARTS = 1000  # of a table, whatever it costs to compact them: each commit writes a list of all
_ATTEMPTS = 3  # at compacting a table of which no other process has a part
_MOST_FILES = 10  # of a table when the store is closed
_AT_ONCE = timedelta(milliseconds=1)  # LanceDB warns about anything shorter
_NEVER = timedelta(days=36_500)
_CLOCK_TOLERANCE = timedelta(days=1)  # LanceDB deletes files of nobody that are older than 7 days


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One result of a search over many episodes."""

    episode_id: str
    entry_id: str
    text: str
    score: float  # cosine similarity, in [-1, 1]


class MemoryStore:
    """A folder with the memories of many episodes. Nothing is opened, or created, before the first commit or read.

    A `write` that has returned survives a kill of the process at any moment; `checkpoint` makes it survive a loss of power as
    well. Several processes can write to one folder at the same time, each with its own store (a store can be pickled). A
    process that was forked after LanceDB was used cannot use it: start processes with `spawn`. A store compacts its small
    files now and then, and when it is closed; another program that holds a table open across that must open it again. Copy the
    folder when no process writes to it: whether a copy made meanwhile is complete, `check` says, and what reads an episode.

    Args:
        folder: where the tables are.
        durability: "episode": an episode is committed when it ends; "step": each reply is; "off": nothing is.

    Raises:
        SettingError: another durability.
    """

    @classmethod
    def temporary(cls, durability: str = "episode") -> MemoryStore:
        """A store in a temporary folder that is removed by `close`, with the store itself, or with the process."""
        store = cls(temporary_folder("memory"), durability)
        store._remove_later()
        return store

    def __init__(self, folder: str | Path, durability: str = "episode") -> None:
        if durability not in DURABILITIES:
            raise SettingError(f"durability must be one of {', '.join(DURABILITIES)}, got {durability!r}.")
        self.folder = Path(folder).expanduser()
        self.durability = durability
        self._folder_lock = FolderLock(self.folder)
        self._lock = threading.RLock()  # of writing and compaction
        self._tables = StoreTables(self._folder_lock)
        self._commits = 0
        self._remove: Callable[[], object] | None = None  # of a temporary store

    def _remove_later(self) -> None:
        self._remove = remove_with(self, self.folder)

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[Path, str]]:
        return type(self), (self.folder, self.durability)

    # ---------------------------------------------------------------------------------------------------------- writing

    def expect_dimension(self, dimension: int) -> None:
        """Checks now, rather than at the first commit, that vectors [`dimension`] can be stored here.

        Raises:
            StoreError: the folder holds vectors of another dimension, or cannot be read.
        """
        if self.durability != "off":
            self._agreed_dimension({dimension})

    def begin(
        self,
        *,
        env_id: str,
        task_id: str,
        index: int,
        task_seed: int,
        episode_seed: int,
        settings: dict[str, object],
    ) -> Recorder:
        """The recorder of a new episode, with an id that no other has.

        Raises:
            StoreError: a number is not one of 64 bits.
            TypeError: `settings` cannot be written as JSON.
        """
        for name, value in (("index", index), ("task_seed", task_seed), ("episode_seed", episode_seed)):
            if not -(2**63) <= value < 2**63:
                raise StoreError(f"{name} must be a whole number of 64 bits to be stored, got {value}.")
        record = EpisodeRecord(
            episode_id=uuid.uuid4().hex,
            env_id=replace_surrogates(env_id),
            task_id=replace_surrogates(task_id),
            index=int(index),
            task_seed=int(task_seed),
            episode_seed=int(episode_seed),
            settings=json.loads(json.dumps(settings)),
            status=INTERRUPTED,
            reward=0.0,
            steps=0,
            writers=(),
            schema_version=SCHEMA_VERSION,
            committed_at=datetime.now(UTC),
        )
        return Recorder(self.durability, record)

    def resume(self, episode_id: str) -> Recorder:
        """The recorder that continues an interrupted episode; its first reply is number `steps` + 1.

        Raises:
            StoreError: no such episode, it is incomplete, or it is over.
        """
        record = self._complete(episode_id)
        if record.status != INTERRUPTED:
            raise StoreError(f"Episode {episode_id} is over ({record.status}); only an interrupted one can be resumed.")
        return Recorder(self.durability, record, changes=len(self._changes(record)), replaced=record.writers)

    def write(self, recorders: Iterable[Recorder]) -> None:
        """Commits, as one group, what these recorders have due (`Recorder.due`). Returns when it is durable.

        A crash leaves of each episode what was there before or some whole steps more. After an error everything stays
        buffered, and the call can be repeated.

        Raises:
            StoreError: vectors of another dimension than the folder's, or it cannot be written.
        """
        with self._lock:
            due = [recorder for recorder in recorders if recorder.due]
            if not due:
                return
            commits = [recorder.next_commit() for recorder in due]
            try:
                self._write(commits)
            except BaseException:
                for recorder in due:
                    recorder.mark_failed()
                raise
            for recorder, commit in zip(due, commits, strict=True):
                recorder.mark_committed(commit)
            self._commits += 1
            if self._commits % _OPTIMIZE_EVERY == 0:
                with self._folder_lock.acquire_exclusive() as exclusive:
                    for table in self._tables.opened():
                        if self._needs_compaction(table):
                            self._optimize(table, exclusive)
                self._tables.close()  # an open connection holds some memory of each commit

    def checkpoint(self) -> None:
        """Returns when all that was written is on the disk and survives a loss of power, which LanceDB does not ensure.

        Raises:
            StoreError: the disk failed.
        """
        with self._lock, self._convert_errors("write"):
            self._folder_lock.sync()

    def optimize(self) -> None:
        """Compacts the small files that commits leave, and removes what only older versions of the tables need.

        While another process uses the folder nothing is removed: a commit adds a few kilobytes a table, and compaction copies
        each row a few times in all. The last process that closes its store, or `optimize` in one that is alone, removes them.
        Nothing is removed where the system has no file locks, and nothing compacted by a process whose clock is off by more
        than a day.

        Raises:
            StoreError: the folder cannot be written.
        """
        tables = [table for name in TABLES if (table := self._tables.get(name)) is not None]
        with self._lock, self._folder_lock.acquire_exclusive() as exclusive:
            for table in tables:
                self._optimize(table, exclusive)

    def close(self) -> None:
        """Compacts tables that this store wrote to and that have many files, and closes the folder; a later call reopens it.

        A temporary folder is removed.
        """
        with self._lock:
            if self._remove is None and not forked_after_lancedb():
                with self._folder_lock.acquire_exclusive(leaving=True) as exclusive:
                    for name in TABLES if self._commits else ():
                        table = self._tables.get(name)
                        if table is None:
                            continue
                        for _ in range(
                            _ATTEMPTS if exclusive else 1
                        ):  # a conflict with LanceDB's own threads is no error
                            if self._count_files(name) > _MOST_FILES if exclusive else self._needs_compaction(table):
                                self._optimize(table, exclusive)
            self._tables.close()
            self._commits = 0
            if self._remove is not None:
                self._remove()
                self._remove_later()  # in case a later call creates it again

    def _count_files(self, name: str) -> int:
        return sum(path.is_file() for path in (self.folder / f"{name}.lance").rglob("*"))

    def _needs_compaction(self, table: Any) -> bool:
        """Whether compacting a table's files is worth rewriting it.

        It is when the table has grown by half since the last time, judged by its largest file. After a fixed number of
        commits instead, the time would grow with the square of the episodes.
        """
        with self._convert_errors("read", table.name):
            stats = table.stats()
        parts, largest = stats["fragment_stats"]["num_fragments"], stats["fragment_stats"]["lengths"]["max"]
        return parts > 1 and (stats["num_rows"] - largest >= largest / 2 or parts > _MOST_PARTS)

    def _optimize(self, table: Any, exclusive: bool) -> None:
        """Compacts a table; deletes older versions where `exclusive`: no other process uses the folder.

        Of files that no version lists, LanceDB deletes those older than 7 days, by this process's clock; younger ones are
        left, because a client of LanceDB without our lock may be about to commit them. With a clock that differs from
        the file system's every new file could seem that old: then nothing is compacted.
        """
        with self._convert_errors("optimize", table.name), ignore_conflicts():
            if abs(self._folder_lock.clock_difference()) <= _CLOCK_TOLERANCE.total_seconds():
                table.optimize(cleanup_older_than=_AT_ONCE if exclusive else _NEVER, delete_unverified=False)

    def _write(self, commits: list[Commit]) -> None:
        """Appends the rows of a group, in an order that leaves whole steps, then removes what they replace."""
        for name in TABLES:  # a table of another version raises before any is created
            self._tables.get(name)
        dimension = self._agreed_dimension(dimensions_of(commits))
        with self._convert_errors("write"):
            self._folder_lock.acquire_shared(make=True)
            # In this order a table that is missing beside a later one was lost. Tables with vectors are created even without
            # rows, so that the folder has a dimension.
            needed = reversed(TABLES if dimension else ("turns", "episodes"))
            tables = {name: self._tables.ensure(name, dimension) for name in needed}
            for names in (("journal", "entries"), ("turns",), ("episodes",)):
                pending = []
                for name in names:
                    batches = batches_of(name, commits, dimension)
                    first = next(batches, None)
                    if first is not None:
                        columns = tables[name].schema.names  # fewer than ours in a folder of an earlier version
                        pending.append((tables[name], reader_of(first, batches, columns)))
                if len(pending) > 1:
                    with ThreadPoolExecutor(len(pending)) as threads:
                        list(threads.map(lambda pair: pair[0].add(pair[1]), pending))
                elif pending:
                    pending[0][0].add(pending[0][1])
            if replaced := [writer for commit in commits if commit.row for writer in commit.replaced]:
                for name in ("episodes", "entries"):
                    if (table := self._tables.get(name)) is not None:
                        with ignore_conflicts():
                            table.delete(_writer_in(replaced))

    def _agreed_dimension(self, dimensions: set[int]) -> int | None:
        """The one dimension D of vectors of these lengths and of those in the folder; None where there are none yet."""
        table = self._tables.get("journal")
        stored = None if table is None else table.schema.field("vector").type.list_size
        expected = stored or min(dimensions, default=None)
        if others := sorted(dimensions - {expected}):
            raise StoreError(
                f"The memory store in {self.folder} holds {expected}-dimensional vectors, got {others[0]}. "
                "Use the embedder that it was made with, or another folder."
            )
        return expected

    # ---------------------------------------------------------------------------------------------------------- reading

    def episodes(self) -> list[EpisodeRecord]:
        """All episodes, in the order in which they were committed; `check` says whether all their rows are there."""
        return self._records()

    def check(self) -> int:
        """Checks that all rows of all episodes are there, which those of a copy made while a process wrote may not be.

        Returns:
            How many more episodes have replies and no row in `episodes`, because a process was killed or is writing.

        Raises:
            StoreError: an episode is incomplete; the message names it and the table.
        """
        records = self._records()
        self._check(records)
        stored = self._read("turns", None, ["episode_id"]).column("episode_id").unique().to_pylist()
        return len({*stored} - {record.episode_id for record in records})

    def episode(self, episode_id: str) -> EpisodeRecord:
        """One episode.

        Raises:
            StoreError: no such episode.
        """
        records = self._records(f"episode_id = {_quote(episode_id)}")
        if not records:
            raise StoreError(
                f"No episode {episode_id!r} in the memory store in {self.folder}; `episodes()` lists them."
            )
        return records[0]

    def replies(self, episode_id: str) -> list[str]:
        """An episode's replies, exactly as given.

        Raises:
            StoreError: no such episode, or it is incomplete.
        """
        return [
            row["reply"] if row["reply_raw"] is None else row["reply_raw"].decode("utf-8", "surrogatepass")
            for row in self._turns(self._complete(episode_id), ["reply", "reply_raw"])
        ]

    def turns(self, episode_id: str) -> list[dict[str, Any]]:
        """An episode's turns, lone surrogates replaced: step, reply, and the notice, query and scratchpad after it.

        Raises:
            StoreError: no such episode, or it is incomplete.
        """
        names = ["step", "reply", "notice", "query", "scratchpad"]
        return [{name: row[name] for name in names} for row in self._turns(self._complete(episode_id), names)]

    def changes(self, episode_id: str) -> list[dict[str, Any]]:
        """An episode's journal, in order: seq, step, operation, entry_id, text, vector ([D], or None for a Delete).

        Raises:
            StoreError: no such episode, or it is incomplete.
        """
        names = ["seq", "step", "operation", "entry_id", "text", "vector"]
        return [{name: row[name] for name in names} for row in self._changes(self._complete(episode_id))]

    def vectors(self, episode_id: str) -> dict[tuple[EmbeddingKind, str], Vector]:
        """The unit vectors [D] of all texts that an episode stored or searched for, to replay it without an embedder.

        Raises:
            StoreError: no such episode, or it is incomplete.
        """
        return {
            ("query" if row["operation"] == OperationKind.READ else "document", row["text"]): row["vector"]
            for row in self._changes(self._complete(episode_id))
            if row["vector"] is not None
        }

    def memory_at(self, episode_id: str, step: int) -> WorkingMemory:
        """An episode's memory, without its capacity, after `step` replies; 0: empty.

        Raises:
            StoreError: no such episode, it has fewer replies, or it is incomplete.
        """
        record = self._complete(episode_id)
        if not 0 <= step <= record.steps:
            raise StoreError(
                f"Episode {episode_id} has {record.steps} replies; step must be from 0 to {record.steps}, got {step}."
            )
        memory = WorkingMemory()
        for row in self._changes(record):
            if row["step"] > step:
                break
            kind, entry_id = row["operation"], row["entry_id"]
            if kind == OperationKind.READ:
                continue
            if kind == OperationKind.CREATE:
                fits = memory.create(row["text"], row["vector"]) == entry_id
            elif fits := entry_id in memory:
                if kind == OperationKind.UPDATE:
                    memory.update(entry_id, row["text"], row["vector"])
                else:
                    memory.delete(entry_id)
            if not fits:
                raise StoreError(
                    f"The journal of episode {episode_id} in {self.folder} is damaged: {kind} of {entry_id} does not fit. "
                    + RESTORE
                )
        if step == record.steps and record.status != INTERRUPTED:
            rows = self._rows("entries", _writer_in(record.writers[-1:]), ["entry_id", "text"])
            if {row["entry_id"]: row["text"] for row in rows} != {entry.id: entry.text for entry in memory.entries()}:
                raise StoreError(
                    f"The tables 'entries' and 'journal' in {self.folder} are damaged: the entries at the end of episode "
                    f"{episode_id} are not those that its changes lead to. {RESTORE}"
                )
        return memory

    def search(self, query_vector: ArrayLike, k: int, episode_id: str | None = None) -> list[SearchResult]:
        """The `k` stored entries nearest to `query_vector` [D] by cosine similarity, best first, of one episode or of all.

        Raises:
            EmbeddingError: the vector is zero or not finite.
            StoreError: no such episode, it is incomplete, or the vector has another dimension than those in the folder.
        """
        query = unit(query_vector)
        where = None if episode_id is None else _writer_in(self._complete(episode_id).writers[-1:])
        if (table := self._tables.get("entries")) is None:
            return []
        self._agreed_dimension({len(query)})
        limit, rows = k, []
        while True:
            with self._convert_errors("search", "entries"):
                builder = table.search(query, vector_column_name="vector").distance_type("cosine").limit(limit)
                matches = (builder if where is None else builder.where(where, prefilter=True)).to_list()
            rows = matches
            if where is None and matches:  # rows left by a crash have a writer that no episode lists last
                names = ", ".join(sorted({_quote(row["episode_id"]) for row in matches}))
                last = {record.writers[-1] for record in self._records(f"episode_id IN ({names})")}
                rows = [row for row in matches if row["writer"] in last]
            if len(rows) >= k or len(matches) < limit:
                break
            limit *= 2
        return [SearchResult(row["episode_id"], row["entry_id"], row["text"], 1 - row["_distance"]) for row in rows[:k]]

    def _complete(self, episode_id: str) -> EpisodeRecord:
        """One episode, all of whose rows are there."""
        record = self.episode(episode_id)
        self._check([record], _writer_in(record.writers))
        return record

    def _check(self, records: Sequence[EpisodeRecord], where: str | None = None) -> None:
        turns = self._tables.get("turns")
        counted = turns is not None and "changes" in turns.schema.names

        def read(name: str, columns: Sequence[str]) -> Any:
            return self._read(name, where, columns)

        check_tables(self.folder, records, read, counted=counted)

    def _records(self, where: str | None = None) -> list[EpisodeRecord]:
        latest: dict[str, EpisodeRecord] = {}
        for row in self._rows("episodes", where, list(EpisodeRecord.__dataclass_fields__)):
            with self._convert_errors("read", "episodes"):
                settings = json.loads(row["settings"])
            record = EpisodeRecord(**row | {"settings": settings, "writers": tuple(row["writers"])})
            # A crash can leave an episode's old row next to the new one.
            rival = latest.get(record.episode_id)
            if rival is None or (len(rival.writers), rival.committed_at) < (len(record.writers), record.committed_at):
                latest[record.episode_id] = record
        unfinished = [record for record in latest.values() if record.status == INTERRUPTED]
        if unfinished:  # with durability "step" there are later replies than the row counts
            steps: dict[str, set[int]] = {record.episode_id: set() for record in unfinished}
            writers = [writer for record in unfinished for writer in record.writers]
            for row in self._rows("turns", _writer_in(writers), ["episode_id", "step"]):
                steps[row["episode_id"]].add(row["step"])
            latest |= {record.episode_id: replace(record, steps=len(steps[record.episode_id])) for record in unfinished}
        return sorted(latest.values(), key=lambda record: (record.committed_at, record.episode_id))

    def _turns(self, record: EpisodeRecord, columns: list[str]) -> list[dict[str, Any]]:
        """The turn of each step, in order."""
        order = {writer: index for index, writer in enumerate(record.writers)}
        rows = self._rows("turns", _writer_in(record.writers), list({*columns, "step", "writer"}))
        rows.sort(key=lambda row: (row["step"], order[row["writer"]]))
        return list({row["step"]: row for row in rows}.values())

    def _changes(self, record: EpisodeRecord) -> list[dict[str, Any]]:
        """The journal of an episode, in order."""
        writer_of = {row["step"]: row["writer"] for row in self._turns(record, [])}
        columns = ["seq", "step", "operation", "entry_id", "text", "vector", "writer"]
        rows = self._rows("journal", _writer_in(record.writers), columns)
        return sorted((row for row in rows if writer_of.get(row["step"]) == row["writer"]), key=lambda row: row["seq"])

    def _rows(self, name: str, where: str | None, columns: list[str]) -> list[dict[str, Any]]:
        """Rows as dictionaries, "vector" as float32 array [D] or None; none where the table does not exist."""
        matches = self._read(name, where, columns)
        rows: list[dict[str, Any]] = matches.select([column for column in columns if column != "vector"]).to_pylist()
        if "vector" in columns:
            for row, vector in zip(rows, matches.column("vector"), strict=True):
                row["vector"] = vector.values.to_numpy() if vector.is_valid else None
        return rows

    def _read(self, name: str, where: str | None, columns: Sequence[str]) -> Any:
        """Columns of a table's rows as an Arrow table; no rows where the table does not exist."""
        if (table := self._tables.get(name)) is None:
            return schema_of(name, None).empty_table().select(columns)
        with self._convert_errors("read", name):
            query = table.search().select(list(columns))
            return (query if where is None else query.where(where)).to_arrow()

    def _convert_errors(self, action: str, table: str = "") -> AbstractContextManager[None]:
        return convert_errors(self.folder, action, table)


def _quote(text: str) -> str:
    """`text` as a string literal of LanceDB's filter language."""
    return "'" + text.replace("'", "''") + "'"


def _writer_in(writers: Sequence[str]) -> str:
    return f"writer IN ({', '.join(map(_quote, writers))})"
