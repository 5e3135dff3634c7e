"""All that can be known of a cluster run before hours are lost on it: what cannot work is refused, the rest is estimated.

Each check raises one `SettingError` that lists everything wrong, with what was expected, what came and what to change. What
is checked needs no GPU: memory is a sum, as in `train.estimate`, which leans towards too little.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import gymnasium as gym
from rich import box
from rich.table import Table

from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from agents.rollout import Driver
from atommem_env.embedders import get_embedder
from atommem_env.errors import AtomMemError, ModelNotFound, SettingError
from atommem_env.prompts import get_layout
from atommem_env.tokens import BuiltinTokenizer
from atommem_env.types import Observation
from train.cluster.recipe import VERSION, ClusterGRPOConfig, derived_flags
from train.estimate import (
    SHORT,
    Item,
    ModelSize,
    Turn,
    activations,
    environment_of,
    model_size,
    most_questions,
    product,
    written_sum,
)
from train.recipes import NAMES, read_recipe
from train.settings import LocalGRPOConfig, make_env

# A model's tokens for one of the tokenizer `builtin`. Over 200-document contexts of the three datasets SmolLM2's tokenizer has a
# mean of 1.26 (MuSiQue) to 1.36 (2WikiMultiHopQA), and 1.65 in the chunk with the most foreign names.
_USUAL, _MOST = 1.3, 1.7
_QUESTION, _NOTICE = 128, 256  # most tokens of a question, and of a notice with what marks the entries
_ENGINE = 3e9  # bytes of an engine's workspace and CUDA graphs
# An H100: peak of its dense bf16 arithmetic and of its memory, with the shares of them that are usually reached.
_FLOPS, _BANDWIDTH = 989e12, 3.35e12  # a second; bytes a second
_PREFILL, _DECODE, _TRAIN = 0.4, 0.4, 0.35

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


class Node(NamedTuple):
    """A machine."""

    name: str
    gpus: int
    gpu_memory: int | None  # bytes of its smallest GPU; None: not known


@dataclass(frozen=True, slots=True)
class Machines:
    """What a run can be given."""

    nodes: tuple[Node, ...]

    @classmethod
    def here(cls) -> Machines:
        """This machine.

        Raises:
            SettingError: the GPUs' driver does not answer.
        """
        memory = _gpu_memory()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = len(memory) if visible is None else len([name for name in visible.split(",") if name.strip()])
        return cls((Node(platform.node(), gpus, min(memory, default=None)),))

    @classmethod
    def on_ray(cls) -> Machines:
        """Those of the Ray that this process is connected to; `train` must be installed on each of them.

        Raises:
            SettingError: the driver of some machine's GPUs does not answer.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ask = ray.remote(num_cpus=0)(_gpu_memory)
        alive = [node for node in ray.nodes() if node["Alive"]]
        asked = [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in alive
        ]
        return cls(
            tuple(
                Node(node["NodeManagerHostname"], int(node["Resources"].get("GPU", 0)), min(memory, default=None))
                for node, memory in zip(alive, ray.get(asked), strict=True)
            )
        )

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of the smallest GPU; None: not known."""
        return min((node.gpu_memory for node in self.nodes if node.gpu_memory is not None), default=None)

    def __str__(self) -> str:
        return ", ".join(f"{node.name}: {node.gpus}" for node in self.nodes) or "no machine"


def _gpu_memory() -> list[int]:
    """Bytes of each GPU of this machine, by its driver: a process to which Ray gave no GPU sees none by CUDA."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        raise SettingError(f"{' '.join(command)} failed on {platform.node()}: {(asked.stdout + asked.stderr).strip()}")
    return [int(line) * 2**20 for line in asked.stdout.split()]


# ---------------------------------------------------------------------------------------------------------------- checks


def check_recipe(run: ClusterGRPOConfig, size: ModelSize | None = None) -> None:
    """Checks what is arithmetic alone.

    Args:
        size: The model's; where it is not given and not known either, what follows from it is not checked.

    Raises:
        SettingError: something cannot work; all of it is listed.
    """
    _refuse(run, _recipe_problems(run, size or known_size(run.model)))


def check_machines(run: ClusterGRPOConfig, machines: Machines, size: ModelSize | None = None) -> None:
    """Checks that the run fits on the machines, by the number of their GPUs and by the memory that these have.

    Raises:
        SettingError: it does not; everything wrong is listed.
    """
    _refuse(run, _machine_problems(run, machines, size or known_size(run.model)))


def check_services(run: ClusterGRPOConfig) -> None:
    """Checks what the run needs besides machines: packages, model, data, embedder and the key of wandb.

    An embedder that the run serves itself is left out: it does not stand yet. `check_embedder` is for when it does.

    Raises:
        SettingError: something is missing; everything is listed.
    """
    embedder = () if run.embedding_model else _embedder_problems(run)
    _refuse(run, (*_package_problems(), *_model_problems(run), *_data_problems(run), *embedder, *_key_problems(run)))


def check_embedder(run: ClusterGRPOConfig) -> None:
    """Checks that the embedder embeds a text.

    Raises:
        SettingError: it does not.
    """
    _refuse(run, _embedder_problems(run))


def known_size(model: str) -> ModelSize | None:
    """The size of a model on this machine, or of one that a recipe describes; None: of no other.

    Raises:
        MissingDependency: the packages that read a model's configuration are not installed.
    """
    try:
        return model_size(model)
    except ModelNotFound:
        recipes = map(read_recipe, NAMES)
        fields = (one.model for one in recipes if one.model and one.configs[LocalGRPOConfig].model == model)
        return next((model_size(model, described) for described in fields), None)


def _refuse(run: ClusterGRPOConfig, problems: Iterable[str]) -> None:
    listed = list(problems)
    if listed:
        raise SettingError(f"{run.model} on {run.env_id} cannot be trained like this:\n- " + "\n- ".join(listed))


def _recipe_problems(run: ClusterGRPOConfig, size: ModelSize | None) -> Iterator[str]:
    yield from _placement_problems(run, size)
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
    try:
        yield from _budget_problems(run)
    except SettingError as error:  # an option or a layout that does not exist
        yield f"environment: {error}"
    yield from _flag_problems(run)


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


def _budget_problems(run: ClusterGRPOConfig) -> Iterator[str]:
    """Whether the longest prompt and a reply fit into `max_tokens`.

    The environment counts chunks and entries with a tokenizer of its own, of which the model's may need `_MOST` for one. What
    was written by a reply (the scratchpad, the query, each entry) has at most `max_new_tokens` of the model's tokens.
    """
    _, settings, source = environment_of(run)
    factor = _MOST if settings.tokenizer == "builtin" else 1.0  # a tokenizer.json should be the model's own
    reply = run.max_new_tokens
    parts = {
        "chunk_tokens": math.ceil(factor * settings.chunk_tokens),
        "entries shown": min(math.ceil(factor * settings.memory_tokens), settings.top_k * reply),
        "scratchpad": min(math.ceil(factor * settings.scratchpad_tokens), reply),
        "query": reply,
        "questions": _QUESTION * most_questions(source),
        "notice": _NOTICE,
        "layout": math.ceil(_MOST * _layout_tokens(run)),
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


def _layout_tokens(run: ClusterGRPOConfig) -> int:
    """Tokens of a prompt in which nothing stands yet, as the environment counts them."""
    _, settings, _ = environment_of(run)
    empty: Any = {name: "" if kind is str else 0 for name, kind in get_type_hints(Observation).items()}
    chat = get_layout(run.layout)(empty | {"phase": "read"}, settings)
    return sum(BuiltinTokenizer().count(message["content"]) for message in chat)


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


def _machine_problems(run: ClusterGRPOConfig, machines: Machines, size: ModelSize | None) -> Iterator[str]:
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
    if memory is None or size is None:
        return
    for phase, items in gpu_memory_needed(run, size, memory).items():
        total = sum(item.size for item in items)
        if total > memory:
            yield (
                f"a GPU must have about {total / 1e9:.1f} GB while it {phase}; got {memory / 1e9:.1f} GB:\n{written_sum(items)}\n"
                f"  Smaller with {', '.join(_remedies(run, phase))}."
            )
    room = _cache_room(run, size, memory)
    if room < run.max_tokens * _cache_of_token(size):
        yield (
            f"an engine must have room for the keys and values of max_tokens = {run.max_tokens} tokens, "
            f"{run.max_tokens * _cache_of_token(size) / 1e9:.1f} GB; got {room / 1e9:.1f} GB, what {run.gpu_memory_utilization} "
            f"of {memory / 1e9:.1f} GB leaves beside the weights. Raise gpu_memory_utilization or tensor_parallel."
        )


def _package_problems() -> Iterator[str]:
    try:
        found = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        yield (
            f"openrlhf must be version {VERSION}, whose inner functions are built upon; got {found}. "
            f"Install it: pip install 'atommem[cluster]'."
        )
    missing = [name for name in ("deepspeed", "ray", "vllm") if importlib.util.find_spec(name) is None]
    if missing:
        yield f"deepspeed, ray and vllm must be installed; missing: {', '.join(missing)}. pip install 'atommem[cluster]'."


def _model_problems(run: ClusterGRPOConfig) -> Iterator[str]:
    try:
        chat = ChatTokenizer(find_model(run.model))
    except (
        AtomMemError,
        OSError,
        ValueError,
    ) as error:  # of ours, and what transformers raises for a folder without a tokenizer
        yield f"model: {error}"
        return
    tag = "<final_answer></final_answer>"
    if (
        "".join(chat.text(chat.completion_ids(tag)[:-1]).split()) != tag
    ):  # transformers makes an empty one of no file at all
        yield f"model: {run.model} must hold a tokenizer (tokenizer.json) that can write {tag}; its own cannot. Fetch it again."
    if chat.backend.eos_token_id is None:
        yield f"model: the tokenizer of {run.model} must name its eos_token, which ends a reply; got none. Set it there."


def _data_problems(run: ClusterGRPOConfig) -> Iterator[str]:
    # The data need no embedder, and the run's own may be a service that is yet to be started.
    plain = dataclasses.replace(run, embedder="hashing", durability="off")
    needed = {"split": run.groups} | ({"eval_split": run.eval_episodes} if run.eval_every else {})
    for name, least in needed.items():
        split = getattr(run, name)
        try:
            env = make_env(plain, split)
        except (AtomMemError, gym.error.Error) as error:
            yield f"{name}: {error}"
            continue
        tasks = len(Driver.of(env).source)
        env.close()
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


# ---------------------------------------------------------------------------------------------------------------- memory


def gpu_memory_needed(run: ClusterGRPOConfig, size: ModelSize, gpu_memory: int) -> dict[str, list[Item]]:
    """What one GPU must hold in each phase of a step.

    Args:
        gpu_memory: Bytes that it has; services take shares of it.

    DeepSpeed trains in bf16 with float32 copies; ZeRO 2 shards gradients, copies and moments over the GPUs that train, ZeRO 3
    the weights as well. Between updates, with `colocate`, all but the bf16 weights wait in the machine's memory.
    """
    ranks = max(1, run.training_gpus)
    shard = (ranks, "GPUs")
    parameters = (size.parameters, "parameters")
    of_weights = shard if run.zero_stage == 3 else (1, "GPU")
    weights = [_quotient("weights", of_weights, parameters, (2, "bytes"))]
    if run.kl_coef > 0:
        weights.append(_quotient("starting model", of_weights, parameters, (2, "bytes")))
    trained = [*weights, _quotient("gradients", shard, parameters, (2, "bytes"))]
    if not run.offload_optimizer:
        trained.append(_quotient("float32 weights, moments", shard, parameters, (12, "bytes")))
    if run.zero_stage == 3:
        trained.append(product("weights gathered", (min(size.parameters, 10**9), "parameters"), (2, "bytes")))
    trained += [
        activations(size, run.micro_batch_tokens, 2, residual=2, adapters=False, recompute=run.gradient_checkpointing),
        product(
            "logits",
            (run.micro_batch_tokens, "tokens"),
            (size.vocabulary, "vocabulary"),
            (10, "bytes: float32, its gradient, that in bf16"),
        ),
    ]
    engine = [_share("engine", run.gpu_memory_utilization, gpu_memory)]
    service = [_share("embedding service", run.embedding_gpu_memory, gpu_memory)] if run.embedding_model else []
    samples = [*engine, *(weights if run.colocate else []), *service]
    return {"samples": samples, "updates": [*trained, *service]}


def _quotient(what: str, divisor: tuple[int, str], *factors: tuple[int, str]) -> Item:
    """
    >>> _quotient("weights", (8, "GPUs"), (1_000, "parameters"), (2, "bytes"))
    Item(what='weights', size=250, how='1,000 parameters × 2 bytes / 8 GPUs')
    """
    item = product(what, *factors)
    return Item(what, item.size // divisor[0], item.how + (f" / {divisor[0]} {divisor[1]}" if divisor[0] > 1 else ""))


def _share(what: str, share: float, memory: int) -> Item:
    return Item(what, int(share * memory), f"{share:g} of {memory / 1e9:.1f} GB")


def _cache_of_token(size: ModelSize) -> int:
    """Bytes of the keys and values of a token, in bf16."""
    return 2 * size.layers * size.kv_heads * size.head_dim * 2


def _cache_room(run: ClusterGRPOConfig, size: ModelSize, gpu_memory: int) -> float:
    """Bytes that an engine, over all its GPUs, has for keys and values."""
    return run.tensor_parallel * (run.gpu_memory_utilization * gpu_memory - _ENGINE) - 2 * size.parameters


def _remedies(run: ClusterGRPOConfig, phase: str) -> list[str]:
    """Settings that would make the phase's sum smaller, those first that cost least."""
    if phase == "samples":
        told = ["a lower gpu_memory_utilization"]
    else:
        told = ["a lower micro_batch_tokens"] if run.micro_batch_tokens > run.max_tokens else []
        told += ["gradient_checkpointing = true"] if not run.gradient_checkpointing else []
    told += ["zero_stage = 3"] if run.zero_stage < 3 else []
    if phase == "updates":
        told += ["offload_optimizer = true"] if not run.offload_optimizer else []
        told += ["a lower max_tokens with micro_batch_tokens"]
    return [*told, "more GPUs"]


# -------------------------------------------------------------------------------------------------------------- estimate


class Row(NamedTuple):
    """One line of the estimate."""

    what: str
    figure: str
    how: str


def estimate(run: ClusterGRPOConfig, size: ModelSize, gpu_memory: int) -> list[Row]:
    """Tokens, memory and time of a run, by rules of thumb.

    A chunk has the usual length of its dataset, an entry and a reply 64 tokens, and one token of the environment is 1.3 of the
    model's. The time is that of H100s (989 TFLOP/s and 3.35 TB/s, of which prefill reaches 40 %, decoding 40 % and training
    35 %), with 2 FLOPs a parameter and token forward and 4 backward; attention, stragglers, the passing on of weights, the
    embedder and evaluations come on top.
    """
    turn = Turn.of(run)
    _, settings, source = environment_of(run)
    head = round(_USUAL * (_layout_tokens(run) + SHORT * most_questions(source)))
    chunk = round(_USUAL * turn.context / turn.reading)
    reads, writes = "read" in settings.operations, settings.scratchpad
    own = (turn.entries + SHORT if reads else 0) + (SHORT if writes else 0)
    prompt = head + chunk + own
    tokens = turn.reading * chunk + turn.turns * (head + own + turn.reply)
    rollouts = run.groups * run.group_size

    shared = turn.reading * chunk + turn.turns * head
    prefilled = run.groups * shared + rollouts * turn.turns * own
    engine_gpus = run.engines * run.tensor_parallel
    prefill = 2 * size.parameters * prefilled / (engine_gpus * _FLOPS * _PREFILL)
    rows = math.ceil(rollouts / run.engines)
    cache = (prompt + turn.reply) * _cache_of_token(size)
    room = _cache_room(run, size, gpu_memory)
    at_once = max(1, min(rows, int(room // cache)))
    read = (2 * size.parameters + at_once * cache) / run.tensor_parallel
    decode = math.ceil(rows / at_once) * turn.turns * turn.reply * read / (_BANDWIDTH * _DECODE)

    passes = 2 + 6 + 2 * run.gradient_checkpointing + 2 * (run.kl_coef > 0)
    trained = passes * size.parameters * rollouts * tokens / (max(1, run.training_gpus) * _FLOPS * _TRAIN)
    seconds = max(prefill + decode, trained) if run.asynchronous else prefill + decode + trained

    sums = {name: sum(item.size for item in items) for name, items in gpu_memory_needed(run, size, gpu_memory).items()}
    gpus = f"{run.training_gpus} GPU{'s' if run.training_gpus > 1 else ''}"
    billions = f"{size.parameters / 1e9:.2f}e9 parameters"
    asleep = (
        0.0  # bytes of the engines' weights while the trainer has the GPUs, of the trainer's copies while they have
    )
    if run.colocate:
        asleep += 2 * size.parameters * run.engines
    if run.colocate or run.offload_optimizer:
        asleep += 14 * size.parameters
    return [
        Row(
            "tokens a rollout",
            f"{_round(tokens):,}",
            f"{turn.reading} chunks × {chunk:,} + {turn.turns} turns × ({head} of layout and questions + {own} of memory + "
            f"{turn.reply} of reply)",
        ),
        Row(
            "tokens trained a step",
            f"{_round(rollouts * tokens):,}",
            f"{run.groups} groups × {run.group_size} rollouts × {tokens:,}",
        ),
        Row(
            "KV cache a rollout",
            f"{cache / 1e9:.2f} GB",
            f"{prompt + turn.reply:,} tokens × {_cache_of_token(size):,} bytes; an engine has room for "
            f"{max(0, int(room // cache))} that share nothing, and gets {rows}",
        ),
        Row(
            "memory of a GPU, sampling",
            f"{sums['samples'] / 1e9:.0f} GB",
            f"of {gpu_memory / 1e9:.0f}; {run.gpu_memory_utilization:g} of it the engine's",
        ),
        Row(
            "memory of a GPU, updating",
            f"{sums['updates'] / 1e9:.0f} GB",
            f"ZeRO {run.zero_stage} over {gpus}, {run.micro_batch_tokens:,} tokens at a time",
        ),
        Row(
            "memory of a machine",
            f"{asleep / run.nodes / 1e9:.0f} GB",
            "what waits there while others have the GPUs: 2 bytes a parameter of each engine, 14 of the trainer",
        ),
        Row(
            "seconds of sampling",
            f"{_round(prefill + decode):,}",
            f"{prefilled / 1e6:.1f}e6 prompt tokens (shared ones once a group): {prefill:.0f} s; "
            f"{turn.turns * turn.reply} tokens decoded of {at_once} rollouts at once: {decode:.0f} s",
        ),
        Row(
            "seconds of training",
            f"{_round(trained):,}",
            f"{passes} FLOPs × {billions} × {rollouts * tokens / 1e6:.1f}e6 tokens / ({gpus} × "
            f"{_TRAIN * 100:.0f} % of {_FLOPS / 1e12:.0f} TFLOP/s)",
        ),
        Row("seconds a step", f"{_round(seconds):,}", f"{run.steps} steps in {run.steps * seconds / 3600:.1f} hours"),
    ]


def estimate_table(run: ClusterGRPOConfig, size: ModelSize | None = None, machines: Machines | None = None) -> Table:
    """The estimate as a table; where the machines' GPUs are not known, for GPUs of 80 GB.

    Where the model's size is not known, the table says so.
    """
    size = size or known_size(run.model)
    memory = (machines and machines.gpu_memory) or 80 * 10**9
    table = Table(title="Estimate (an H100's speed; rules of thumb)", box=box.SIMPLE, title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("how")
    if size is None:
        table.add_row("size of the model", "unknown", f"{run.model} is not on this machine: hf download {run.model}")
    else:
        for row in estimate(run, size, memory):
            table.add_row(*row)
    return table


def _round(value: float) -> int:
    """To two significant digits.

    >>> _round(36_512), _round(373.2), _round(4.2)
    (37000, 370, 4)
    """
    return round(value if value < 10 else round(value, 1 - math.floor(math.log10(value))))
