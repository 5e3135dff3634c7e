"""The value of each memory operation: the same episodes, planned again without it.

    python -m eval.benchmarks.operations
    python -m eval.benchmarks.operations --episodes 1000 --out operations.json

The planner (`agents.baselines.planner`) plays episodes of AtomMem-Synthetic in which one operation per reply is carried out:
with all four, without each of them, and without both that change an entry. A difference is the score with all four minus this
one on the same episodes, with the 95 % bootstrap interval over episodes.

The episodes (`EPISODES`): a chunk is about one document; the capacity is one entry for each of the 20 links of ten questions; a
fact of each chain is corrected, so that about as many entries become obsolete; a search shows two entries, enough for one
fact. The scratchpad is off: it is always in view, and with 2048 tokens it could store all relevant facts, which would make
the other memory redundant.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import tyro
from rich.console import Console
from rich.table import Table

from agents.baselines.planner import Planner
from agents.rollout import Driver, EpisodeSpec
from atommem_env.env import count_results
from atommem_env.types import Rollout
from eval.benchmarks import write_figures
from eval.metrics import bootstrap_ci95

OPERATIONS = ("create", "read", "update", "delete")
WITHOUT: tuple[tuple[str, ...], ...] = ((), *((name,) for name in OPERATIONS), ("update", "delete"))
EPISODES: dict[str, Any] = {
    "split": "test",
    "questions": 10,
    "hops": [2],
    "num_docs": 40,
    "corrections": 1.0,
    "unanswerable": 0.0,
    "chunk_tokens": 24,
    "capacity": 20,
    "top_k": 2,
    "operations_per_reply": 1,
    "scratchpad": False,
    "embedder": "hashing",
    "durability": "off",
}


@dataclass(frozen=True, slots=True)
class Result:
    """The planner without some of the operations. Scores are mean exact match, in [0, 1]."""

    without: tuple[str, ...]
    em: float
    lost: float  # the score with all four minus this one
    lost_ci95: tuple[float, float]
    operations: dict[str, float]  # carried out, mean per episode
    replies: float  # mean per episode


def play(without: tuple[str, ...], episodes: int) -> list[Rollout]:
    """The first `episodes` episodes without these operations, in order."""
    operations = [name for name in OPERATIONS if name not in without]
    driver = Driver.of(gym.make("AtomMem-Synthetic", operations=operations, **EPISODES))
    specs = [EpisodeSpec(index, index, index) for index in range(episodes)]
    return asyncio.run(driver.run(specs, Planner(driver.settings)))


def compare(without: tuple[str, ...], rollouts: list[Rollout], complete: list[Rollout]) -> Result:
    """Compares `rollouts` with those of the same episodes with all four operations."""
    lost = [one.reward - other.reward for one, other in zip(complete, rollouts, strict=True)]
    operations: Counter[str] = Counter()
    for rollout in rollouts:
        for turn in rollout.turns:
            operations.update(count_results(turn.results)["operations"])
    return Result(
        without=without,
        em=sum(rollout.reward for rollout in rollouts) / len(rollouts),
        lost=sum(lost) / len(lost),
        lost_ci95=bootstrap_ci95(lost, [len(rollout.questions) for rollout in rollouts]),
        operations={name: operations[name] / len(rollouts) for name in OPERATIONS},
        replies=sum(len(rollout.turns) for rollout in rollouts) / len(rollouts),
    )


def main(*, episodes: int = 300, out: Path | None = None) -> None:
    """Print the cost of losing each operation.

    Args:
        episodes: of ten questions each.
        out: JSON file for the numbers.
    """
    complete = play((), episodes)
    results = [compare(without, play(without, episodes) if without else complete, complete) for without in WITHOUT]
    table = Table(title=f"AtomMem-Synthetic, the planner, {episodes} episodes of {EPISODES['questions']} questions")
    for heading in ("without", "EM", "lost", "95 %", *OPERATIONS):
        table.add_column(heading, justify="left" if heading == "without" else "right", no_wrap=True)
    for result in results:
        low, high = result.lost_ci95
        lost = (f"{100 * result.lost:.1f}", f"{100 * low:.1f}–{100 * high:.1f}") if result.without else ("", "")
        counts = [f"{count:.1f}" for count in result.operations.values()]
        table.add_row("+".join(result.without), f"{100 * result.em:.1f}", *lost, *counts)
    Console().print(table)
    figures = {"episodes": episodes, "settings": EPISODES, "results": [asdict(result) for result in results]}
    write_figures(out, figures)


if __name__ == "__main__":
    tyro.cli(main)
