"""`atommem quickstart`: the built-in policies on the synthetic tasks, in a minute and without any data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rich.console import Console

from eval.run import EvalConfig, evaluate, results_table

_POLICIES = ("silent", "constant=unknown", "random", "spam", "fixed-position", "append-all", "oracle")

_NEXT = """\
What next?
  be the policy yourself
      atommem play AtomMem-Synthetic
  evaluate a function of your own: def policy(observation)
      atommem eval AtomMem-Synthetic --policy my_module:policy --out runs/mine
  real questions
      atommem data import hotpotqa FILE --split dev --corpus FILE
      atommem eval AtomMem-HotpotQA --policy oracle --out runs/hotpotqa
  a language model on this machine
      pip install -e '.[local]' && atommem models get smollm2
      atommem eval AtomMem-Synthetic --policy smollm2 --episodes 5 --out runs/lm"""


def main(*, out: Path = Path("runs/quickstart"), episodes: int = 100, seed: int = 0) -> None:
    """Evaluate the built-in policies on held-out synthetic tasks and print a table.

    Args:
        out: Folder of the runs; what an earlier quick start left there is replaced.
        episodes: Episodes for each policy.
        seed: Draws the tasks.
    """
    console = Console()
    summaries = []
    for policy in _POLICIES:
        folder = out / policy
        if (folder / "config.json").exists():  # only ever a folder of ours
            shutil.rmtree(folder)
        config = EvalConfig(
            env_id="AtomMem-Synthetic", policy=policy, out=folder, episodes=episodes, seed=seed, split="test"
        )
        summaries.append(evaluate(config, console))
    out.joinpath("quickstart.json").write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
    console.print(results_table(summaries, f"AtomMem-Synthetic, held-out tasks, {episodes} episodes each"))
    console.print(f"Every number and every memory entry is in {out}.\n\n{_NEXT}", markup=False, highlight=False)
