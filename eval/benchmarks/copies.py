"""Copies of a store in use: `python -m eval.benchmarks.copies [--copies 40] [--out FILE]`, some minutes on two cores.

A process writes episodes of `AtomMem-Synthetic` while its folder is copied by `cp -r`. Each copy must either be complete, so
that its episodes replay to the memories in it (`eval.benchmarks.crash`), or be rejected by `MemoryStore.check`.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from atommem_env.errors import StoreError
from atommem_env.store.memory_store import MemoryStore
from eval.benchmarks import write_figures
from eval.benchmarks.crash import read_acknowledged, replay_last, start_player


@dataclass(frozen=True, slots=True)
class Result:
    """What the copies of one store were."""

    durability: str
    copies: int
    complete: int
    rejected: int  # incomplete, and `check` said so
    unnoticed: int  # incomplete, and it did not; must be 0


def measure(durability: str, copies: int, console: Console, seed: int = 0, longest: float = 0.5) -> Result:
    """Copies a store that is written to, each time up to `longest` seconds later; prints what was not noticed."""
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(("complete", "rejected", "unnoticed"), 0)
    with tempfile.TemporaryDirectory() as work:
        with start_player(Path(work) / "store", durability, seed) as player:
            reader = threading.Thread(target=read_acknowledged, args=(player,))  # without it the pipe would fill up
            reader.start()
            try:
                for number in range(copies):
                    _wait(player, float(rng.uniform(0, longest)))
                    words = ["cp", "-r", f"{work}/store", f"{work}/{number}"]  # files vanish as the store compacts them
                    subprocess.run(words, stderr=subprocess.DEVNULL, check=False)
            finally:
                player.kill()
                reader.join()
        for number in track(range(copies), durability, console=console, transient=True):
            store = MemoryStore(Path(work) / str(number))
            try:
                store.check()
            except StoreError:
                counts["rejected"] += 1
                continue
            problems = [*replay_last(store, store.episodes(), resume=False)]
            counts["unnoticed" if problems else "complete"] += 1
            for line in problems:
                console.print(f"{durability}, copy {number}: {line}", markup=False)
    return Result(durability=durability, copies=copies, **counts)


def _wait(player: subprocess.Popen[bytes], seconds: float) -> None:
    """Waits while the player writes.

    Raises:
        RuntimeError: the player has ended.
    """
    try:
        player.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    raise RuntimeError(f"Expected the process to write on, but it ended with status {player.returncode}.")


def main(*, out: Path | None = None, copies: int = 40, seed: int = 0) -> None:
    """Copy a store in use, and print a table; the status is 1 if an incomplete copy was not noticed.

    Args:
        out: JSON file for the numbers.
        copies: How many, with each durability.
        seed: Draws episodes and moments.
    """
    console = Console()
    results = [measure(durability, copies, console, seed) for durability in ("episode", "step")]
    names = [field.name for field in dataclasses.fields(Result)]
    table = Table(title="Copies of a store in use")
    for name in names:
        table.add_column(name, justify="left" if name == "durability" else "right")
    for result in results:
        table.add_row(*(str(getattr(result, name)) for name in names))
    console.print(table)
    write_figures(out, [dataclasses.asdict(result) for result in results])
    sys.exit(any(result.unnoticed for result in results))


if __name__ == "__main__":
    tyro.cli(main)
