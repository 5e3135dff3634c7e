"""What a cluster run is: a recipe's settings, and the flags of OpenRLHF that they become."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.rollout import EpisodeSpec, episode_specs
from atommem_env.errors import SettingError
from eval.options import EnvConfig
from eval.played_as import CARD, record_of, write_card
from eval.run_folder import to_jsonl, write_atomic
from eval.toml_tables import fields_of, read_recipe_file, read_table, shipped_recipes
from train.settings import GRPOConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "cluster"
VERSION = "0.11.2"  # of OpenRLHF; another is rejected
AGENT = Path(__file__).with_name("agent.py")
RUN_VARIABLE = "ATOMMEM_RUN"  # names the folder of the run to every process of its job
REPLACEMENTS = 3  # of each prompt
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterGRPOConfig(GRPOConfig):
    """A training run on a cluster. `micro_batch_tokens` is of each GPU."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each machine that this run takes."""
    colocate: bool = True
    """Engines and trainer take turns on all GPUs; else `engines` × `tensor_parallel` GPUs sample and the others train."""
    engines: int = 8
    """vLLM engines."""
    tensor_parallel: int = 1
    """GPUs of each engine."""
    zero_stage: int = 3
    """DeepSpeed: 2 shards gradients and moments over the GPUs, 3 the weights as well."""
    offload_optimizer: bool = False
    """Hold Adam's moments in the machines' memory instead of the GPUs'."""
    gradient_checkpointing: bool = True
    """Compute activations twice instead of storing them: less memory, more time."""
    max_tokens: int = 16_384
    """Longest prompt and reply together; a longer prompt ends the run: nothing is truncated."""
    gpu_memory_utilization: float = 0.6
    """Share of its GPU's memory that an engine may take."""
    asynchronous: bool = False
    """Sample the next step while this one is trained on; its samples are one update old."""
    partial_rollouts: bool = False
    """With `asynchronous`: new weights reach episodes in the middle."""
    dynamic_filtering: bool = False
    """Play another task instead of one whose rollouts all have the same reward."""
    retries: int = 2
    """How often an episode that the infrastructure failed is played again before its group is dropped and replaced."""
    embedding_model: str | None = None
    """The model that an embedding service of the run's own serves, for the embedder openai:MODEL; else it runs elsewhere."""
    embedding_gpu_memory: float = 0.1
    """Share of one GPU's memory that this service may take."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases; the key is read from WANDB_API_KEY."""
    openrlhf: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FLAG")] = ()
    """Any other flags of OpenRLHF, for example --vllm.enforce_eager or --ds.zpg=8; they come last, and so count."""

    def __post_init__(self) -> None:
        GRPOConfig.__post_init__(self)
        for name in ("nodes", "gpus_per_node", "engines", "tensor_parallel"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("zero_stage", self.zero_stage in (2, 3), "2 or 3")
        self._check("retries", self.retries >= 0, "at least 0")
        self._check("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "above 0 and at most 1")
        self._check("partial_rollouts", self.asynchronous or not self.partial_rollouts, "false without asynchronous")
        self._check("colocate", not (self.colocate and self.asynchronous), "false with asynchronous")

    @property
    def gpus(self) -> int:
        """All GPUs of the run."""
        return self.nodes * self.gpus_per_node

    @property
    def training_gpus(self) -> int:
        """GPUs that DeepSpeed shards the model over: the data-parallel ranks."""
        return self.gpus if self.colocate else self.gpus - self.engines * self.tensor_parallel


@dataclass(frozen=True, slots=True)
class Prompt:
    """What OpenRLHF takes for a prompt: the name of an episode."""

    split: str  # train or held_out
    position: int  # among the prompts of its file; a replacement has that of what it replaces
    spec: EpisodeSpec

    def text(self) -> str:
        return json.dumps({"split": self.split, "position": self.position, **dataclasses.asdict(self.spec)})

    @classmethod
    def of(cls, text: str) -> Prompt:
        fields = json.loads(text)
        return cls(fields.pop("split"), fields.pop("position"), EpisodeSpec(**fields))


def read_recipe(name: str) -> ClusterGRPOConfig:
    """The recipe of that name in `configs/cluster/`, or the one in that TOML file.

    Raises:
        SettingError: as in `read_recipe_file`, or something in a file is not as it must be.
    """
    file = read_recipe_file(name, FOLDER, joined=("set", "openrlhf"))
    for table in file.tables:
        if table not in ("env", "cluster"):
            raise SettingError(f"{file}: there is no table [{table}]. There are: env, cluster.")
    env = read_table(file, "env", file.tables.get("env", {}), fields_of(EnvConfig))
    fields = {field: kind for field, kind in fields_of(ClusterGRPOConfig).items() if field != "recipe"}
    own = read_table(file, "cluster", file.tables.get("cluster", {}), fields)
    if "env_id" not in env:
        raise SettingError(f"{file}: [env] must name env_id, for example AtomMem-HotpotQA.")
    try:
        return ClusterGRPOConfig(**env | own, recipe=file.name)
    except SettingError as error:
        error.add_note(f"in {file}")
        raise


def read_run() -> ClusterGRPOConfig:
    """The run that this process is a part of: the one in the folder that the variable `ATOMMEM_RUN` names.

    Raises:
        SettingError: the variable is not set, or the folder holds no run.
    """
    folder = Path(os.environ.get(RUN_VARIABLE, ""))
    path = folder / "config.json"
    if not path.is_file():
        raise SettingError(
            f"{RUN_VARIABLE} must name the folder of a cluster run, got {str(folder)!r}. Start it by `atommem train cluster`."
        )
    fields = read_table(path, "the run", json.loads(path.read_text(encoding="utf-8")), fields_of(ClusterGRPOConfig))
    return ClusterGRPOConfig(**fields | {"out": folder})


def recipe_names() -> list[str]:
    """The recipes that come with this package."""
    return shipped_recipes(FOLDER)


def write_prompts(run: ClusterGRPOConfig, train_tasks: int, held_out_tasks: int) -> None:
    """Writes the files of prompts into the run's folder: a prompt names a task, which the executor plays.

    OpenRLHF reads `prompts.jsonl`, exactly those of all steps, and `held_out.jsonl`. The tasks of `replacements.jsonl` replace
    those whose group is dropped or filtered: the replacements of prompt p are its lines p, p + N, …, with N prompts in all, so
    that a resumed run takes the same ones.
    """
    wanted = run.steps * run.groups
    train = episode_specs(train_tasks, (1 + REPLACEMENTS) * wanted, run.seed)
    files = {"prompts": ("train", train[:wanted]), "replacements": ("train", train[wanted:])}
    if run.eval_every:
        files["held_out"] = ("held_out", episode_specs(held_out_tasks, run.eval_episodes, run.seed))
    for name, (split, specs) in files.items():
        prompts = (Prompt(split, number % wanted, spec).text() for number, spec in enumerate(specs))
        lines = "".join(to_jsonl({"prompt": prompt, "datasource": split}) for prompt in prompts)
        write_atomic(run.out / f"{name}.jsonl", lines)


def write_run_card(run: ClusterGRPOConfig) -> None:
    """Writes `atommem.json` into the run's folder, from where it goes into that of every model (`add_card`)."""
    environment = record_of(run)
    write_card(
        run.out, environment, run.max_new_tokens, command="atommem train cluster", run=run.out, recipe=run.recipe
    )


def add_card(run: ClusterGRPOConfig) -> None:
    """Puts the run's `atommem.json` into the folder of the model that OpenRLHF wrote, if it has written one."""
    card, model = run.out / CARD, run.out / "model"
    if card.is_file() and model.is_dir():  # a folder that an earlier version prepared has no card
        shutil.copyfile(card, model / CARD)


def openrlhf_flags(run: ClusterGRPOConfig, model: Path) -> list[str]:
    """The arguments of `openrlhf.cli.train_ppo_ray`.

    Args:
        model: the folder of the model to start from.
    """
    return flag_words(derived_flags(run, model), run.openrlhf)


def derived_flags(run: ClusterGRPOConfig, model: Path) -> dict[str, Any]:
    """The flags that follow from the recipe's settings; one that is False is left out."""
    per_node = run.gpus_per_node if run.colocate else run.training_gpus // run.nodes
    rollouts = run.groups * run.group_size
    flags: dict[str, Any] = {
        "actor.model_name_or_path": model,
        "train.agent_func_path": AGENT,
        "data.prompt_dataset": run.out / "prompts.jsonl",
        "data.input_key": "prompt",
        "data.max_len": run.max_tokens,
        "rollout.max_new_tokens": run.max_new_tokens,
        "rollout.temperature": run.temperature,
        "rollout.batch_size": run.groups,
        "rollout.n_samples_per_prompt": run.group_size,
        "rollout.micro_batch_size": 1,
        "rollout.max_tokens_per_gpu": run.micro_batch_tokens,
        "train.batch_size": rollouts,  # one update a step: on-policy
        "train.micro_batch_size": 1,
        "train.dynamic_batch_enable": True,
        "train.max_tokens_per_gpu": run.micro_batch_tokens,
        "train.seed": run.seed,
        "actor.num_nodes": run.nodes,
        "actor.num_gpus_per_node": per_node,
        "ref.num_nodes": run.nodes,
        "ref.num_gpus_per_node": per_node,
        "actor.adam.lr": run.learning_rate,
        "actor.lr_scheduler": _SCHEDULES[run.schedule],
        "actor.lr_warmup_ratio": run.warmup_steps / run.steps,
        "actor.max_norm": run.max_grad_norm,
        "actor.eps_clip_low_high": (run.clip_low, run.clip_high),
        "actor.entropy_coef": 0,  # logged, not trained on
        "actor.gradient_checkpointing_enable": run.gradient_checkpointing,
        "algo.advantage.estimator": "group_norm" if run.divide_by_std else "dr_grpo",
        "algo.kl.init_coef": run.kl_coef,
        "algo.kl.use_loss": run.kl_coef > 0,
        "algo.kl.estimator": "k3",
        "algo.dynamic_filtering_enable": run.dynamic_filtering,
        "vllm.num_engines": run.engines,
        "vllm.tensor_parallel_size": run.tensor_parallel,
        "vllm.gpu_memory_utilization": run.gpu_memory_utilization,
        "vllm.enable_prefix_caching": True,
        "train.colocate_all": run.colocate,
        "train.colocate_actor_ref": run.kl_coef > 0,
        "vllm.enable_sleep": run.colocate,
        "ds.enable_sleep": run.colocate,
        "ds.zero_stage": run.zero_stage,
        "ds.adam_offload": run.offload_optimizer,
        "ds.packing_samples": True,
        "train.async_enable": run.asynchronous,
        "train.partial_rollout_enable": run.partial_rollouts,
        "eval.steps": run.eval_every or -1,
        "eval.temperature": 0,
        "eval.n_samples_per_prompt": 1,
        "ckpt.path": run.out / "checkpoints",
        "ckpt.output_dir": run.out / ("last" if run.eval_every else "model"),  # the best so far is exported to model/
        "ckpt.save_steps": run.save_every,
        "ckpt.load_enable": run.resume,
        "logger.tensorboard_dir": run.out / "tensorboard",
        "logger.wandb.run_name": run.out.name,
    }
    # The correction also makes the engines record the log-probabilities that were sampled with; without a cap it changes nothing.
    cap = 1e9 if run.importance_cap is None else run.importance_cap
    flags |= {
        "algo.advantage.is_correction_level": "token",
        "algo.advantage.is_correction_mode": "clip",
        "algo.advantage.is_correction_threshold": (0, cap),
    }
    if run.eval_every:
        flags["eval.dataset"] = run.out / "held_out.jsonl"
    if run.wandb_project:
        flags |= {"logger.wandb.key": "$WANDB_API_KEY", "logger.wandb.project": run.wandb_project}
    return flags


def flag_words(flags: dict[str, Any], more: Sequence[str]) -> list[str]:
    """Flags of OpenRLHF as the words of a command; those of a recipe's `openrlhf` come last, and so count.

    >>> flag_words({"ds.zero_stage": 3, "ds.adam_offload": False, "adam.betas": (0.9, 0.95)}, ["--ds.zpg=8"])
    ['--ds.zero_stage', '3', '--adam.betas', '0.9', '0.95', '--ds.zpg', '8']
    """
    words: list[str] = []
    for name, value in flags.items():
        if value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return [*words, *(word for flag in more for word in flag.split("=", 1))]
