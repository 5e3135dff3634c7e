"""`atommem collect`: a teacher's trajectories, as samples for supervised fine-tuning.

    atommem collect AtomMem-Synthetic --policy oracle --episodes 500 --out runs/oracle-samples

Episodes whose reward is too small are left out; of the others every turn is a sample, in TRL's conversational form: `prompt` is
the chat that shows the observation, in the layout that the *student* is to read, `completion` the reply. The folder `--out` then
holds them as `samples.parquet` and, the same rows, as `samples.jsonl`, beside `config.json` (what was asked for) and
`summary.json` (the numbers). The same configuration gives the same bytes. What is left out: resuming a run that
was interrupted, which leaves nothing.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from agents.event_loop import run_blocking
from agents.rollout import episode_specs
from atommem_env.episode import legal_text
from atommem_env.errors import SettingError
from atommem_env.prompts import get_layout
from atommem_env.types import Message, Rollout, Turn
from eval.options import PlayConfig
from eval.players import Parts, prepare
from eval.progress import episode_bar
from eval.run_folder import require_empty_dir, to_jsonl, write_atomic

_CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("prompt", _CHAT),  # what the layout makes of the observation
        ("completion", _CHAT),  # one message, the reply: the loss is on this alone
        ("env_id", pa.string()),
        ("task_id", pa.string()),
        ("episode", pa.int64()),  # 0 ≤ episode < episodes played
        ("turn", pa.int64()),  # 0 ≤ turn < turns of the episode
        ("reward", pa.float64()),  # of the whole episode, in [0, 1]
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig(PlayConfig):
    """Whose trajectories, and which of them. Options left out are the environment's own."""

    out: Path = Path("runs/collect")
    """Folder of the samples; new or empty."""
    split: str = "train"
    """Split of the dataset."""
    durability: str = "off"
    """off, or episode: keep every entry in the folder's memory/."""
    min_reward: float = 0.5
    """Episodes with a smaller reward (the mean exact match over their questions) are left out."""
    drop_guesses: bool = False
    """Leave out episodes that were won by a guess: not all of a question's evidence was stored when it was answered."""
    drop_faults: bool = False
    """Leave out turns of whose reply an operation was not carried out as written."""


def collect(config: CollectConfig, console: Console | None = None, parts: Parts | None = None) -> dict[str, Any]:
    """Plays the episodes, writes the samples, and returns what `summary.json` holds.

    Args:
        console: where a progress bar is drawn; stderr unless given.
        parts: objects in the place of what the configuration names.

    Raises:
        SettingError: the folder is not empty, a setting cannot work, or no turn was good enough.
        Exception: what the policy, the embedder or the store raised.
    """
    parts = parts or Parts()
    layout = get_layout(parts.layout or config.layout)
    if not 0 <= config.min_reward <= 1:
        raise SettingError(f"min_reward must be between 0 and 1, got {config.min_reward}.")
    require_empty_dir(config.out)
    driver, policy, resolved_config = prepare(config, parts)
    config.out.mkdir(parents=True, exist_ok=True)
    specs = episode_specs(len(driver.source), config.episodes, config.seed)
    with closing(driver.store), episode_bar(console, None, f"{policy.name} on {config.env_id}", len(specs)) as bar:
        rollouts = run_blocking(
            driver.run(
                specs,
                policy,
                in_flight=config.in_flight,
                finished=lambda _, rollout: bar.ended(rollout.reward),
                replied=bar.replied,
            )
        )
    good = [
        (number, rollout)
        for number, rollout in enumerate(rollouts)
        if rollout.reward >= config.min_reward and not (config.drop_guesses and _has_guess(rollout))
    ]
    turns = sum(len(rollout.turns) for _, rollout in good)
    rows = [
        {
            "prompt": layout(turn.observation, driver.settings),
            "completion": [Message(role="assistant", content=legal_text(turn.reply.text)[0])],
            "env_id": config.env_id,
            "task_id": rollout.task_id,
            "episode": episode,
            "turn": number,
            "reward": rollout.reward,
        }
        for episode, rollout in good
        for number, turn in enumerate(rollout.turns)
        if not (config.drop_faults and _has_fault(turn))
    ]
    summary = {
        "env_id": config.env_id,
        "policy": policy.name,
        "privileged": policy.privileged,
        "episodes": len(rollouts),
        "kept": len(good),
        "turns": turns,  # of these
        "turns_with_faults": sum(_has_fault(turn) for _, rollout in good for turn in rollout.turns),
        "samples": len(rows),
        "reward": round(fmean(rollout.reward for rollout in rollouts), 4),  # mean over all episodes played
        "schema_version": resolved_config["schema_version"],
    }
    if not rows:
        best = max(rollout.reward for rollout in rollouts)
        raise SettingError(
            f"No samples: {len(good)} of {len(rollouts)} episodes of {policy.name} reached a reward of "
            f"{config.min_reward:g} (mean {summary['reward']:g}, best {best:g})"
            + (f", and all of their {turns} turns had faults. Leave --drop-faults out, " if good else ". ")
            + ("or" if good else "Lower --min-reward, play more --episodes, or")
            + " choose a better --policy."
        )
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), config.out / "samples.parquet")
    write_atomic(config.out / "samples.jsonl", "".join(map(to_jsonl, rows)))
    asked = {name: getattr(config, name) for name in ("min_reward", "drop_guesses", "drop_faults")}
    for name, record in (("config", {**resolved_config, **asked}), ("summary", summary)):
        write_atomic(config.out / f"{name}.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return summary


def _has_guess(rollout: Rollout) -> bool:
    """Whether a right answer was luck: some of its evidence was not stored."""
    return any(outcome.em == 1 and outcome.stored < outcome.evidence for outcome in rollout.questions)


def _has_fault(turn: Turn) -> bool:
    """Whether something in the reply was not carried out as written, or something was missing from it."""
    return any(result.fault is not None for result in turn.results)


def main(config: CollectConfig) -> None:
    """Collect a policy's trajectories, every turn a prompt and a completion to train on."""
    summary = collect(config)
    Console().print(
        f"{summary['kept']} of {summary['episodes']} episodes kept (mean reward {summary['reward']:.3f}): "
        f"{summary['samples']} samples, {summary['turns_with_faults']} of {summary['turns']} turns with faults.\n"
        f"Written to [bold]{config.out}[/]: samples.parquet, samples.jsonl, config.json, summary.json."
    )
