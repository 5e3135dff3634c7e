"""What a cluster run logs: `metrics.jsonl` under the names of `atommem grpo`, and everything to TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from eval.run_folder import read_jsonl, to_jsonl, write_atomic

_ROLLOUT = "rollout/"  # before the names of the numbers that are about rollouts and turns
# What OpenRLHF calls a number → what `atommem grpo` calls it, in metrics.jsonl; TensorBoard and wandb show both.
_NAMES = {
    "policy_loss": "policy_loss",
    "ppo_clip_ratio": "clip_fraction",
    "ppo_kl": "approx_kl",
    "vllm_kl": "sampler_kl",
    "kl": "reference_kl",
    "entropy_loss": "entropy",
    "actor_grad_norm": "grad_norm",
    "actor_lr": "learning_rate",
    "timing/generation": "seconds_rollouts",
    "timing/make_experience": "seconds_logprobs",
    "timing/ppo_train": "seconds_update",
    "timing/broadcast": "seconds_sync",
    "timing/step_total": "seconds",
}


class MetricsLogger:
    """Writes `metrics.jsonl` under the names of `train.grpo`, and passes everything to TensorBoard."""

    def __init__(self, path: Path, tensorboard: Any) -> None:
        self.path, self.tensorboard = path, tensorboard
        # Of the prompts of the step: they show that a resumed run loses none and repeats none.
        self.positions: list[int] = []

    def truncate(self, step: int) -> None:
        """Drops the lines after the checkpoint that a run resumes from: those steps are logged again."""
        lines = [line for line in read_jsonl(self.path) if line["step"] <= step]
        write_atomic(self.path, "".join(map(to_jsonl, lines)))

    def log_train(self, step: int, status: dict[str, Any]) -> None:
        """The numbers of an update, and of the rollouts that it was made on."""
        line: dict[str, Any] = {"step": step, "positions": self.positions}
        for name, value in status.items():
            if name.startswith(_ROLLOUT):
                *outer, inner = name.removeprefix(_ROLLOUT).split("/")
                target = line.setdefault(outer[0], {}) if outer else line
                target[inner] = round(value, 6)
            elif name in _NAMES:
                line[_NAMES[name]] = float(value)
        self._write(line)
        self.tensorboard.log_train(step, status)

    def log_eval(self, step: int, status: dict[str, Any]) -> None:
        """Exact match on the held-out episodes; its interval is that of a share, at most as wide for one that is a mean."""
        em, episodes = status["eval_held_out_pass1"], int(status["eval_num_samples"])
        margin = 1.96 * math.sqrt(em * (1 - em) / episodes)
        interval = [round(max(em - margin, 0), 4), round(min(em + margin, 1), 4)]
        self._write({"step": step, "eval_em": round(em, 4), "eval_em_ci95": interval, "eval_episodes": episodes})
        self.tensorboard.log_eval(step, status)

    def close(self) -> None:
        """Closes TensorBoard's files."""
        self.tensorboard.close()

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(to_jsonl(line))


def flatten_stats(stats: dict[str, Any]) -> dict[str, float]:
    """A step's numbers under names for TensorBoard and wandb.

    >>> flatten_stats({"turns": 3.0, "operations": {"create": 0.5}})
    {'rollout/turns': 3.0, 'rollout/operations/create': 0.5}
    """
    flattened: dict[str, float] = {}
    for name, value in stats.items():
        if isinstance(value, dict):
            flattened |= {f"{_ROLLOUT}{name}/{inner}": number for inner, number in value.items()}
        else:
            flattened[_ROLLOUT + name] = value
    return flattened
