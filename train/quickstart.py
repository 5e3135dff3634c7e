"""`atommem quickstart`: a policy learns to manage its memory, on this machine, within minutes.

    atommem quickstart

1. What a policy without understanding earns, and what perfect ones do.
2. Supervised fine-tuning of `tiny`, a shipped base model, on a teacher that stores facts by a simple rule.
3. Reinforcement learning (GRPO) from there: it may find what the teacher does not know.
4. All three models on the same held-out episodes, with intervals.

The task, the teacher and all figures are those of `configs/train/tiny.toml`. The folder `--out` then holds `quickstart.json`,
`curve.png`, and every run with its own folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from atommem_env.errors import SettingError
from eval.metrics import bootstrap_ci95
from eval.options import EvalConfig
from eval.report.tables import results_table
from eval.run import evaluate
from eval.run_folder import read_jsonl, write_atomic
from train.collect import CollectConfig, collect
from train.grpo import Trainer
from train.recipes import load_recipe
from train.settings import LocalGRPOConfig, SFTConfig
from train.sft import train

RECIPE = "tiny"
_RESULT = "quickstart.json"
_POLICIES = ("constant=unknown", "random", "spam", "perfect-rag", "first-link", "chain-match", "oracle")

_NEXT = """\
What next?
  look at what the trained policy wrote, step by step
      atommem trace {out}/grpo-eval
  be the policy yourself, on the same tasks
      atommem play AtomMem-Synthetic
  train longer, or with settings of your own
      atommem grpo --recipe tiny --model {out}/sft/model --steps 600 --out runs/longer
  evaluate a function of your own: def policy(observation)
      atommem eval AtomMem-Synthetic --policy my_module:policy --out runs/mine
  a larger model, real questions
      atommem grpo --recipe smollm2 --help"""


def main(*, out: Path = Path("runs/quickstart"), seed: int = 0, smoke: bool = False) -> None:
    """Train a small policy by SFT, then GRPO, and show what it gained on held-out tasks.

    Args:
        out: Folder of the runs; what an earlier quick start left there is replaced.
        seed: Of everything that is drawn.
        smoke: Do everything with very little of each, to see within two minutes that it works.
    """
    console = Console()
    _open(out)
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    collecting, fine_tuning, training = _configurations(out, seed, smoke)
    episodes = 40 if smoke else 600

    def judge(policy: str, name: str, count: int) -> dict[str, Any]:
        shared = {field.name: getattr(training, field.name) for field in dataclasses.fields(training)}
        names = {field.name for field in dataclasses.fields(EvalConfig)} & set(shared)
        own = {
            "policy": policy,
            "out": out / name,
            "split": "test",
            "temperature": 0.0,
            "episodes": count,
            "seed": seed,
        }
        return evaluate(
            EvalConfig(**{key: shared[key] for key in names - {"resume"}} | own | {"durability": "episode"})
        )

    console.rule("1. What policies without training earn")
    built_in = [judge(policy, policy.replace("=", "-"), min(100, episodes)) for policy in _POLICIES]
    console.print(results_table(built_in, "Built-in policies; * is given the golds"))
    lap("built_in")

    console.rule("2. Supervised fine-tuning")
    summary = collect(collecting)
    console.print(
        f"{summary['samples']} turns of {summary['policy']}, from {summary['kept']} of {summary['episodes']} episodes."
    )
    train(fine_tuning)
    lap("sft")

    console.rule("3. Reinforcement learning (GRPO)")
    Trainer(training, console).train()
    shutil.copyfile(training.out / "curve.png", out / "curve.png")
    lap("grpo")

    console.rule("4. The same held-out episodes")
    models = {
        "untrained": fine_tuning.model,
        "sft": str(fine_tuning.out / "model"),
        "grpo": str(training.out / "model"),
    }
    results = {name: judge(policy, f"{name}-eval", episodes) | {"label": name} for name, policy in models.items()}
    lap("evaluation")
    gain, low, high = _paired(out / "sft-eval", out / "grpo-eval")
    console.print(results_table(list(results.values()), f"{training.env_id}, {episodes} held-out episodes, greedy"))
    console.print(
        f"GRPO - SFT: {100 * gain:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, paired.\n"
    )
    record = {
        **{f"em_{name}": result["em"] for name, result in results.items()},
        **{f"em_{name}_ci95": result["em_ci95"] for name, result in results.items()},
        "gain": round(gain, 4),
        "gain_ci95": [round(low, 4), round(high, 4)],
        "episodes": episodes,
        "seed": seed,
        "smoke": smoke,
        "seconds": {**seconds, "total": round(time.perf_counter() - started, 1)},
        "recipe": RECIPE,
    }
    write_atomic(out / _RESULT, json.dumps(record, indent=2) + "\n")
    console.print(f"Every number is in {out}, the curve in {out / 'curve.png'}.\n", markup=False, highlight=False)
    console.print(_NEXT.format(out=out), markup=False, highlight=False)


def _open(out: Path) -> None:
    """An empty folder that says whose it is, so that the next quick start knows that it may replace it."""
    if out.exists() and any(out.iterdir()):
        if not (out / _RESULT).is_file():
            raise SettingError(f"{out} holds something other than a quick start; choose another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / _RESULT, "{}\n")


def _configurations(out: Path, seed: int, smoke: bool) -> tuple[CollectConfig, SFTConfig, LocalGRPOConfig]:
    """Those of the recipe, in the folder of this quick start."""
    collecting = dataclasses.replace(load_recipe(RECIPE, CollectConfig), out=out / "samples", seed=seed)
    fine_tuning = dataclasses.replace(
        load_recipe(RECIPE, SFTConfig), samples=out / "samples", out=out / "sft", seed=seed
    )
    training = dataclasses.replace(
        load_recipe(RECIPE, LocalGRPOConfig), model=str(out / "sft" / "model"), out=out / "grpo", seed=seed
    )
    if smoke:
        collecting = dataclasses.replace(collecting, episodes=300)
        training = dataclasses.replace(training, steps=4, groups=4, group_size=8, eval_every=2, eval_episodes=20)
    return collecting, fine_tuning, training


def _paired(before: Path, after: Path) -> tuple[float, float, float]:
    """How much more the second evaluation earned on the same episodes, with a 95 % interval."""
    rewards = [[record["reward"] for record in read_jsonl(folder / "episodes.jsonl")] for folder in (before, after)]
    differences = np.subtract(rewards[1], rewards[0])
    low, high = bootstrap_ci95(differences.tolist(), [1] * len(differences), bounds=(-1.0, 1.0))
    return float(differences.mean()), low, high
