"""Kills a process that writes a store: `python -m eval.benchmarks.crash [--trials 50] [--out FILE]`, some minutes on two cores.

A process plays random episodes of `AtomMem-Synthetic`, eight at a time, and prints after each commit what was acknowledged. It
is killed by kill -9 at a random moment. Then the store must be readable, by `MemoryStore` and by plain LanceDB; it must
contain everything acknowledged; the replay of its last episodes must give the memory that the journal gives; each interrupted
episode must be resumable to its end; and after compaction and closing no table may have more than ten files. Five trials in
turn write to the same store.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from agents.baselines.sanity import Random
from agents.policy import Act
from atommem_env.embedders import embed, get_embedder
from atommem_env.episode import Episode
from atommem_env.errors import StoreError
from atommem_env.store.memory_store import MemoryStore
from atommem_env.store.recorder import INTERRUPTED, EpisodeRecord, Recorder
from atommem_env.store.replay import initial_episode, replay
from atommem_env.store.tables import TABLES
from atommem_env.tasks import make_source
from atommem_env.types import EpisodeSettings
from eval.benchmarks import write_figures

_SETTINGS = EpisodeSettings(chunk_tokens=64)
_IN_FLIGHT = 8
_MOST_FILES = 10
_REPLAYED = 8  # the last finished episodes; unfinished ones are all replayed


@dataclass(frozen=True, slots=True)
class Result:
    """The results with one durability; all but the first four must be 0."""

    durability: str
    trials: int
    acknowledged_replies: int  # with "episode": those of episodes whose end was acknowledged
    resumed: int  # interrupted episodes that were resumed to their end
    unreadable: int  # stores that could not be opened or read
    lost: int  # episodes with acknowledged replies, or an acknowledged end, that are missing
    inconsistent: int  # episodes whose journal and replies disagree
    not_resumed: int
    too_many_files: int  # tables


def play(folder: str, durability: str, seed: str, commits: str) -> None:
    """Plays, and prints a line for each commit: of each acknowledged episode its id, replies and whether it ended.

    Args:
        commits: how many, from the moment that a line can be read from the standard input; the store is compacted after each
            of them, and closed at the end. "0": at once and without an end.
    """
    import lancedb  # noqa: F401  # takes a second, during which a kill would test nothing

    store, source = MemoryStore(folder, durability), make_source("synthetic")
    rng = np.random.default_rng(int(seed))

    def begin() -> tuple[Episode, Recorder, Act]:
        index, number = int(rng.integers(len(source))), int(rng.integers(2**31))
        task = source.task(index, number)
        recorder = store.begin(
            env_id="crash",
            task_id=task.id,
            index=index,
            task_seed=number,
            episode_seed=number,
            settings=dataclasses.asdict(_SETTINGS),
        )
        return Episode(task, _SETTINGS, number), recorder, Random(_SETTINGS).begin(number, None)

    playing = [begin() for _ in range(_IN_FLIGHT)]
    os.write(1, b"{}\n")  # from now on it may be killed
    if int(commits):
        sys.stdin.readline()
    for commit in count(1):
        for one in playing:
            _step(*one)
        store.write([recorder for _, recorder, _ in playing])
        acknowledged = {
            recorder.episode_id: (episode.steps, episode.stop_reason is not None)
            for episode, recorder, _ in playing
            if durability == "step" or episode.stop_reason is not None
        }
        os.write(1, json.dumps(acknowledged).encode() + b"\n")  # one call: never an incomplete line
        playing = [begin() if one[0].stop_reason is not None else one for one in playing]
        if int(commits):
            store.optimize()
        if commit == int(commits):
            break
    store.close()


def _step(episode: Episode, recorder: Recorder, act: Act) -> None:
    reply = act(episode.observe())
    assert isinstance(reply, str)
    result = episode.resolve(embed(get_embedder("hashing"), episode.submit(reply)))
    recorder.record(episode.steps, reply, result)
    if episode.stop_reason is not None:
        recorder.end(episode.stop_reason, episode.reward, episode.memory)


def start_player(
    folder: Path, durability: str, seed: int, commits: int = 0, prefix: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """A process that is about to `play`; `prefix` are words of a program that starts it."""
    code = "import sys; from eval.benchmarks.crash import play; play(*sys.argv[1:])"
    words = [str(folder), durability, str(seed), str(commits)]
    command = [*prefix, sys.executable, "-c", code, *words]
    root = Path(__file__).parents[2]
    player = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
    assert player.stdout is not None
    player.stdout.readline()
    return player


def read_acknowledged(player: subprocess.Popen[bytes]) -> dict[str, tuple[int, bool]]:
    """Waits for the end of a player.

    Returns:
        Episode id → (acknowledged replies, whether its end was acknowledged).
    """
    assert player.stdout is not None
    acknowledged: dict[str, tuple[int, bool]] = {}
    for line in player.stdout:
        acknowledged |= {episode: (steps, over) for episode, (steps, over) in json.loads(line).items()}
    return acknowledged


def write_and_kill(folder: Path, durability: str, seed: int, delay: float) -> dict[str, tuple[int, bool]]:
    """Lets a process write for `delay` seconds and kills it.

    Returns:
        Episode id → (acknowledged replies, whether its end was acknowledged).

    Raises:
        RuntimeError: the process ended by itself.
    """
    with start_player(folder, durability, seed) as child:
        timer = threading.Timer(delay, child.send_signal, (signal.SIGKILL,))
        timer.start()
        acknowledged = read_acknowledged(child)
    timer.cancel()
    if child.returncode != -signal.SIGKILL:
        raise RuntimeError(f"Expected the process to be killed, but it ended with status {child.returncode}.")
    return acknowledged


def inspect(
    folder: Path, acknowledged: dict[str, tuple[int, bool]], after: float, resume: bool = True
) -> Iterator[str]:
    """Inspects a store; yields lines that begin with a field of `Result` to count.

    Args:
        after: when the first of the episodes that are played again was committed.
        resume: plays interrupted episodes to their end.
    """
    import lancedb

    store = MemoryStore(folder, "step")
    try:
        store.check()
        records = {record.episode_id: record for record in store.episodes()}
        for name in TABLES if records else ():
            lancedb.connect(folder).open_table(name).to_arrow()
    except Exception as error:  # any error is a finding
        yield f"unreadable: {error!r}"
        return
    for episode_id, (steps, ended) in acknowledged.items():
        row = records.get(episode_id)
        if row is None or row.steps < steps or (ended and row.status == INTERRUPTED):
            yield f"lost: {episode_id} had {steps} replies{' and its end' if ended else ''}, now {row}"
    new = [record for record in records.values() if record.committed_at.timestamp() >= after]
    yield from replay_last(store, new, resume)
    store.optimize()
    store.close()
    for name in TABLES if records else ():
        files = sum(path.is_file() for path in (folder / f"{name}.lance").rglob("*"))
        if files > _MOST_FILES:
            yield f"too_many_files: {files} of {name}"


def replay_last(store: MemoryStore, records: Sequence[EpisodeRecord], resume: bool) -> Iterator[str]:
    """Replays the last of these episodes, and all interrupted ones; yields a line for each that ends otherwise.

    Args:
        resume: plays interrupted episodes to their end.
    """
    source = make_source("synthetic")
    over = [record for record in records if record.status != INTERRUPTED]
    for record in over[-_REPLAYED:] + [record for record in records if record.status == INTERRUPTED]:
        episode = initial_episode(record, source, _SETTINGS)
        try:
            for _ in replay(episode, store, record.episode_id):
                pass
            stored = store.memory_at(record.episode_id, record.steps)
        except StoreError as error:
            yield f"inconsistent: {error}"
            continue
        status = episode.stop_reason or INTERRUPTED
        if (
            episode.steps != record.steps
            or stored.entries() != episode.memory.entries()
            or not np.array_equal(stored.vectors(), episode.memory.vectors())
            or (record.status != INTERRUPTED and status != record.status)
        ):
            yield f"inconsistent: {record}, played again {episode.steps} replies, {status}"
        elif record.status == INTERRUPTED and resume:
            yield _resume(store, record, episode)


def _resume(store: MemoryStore, record: EpisodeRecord, episode: Episode) -> str:
    """Plays an interrupted episode to its end: "resumed", or what is wrong afterwards."""
    recorder = store.resume(record.episode_id)
    act = Random(_SETTINGS).begin(record.episode_seed, None)
    if episode.stop_reason is not None:  # its last reply was written, its end was not
        recorder.end(episode.stop_reason, episode.reward, episode.memory)
    while episode.stop_reason is None:
        _step(episode, recorder, act)
        store.write([recorder])
    store.write([recorder])
    final = store.episode(record.episode_id)
    last = store.memory_at(record.episode_id, episode.steps).entries()
    right = (final.status, final.steps, last) == (episode.stop_reason, episode.steps, episode.memory.entries())
    return "resumed" if right else f"not_resumed: {final}"


def measure(durability: str, trials: int, seed: int, console: Console, longest: float = 3.0) -> Result:
    """Kills `trials` times, after up to `longest` seconds of writing; prints the problems."""
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    replies = 0
    with tempfile.TemporaryDirectory() as work:
        for trial in track(range(trials), durability, console=console, transient=True):
            begun = time.time()
            folder = Path(work) / str(trial // 5)  # five trials write to one store
            acknowledged = write_and_kill(folder, durability, int(rng.integers(2**31)), float(rng.uniform(0, longest)))
            replies += sum(steps for steps, _ in acknowledged.values())
            for line in inspect(folder, acknowledged, begun):
                name, _, detail = line.partition(": ")
                counts[name] += 1
                if detail:
                    console.print(f"{durability}, trial {trial}: {line}", markup=False)
    names = ("resumed", "unreadable", "lost", "inconsistent", "not_resumed", "too_many_files")
    return Result(
        durability=durability, trials=trials, acknowledged_replies=replies, **{name: counts[name] for name in names}
    )


def main(*, out: Path | None = None, trials: int = 50, seed: int = 0) -> None:
    """Kill a process that writes a store, inspect the store, and print a table; the status is 1 if anything was lost.

    Args:
        out: JSON file for the numbers.
        trials: with each durability.
        seed: of the episodes and of the moments.
    """
    console = Console()
    results = [measure(durability, trials, seed, console) for durability in ("episode", "step")]
    fields = [field.name for field in dataclasses.fields(Result)]
    table = Table(title=f"kill -9, {trials} times with each durability")
    table.add_column("")
    for result in results:
        table.add_column(result.durability, justify="right")
    for name in fields[1:]:
        table.add_row(name.replace("_", " "), *(f"{getattr(result, name):,}" for result in results))
    console.print(table)
    write_figures(out, [asdict(result) for result in results])
    sys.exit(any(getattr(result, name) for result in results for name in fields[4:]))


if __name__ == "__main__":
    tyro.cli(main)
