"""All that can be known of a cluster run before hours are lost on it: what cannot work is rejected, with what to change.

Each check raises one `SettingError` that lists everything wrong, with what was expected, what came and what to change. What
is checked needs no GPU: memory is a sum, as in `train.estimate`, which leans towards too little.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym

from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from agents.rollout import Driver
from atommem_env.embedders import get_embedder
from atommem_env.errors import AtomMemError, ModelNotFound, SettingError
from atommem_env.types import TaskSource
from train.cluster.machines import Machines
from train.cluster.recipe import VERSION, ClusterGRPOConfig, derived_flags
from train.estimate import gpu_memory_problems
from train.recipes import NAMES, read_recipe
from train.settings import LocalGRPOConfig, make_env
from train.shapes import ModelSize, TaskShape, model_size

# A model's tokens for one of the tokenizer `builtin`, at most. Over 200-document contexts of the three datasets SmolLM2's
# tokenizer has a mean of 1.26 (MuSiQue) to 1.36 (2WikiMultiHopQA), and 1.65 in the chunk with the most foreign names.
_MOST_TOKENS = 1.7
_QUESTION, _NOTICE = 128, 256  # most tokens of a question, and of a notice with what marks the entries

# Flags that would break what a run stands for, and are no setting of it.
_NOT_FREE = {
    "rollout.top_p": "log-probabilities are those of the whole distribution, which must be the one sampled from",
    "rollout.vllm_generate_batch_size": "prompts would be counted otherwise than a resumed run needs",
    "train.num_episodes": "the file of prompts has those of all steps",
    "train.max_epochs": "every rollout is trained on once",
    "data.max_samples": "the file of prompts has those of all steps",
    "data.apply_chat_template": "a prompt is the name of an episode",
    "data.input_template": "a prompt is the name of an episode",
    "actor.dual_clip": "the loss is that of both trainers",
    "actor.loss_agg_mode": "the loss is a mean over the tokens of the whole batch",
    "actor.policy_loss_type": "the loss is that of both trainers",
    "algo.advantage.gamma": "all turns have the advantage of their rollout",
    "algo.advantage.is_correction_gating": "importance_cap is a cap on the ratio",
    "algo.kl.target": "kl_coef is a constant",
    "ds.ring_attn_size": "every training GPU is a data-parallel rank",
    "ds.tensor_parallel_size": "every training GPU is a data-parallel rank",
    "reward.": "the reward is the environment's",
    "critic.": "there is no critic",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What will run: a recipe that passed its check, with what follows from it; checks, sums and commands read it here."""

    run: ClusterGRPOConfig
    model: Path  # its folder; where it is not on this machine, its name
    missing_model: str  # why it is not on this machine; "": it is
    size: ModelSize | None  # None: not known
    task: TaskShape


def make_plan(run: ClusterGRPOConfig, size: ModelSize | None = None) -> Plan:
    """Checks what is arithmetic alone, and derives what the rest of a launch needs.

    Args:
        size: The model's; where it is not given and not known either, what follows from it is not checked.

    Raises:
        SettingError: something cannot work; all of it is listed.
        MissingDependency: the packages that read a model's configuration are not installed.
    """
    model, missing_model = Path(run.model), ""
    try:
        model = find_model(run.model).resolve()
    except ModelNotFound as error:
        missing_model = str(error)
    size = size or (described_size(run.model) if missing_model else model_size(model))
    problems = [*_placement_problems(run, size), *_batch_problems(run, size)]
    task = None
    try:
        task = TaskShape.of(run)
        problems += _budget_problems(run, task)
    except SettingError as error:  # an option or a layout that does not exist
        problems.append(f"environment: {error}")
    problems += _flag_problems(run)
    _reject(run, problems)
    assert task is not None, "else there is a problem"
    return Plan(run, model, missing_model, size, task)


def check_machines(plan: Plan, machines: Machines) -> None:
    """Checks that the run fits on the machines, by the number of their GPUs and by the memory that these have.

    Raises:
        SettingError: it does not; everything wrong is listed.
    """
    _reject(plan.run, _machine_problems(plan, machines))


def check_services(plan: Plan) -> None:
    """Checks what the run needs besides machines: packages, model, data, embedder and the key of wandb.

    An embedder that the run serves itself is left out: it does not run yet. `check_embedder` is for when it does.

    Raises:
        SettingError: something is missing; everything is listed.
    """
    run = plan.run
    embedder = () if run.embedding_model else _embedder_problems(run)
    _reject(run, (*_package_problems(), *_model_problems(plan), *_data_problems(run), *embedder, *_key_problems(run)))


def check_embedder(run: ClusterGRPOConfig) -> None:
    """Checks that the embedder embeds a text.

    Raises:
        SettingError: it does not.
    """
    _reject(run, _embedder_problems(run))


def described_size(model: str) -> ModelSize | None:
    """The size of a model that a recipe of `atommem grpo` describes; None: of no other."""
    recipes = map(read_recipe, NAMES)
    fields = (one.model for one in recipes if one.model and one.configs[LocalGRPOConfig].model == model)
    return next(map(model_size, fields), None)


def task_source(run: ClusterGRPOConfig, split: str | None) -> TaskSource:
    """Where the tasks of a split come from.

    Raises:
        AtomMemError, gymnasium.error.Error: there is no such environment, or its data are not on this machine.
    """
    # It needs no embedder, and the run's own may be a service that does not run yet.
    env = make_env(dataclasses.replace(run, embedder="hashing", durability="off"), split)
    source = Driver.of(env).source
    env.close()
    return source


def _reject(run: ClusterGRPOConfig, problems: Iterable[str]) -> None:
    lines = list(problems)
    if lines:
        raise SettingError(f"{run.model} on {run.env_id} cannot be trained like this:\n- " + "\n- ".join(lines))


def _batch_problems(run: ClusterGRPOConfig, size: ModelSize | None) -> Iterator[str]:
    ranks = run.training_gpus
    rollouts = run.groups * run.group_size
    if rollouts < ranks:
        yield (
            f"groups × group_size must be at least the {ranks} GPUs that train, so that each has a rollout; got {run.groups} × "
            f"{run.group_size} = {rollouts}. Raise groups."
        )
    if run.micro_batch_tokens < run.max_tokens:
        yield (
            f"micro_batch_tokens must be at least max_tokens = {run.max_tokens}, so that every turn fits; got "
            f"{run.micro_batch_tokens}. Raise it, or lower max_tokens."
        )
    if size and run.max_tokens > size.window:
        yield (
            f"max_tokens must be at most {size.window}, the model's window (max_position_embeddings); got {run.max_tokens}. "
            f"Lower it."
        )
    if run.embedding_model and run.embedder != f"openai:{run.embedding_model}":
        yield (
            f"embedder must be 'openai:{run.embedding_model}', which embedding_model serves; got {run.embedder!r}. Change one "
            f"of the two."
        )


def _placement_problems(run: ClusterGRPOConfig, size: ModelSize | None) -> Iterator[str]:
    width, per_node = run.tensor_parallel, run.gpus_per_node
    used, all_gpus = f"engines × tensor_parallel = {run.engines} × {width} = {run.engines * width}", run.gpus
    if width > per_node or (run.colocate and per_node % width):
        yield (
            f"tensor_parallel must divide gpus_per_node = {per_node}: an engine lies on one machine; got {width}. Lower it."
        )
    if run.colocate and run.engines * width != all_gpus:
        yield (
            f"engines × tensor_parallel must be nodes × gpus_per_node = {run.nodes} × {per_node} = {all_gpus} with colocate; "
            f"got {used}. Set engines to {max(1, all_gpus // width)}, or colocate to false."
        )
    if not run.colocate and run.training_gpus < 1:
        yield (
            f"engines × tensor_parallel must leave a GPU of nodes × gpus_per_node = {all_gpus} to train on; got {used}. Lower "
            f"engines, or set colocate to true."
        )
    elif not run.colocate and run.training_gpus % run.nodes:
        yield (
            f"the GPUs that train must be the same number on each of {run.nodes} nodes; {used} leaves {run.training_gpus}. "
            f"Change engines."
        )
    if size and size.heads % width:
        yield f"tensor_parallel must divide the model's {size.heads} attention heads; got {width}. Lower it."
    elif size and size.kv_heads % width and width % size.kv_heads:
        yield f"tensor_parallel must divide the model's {size.kv_heads} heads of keys and values; got {width}. Lower it."


def _budget_problems(run: ClusterGRPOConfig, task: TaskShape) -> Iterator[str]:
    """Whether the longest prompt and a reply fit into `max_tokens`.

    The environment counts chunks and entries with a tokenizer of its own, of which the model's may need `_MOST_TOKENS` for one.
    What was written by a reply (the scratchpad, the query, each entry) has at most `max_new_tokens` of the model's tokens.
    """
    settings, reply = task.settings, run.max_new_tokens
    factor = _MOST_TOKENS if settings.tokenizer == "builtin" else 1.0  # a tokenizer.json should be the model's own
    parts = {
        "chunk_tokens": math.ceil(factor * settings.chunk_tokens),
        "entries shown": min(math.ceil(factor * settings.memory_tokens), settings.top_k * reply),
        "scratchpad": min(math.ceil(factor * settings.scratchpad_tokens), reply),
        "query": reply,
        "questions": _QUESTION * task.turn.questions,
        "notice": _NOTICE,
        "layout": math.ceil(_MOST_TOKENS * task.layout_tokens),
        "max_new_tokens": reply,
    }
    if "read" not in settings.operations:
        parts["entries shown"] = parts["query"] = 0
    if not settings.scratchpad:
        parts["scratchpad"] = 0
    needed = sum(parts.values())
    if run.max_tokens < needed:
        arithmetic = " + ".join(f"{tokens:,} ({what})" for what, tokens in parts.items() if tokens)
        counted = f", with {factor} tokens of the model for one of the environment's" if factor != 1 else ""
        yield (
            f"max_tokens must be at least {needed}, the longest prompt and reply: {arithmetic}{counted}; got "
            f"{run.max_tokens}. Raise it (and micro_batch_tokens), or lower max_new_tokens, chunk_tokens or memory_tokens."
        )


def _flag_problems(run: ClusterGRPOConfig) -> Iterator[str]:
    derived = derived_flags(run, Path(run.model))
    for flag in run.openrlhf:
        name = flag.removeprefix("--").partition("=")[0]
        if not flag.startswith("--"):
            continue  # a value of the flag before it
        # OpenRLHF also takes the beginning of a flag for the flag.
        if any(one.startswith(name) for one in derived):
            yield (
                f"openrlhf must have flags that no setting of the recipe stands for; got {flag}. Leave it out and change the "
                f"setting: the run would not be what its config.json says, or not be right."
            )
            continue
        for fixed, why in _NOT_FREE.items():
            if fixed.startswith(name) or (fixed.endswith(".") and name.startswith(fixed)):
                yield f"openrlhf must leave {fixed} as it is: {why}; got {flag}. Leave it out."
                break


def _machine_problems(plan: Plan, machines: Machines) -> Iterator[str]:
    run = plan.run
    needed = f"nodes × gpus_per_node = {run.nodes} × {run.gpus_per_node}"
    fitting = [node for node in machines.nodes if node.gpus >= run.gpus_per_node]
    if sum(node.gpus for node in machines.nodes) < run.gpus:
        yield f"the machines must have {needed} = {run.gpus} GPUs; got {machines}. Lower nodes or gpus_per_node, and engines."
    elif len(fitting) < run.nodes:
        yield (
            f"{needed} needs {run.nodes} machines of {run.gpus_per_node} GPUs each; got {machines}. Set nodes and gpus_per_node "
            f"to what they have."
        )
    memory = Machines(tuple(fitting)).gpu_memory
    if memory is not None and plan.size is not None:
        yield from gpu_memory_problems(run, plan.size, memory)


def _package_problems() -> Iterator[str]:
    try:
        installed = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed != VERSION:
        yield (
            f"openrlhf must be version {VERSION}, whose inner functions are built upon; got {installed}. "
            f"Install it: pip install 'atommem[cluster]'."
        )
    missing = [name for name in ("deepspeed", "ray", "vllm") if importlib.util.find_spec(name) is None]
    if missing:
        yield f"deepspeed, ray and vllm must be installed; missing: {', '.join(missing)}. pip install 'atommem[cluster]'."


def _model_problems(plan: Plan) -> Iterator[str]:
    if plan.missing_model:
        yield f"model: {plan.missing_model}"
        return
    name = plan.run.model
    try:
        chat = ChatTokenizer(plan.model)
    except (
        AtomMemError,
        OSError,
        ValueError,
    ) as error:  # ours, and those of transformers for a folder without a tokenizer
        yield f"model: {error}"
        return
    tag = "<final_answer></final_answer>"
    written = chat.text(chat.completion_ids(tag)[:-1])
    if "".join(written.split()) != tag:  # transformers makes an empty tokenizer of no file at all
        yield f"model: {name} must hold a tokenizer (tokenizer.json) that can write {tag}; its own cannot. Fetch it again."
    if chat.backend.eos_token_id is None:
        yield f"model: the tokenizer of {name} must name its eos_token, which ends a reply; got none. Set it there."


def _data_problems(run: ClusterGRPOConfig) -> Iterator[str]:
    needed = {"split": run.groups} | ({"eval_split": run.eval_episodes} if run.eval_every else {})
    for name, least in needed.items():
        split = getattr(run, name)
        try:
            tasks = len(task_source(run, split))
        except (AtomMemError, gym.error.Error) as error:
            yield f"{name}: {error}"
            continue
        if tasks < least:
            setting = "groups" if name == "split" else "eval_episodes"
            yield (
                f"{name}: {split!r} must have at least {setting} = {least} tasks, so that none is taken twice at a time; got "
                f"{tasks}. Lower {setting}, or import more."
            )


def _embedder_problems(run: ClusterGRPOConfig) -> Iterator[str]:
    name = run.embedder or "hashing"
    try:
        get_embedder(name).embed(["preflight"], "document")
    except AtomMemError as error:
        yield f"embedder: {error}"


def _key_problems(run: ClusterGRPOConfig) -> Iterator[str]:
    if run.wandb_project and not os.environ.get("WANDB_API_KEY"):
        yield (
            f"wandb_project = {run.wandb_project!r} needs a key in the variable WANDB_API_KEY; got none. Set it, or leave "
            f"wandb_project out."
        )
