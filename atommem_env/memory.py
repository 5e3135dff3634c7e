"""One episode's memory: entries, their vectors, and exact search by vectors or by words."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from atommem_env.bm25 import BM25Index, fuse
from atommem_env.errors import EmbeddingError, EpisodeStateError, SettingError
from atommem_env.types import Entry, Vector

_FIRST_ROWS = 128  # of the first matrix, whose pages the system allocates as they are written; doubled when full
_TIE = 1e-6  # a matrix product's scores are off by less than half of this, depending on a row's position
_UNIT = 5e-7  # rounding to float32 moves a unit vector's squared length by at most 1.2e-7


def unit(vectors: ArrayLike) -> Vector:
    """Vectors scaled to length 1, float32, of the same shape: [D] or [n, D].

    A vector that already has length 1, to the precision of float32, is returned bit for bit, so that a round trip through
    the store never changes it.

    Raises:
        EmbeddingError: a value is not finite, a vector is zero, or the shape is neither [D] nor [n, D].

    >>> unit([3, 4]).tolist() == np.float32([0.6, 0.8]).tolist()
    True
    """
    if isinstance(vectors, np.ndarray) and vectors.dtype == np.float32:
        rows = vectors
    else:
        with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite and is rejected below
            rows = np.asarray(vectors, dtype=np.float32)
    if rows.ndim not in (1, 2) or rows.shape[-1] == 0:
        raise EmbeddingError(f"Expected vectors of shape [D] or [n, D], got {rows.shape}; check the embedder.")
    wide = rows.astype(np.float64)
    if wide.ndim == 1 and abs(wide.dot(wide) - 1) <= _UNIT:  # by far the most frequent case; three times as fast
        return rows
    squared = np.einsum("...d,...d->...", wide, wide)
    off = np.abs(squared - 1).max(initial=0)
    if off <= _UNIT:
        return rows
    if not np.isfinite(off):
        raise EmbeddingError("Expected finite vectors, got one with an infinite or NaN value; check the embedder.")
    if not squared.all():
        raise EmbeddingError("Expected vectors with a direction, got one that is zero; check the embedder.")
    length = np.where(np.abs(squared - 1) <= _UNIT, 1.0, np.sqrt(squared))
    scaled: Vector = (wide / length[..., None]).astype(np.float32)
    return scaled


class WorkingMemory:
    """The entries of one episode and their unit vectors in a float32 matrix [rows, D], D taken from the first vector.

    Ids are "m1", "m2", … in order of creation and never used twice. Search is exact and depends on ids and vectors alone,
    not on the position of a row: the same before and after `fork`, `restore` and deletions.

    With vectors of 1024 numbers a create takes about 3 µs, a search among 50 entries 8 µs (`eval/benchmarks/store.py`).

    Args:
        capacity: most entries at a time; None: no limit.

    >>> memory = WorkingMemory()
    >>> memory.create("Ada lives in Turin.", [1, 0]), memory.create("Ben lives in Oslo.", [0, 1])
    ('m1', 'm2')
    >>> memory.search([0.6, 0.8], k=1)
    ['m2']
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self._created = 0
        self._entries: dict[str, Entry] = {}  # in order of creation
        self._rows: dict[str, int] = {}  # the row of each id; the first len(self) rows are in use, in any order
        self._matrix: Vector | None = None
        self._ids: list[str] = []  # of the entry in each row in use
        self._lexical: BM25Index | None = None  # from the first search by words on; a copy builds its own

    @property
    def dimension(self) -> int | None:
        """D; None before the first entry."""
        return None if self._matrix is None else self._matrix.shape[1]

    @property
    def full(self) -> bool:
        """Whether the memory holds as many entries as its capacity."""
        return self.capacity is not None and len(self) >= self.capacity

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry_id: object) -> bool:
        return entry_id in self._entries

    def get(self, entry_id: str) -> Entry:
        """The entry of that id.

        Raises:
            KeyError: there is none.
        """
        return self._entries[entry_id]

    def entries(self) -> tuple[Entry, ...]:
        """All entries in order of creation."""
        return tuple(self._entries.values())

    def vectors(self) -> Vector:
        """The unit vectors, [n, D], in the order of `entries`; [0, 0] before the first entry."""
        if self._matrix is None:
            return np.zeros((0, 0), dtype=np.float32)
        return self._matrix[[self._rows[entry_id] for entry_id in self._entries]]

    def create(self, text: str, vector: ArrayLike) -> str:
        """Adds an entry and returns its id. `vector`: [D].

        Raises:
            EmbeddingError: `unit` rejects the vector, or it has another dimension than the stored ones.
            EpisodeStateError: the memory is full; check `full` first.
        """
        if self.full:
            raise EpisodeStateError(f"The memory is full ({self.capacity} entries); check `full` before `create`.")
        unit_vector = self._check_vector(vector)
        row = len(self)
        if self._matrix is None:
            self._matrix = np.empty((0, len(unit_vector)), dtype=np.float32)
        if row == len(self._matrix):
            longer = np.empty((max(_FIRST_ROWS, 2 * row), len(unit_vector)), dtype=np.float32)
            longer[:row] = self._matrix
            self._matrix = longer
        self._created += 1
        entry_id = f"m{self._created}"
        self._entries[entry_id] = Entry(entry_id, text)
        self._rows[entry_id] = row
        self._matrix[row] = unit_vector
        self._ids.append(entry_id)
        if self._lexical is not None:
            self._lexical.add(self._created, text)
        return entry_id

    def update(self, entry_id: str, text: str, vector: ArrayLike) -> None:
        """Replaces an entry's text and vector [D]; its position in the order stays.

        Raises:
            KeyError: no entry has that id.
            EmbeddingError: as for `create`.
        """
        row = self._rows[entry_id]
        unit_vector = self._check_vector(vector)
        assert self._matrix is not None
        self._matrix[row] = unit_vector
        if self._lexical is not None:
            self._lexical.remove(_number(entry_id), self._entries[entry_id].text)
            self._lexical.add(_number(entry_id), text)
        self._entries[entry_id] = Entry(entry_id, text)

    def delete(self, entry_id: str) -> None:
        """Removes an entry.

        Raises:
            KeyError: no entry has that id.
        """
        row = self._rows.pop(entry_id)
        entry = self._entries.pop(entry_id)
        if self._lexical is not None:
            self._lexical.remove(_number(entry_id), entry.text)
        moved = self._ids.pop()
        if moved != entry_id:  # the last row moves into the gap, so that the rows in use stay together
            assert self._matrix is not None
            self._matrix[row] = self._matrix[len(self)]
            self._ids[row] = moved
            self._rows[moved] = row

    def search(self, query_vector: ArrayLike, k: int) -> list[str]:
        """Ids of the `k` entries nearest to `query_vector` [D] by cosine similarity, best first; ties by age, oldest first.

        A matrix product gives equal rows scores that differ with their position. Where scores are closer than that error,
        the candidates are scored again, each row by itself, before they are sorted.

        Raises:
            EmbeddingError: as for `create`.
            SettingError: k is less than 1.
        """
        if k < 1:
            raise SettingError(f"k must be at least 1, got {k}.")
        query = self._check_vector(query_vector)
        if not self._entries:
            return []
        assert self._matrix is not None
        used = self._matrix[: len(self)]
        scores = used.dot(query)
        top = scores.argsort()[: -k - 2 : -1]  # the best k, and the first that is left out
        ranked = scores[top].tolist()
        if all(better - worse > _TIE for better, worse in pairwise(ranked)):
            return [self._ids[row] for row in top[:k].tolist()]
        if k < len(used):
            kth = np.partition(scores, len(used) - k)[len(used) - k]
            near = np.flatnonzero(scores >= kth - _TIE)
        else:
            near = np.arange(len(used))
        exact = np.einsum("ij,j->i", used[near], query).tolist()
        ranking = sorted(zip((-score for score in exact), (int(self._ids[row][1:]) for row in near), strict=True))
        return [f"m{number}" for _, number in ranking[:k]]

    def search_words(self, query: str, k: int) -> list[str]:
        """Ids of the `k` entries with the best BM25 scores for `query` (`atommem_env.bm25`), best first; ties by age, oldest
        first. Entries that share no word with the query are left out.

        Raises:
            SettingError: k is less than 1.
        """
        return _ids(self._rank_by_words(query), k)

    def search_hybrid(self, query: str, query_vector: ArrayLike, k: int) -> list[str]:
        """Ids of the `k` best entries by reciprocal rank fusion of the rankings of `search` and `search_words`.

        Raises:
            EmbeddingError, SettingError: as for `search`.
        """
        nearest = self.search(query_vector, max(1, len(self)))
        return _ids(fuse([[_number(entry_id) for entry_id in nearest], self._rank_by_words(query)]), k)

    def snapshot(self) -> dict[str, object]:
        """The state as plain, picklable data."""
        return {
            "capacity": self.capacity,
            "created": self._created,
            "ids": [entry.id for entry in self.entries()],
            "texts": [entry.text for entry in self.entries()],
            "vectors": None if self._matrix is None else self.vectors(),  # [n, D]; n can be 0
        }

    @classmethod
    def restore(cls, snapshot: dict[str, Any]) -> Self:
        """The memory that `snapshot` was taken from."""
        memory = cls(snapshot["capacity"])
        ids = snapshot["ids"]
        memory._created = snapshot["created"]
        memory._entries = {
            entry_id: Entry(entry_id, text) for entry_id, text in zip(ids, snapshot["texts"], strict=True)
        }
        memory._rows = {entry_id: row for row, entry_id in enumerate(ids)}
        memory._matrix = None if snapshot["vectors"] is None else snapshot["vectors"].copy()
        memory._ids = list(ids)
        return memory

    def fork(self) -> Self:
        """An independent copy."""
        twin = type(self)(self.capacity)
        twin._created = self._created
        twin._entries = self._entries.copy()
        twin._rows = self._rows.copy()
        twin._matrix = None if self._matrix is None else self._matrix[: len(self)].copy()
        twin._ids = self._ids.copy()
        return twin

    def _rank_by_words(self, query: str) -> list[int]:
        if self._lexical is None:
            self._lexical = BM25Index()
            for entry in self._entries.values():
                self._lexical.add(_number(entry.id), entry.text)
        return self._lexical.ranking(query)

    def _check_vector(self, vector: ArrayLike) -> Vector:
        """The unit vector of `vector`, known to fit into this memory."""
        unit_vector = unit(vector)
        fits = unit_vector.ndim == 1 if self._matrix is None else unit_vector.shape == self._matrix.shape[1:]
        if not fits:
            expected = "[D]" if self.dimension is None else f"[{self.dimension}]"
            raise EmbeddingError(
                f"Expected a vector of shape {expected} in this memory, got {list(unit_vector.shape)}; use one embedder."
            )
        return unit_vector


def _number(entry_id: str) -> int:
    return int(entry_id[1:])


def _ids(ranking: list[int], k: int) -> list[str]:
    if k < 1:
        raise SettingError(f"k must be at least 1, got {k}.")
    return [f"m{number}" for number in ranking[:k]]
