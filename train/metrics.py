"""The numbers of a training step's rollouts: the rewards to train on, and what the policy did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from atommem_env.env import count_results
from atommem_env.types import Rollout


def count_faults(rollout: Rollout) -> int:
    """How many operations were not carried out as written."""
    return sum(result.fault is not None for turn in rollout.turns for result in turn.results)


def training_rewards(
    rollouts_P_G: Sequence[Sequence[Rollout | None]], fault_penalty: float
) -> list[list[float | None]]:
    """What the advantages are computed from: the reward, less `fault_penalty` for each fault; None where a rollout was lost."""
    return [
        [rollout.reward - fault_penalty * count_faults(rollout) if rollout else None for rollout in group]
        for group in rollouts_P_G
    ]


def policy_metrics(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """What the policy did: operations carried out a turn, by kind; faults and turns an episode; tokens a reply, and the share of
    replies that were truncated."""
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    done: Counter[str] = Counter()
    for turn in turns:
        done.update(count_results(turn.results)["operations"])
    return {
        "operations": {name: done[name] / len(turns) for name in sorted(done)},
        "faults": fmean(map(count_faults, rollouts)),
        "turns": len(turns) / len(rollouts),
        "prompt_tokens": fmean(len(turn.reply.prompt_ids) for turn in turns),
        "reply_tokens": fmean(len(turn.reply.completion_ids) for turn in turns),
        "replies_truncated": sum(turn.reply.stop == "length" for turn in turns) / len(turns),
    }
