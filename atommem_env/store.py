"""The durable memory: what episodes did and kept, in a LanceDB folder that many episodes and processes share.

Four tables, each with the schema version in its metadata and readable by any LanceDB client:

| table      | a row is                                                   |
|------------|------------------------------------------------------------|
| `episodes` | an episode that was committed                              |
| `turns`    | a reply and what the policy was told after it              |
| `journal`  | a change to the memory, or a query, with its vector        |
| `entries`  | an entry that was in the memory at the end, with its vector |

Rows are appended under the name of their `writer` (one commit of one episode) and count from the moment when the
`episodes` row that lists this writer is there. It is written last, so that a crash leaves what was before.
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from atommem_env.errors import MissingDependency, SettingError, StoreError
from atommem_env.memory import WorkingMemory, unit
from atommem_env.store_tables import SCHEMA_VERSION, TABLES, VERSION_KEY, batch_of, schema_of
from atommem_env.types import EmbeddingKind, OperationKind, StepResult, StopReason, Vector

INTERRUPTED = "interrupted"  # the status of an episode that ended before it was over

_DURABILITIES = ("off", "episode")
_OPTIMIZE_EVERY = 64  # commits, each of which leaves a few small files a table
_KEEP_VERSIONS = timedelta(hours=1)  # another process may still be reading an older version
_CACHE_BYTES = 16 << 20  # without a limit LanceDB's caches grow with every commit
_SURROGATES = re.compile(r"[\ud800-\udfff]")

_forked_after_lancedb = False


def _note_fork() -> None:
    global _forked_after_lancedb
    _forked_after_lancedb = _forked_after_lancedb or "lancedb" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """A row of `episodes`."""

    episode_id: str
    env_id: str
    task_id: str
    index: int
    task_seed: int
    episode_seed: int
    settings: dict[str, object]  # as JSON gives them back: tuples are lists
    status: str  # a StopReason, or "interrupted"
    reward: float
    steps: int  # replies
    writers: tuple[str, ...]  # whose rows in the other tables count: one, and one more each time it was resumed
    schema_version: int
    committed_at: datetime  # UTC


@dataclass(frozen=True, slots=True)
class FoundEntry:
    """What a search over many episodes finds."""

    episode_id: str
    entry_id: str
    text: str
    score: float  # cosine similarity, in [-1, 1]


class MemoryStore:
    """A folder with the memories of many episodes. Nothing is opened, or made, before the first commit or read.

    Several processes can commit to one folder at the same time; each needs a store of its own (a store can be pickled).
    A process that was forked after LanceDB was used cannot use it: start processes with `spawn`.

    Args:
        folder: where the tables are.
        durability: "episode": an episode is kept when it ends; "off": nothing is kept.

    Raises:
        SettingError: another durability.
    """

    def __init__(self, folder: str | Path, durability: str = "episode") -> None:
        if durability not in _DURABILITIES:
            raise SettingError(f"durability must be one of {', '.join(_DURABILITIES)}, got {durability!r}.")
        self.folder = Path(folder).expanduser()
        self.durability = durability
        self._connection: Any = None
        self._tables: dict[str, Any] = {}
        self._commits = 0

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[Path, str]]:
        return type(self), (self.folder, self.durability)

    # ---------------------------------------------------------------------------------------------------------- writing

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
            env_id=_clean(env_id),
            task_id=_clean(task_id),
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
        return Recorder(self, record)

    def resume(self, episode_id: str) -> Recorder:
        """The recorder that continues an interrupted episode; its first reply is number `steps` + 1.

        Raises:
            StoreError: no such episode, or it is over.
        """
        record = self.episode(episode_id)
        if record.status != INTERRUPTED:
            raise StoreError(f"Episode {episode_id} is over ({record.status}); only an interrupted one can be resumed.")
        return Recorder(self, record, changes=len(self._rows_of(record, "journal", ["seq"])))

    def optimize(self) -> None:
        """Joins the small files that commits leave, and removes versions of tables that are over an hour old.

        Raises:
            StoreError: the folder cannot be written.
        """
        for name in TABLES:
            if (table := self._table(name)) is not None:
                self._optimize(table)

    def close(self) -> None:
        """Optimizes the tables if it wrote any, where worth it, and lets go of the folder; a later call opens it again."""
        if self._commits:
            self._optimize_where_due()
        self._connection, self._tables, self._commits = None, {}, 0

    def _optimize_where_due(self) -> None:
        """Optimizes the tables that have grown by half since they were, as their largest file tells.

        Every time LanceDB writes the whole table anew and the old files stay for an hour. Were it done after a fixed number
        of commits, time and disk would grow with the square of the episodes.
        """
        for table in self._tables.values():
            with self._reporting("read"):
                stats = table.stats()
            largest = stats["fragment_stats"]["lengths"]["max"]
            if stats["num_rows"] - largest >= largest / 2:
                self._optimize(table)

    def _optimize(self, table: Any) -> None:
        with self._reporting("optimize"):
            try:
                table.optimize(cleanup_older_than=_KEEP_VERSIONS)
            except RuntimeError as error:
                # Another process joined the same files, or deleted from them: no row is at stake, and the next call
                # finishes what this one left.
                if "commit conflict" not in str(error):
                    raise

    def _commit(
        self,
        record: EpisodeRecord,
        turns: list[dict[str, object]],
        journal: list[dict[str, object]],
        journal_vectors: list[Vector | None],
        memory: WorkingMemory,
        replaced: tuple[str, ...],
    ) -> None:
        """Appends an episode's rows, its `episodes` row last, then removes what writers `replaced` said of its end."""
        entries: list[dict[str, object]] = [
            {"entry_id": entry.id, "text": _clean(entry.text)} for entry in memory.entries()
        ]
        vectors = [vector for vector in (*journal_vectors, *memory.vectors()) if vector is not None]
        for name in TABLES:  # one of another version is found before any is made
            self._table(name)
        dimension = self._agreed_dimension(vectors)
        episode = {name: getattr(record, name) for name in EpisodeRecord.__dataclass_fields__}
        episode |= {"settings": json.dumps(record.settings), "writers": list(record.writers)}
        parts: list[tuple[str, list[dict[str, object]], Sequence[Vector | None] | None]] = [
            ("turns", turns, None),
            ("journal", journal, journal_vectors),
            ("entries", entries, memory.vectors()),  # type: ignore[list-item]  # rows of [n, D]
            ("episodes", [episode], None),
        ]
        own = {"episode_id": record.episode_id, "writer": record.writers[-1]}
        with self._reporting("write"):
            # All is built before anything is written, so that a row that cannot be stored leaves the folder alone.
            batches = [
                (self._made_table(name, dimension), batch_of(name, [own | row for row in rows], column, dimension))
                for name, rows, column in parts
                if rows or (dimension and column is not None)  # an empty table rather than none
            ]
            for table, batch in batches:
                if len(batch):
                    table.add(batch)
            if replaced:
                old = f"episode_id = {_quoted(record.episode_id)} AND {_writer_in(replaced)}"
                for name in ("episodes", "entries"):
                    if (table := self._table(name)) is not None:
                        table.delete(old)
        self._commits += 1
        if self._commits % _OPTIMIZE_EVERY == 0:
            self._optimize_where_due()

    def _agreed_dimension(self, vectors: list[Vector]) -> int | None:
        """D of `vectors` and of those in the folder; None where there are none yet."""
        table = self._table("journal")
        kept = None if table is None else table.schema.field("vector").type.list_size
        for vector in vectors:
            kept = kept or len(vector)
            if len(vector) != kept:
                raise StoreError(
                    f"The memory store in {self.folder} holds {kept}-dimensional vectors, got {len(vector)}. "
                    "Use the embedder that it was made with, or another folder."
                )
        return kept

    # ---------------------------------------------------------------------------------------------------------- reading

    def episodes(self) -> list[EpisodeRecord]:
        """All episodes, in the order in which they were committed."""
        return self._records()

    def episode(self, episode_id: str) -> EpisodeRecord:
        """One episode.

        Raises:
            StoreError: it is not there.
        """
        records = self._records(f"episode_id = {_quoted(episode_id)}")
        if not records:
            raise StoreError(
                f"No episode {episode_id!r} in the memory store in {self.folder}; `episodes()` lists them."
            )
        return records[0]

    def replies(self, episode_id: str) -> list[str]:
        """An episode's replies, exactly as they were given.

        Raises:
            StoreError: no such episode.
        """
        rows = self._rows_of(self.episode(episode_id), "turns", ["step", "reply", "reply_raw"])
        rows.sort(key=lambda row: row["step"])
        return [
            row["reply"] if row["reply_raw"] is None else row["reply_raw"].decode("utf-8", "surrogatepass")
            for row in rows
        ]

    def vectors(self, episode_id: str) -> dict[tuple[EmbeddingKind, str], Vector]:
        """The unit vectors [D] of all texts that an episode stored or searched for, to replay it without an embedder.

        Raises:
            StoreError: no such episode.
        """
        return {
            ("query" if row["operation"] == OperationKind.READ else "document", row["text"]): row["vector"]
            for row in self._changes(self.episode(episode_id))
            if row["vector"] is not None
        }

    def memory_at(self, episode_id: str, step: int) -> WorkingMemory:
        """An episode's memory, without its capacity, as it was after `step` replies; 0: empty.

        Raises:
            StoreError: no such episode, or it has fewer replies.
        """
        record = self.episode(episode_id)
        if not 0 <= step <= record.steps:
            raise StoreError(
                f"Episode {episode_id} has {record.steps} replies; step must be from 0 to that, got {step}."
            )
        memory = WorkingMemory()
        for row in self._changes(record):
            if row["step"] > step:
                break
            if row["operation"] == OperationKind.CREATE:
                created = memory.create(row["text"], row["vector"])
                if created != row["entry_id"]:
                    raise StoreError(
                        f"The journal of episode {episode_id} is damaged: {created} expected, {row['entry_id']} found."
                    )
            elif row["operation"] == OperationKind.UPDATE:
                memory.update(row["entry_id"], row["text"], row["vector"])
            elif row["operation"] == OperationKind.DELETE:
                memory.delete(row["entry_id"])
        return memory

    def search(self, query_vector: ArrayLike, k: int, episode_id: str | None = None) -> list[FoundEntry]:
        """The `k` kept entries nearest to `query_vector` [D] by cosine, best first, of one episode or of all.

        Raises:
            EmbeddingError: the vector is zero or not finite.
            StoreError: no such episode, or the vector has another dimension than those in the folder.
        """
        query = unit(query_vector)
        where = None
        if episode_id is not None:
            record = self.episode(episode_id)
            where = f"episode_id = {_quoted(episode_id)} AND {_writer_in(record.writers[-1:])}"
        if (table := self._table("entries")) is None:
            return []
        self._agreed_dimension([query])
        with self._reporting("search"):
            builder = table.search(query, vector_column_name="vector").distance_type("cosine").limit(k)
            rows = (builder if where is None else builder.where(where)).to_list()
        return [FoundEntry(row["episode_id"], row["entry_id"], row["text"], 1 - row["_distance"]) for row in rows]

    def _records(self, where: str | None = None) -> list[EpisodeRecord]:
        latest: dict[str, EpisodeRecord] = {}
        for row in self._rows("episodes", where, list(EpisodeRecord.__dataclass_fields__)):
            record = EpisodeRecord(**row | {"settings": json.loads(row["settings"]), "writers": tuple(row["writers"])})
            # A crash while a resumed episode was committed can leave its old row beside the new one.
            rival = latest.get(record.episode_id)
            if rival is None or (len(rival.writers), rival.committed_at) < (len(record.writers), record.committed_at):
                latest[record.episode_id] = record
        return sorted(latest.values(), key=lambda record: (record.committed_at, record.episode_id))

    def _changes(self, record: EpisodeRecord) -> list[dict[str, Any]]:
        """The journal of an episode, in order."""
        rows = self._rows_of(record, "journal", ["seq", "step", "operation", "entry_id", "text", "vector"])
        return sorted(rows, key=lambda row: row["seq"])

    def _rows_of(self, record: EpisodeRecord, name: str, columns: list[str]) -> list[dict[str, Any]]:
        """What an episode's writers wrote; rows that a crash left behind have other writers."""
        where = f"episode_id = {_quoted(record.episode_id)} AND {_writer_in(record.writers)}"
        return self._rows(name, where, columns)

    def _rows(self, name: str, where: str | None, columns: list[str]) -> list[dict[str, Any]]:
        """Rows as dictionaries, "vector" as float32 array [D] or None; none where the table does not exist."""
        if (table := self._table(name)) is None:
            return []
        with self._reporting("read"):
            query = table.search().select(columns)
            found = (query if where is None else query.where(where)).to_arrow()
        rows: list[dict[str, Any]] = found.select([column for column in columns if column != "vector"]).to_pylist()
        if "vector" in columns:
            for row, vector in zip(rows, found.column("vector"), strict=True):
                row["vector"] = vector.values.to_numpy() if vector.is_valid else None
        return rows

    # ---------------------------------------------------------------------------------------------------------- opening

    def _table(self, name: str) -> Any:
        """A table, or None where there is none; makes neither table nor folder."""
        if _forked_after_lancedb:
            raise StoreError(
                "This process was forked from one that had loaded LanceDB, which hangs or crashes in such a child. "
                "Start processes with multiprocessing.get_context('spawn'), or use threads."
            )
        if name not in self._tables:
            if self._connection is None and not self.folder.exists():
                return None
            with self._reporting("open"):
                try:
                    table = self._connect().open_table(name)
                except ValueError as error:
                    if "not found" not in str(error):
                        raise
                    return None
                self._check_version(name, table.schema.metadata)
            self._tables[name] = table
        return self._tables[name]

    def _made_table(self, name: str, dimension: int | None) -> Any:
        """A table, made where there is none."""
        if (table := self._table(name)) is None:
            try:
                self._connect().create_table(name, schema=schema_of(name, dimension))
            except ValueError as error:
                if "already exists" not in str(error):  # another process was faster
                    raise
            table = self._table(name)
        return table

    def _connect(self) -> Any:
        if self._connection is None:
            try:
                import lancedb
            except ImportError as error:
                raise MissingDependency(
                    "A memory store needs the package lancedb: pip install lancedb, or set durability='off'."
                ) from error
            self._connection = lancedb.connect(
                self.folder,
                read_consistency_interval=timedelta(0),  # else what other processes commit is not seen
                session=lancedb.Session(
                    index_cache_size_bytes=_CACHE_BYTES,
                    metadata_cache_size_bytes=_CACHE_BYTES,
                ),
            )
        return self._connection

    def _check_version(self, name: str, metadata: dict[bytes, bytes] | None) -> None:
        version = (metadata or {}).get(VERSION_KEY)
        if version is None:
            raise StoreError(f"The table {name!r} in {self.folder} is not one of AtomMem's; choose another folder.")
        if int(version) > SCHEMA_VERSION:
            raise StoreError(
                f"The table {name!r} in {self.folder} has schema version {int(version)}, and this AtomMem reads up to "
                f"{SCHEMA_VERSION}. Upgrade atommem, or choose another folder."
            )

    @contextmanager
    def _reporting(self, doing: str) -> Iterator[None]:
        """Turns what LanceDB raises into a StoreError."""
        try:
            yield
        except StoreError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError(
                f"Cannot {doing} the memory store in {self.folder}: {error}. "
                "Name a folder that this user can write, or set durability='off'."
            ) from error


class Recorder:
    """Keeps what happens in one episode until it is committed; made by `MemoryStore.begin` and `resume`."""

    def __init__(self, store: MemoryStore, record: EpisodeRecord, changes: int = 0) -> None:
        self.episode_id = record.episode_id
        self._store = store
        self._before = record
        self._steps = record.steps
        self._changes = changes  # journal rows so far
        self._turns: list[dict[str, object]] = []
        self._journal: list[dict[str, object]] = []
        self._vectors: list[Vector | None] = []  # of the journal's rows
        self._committed = False

    def record(self, step: int, reply: str, result: StepResult) -> None:
        """Notes reply number `step`, counted from 1, and what it led to; nothing is written yet.

        Raises:
            StoreError: not the next reply, or the episode was committed.
        """
        self._check_open()
        if step != self._steps + 1:
            raise StoreError(f"Reply {self._steps + 1} of episode {self.episode_id} comes next, got number {step}.")
        self._steps = step
        if self._store.durability == "off":
            return
        readable = _clean(reply)
        self._turns.append(
            {
                "step": step,
                "reply": readable,
                "reply_raw": None if readable == reply else reply.encode("utf-8", "surrogatepass"),
                "notice": _clean(result.observation["notice"]),
                "query": _clean(result.observation["query"]),
                "scratchpad": _clean(result.observation["scratchpad"]),
            }
        )
        for mutation in result.mutations:
            self._changes += 1
            self._journal.append(
                {
                    "seq": self._changes,
                    "step": step,
                    "operation": str(mutation.kind),
                    "entry_id": mutation.entry_id,
                    "text": _clean(mutation.text),
                }
            )
            self._vectors.append(mutation.vector)

    def commit(self, status: str, reward: float, memory: WorkingMemory) -> None:
        """Writes the episode; with durability "off" nothing. After an error it can be called again.

        A crash, or an error, at any moment leaves what the store said before; once the `episodes` row is there, the new
        state. The old rows of a resumed episode are removed after that; where this is cut short, `MemoryStore` passes
        over them, while other clients see the old `episodes` row and the old `entries` as well.

        Args:
            status: a StopReason, or "interrupted".
            reward: the episode's reward so far.
            memory: the memory as it is now.

        Raises:
            SettingError: another status.
            StoreError: already committed, vectors of another dimension than the folder's, or it cannot be written.
        """
        known = (*map(str, StopReason), INTERRUPTED)
        if str(status) not in known:
            raise SettingError(f"status must be one of {', '.join(known)}, got {status!r}.")
        self._check_open()
        if self._store.durability != "off":
            record = replace(
                self._before,
                status=str(status),
                reward=float(reward),
                steps=self._steps,
                writers=(*self._before.writers, uuid.uuid4().hex),
                committed_at=datetime.now(UTC),
            )
            self._store._commit(record, self._turns, self._journal, self._vectors, memory, self._before.writers)
        self._committed = True

    def _check_open(self) -> None:
        if self._committed:
            raise StoreError(
                f"Episode {self.episode_id} was committed; `MemoryStore.resume` continues an interrupted one."
            )


def _quoted(text: str) -> str:
    """A string of LanceDB's filter language."""
    return "'" + text.replace("'", "''") + "'"


def _writer_in(writers: Sequence[str]) -> str:
    return f"writer IN ({', '.join(map(_quoted, writers))})"


def _clean(text: str) -> str:
    """`text` with lone surrogates, which no file can hold, replaced by U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)
