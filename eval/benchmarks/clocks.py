"""A store shared with a process whose clock is wrong: `python -m eval.benchmarks.clocks [--trials 2] [--out FILE]`.

Two processes write episodes of `AtomMem-Synthetic` to one folder at the same time and compact it after each commit; the
clock of one is wrong by some days (by the program `faketime`, a package of most Linux distributions). When both have closed
the store, all that was acknowledged must be there, and be what the same replies lead to (`eval.benchmarks.crash`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from atommem_env.errors import MissingDependency
from eval.benchmarks import write_figures
from eval.benchmarks.crash import inspect, read_acknowledged, start_player

DAYS = (3.0, 8.0, 400.0, -8.0)


@dataclass(frozen=True, slots=True)
class Result:
    """What was left of the stores with one wrong clock; all but the first three must be 0."""

    days: float  # by which the clock of one of the two processes is ahead
    trials: int
    acknowledged_replies: int
    failed: int  # processes that ended with an error
    unreadable: int  # stores that could not be opened or read
    lost: int  # acknowledged replies, and ends, that were not there
    inconsistent: int  # episodes whose journal and replies disagree


def measure(days: float, trials: int, commits: int, console: Console, seed: int = 0) -> Result:
    """Two processes with `commits` commits each, `trials` times; prints what was lost.

    Raises:
        MissingDependency: there is no program `faketime`.
    """
    if shutil.which("faketime") is None:
        raise MissingDependency("This program shifts the clock by `faketime`: install the package of that name.")
    counts = dict.fromkeys(("failed", "unreadable", "lost", "inconsistent"), 0)
    replies = 0
    # The clock of the process alone is wrong, not the times of files.
    shift = ("env", "NO_FAKE_STAT=1", "faketime", "--exclude-monotonic", "-f", f"{days:+g}d")
    for trial in range(trials):
        with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
            players = [
                stack.enter_context(start_player(Path(work), "step", seed + 2 * trial + number, commits, prefix))
                for number, prefix in enumerate(((), shift))
            ]
            for player in players:
                assert player.stdin is not None
                player.stdin.write(b"\n")
                player.stdin.close()
            acknowledged = {episode: last for player in players for episode, last in read_acknowledged(player).items()}
            counts["failed"] += sum(player.wait() != 0 for player in players)
            replies += sum(steps for steps, _ in acknowledged.values())
            for line in inspect(Path(work), acknowledged, 0, resume=False):
                name = line.partition(": ")[0]
                if name in counts:
                    counts[name] += 1
                    console.print(f"{days:+g} days, trial {trial}: {line}", markup=False)
    return Result(days=days, trials=trials, acknowledged_replies=replies, **counts)


def main(*, out: Path | None = None, trials: int = 2, commits: int = 32, seed: int = 0) -> None:
    """Share a store with a process whose clock is wrong, and print a table; the status is 1 if anything was lost.

    Args:
        out: JSON file for the numbers.
        trials: How often, with each wrong clock.
        commits: Of each process.
        seed: Draws the episodes.
    """
    console = Console()
    results = [measure(days, trials, commits, console, seed) for days in DAYS]
    names = [field.name for field in dataclasses.fields(Result)]
    table = Table(title="Two processes, the clock of one is wrong")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for result in results:
        table.add_row(*(f"{getattr(result, name):,g}" for name in names))
    console.print(table)
    write_figures(out, [dataclasses.asdict(result) for result in results])
    sys.exit(any(getattr(result, name) for result in results for name in names[3:]))


if __name__ == "__main__":
    tyro.cli(main)
