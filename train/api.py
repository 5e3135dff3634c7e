"""Collecting from Python: `atommem_env.collect(policy, env, out=…)`, what `atommem collect` is on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.chat_policy import ChatModel
from eval.api import EnvLike, configure, console_for
from eval.players import PolicyLike
from train.collect import CollectConfig
from train.collect import collect as collect_config


def collect(
    policy: PolicyLike,
    env: EnvLike | None = None,
    *,
    out: str | Path,
    episodes: int = 50,
    seed: int = 0,
    model: str | ChatModel | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Plays episodes and writes every turn of the good ones as a prompt and a completion to train on.

    Args:
        policy, env, seed, model, progress: as for `atommem_env.evaluate`.
        out: folder of the samples, new or empty: `atommem sft` reads it.
        options: of `atommem collect`, with underscores (`min_reward`, `drop_faults`, `layout`, …), and of the environment.

    Returns:
        What `summary.json` holds: `episodes`, `kept`, `samples`, `reward` and more.

    Raises:
        SettingError: an option cannot work, the folder is not empty, or no turn was good enough.
        Exception: what the policy, the embedder or the store raised.
    """
    config, parts = configure(
        CollectConfig, policy, env, model, options | {"out": Path(out), "episodes": episodes, "seed": seed}
    )
    return collect_config(config, console_for(progress), parts)
