"""Whether the tables of a memory store fit together: a copy made while a process wrote, or a lost file, is noticed.

A commit writes `journal` and `entries`, then `turns`, then `episodes`. So each row of `episodes` must have its turns, each turn
its rows in `journal`, and an episode that is over the entries to which its journal leads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import StoreError
from atommem_env.store.failures import RESTORE
from atommem_env.store.recorder import INTERRUPTED, EpisodeRecord
from atommem_env.types import OperationKind

_Numbers = NDArray[np.int64]


def check_tables(
    folder: Path, records: Sequence[EpisodeRecord], read: Callable[[str, Sequence[str]], Any], *, counted: bool
) -> None:
    """Checks that these episodes are complete in the other tables.

    Args:
        read: columns of a table as an Arrow table, without rows of other writers or with them; called for `turns`, `journal`
            and `entries` in this order, so that what a process writes meanwhile is in the later ones.
        counted: whether turns say how many rows in `journal` they have, which those of schema 1 do not.

    Raises:
        StoreError: they are not; the message names the table and an episode.
    """
    if not records:
        return
    count = len(records)
    of_episode = np.repeat(np.arange(count), [len(record.writers) for record in records])
    writers = [writer for record in records for writer in record.writers]  # of an episode, the later ones count

    def fail(table: str, wrong: NDArray[np.bool_], got: _Numbers, expected: _Numbers, noun: str) -> None:
        numbers = np.flatnonzero(wrong)
        if len(numbers):
            first = int(numbers[0])
            more = f", and {len(numbers) - 1} more are incomplete" if len(numbers) > 1 else ""
            raise StoreError(
                f"The memory store in {folder} is damaged or incomplete: of episode {records[first].episode_id} the table "
                f"{table!r} has {got[first]} {noun}, expected {expected[first]}{more}. {RESTORE}"
            )

    turns = read("turns", ["writer", "step", *(["changes"] if counted else [])])
    writer, steps = _codes(turns, writers), _numbers(turns, "step")
    order = np.lexsort((writer, steps, of_episode[writer]))
    order = order[writer[order] >= 0]
    episode, step = of_episode[writer[order]], steps[order]
    last = np.append((episode[1:] != episode[:-1]) | (step[1:] != step[:-1]), True)[: len(order)]
    order, episode, step = order[last], episode[last], step[last]  # the turn of each step that counts
    have, highest = np.bincount(episode, minlength=count), np.zeros(count, np.int64)
    np.maximum.at(highest, episode, step)
    expected = np.array([record.steps for record in records])
    over = np.array([record.status != INTERRUPTED for record in records])
    expected = np.where(over, expected, np.maximum(expected, highest))  # of another one a process may write more
    fail("turns", have != expected, have, expected, "replies")

    journal = read("journal", ["writer", "step", "operation"])
    width = int(max(steps.max(initial=0), _numbers(journal, "step").max(initial=0))) + 1
    keys = writer[order] * width + step  # of each turn that counts, in any order
    changes = _codes(journal, writers) * width + _numbers(journal, "step")
    by_key = np.argsort(keys)
    position = np.searchsorted(keys[by_key], changes).clip(max=max(len(keys) - 1, 0))
    counts = keys[by_key][position] == changes if len(keys) else np.zeros(len(changes), bool)
    turn_of = by_key[position[counts]]
    if counted:
        noted = _numbers(turns, "changes")[order]
        wrong = np.bincount(turn_of, minlength=len(order)) != noted
        got = np.bincount(episode[turn_of], minlength=count)
        total = np.bincount(episode, noted, minlength=count).astype(np.int64)
        fail("journal", np.bincount(episode[wrong], minlength=count) > 0, got, total, "changes and searches")

    entries = read("entries", ["writer"])
    ends = np.cumsum([len(record.writers) for record in records]) - 1  # the last writer of each episode
    have = np.bincount(_codes(entries, [writers[end] for end in ends]) + 1, minlength=count + 1)[1:]
    gained = (_equal(journal, OperationKind.CREATE) - _equal(journal, OperationKind.DELETE))[counts]
    expected = np.bincount(episode[turn_of], gained, minlength=count).astype(np.int64)
    fail("entries", over & (have != expected), have, expected, "entries")


def _codes(rows: Any, writers: Sequence[str]) -> _Numbers:
    """[rows] the position in `writers` of each row's writer; -1: it is not there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    positions = pc.index_in(rows.column("writer"), value_set=pa.array(writers, pa.string()))
    return np.asarray(positions.fill_null(-1).to_numpy(), dtype=np.int64)


def _equal(journal: Any, kind: OperationKind) -> _Numbers:
    """[rows] 1 where it is an operation of that kind, else 0."""
    import pyarrow.compute as pc

    return np.asarray(pc.equal(journal.column("operation"), str(kind)).to_numpy(), dtype=np.int64)


def _numbers(rows: Any, name: str) -> _Numbers:
    return np.asarray(rows.column(name).to_numpy(), dtype=np.int64)
