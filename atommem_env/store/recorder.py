"""Buffers an episode's steps, and hands them to the store as the rows of one commit."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from atommem_env.errors import SettingError, StoreError
from atommem_env.memory import WorkingMemory
from atommem_env.store.tables import batch_of, surrogate_bytes
from atommem_env.types import StepResult, StopReason, Vector

INTERRUPTED = "interrupted"  # the status of an episode that is not over, whether or not it is still being played
_BATCH_ROWS = 256  # most rows of a batch: LanceDB writes batches of over a megabyte at half the speed
_BATCH_NUMBERS = 1 << 18  # most float32 numbers of a batch


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
    writers: tuple[str, ...]  # ids whose rows in the other tables count: one, and one more each time it was resumed
    schema_version: int
    committed_at: datetime  # UTC


_BufferedStep = tuple[int, str, StepResult]  # number of the step, reply, result


@dataclass(frozen=True, slots=True)
class Commit:
    """The rows that one recorder has to write."""

    episode_id: str
    writer: str
    steps: tuple[_BufferedStep, ...]
    changes: int  # journal rows before these
    row: EpisodeRecord | None  # for `episodes`, where this writer is new
    memory: WorkingMemory | None  # at the end of the episode
    replaced: tuple[str, ...]  # writers whose rows of `episodes` and `entries` are replaced by this one's


class Recorder:
    """Buffers the steps of one episode until `MemoryStore.write`; made by `MemoryStore.begin` and `resume`."""

    def __init__(
        self, durability: str, record: EpisodeRecord, changes: int = 0, replaced: tuple[str, ...] = ()
    ) -> None:
        self.episode_id = record.episode_id
        self._durability = durability  # of the store
        self._record = record
        self._steps = record.steps
        self._changes = changes  # journal rows written
        self._replaced = replaced
        self._writer = ""  # "": the next commit gets a new one
        self._buffered: list[_BufferedStep] = []  # not yet written
        self._ending: tuple[str, float, WorkingMemory] | None = None
        self._closed = False

    def detached(self) -> Recorder:
        """A recorder for a copy of the episode: it takes the replies that follow, and stores nothing."""
        return Recorder("off", replace(self._record, steps=self._steps))

    @property
    def due(self) -> bool:
        """Whether `MemoryStore.write` has rows to write: with "episode" at the end, with "step" after each reply."""
        if self._closed or self._durability == "off":
            return False
        return self._ending is not None or (self._durability == "step" and bool(self._buffered))

    def record(self, step: int, reply: str, result: StepResult) -> None:
        """Buffers reply number `step`, counted from 1, and its result.

        Raises:
            StoreError: not the next reply, or the episode has ended.
        """
        self._check_open()
        if self._ending is not None or step != self._steps + 1:
            raise StoreError(f"Expected reply {self._steps + 1} of episode {self.episode_id}, got reply {step}.")
        self._steps = step
        if self._durability != "off":
            self._buffered.append((step, reply, result))

    def end(self, status: str, reward: float, memory: WorkingMemory) -> None:
        """Marks the episode as ended; can be called again until it was written.

        Args:
            status: a StopReason, or "interrupted".
            reward: the episode's reward so far.
            memory: the current memory, which must not change until it was written.

        Raises:
            SettingError: another status.
            StoreError: the end was written already.
        """
        known = (*map(str, StopReason), INTERRUPTED)
        if str(status) not in known:
            raise SettingError(f"status must be one of {', '.join(known)}, got {status!r}.")
        self._check_open()
        self._ending = str(status), float(reward), memory
        self._closed = self._durability == "off"

    def next_commit(self) -> Commit:
        """All that is buffered, under this recorder's writer; stays buffered until `mark_committed`."""
        row = memory = None
        if self._ending is not None or not self._writer:
            status, reward, memory = self._ending or (INTERRUPTED, 0.0, None)
            self._replaced += (self._writer,) if self._writer else ()
            self._writer = uuid.uuid4().hex
            row = replace(
                self._record,
                status=status,
                reward=reward,
                steps=self._steps,
                writers=(*self._record.writers, self._writer),
                committed_at=datetime.now(UTC),
            )
        steps = tuple(self._buffered)
        return Commit(self.episode_id, self._writer, steps, self._changes, row, memory, self._replaced)

    def mark_committed(self, commit: Commit) -> None:
        """Drops what the commit, now durable, contains from the buffer."""
        del self._buffered[: len(commit.steps)]
        self._changes += sum(len(result.mutations) for _, _, result in commit.steps)
        if commit.row is not None:
            self._record, self._replaced = commit.row, ()
        self._closed = self._ending is not None

    def mark_failed(self) -> None:
        """Starts a new writer that replaces this one and writes everything again: how much was written is unknown."""
        self._replaced, self._writer = (*self._replaced, self._writer), ""

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(
                f"Episode {self.episode_id} was committed already; `MemoryStore.resume` continues an interrupted one."
            )


def dimensions_of(commits: list[Commit]) -> set[int]:
    """The dimensions of all vectors in these commits."""
    lengths = {len(vector) for commit in commits for vector in _vectors(commit)}
    return lengths | {commit.memory.dimension for commit in commits if commit.memory and commit.memory.dimension}


def _vectors(commit: Commit) -> Iterator[Vector]:
    for _, _, result in commit.steps:
        for mutation in result.mutations:
            if mutation.vector is not None:
                yield mutation.vector


def batches_of(name: str, commits: list[Commit], dimension: int | None) -> Iterator[Any]:
    """The rows that a group adds to a table, in batches made as they are written, so that little memory is needed."""
    make = {"journal": _journal, "entries": _entries, "turns": _turns, "episodes": _episodes}[name]
    rows = ((commit.episode_id, commit.writer, *values) for commit in commits for values in make(commit))
    size = max(1, min(_BATCH_ROWS, _BATCH_NUMBERS // (dimension or 1)))
    while batch := tuple(islice(rows, size)):
        yield batch_of(name, tuple(zip(*batch, strict=True)), dimension)


# The rows of each table: the values after `episode_id` and `writer`, in the order of the schema.


def _turns(commit: Commit) -> Iterator[tuple[object, ...]]:
    for step, reply, result in commit.steps:
        after = result.observation
        texts = after["notice"], after["query"], after["scratchpad"]
        yield step, reply, surrogate_bytes(reply), *texts, len(result.mutations)


def _journal(commit: Commit) -> Iterator[tuple[object, ...]]:
    seq = commit.changes
    for step, _, result in commit.steps:
        for mutation in result.mutations:
            seq += 1
            yield seq, step, str(mutation.kind), mutation.entry_id, mutation.text, mutation.vector


def _entries(commit: Commit) -> Iterator[tuple[object, ...]]:
    if commit.memory is not None:
        for entry, vector in zip(commit.memory.entries(), commit.memory.vectors(), strict=True):
            yield entry.id, entry.text, vector


def _episodes(commit: Commit) -> Iterator[tuple[object, ...]]:
    row = commit.row
    if row is not None:
        yield (
            row.env_id,
            row.task_id,
            row.index,
            row.task_seed,
            row.episode_seed,
            json.dumps(row.settings),
            row.status,
            row.reward,
            row.steps,
            list(row.writers),
            row.schema_version,
            row.committed_at,
        )
