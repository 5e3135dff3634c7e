"""The time of a step outside of the model: `python -m eval.benchmarks.environment [--out FILE]`, half a minute.

Episodes of the synthetic world are played with replies of a fixed kind (three Creates, an Update and a Read while reading, an
answer when asked) and precomputed vectors. A step is split into **parse** (`Episode.submit`: parsing and planning the reply),
**memory** (`Episode.resolve`: writing, searching, the next observation) and **render** (a layout: the observation as chat
messages); **reset** draws a task and splits it into chunks.

Also compared are whole steps of `gym.make_vec`, which embeds and commits once for all its environments, with Gymnasium's own
`SyncVectorEnv` over as many single ones, with the same replies, embedder and store settings.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import atommem_env  # noqa: F401  (registers the ids)
from atommem_env.dialects import get_dialect
from atommem_env.embedders import get_embedder
from atommem_env.episode import Episode
from atommem_env.prompts import get_layout
from atommem_env.tasks.synthetic import SyntheticSource
from atommem_env.types import EpisodeSettings, Observation, Operation, OperationKind
from eval.benchmarks import write_figures

_WORDS = [f"word{number}" for number in range(500)]
_ENTRY_WORDS, _QUERY_WORDS = 30, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured and compared."""

    dialect: str = "tags"
    """Dialect of the replies."""
    layout: str = "shared_prefix"
    """Layout of the observations."""
    num_docs: int = 400
    """Documents of a task in the measurement of parts."""
    chunk_tokens: int = 512
    """Size of its chunks."""
    dimension: int = 1024
    """Dimension of its vectors."""
    episodes: int = 40
    """Episodes in the measurement of parts."""
    num_envs: int = 64
    """Environments of the vector environments."""
    steps: int = 12
    """Steps of each of them."""
    embedder: str = "hashing"
    """Their embedder."""
    durability: str = "step"
    """Their durability."""
    repeats: int = 3
    """Timed repetitions; medians are reported."""
    seed: int = 0
    """Seed of tasks and replies."""


@dataclass(frozen=True, slots=True)
class Result:
    """The measurements: means per step or episode; ratios are medians over the repetitions."""

    setup: Setup
    dtype: str
    steps: int  # in the measurement of parts
    reset_us: float  # per episode
    parse_us: float  # per step
    memory_us: float
    render_us: float
    vector_steps_per_s: float
    sync_steps_per_s: float
    ratio: float
    ratios: tuple[float, ...]


class Writer:
    """Replies of the fixed kind, in a dialect; the same for the same seed."""

    def __init__(self, dialect: str, seed: int) -> None:
        self._write = get_dialect(dialect).write
        self._rng = np.random.default_rng(seed)
        self._created = 0

    def __call__(self, observation: Observation) -> str:
        """The reply to an observation."""
        if observation["step"] == 0:
            self._created = 0
        if observation["phase"] == "answer":
            return self._write(Operation(OperationKind.ANSWER, "unknown"))
        operations = [Operation(OperationKind.CREATE, self._words(_ENTRY_WORDS)) for _ in range(3)]
        if self._created:
            # The id of an entry; or, in a dialect that names entries by index, that of the first one shown.
            target = "1" if observation["retrieved"].startswith("Memory ") else f"m{self._created}"
            operations.append(Operation(OperationKind.UPDATE, self._words(_ENTRY_WORDS), target))
        operations.append(Operation(OperationKind.READ, self._words(_QUERY_WORDS)))
        self._created += 3
        return "\n".join(map(self._write, operations))

    def _words(self, count: int) -> str:
        return " ".join(self._rng.choice(_WORDS, count))


def _time_parts(setup: Setup) -> dict[str, float]:
    """Total seconds of reset, parse, memory and render, and the number of steps."""
    source = SyntheticSource(num_docs=setup.num_docs)
    settings = EpisodeSettings(dialect=setup.dialect, chunk_tokens=setup.chunk_tokens)
    messages = get_layout(setup.layout)
    vectors = np.random.default_rng(setup.seed).standard_normal((4096, setup.dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = _cycle(vectors)
    spent = dict.fromkeys(("reset", "parse", "memory", "render", "steps"), 0.0)
    for index in range(setup.episodes):
        write = Writer(setup.dialect, setup.seed + index)
        marks = [time.perf_counter()]
        episode = Episode(source.task(index, setup.seed), settings, setup.seed)
        spent["reset"] += time.perf_counter() - marks[0]
        while episode.stop_reason is None:
            reply = write(episode.observe())
            marks = [time.perf_counter()]
            requests = episode.submit(reply)
            marks.append(time.perf_counter())
            needed = [next(rows) for _ in requests]
            matrix = np.stack(needed) if needed else np.empty((0, setup.dimension), dtype=np.float32)
            marks.append(time.perf_counter())
            result = episode.resolve(matrix)
            marks.append(time.perf_counter())
            messages(result.observation, settings)
            marks.append(time.perf_counter())
            spent["parse"] += marks[1] - marks[0]
            spent["memory"] += marks[3] - marks[2]
            spent["render"] += marks[4] - marks[3]
            spent["steps"] += 1
    return spent


def _cycle(rows: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    while True:
        yield from rows


def _play(vector: Any, dialect: str, steps: int, seed: int) -> tuple[float, list[Any]]:
    """(seconds of `steps` steps of all environments, everything that they returned except `info`)."""
    writers = [Writer(dialect, seed + number) for number in range(vector.num_envs)]
    observations, _ = vector.reset(seed=seed)
    returned: list[Any] = []
    spent = 0.0
    for _ in range(steps):
        replies = tuple(
            write({name: values[number] for name, values in observations.items()})  # type: ignore[arg-type]
            for number, write in enumerate(writers)
        )
        start = time.perf_counter()
        observations, *rest, _ = vector.step(replies)
        spent += time.perf_counter() - start
        returned.append([{name: list(values) for name, values in observations.items()}, *map(list, rest)])
    return spent, returned


def measure(setup: Setup) -> Result:
    """Times the parts of a step, then both vector environments, starting with another one in each repetition."""
    _time_parts(replace(setup, episodes=1))  # warms up
    spent = _time_parts(setup)
    seconds: dict[str, list[float]] = {"sync": [], "vector_entry_point": []}
    for repeat in range(setup.repeats):
        results: list[list[Any]] = []
        for mode in list(seconds)[:: -1 if repeat % 2 else 1]:
            get_embedder.cache_clear()  # no text may be in the embedder's cache
            with tempfile.TemporaryDirectory() as folder:
                vector = gym.make_vec(
                    "AtomMem-Synthetic",
                    num_envs=setup.num_envs,
                    vectorization_mode=mode,
                    dialect=setup.dialect,
                    embedder=setup.embedder,
                    durability=setup.durability,
                    store=folder,
                )
                took, returned = _play(vector, setup.dialect, setup.steps, setup.seed + 1000 * repeat)
                vector.close()
            seconds[mode].append(took)
            results.append(returned)
        assert results[0] == results[1], "both must return the same"
    ratios = [slow / fast for slow, fast in zip(seconds["sync"], seconds["vector_entry_point"], strict=True)]
    total = setup.num_envs * setup.steps
    return Result(
        setup=setup,
        dtype="float32",
        steps=int(spent["steps"]),
        reset_us=1e6 * spent["reset"] / setup.episodes,
        **{f"{part}_us": 1e6 * spent[part] / spent["steps"] for part in ("parse", "memory", "render")},
        vector_steps_per_s=total / statistics.median(seconds["vector_entry_point"]),
        sync_steps_per_s=total / statistics.median(seconds["sync"]),
        ratio=statistics.median(ratios),
        ratios=tuple(ratios),
    )


def main(setup: Setup, *, out: Path | None = None) -> None:
    """Time the parts of a step, compare the vector environments, and print a table.

    Args:
        setup: what is measured.
        out: JSON file for the numbers.
    """
    result = measure(setup)
    table = Table(title=f"{result.steps} steps, {setup.dialect}, {setup.layout}, D = {setup.dimension}, float32")
    table.add_column("part")
    table.add_column("µs a step", justify="right")
    for part in ("parse", "memory", "render"):
        table.add_row(part, f"{getattr(result, f'{part}_us'):.0f}")
    table.add_row(f"reset ({setup.num_docs} documents), an episode", f"{result.reset_us:,.0f}", style="dim")
    table.add_section()
    for name, rate in (("SyncVectorEnv", result.sync_steps_per_s), ("AtomMemVectorEnv", result.vector_steps_per_s)):
        table.add_row(f"{name}, {setup.num_envs} × {setup.embedder}, {setup.durability}: steps/s", f"{rate:,.0f}")
    table.add_row("ratio", f"{result.ratio:.2f}x")
    Console().print(table)
    write_figures(out, asdict(result))


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
