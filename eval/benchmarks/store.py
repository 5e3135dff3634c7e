"""The cost of a step in each kind of memory: `python -m eval.benchmarks.store [--out FILE]`, some minutes on two cores.

Needs the extra `benchmarks`.

All episodes are halfway, at the same step, and share one process; the embeddings are precomputed. A step makes 3 Creates, 1
Update, on average 0.3 Deletes and 1 Read of the 6 nearest entries of its episode. Five memories are compared:

* **faiss**: as in the AtomMem paper's public code: one flat L2 index of FAISS, through LangChain, for all episodes. A search
  asks for 40,000 candidates and is filtered by episode afterwards; an Update searches all documents for those of equal
  content, deletes them and adds the new one; a Delete likewise.
* **lancedb**: LanceDB used directly, with one table and one call for each step's Creates, Update, Deletes and Read, the
  Update a `merge_insert` on an indexed key, the search exact and prefiltered by episode.
* **memory**: `WorkingMemory`, with a `MemoryStore` of durability "off".
* **episode**: the same, committed when the episodes end.
* **step**: the same, each step of all episodes committed as one group before the next begins.

**In the middle**: faiss, lancedb and memory, each filled to the middle of the episodes at once, make a few steps; the first
two are slow and play only some of the episodes. **Whole episodes**: memory, episode and step play from the first step until
all is durable; compaction at closing is timed separately. The memories alternate, times are medians over the repetitions, and
a step is that of one episode.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from atommem_env.memory import WorkingMemory, unit
from atommem_env.store.memory_store import MemoryStore
from atommem_env.types import Mutation, Observation, OperationKind, StepResult, Vector
from eval.benchmarks import write_figures

TOP_K = 6
_FETCH = 40_000  # candidates of a search in the public code
_EMPTY = Observation(
    phase="read",
    questions="",
    question="",
    chunk="",
    scratchpad="",
    query="",
    retrieved="",
    notice="",
    step=0,
    steps_left=0,
)


@dataclass(frozen=True, slots=True)
class Step:
    """The operations of one reply; entries are numbered by creation within the episode."""

    texts: tuple[str, ...]  # of the Creates, then of the Update
    vectors: Vector  # [5, D], unit length: of the texts, then of the query
    updated: int
    deleted: int | None


Episode = tuple[Step, ...]
State = dict[int, tuple[str, Vector]]  # text and vector of each entry, by number


class Memory(Protocol):
    """A memory to measure."""

    def fill(self, state: Sequence[State], steps: int) -> None:
        """Fills the empty memory with its state after `steps` steps."""

    def do(self, episode: int, step: Step) -> list[str]:
        """Carries out a step; returns the texts of the Read's results, best first."""

    def acknowledge(self, last: bool) -> None:
        """Called after each step of all episodes; `last`: it was their last. Returns when the step is durable, if required."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Result:
    """Times are in seconds, and per step of one episode."""

    memory: str
    episodes: int
    steps: int  # that were timed, in each repetition
    seconds: float  # median
    ratio: float  # to `memory`, of the same repetition, median: above 1 is slower
    all_seconds: tuple[float, ...]  # one a repetition
    close_s: float  # of closing the whole store, median


def draw(episodes: int, steps: int, dimension: int, seed: int) -> list[Episode]:
    """Random episodes; vectors are drawn from a pool of 4,096, and no two of an episode are the same."""
    rng = np.random.default_rng(seed)
    pool = unit(rng.standard_normal((4096, dimension), dtype=np.float32))

    def one(episode: int) -> Episode:
        alive: list[int] = []
        drawn = []
        vectors = rng.choice(len(pool), size=(steps, 5), replace=False)
        for step in range(steps):
            alive += range(3 * step, 3 * step + 3)
            updated = int(rng.choice(alive))
            deleted = int(rng.choice([entry for entry in alive if entry != updated])) if rng.random() < 0.3 else None
            alive = [entry for entry in alive if entry != deleted]
            texts = tuple(
                f"In episode {episode} step {step} noted fact {n} of some length, as notes are." for n in range(4)
            )
            drawn.append(Step(texts, pool[vectors[step]], updated, deleted))
        return tuple(drawn)

    return [one(episode) for episode in range(episodes)]


def state_after(played: Episode, steps: int) -> State:
    """The entries after the first `steps` steps: text and vector by number."""
    state: State = {}
    for number, step in enumerate(played[:steps]):
        state |= {3 * number + n: (step.texts[n], step.vectors[n]) for n in range(3)}
        state[step.updated] = step.texts[3], step.vectors[3]
        if step.deleted is not None:
            del state[step.deleted]
    return state


class FaissMemory:
    """One index for all episodes, as in the public code."""

    def __init__(self, dimension: int) -> None:
        import faiss
        from langchain_community.docstore.in_memory import InMemoryDocstore
        from langchain_community.vectorstores import FAISS
        from langchain_core.embeddings import FakeEmbeddings

        self._store = FAISS(FakeEmbeddings(size=dimension), faiss.IndexFlatL2(dimension), InMemoryDocstore(), {})
        self._texts: dict[int, list[str]] = {}  # of each episode, by number

    def fill(self, state: Sequence[State], steps: int) -> None:
        for episode, entries in enumerate(state):
            self._texts[episode] = [entries[n][0] if n in entries else "" for n in range(3 * steps)]
            self._add(episode, *map(list, zip(*entries.values(), strict=True)))

    def do(self, episode: int, step: Step) -> list[str]:
        texts = self._texts.setdefault(episode, [])
        for text, vector in zip(step.texts[:3], step.vectors[:3], strict=True):
            self._add(episode, [text], [vector])
            texts.append(text)
        self._remove(episode, texts[step.updated])
        self._add(episode, [step.texts[3]], [step.vectors[3]])
        texts[step.updated] = step.texts[3]
        if step.deleted is not None:
            self._remove(episode, texts[step.deleted])
        documents = self._store.similarity_search_by_vector(
            step.vectors[4].tolist(), k=TOP_K, filter={"episode": episode}, fetch_k=_FETCH
        )
        return [document.page_content for document in documents]

    def _add(self, episode: int, texts: list[str], vectors: list[Vector]) -> None:
        pairs = [(text, vector.tolist()) for text, vector in zip(texts, vectors, strict=True)]
        self._store.add_embeddings(pairs, metadatas=[{"episode": episode} for _ in texts])

    def _remove(self, episode: int, text: str) -> None:
        documents = self._store.docstore._dict.items()  # as the public code does
        self._store.delete(
            [
                key
                for key, document in documents
                if document.page_content == text and document.metadata["episode"] == episode
            ]
        )

    def acknowledge(self, last: bool) -> None: ...

    def close(self) -> None: ...


class LanceMemory:
    """Plain LanceDB: a table of entries, changed in place."""

    def __init__(self, folder: Path, dimension: int) -> None:
        import lancedb
        import pyarrow as pa

        self._schema = pa.schema(
            [
                ("key", pa.int64()),  # episode and number
                ("episode", pa.int64()),
                ("text", pa.string()),
                ("vector", pa.list_(pa.float32(), dimension)),
            ]
        )
        session = lancedb.Session(index_cache_size_bytes=256 << 20, metadata_cache_size_bytes=256 << 20)
        self._table = lancedb.connect(folder, session=session).create_table("entries", schema=self._schema)
        self._created: dict[int, int] = {}
        self._rounds = 0

    def fill(self, state: Sequence[State], steps: int) -> None:
        rows = [(episode, n, *pair) for episode, entries in enumerate(state) for n, pair in entries.items()]
        from lancedb.index import BTree

        self._table.add(self._batch(rows))
        for column in ("key", "episode"):
            self._table.create_index(column, config=BTree())
        self._created = dict.fromkeys(range(len(state)), 3 * steps)

    def do(self, episode: int, step: Step) -> list[str]:
        first = self._created.get(episode, 0)
        self._created[episode] = first + 3
        self._table.add(self._batch([(episode, first + n, step.texts[n], step.vectors[n]) for n in range(3)]))
        changed = self._batch([(episode, step.updated, step.texts[3], step.vectors[3])])
        self._table.merge_insert("key").when_matched_update_all().execute(changed)
        if step.deleted is not None:
            self._table.delete(f"key = {_key(episode, step.deleted)}")
        query = self._table.search(step.vectors[4], vector_column_name="vector").distance_type("cosine")
        matches = (
            query.where(f"episode = {episode}", prefilter=True).select(["text", "_distance"]).limit(TOP_K).to_arrow()
        )
        texts: list[str] = matches.column("text").to_pylist()
        return texts

    def _batch(self, rows: Sequence[tuple[int, int, str, Vector]]) -> Any:
        import pyarrow as pa

        episodes, numbers, texts, vectors = map(list, zip(*rows, strict=True))
        columns = [pa.array(list(map(_key, episodes, numbers))), pa.array(episodes), pa.array(texts)]
        vectors_column = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(vectors)), len(vectors[0]))
        return pa.table([*columns, vectors_column], schema=self._schema)

    def acknowledge(self, last: bool) -> None:
        self._rounds += 1
        if self._rounds % 16 == 0:
            self._table.optimize(cleanup_older_than=timedelta(seconds=60))

    def close(self) -> None: ...


class AtomMemMemory:
    """`WorkingMemory` in front of a `MemoryStore`."""

    def __init__(self, folder: Path, durability: str, episodes: int) -> None:
        self._store = MemoryStore(folder, durability)
        self._memories = [WorkingMemory() for _ in range(episodes)]
        self._recorders = [
            self._store.begin(
                env_id="benchmark", task_id=str(index), index=index, task_seed=0, episode_seed=0, settings={}
            )
            for index in range(episodes)
        ]
        self._steps = [0] * episodes

    def fill(self, state: Sequence[State], steps: int) -> None:
        for memory, entries in zip(self._memories, state, strict=True):
            for number in range(3 * steps):
                text, vector = entries.get(number, ("", next(iter(entries.values()))[1]))
                memory.create(text, vector)
            for number in set(range(3 * steps)) - entries.keys():
                memory.delete(f"m{number + 1}")

    def do(self, episode: int, step: Step) -> list[str]:
        memory, mutations = self._memories[episode], []
        for text, vector in zip(step.texts[:3], step.vectors[:3], strict=True):
            mutations.append(Mutation(OperationKind.CREATE, memory.create(text, vector), text, vector))
        updated = f"m{step.updated + 1}"
        memory.update(updated, step.texts[3], step.vectors[3])
        mutations.append(Mutation(OperationKind.UPDATE, updated, step.texts[3], step.vectors[3]))
        if step.deleted is not None:
            memory.delete(f"m{step.deleted + 1}")
            mutations.append(Mutation(OperationKind.DELETE, f"m{step.deleted + 1}", "", None))
        mutations.append(Mutation(OperationKind.READ, "", step.texts[3], step.vectors[4]))
        results = memory.search(step.vectors[4], TOP_K)
        self._steps[episode] += 1
        result = StepResult(_EMPTY, 0.0, False, False, (), tuple(mutations))
        self._recorders[episode].record(self._steps[episode], step.texts[3], result)
        return [memory.get(entry_id).text for entry_id in results]

    def acknowledge(self, last: bool) -> None:
        if last:
            for recorder, memory in zip(self._recorders, self._memories, strict=True):
                recorder.end("answered", 1.0, memory)
        self._store.write(self._recorders)

    def close(self) -> None:
        self._store.close()


def _key(episode: int, number: int) -> int:
    return episode * 1_000_000 + number


def makers(dimension: int, episodes: int) -> dict[str, Callable[[Path], Memory]]:
    """The functions that make each memory in a folder."""
    return {
        "faiss": lambda folder: FaissMemory(dimension),
        "lancedb": lambda folder: LanceMemory(folder, dimension),
        "memory": lambda folder: AtomMemMemory(folder, "off", episodes),
        "episode": lambda folder: AtomMemMemory(folder, "episode", episodes),
        "step": lambda folder: AtomMemMemory(folder, "step", episodes),
    }


def middle(played: Sequence[Episode], slow_steps: int, repeats: int, work: Path | None) -> list[Result]:
    """Times faiss, lancedb and memory from the middle of the episodes.

    In a repetition memory plays the second half of all episodes repeatedly, for at least 512 steps; each of the others
    continues for `slow_steps` steps of single episodes.

    Raises:
        AssertionError: two memories returned different entries for the same Read.
    """
    half = len(played[0]) // 2
    order = [(number, episode) for number in range(half, len(played[0])) for episode in range(len(played))]
    state = [state_after(episode, half) for episode in played]
    make = makers(len(played[0][0].vectors[0]), len(played))
    slow_steps = min(slow_steps, len(order) // repeats)
    seconds: dict[str, list[float]] = {name: [] for name in ("faiss", "lancedb", "memory")}
    steps = dict.fromkeys(seconds, slow_steps) | {"memory": len(order) * -(-512 // len(order))}
    results: dict[tuple[int, int], set[tuple[str, ...]]] = {}  # (step, episode) → different results of its Read

    def play(memory: Memory, part: Sequence[tuple[int, int]]) -> float:
        """The seconds that a part takes; adds the results of its Reads to `results`."""
        texts_of = []
        start = time.perf_counter()
        for number, episode in part:
            texts_of.append(memory.do(episode, played[episode][number]))
            if episode == len(played) - 1:
                memory.acknowledge(False)
        took = time.perf_counter() - start
        for key, texts in zip(part, texts_of, strict=True):
            results.setdefault(key, set()).add(tuple(texts))
        return took

    with tempfile.TemporaryDirectory(dir=work) as folder:
        slow = {name: make[name](Path(folder) / name) for name in ("faiss", "lancedb")}
        for memory in slow.values():
            memory.fill(state, half)
        for repeat in range(repeats):
            for name in list(seconds)[:: -1 if repeat % 2 else 1]:
                if name in slow:
                    took = play(slow[name], order[repeat * slow_steps : (repeat + 1) * slow_steps])
                else:
                    took = 0.0
                    for _ in range(steps[name] // len(order)):
                        memory = make[name](Path(folder) / name)
                        memory.fill(state, half)
                        took += play(memory, order)
                seconds[name].append(took / steps[name])
    assert all(len(texts) == 1 for texts in results.values()), "all must return the same entries"
    return _results(seconds, {name: [0.0] for name in seconds}, len(played), steps)


def whole(played: Sequence[Episode], repeats: int, work: Path | None) -> list[Result]:
    """Times whole episodes, in memory and with both durabilities.

    Raises:
        AssertionError: a store does not hold what the episodes did.
    """
    make = makers(len(played[0][0].vectors[0]), len(played))
    names = ("memory", "episode", "step")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    closing: dict[str, list[float]] = {name: [] for name in names}
    count = len(played) * len(played[0])
    for repeat in range(repeats + 1):  # the first one warms up
        for name in names[:: -1 if repeat % 2 else 1]:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                memory = make[name](Path(folder))
                start = time.perf_counter()
                for number in range(len(played[0])):
                    for episode, steps in enumerate(played):
                        memory.do(episode, steps[number])
                    memory.acknowledge(number == len(played[0]) - 1)
                durable = time.perf_counter()
                memory.close()
                if repeat:
                    seconds[name].append((durable - start) / count)
                    closing[name].append(time.perf_counter() - durable)
                if name != "memory" and not repeat:
                    check(Path(folder), played)
    return _results(seconds, closing, len(played), dict.fromkeys(names, count))


def check(folder: Path, played: Sequence[Episode]) -> None:
    """Checks that a store has all episodes, and the right entries of the first and the last one."""
    records = MemoryStore(folder).episodes()
    assert [record.steps for record in records] == [len(episode) for episode in played], "steps are missing"
    for record in records[:1] + records[-1:]:
        stored = MemoryStore(folder).memory_at(record.episode_id, record.steps)
        expected = state_after(played[record.index], record.steps)
        assert [entry.text for entry in stored.entries()] == [expected[n][0] for n in sorted(expected)], "other entries"


def _results(
    seconds: dict[str, list[float]], closing: dict[str, list[float]], episodes: int, steps: dict[str, int]
) -> list[Result]:
    return [
        Result(
            memory=name,
            episodes=episodes,
            steps=steps[name],
            seconds=statistics.median(times),
            ratio=statistics.median(one / base for one, base in zip(times, seconds["memory"], strict=True)),
            all_seconds=tuple(times),
            close_s=statistics.median(closing[name]),
        )
        for name, times in seconds.items()
    ]


def main(
    *,
    out: Path | None = None,
    episodes: tuple[int, ...] = (1, 64, 512),
    steps: int = 28,
    dimension: int = 1024,
    slow_steps: int = 4,
    repeats: int = 5,
    seed: int = 0,
    folder: Path | None = None,
) -> None:
    """Compare the cost of a step in five kinds of memory and print two tables.

    Args:
        out: JSON file for the numbers.
        episodes: numbers of episodes active at a time, each measured separately.
        steps: replies of an episode.
        dimension: of the vectors, float32.
        slow_steps: steps of single episodes that faiss and lancedb make in a repetition.
        repeats: timed repetitions; medians are reported.
        seed: of the episodes.
        folder: for the temporary stores; by default the system's temporary folder.
    """
    measured: dict[str, list[Result]] = {"middle": [], "whole": []}
    for count in episodes:
        played = draw(count, steps, dimension, seed)
        measured["middle"] += middle(played, slow_steps, repeats, folder)
        measured["whole"] += whole(played, repeats, folder)
    console = Console()
    for part, results in measured.items():
        table = Table(title={"middle": "In the middle of the episodes", "whole": "Whole episodes"}[part])
        for column in ("memory", "episodes", "a step", "steps/s", "times memory's", "closing"):
            table.add_column(column, justify="left" if column == "memory" else "right")
        for result in results:
            table.add_row(
                result.memory,
                f"{result.episodes}",
                f"{result.seconds * 1e6:,.1f} µs",
                f"{1 / result.seconds:,.0f}",
                f"{result.ratio:,.1f}" if part == "middle" else f"{1 / result.ratio:.0%} of the rate",
                f"{result.close_s:.2f} s" if part == "whole" else "",
            )
        console.print(table)
    conditions = {"dtype": "float32", "dimension": dimension, "steps": steps, "top_k": TOP_K, "seed": seed}
    conditions |= {"threads": os.environ.get("OMP_NUM_THREADS", "all"), "cpus": os.cpu_count()}
    figures = {part: [asdict(result) for result in results] for part, results in measured.items()}
    write_figures(out, conditions | figures)


if __name__ == "__main__":
    tyro.cli(main)
