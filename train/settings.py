"""What GRPO is, whoever carries it out: the settings that both trainers have, one machine's and the cluster's."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from atommem_env.env import AtomMemEnv
from atommem_env.errors import SettingError
from eval.options import EnvConfig, has_splits
from eval.run_folder import require_empty_dir, require_same_config


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig(EnvConfig):
    """What is trained on what. The defaults are the paper's, for a model of some billion parameters."""

    model: str = "smollm2"
    """The model to start from: tiny, smollm2, or the folder of a Hugging Face chat model."""
    out: Path = Path("runs/grpo")
    """Folder of the run; new or empty, unless --resume."""
    resume: bool = False
    """Resume an interrupted run in the same folder."""
    split: str | None = "train"
    """Split of the dataset to train on."""
    eval_split: str = "dev"
    """Split of the held-out episodes."""
    durability: str | None = "off"
    """off, or episode: keep every entry of every rollout in the folder's memory/."""
    temperature: float = 1.0
    """Of the rollouts; evaluation is greedy."""
    steps: int = 200
    """Updates."""
    groups: int = 16
    """Tasks in a step."""
    group_size: int = 16
    """Rollouts of each task."""
    learning_rate: float = 1e-6
    """Highest learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What becomes of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises."""
    fault_penalty: float = 0.0
    """Taken off the reward for each operation that was not carried out as written; in training alone."""
    divide_by_std: bool = False
    """Divide advantages by the standard deviation of the group."""
    clip_low: float = 0.2
    """A token made less likely than 1 - clip_low times its old probability is left there."""
    clip_high: float = 0.28
    """A token made more likely than 1 + clip_high times is left there."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the starting model."""
    importance_cap: float | None = 2.0
    """Most that a token counts for the sampler's rounding; None: no correction."""
    max_grad_norm: float = 1.0
    """A longer gradient is scaled down to this length."""
    micro_batch_tokens: int = 16_384
    """Tokens computed at the same time in an update; changes memory and speed only."""
    eval_every: int = 20
    """Steps between evaluations; 0: none, and the last model counts as the best."""
    eval_episodes: int = 200
    """Episodes of an evaluation."""
    save_every: int = 20
    """Steps between checkpoints."""
    seed: int = 0
    """Of the tasks, of what is sampled, and of new weights."""
    recipe: tyro.conf.Suppress[str | None] = field(default=None, compare=False)
    """The recipe that the settings come from; for the record alone."""

    def __post_init__(self) -> None:
        for name in ("steps", "groups", "save_every", "in_flight", "max_new_tokens", "micro_batch_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("group_size", self.group_size >= 2, "at least 2 (one rollout has nothing to be compared with)")
        self._check("fault_penalty", 0 <= self.fault_penalty < math.inf, "at least 0")
        self._check("temperature", self.temperature > 0, "above 0 (greedy rollouts of a task are all alike)")
        for name in ("learning_rate", "max_grad_norm"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("eval_every", "warmup_steps"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("eval_episodes", self.eval_episodes >= 1 or not self.eval_every, "at least 1")
        if self.eval_every and self.split == self.eval_split:
            raise SettingError(
                f"split and eval_split are both {self.split!r}; held-out episodes are those of another split."
            )
        if self.eval_every and self.data is not None:
            raise SettingError(
                "--data names one file, and evaluation needs other questions than training. Import both files with "
                "`atommem data import` as two splits, or turn evaluation off with --eval-every 0."
            )

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise SettingError(f"{name} must be {expected}, got {getattr(self, name)!r}.")


def make_env(run: GRPOConfig, split: str | None) -> AtomMemEnv:
    """The environment of a run, with the tasks of one split."""
    if split in (None, run.split):
        return run.make_env(store=str(run.out / "memory"))
    if not has_splits(run.env_id, run.source):
        raise SettingError(
            f"The tasks of {run.source or run.env_id} have no splits, so that none can be held out for evaluation. Give the task "
            "source an option split, or turn evaluation off with --eval-every 0."
        )
    return run.make_env(store=str(run.out / "memory"), split=split)


def open_run(run: GRPOConfig | SFTConfig, *, extendable: str | None = None, **recorded: str) -> str:
    """Checks that the run's folder fits; returns the text of its `config.json`.

    Args:
        extendable: a setting that may be greater now than the resumed run was begun with.
        recorded: what tells the run from others beside its settings.

    Raises:
        SettingError: a new run in a folder that is not empty, or what is to be resumed is another run.
    """
    values = {name: value for name, value in dataclasses.asdict(run).items() if name not in ("out", "resume")}
    resolved_config = json.loads(json.dumps(values | recorded, default=str))
    if run.resume:
        # The same settings may come from another recipe, or from none.
        settings = {name: value for name, value in resolved_config.items() if name != "recipe"}
        require_same_config(run.out / "config.json", settings, extendable=extendable)
    else:
        require_empty_dir(run.out, ", or --resume")
    run.out.mkdir(parents=True, exist_ok=True)
    return json.dumps(resolved_config, indent=2) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGRPOConfig(GRPOConfig):
    """A training run on one machine."""

    resume: bool = False
    """Resume an interrupted run in the same folder; with more --steps, and a constant --schedule, a finished one is extended."""
    lora_rank: int = 0
    """Train adapters of this rank in every linear layer, merged in the end; 0 trains all weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; weights that are trained are float32 in any case."""
    share_prefixes: bool = True
    """Compute the prompts' common beginnings once for all rollouts of a group; changes the speed only."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""

    def __post_init__(self) -> None:
        GRPOConfig.__post_init__(self)  # super() does not work in a class with slots
        self._check("lora_rank", self.lora_rank >= 0, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig:
    """What is to be learned from what. The defaults are those of AtomMem's public code, but for the learning rate."""

    samples: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SAMPLES")]
    """Folder that `atommem collect` wrote."""
    model: str = "smollm2"
    """The model to start from: smollm2, or the folder of a Hugging Face chat model."""
    out: Path = Path("runs/sft")
    """Folder of the run; new or empty, unless --resume."""
    resume: bool = False
    """Resume an interrupted run in the same folder."""
    epochs: float = 3.0
    """Passes over the samples."""
    batch_size: int = 16
    """Samples in an update."""
    micro_batch_size: int = 2
    """Samples computed at the same time; changes memory and speed only."""
    learning_rate: float = 2e-5
    """Highest learning rate; it rises over the first 3 % of the updates and falls to 0 as a cosine."""
    lora_rank: int = 0
    """Train adapters of this rank in every linear layer, merged in the end; 0 trains all weights."""
    max_tokens: int = 18_384
    """A longer sample, prompt and reply together, is an error: nothing is truncated."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the weights while training; on a GPU float32 weights are computed with in bfloat16."""
    save_every: int = 100
    """Updates between checkpoints; the last one is kept until the run is finished."""
    seed: int = 0
    """Of the order of the samples, and of new adapters."""
    recipe: tyro.conf.Suppress[str | None] = field(default=None, compare=False)
    """The recipe that the settings come from; for the record alone."""

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size < 1 or self.batch_size % self.micro_batch_size:
            raise SettingError(
                f"batch_size must be a multiple of micro_batch_size, got {self.batch_size} and {self.micro_batch_size}."
            )
