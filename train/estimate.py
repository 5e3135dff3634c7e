"""The memory that a run needs at its peak, on one machine or on many, summed before anything is loaded; and a cluster's time.

Weights, gradients, Adam's moments and copies are counted exactly, from the model's size. The rest are rules of thumb that lean
towards too little, because a run that would have worked must not be rejected: an entry and a reply are short (`SHORT` tokens),
a document has the length that is usual in its dataset, and what an allocator wastes is left out. Against the resident memory of
small Qwen3 models on a CPU (width 256 and 512), an update's sum came out 0 to 15 % too small, and the cache of keys and values
10 to 20 %.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich import box
from rich.table import Table

from agents.models.find import find_model
from atommem_env.errors import MissingDependency, SettingError
from train.cluster.recipe import ClusterGRPOConfig
from train.settings import LocalGRPOConfig, SFTConfig
from train.shapes import SHORT, ModelSize, TaskShape, TurnTokens, model_size

MODEL_TOKENS = 1.3  # a model's tokens for one of the tokenizer `builtin`, in the mean
_CHARACTERS_A_TOKEN = 5  # of English text, rounded up
_ENGINE = 3e9  # bytes of an engine's workspace and CUDA graphs
# An H100: peak of its dense bf16 arithmetic and of its memory, with the shares of them that are usually reached.
_FLOPS, _BANDWIDTH = 989e12, 3.35e12  # a second; bytes a second
_PREFILL, _DECODE, _TRAIN = 0.4, 0.4, 0.35


class Item(NamedTuple):
    """One line of the sum."""

    what: str
    size: int  # bytes
    how: str  # the multiplication


def check_memory(run: SFTConfig | LocalGRPOConfig, model: dict[str, Any] | None = None) -> None:
    """Rejects a run that cannot fit into the memory that is free now, of the GPU where there is one.

    Args:
        run: What is to be trained.
        model: The fields of its `config.json`, where the model is not on this machine yet.

    Raises:
        SettingError: it cannot fit; the message has the whole sum, and what would make it smaller.
        ModelNotFound: `model` is not given, and the model is not on this machine.
        MissingDependency: the extra `train` is not installed.
    """
    size = model_size(model or find_model(run.model))
    try:
        import psutil
        import torch
    except ImportError as error:
        raise MissingDependency(f"Training needs {error.name!r}: pip install 'atommem[train]'.") from error
    gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    check_fits(run, size, free, gpu=gpu)


def check_fits(run: SFTConfig | LocalGRPOConfig, size: ModelSize, free: int, *, gpu: bool) -> None:
    """Compares the sum with `free` bytes.

    Raises:
        SettingError: it is more.
    """
    phases = memory_needed(run, size, gpu=gpu)
    totals = {phase: sum(item.size for item in items) for phase, items in phases.items()}
    phase = max(totals, key=totals.__getitem__)
    if totals[phase] <= free:
        return
    where = "are free on the GPU" if gpu else "of memory are free, and there is no GPU"
    raise SettingError(
        f"{run.model} needs about {totals[phase] / 1e9:.1f} GB while it {phase}, and {free / 1e9:.1f} GB {where}:\n"
        f"{written_sum(phases[phase])}\nSmaller with {', '.join(_remedies(run, phase))}, or a smaller --model."
    )


def written_sum(items: Sequence[Item]) -> str:
    """The lines of a sum, and the sum.

    >>> print(written_sum([Item("weights", 2 * 10**9, "10⁹ × 2"), Item("moments", 4 * 10**9, "10⁹ × 4")]))
      weights      2.0 GB  10⁹ × 2
      moments      4.0 GB  10⁹ × 4
      sum          6.0 GB
    """
    width = max(len(item.what) for item in items)
    lines = [f"  {item.what:<{width}} {item.size / 1e9:8.1f} GB  {item.how}" for item in items]
    return "\n".join([*lines, f"  {'sum':<{width}} {sum(item.size for item in items) / 1e9:8.1f} GB"])


def memory_needed(run: SFTConfig | LocalGRPOConfig, size: ModelSize, *, gpu: bool) -> dict[str, list[Item]]:
    """The sum for each phase of a run; what it needs is the larger one."""
    return _sft_memory(run, size, gpu=gpu) if isinstance(run, SFTConfig) else _grpo_memory(run, size, gpu=gpu)


def _sft_memory(run: SFTConfig, size: ModelSize, *, gpu: bool) -> dict[str, list[Item]]:
    weight = 2 if run.dtype == "bfloat16" else 4
    tokens = run.micro_batch_size * min(_longest_sample(run.samples), run.max_tokens, size.window)
    computed = 2 if gpu else weight
    return {
        "trains": [
            *_trained(size, run.lora_rank, weight, gradients=True),
            *([_casts(size)] if computed < weight and not run.lora_rank else []),
            activations(
                size, tokens, computed, residual=_residual(run, computed), adapters=run.lora_rank > 0, recompute=gpu
            ),
        ]  # TRL computes the logits in small pieces
    }


def _grpo_memory(run: LocalGRPOConfig, size: ModelSize, *, gpu: bool) -> dict[str, list[Item]]:
    computed = 2 if run.dtype == "bfloat16" else 4
    weight = computed if run.lora_rank else 4
    always: list[Item] = []
    if run.dtype == "bfloat16" and not run.lora_rank:
        always.append(product("copy that plays", (size.parameters, "parameters"), (2, "bytes")))
    if run.kl_coef and not run.lora_rank:
        always.append(product("starting model", (size.parameters, "parameters"), (4, "bytes")))
    if run.eval_every and not gpu:  # with a GPU they lie in the machine's memory
        always.append(product("best weights so far", (_trained_count(size, run.lora_rank), "trained"), (4, "bytes")))

    turn = TurnTokens.of(run)
    rows = min(run.in_flight, max(run.groups * run.group_size, run.eval_episodes if run.eval_every else 0))
    positions = min(size.window, turn.chunk + turn.entries + run.max_new_tokens)
    cache = product(
        "keys and values",
        (rows, "rows"),
        (positions, "tokens"),
        (size.layers, "layers"),
        (2 * size.kv_heads * size.head_dim, "numbers"),
        (computed, "bytes"),
        (2, "as it grows by copying"),
    )
    chances = product("next tokens' probabilities", (rows, "rows"), (size.vocabulary, "vocabulary"), (28, "bytes"))

    group = turn.chunk + run.group_size * turn.own if run.share_prefixes else run.group_size * (turn.chunk + turn.own)
    tokens = min(run.micro_batch_tokens, run.groups * turn.turns * group)
    replies = tokens * run.group_size * turn.reply // group
    update = [
        *([_casts(size)] if computed < weight else []),
        activations(
            size,
            tokens,
            computed,
            residual=_residual(run, computed),
            adapters=run.lora_rank > 0,
            recompute=run.gradient_checkpointing,
        ),
        product(
            "logits of the replies",
            (replies, "tokens"),
            (size.vocabulary, "vocabulary"),
            (4, "bytes"),
            (4, "with softmax and gradients"),
        ),
    ]
    return {
        "plays": [*_trained(size, run.lora_rank, weight, gradients=False), *always, cache, chances],
        "updates": [*_trained(size, run.lora_rank, weight, gradients=True), *always, *update],
    }


def product(what: str, *factors: tuple[int, str]) -> Item:
    """A line whose size is a product.

    >>> product("weights", (1_000, "parameters"), (4, "bytes"))
    Item(what='weights', size=4000, how='1,000 parameters × 4 bytes')
    """
    return Item(
        what, math.prod(count for count, _ in factors), " × ".join(f"{count:,} {unit}" for count, unit in factors)
    )


def _trained_count(size: ModelSize, lora_rank: int) -> int:
    return lora_rank * size.linear_width or size.parameters


def _trained(size: ModelSize, lora_rank: int, weight: int, *, gradients: bool) -> list[Item]:
    """The weights, and what the optimiser stores for those that it trains; `weight` is bytes, adapters are float32."""
    count, of_trained = _trained_count(size, lora_rank), 4 if lora_rank else weight
    lines = [product("weights", (size.parameters, "parameters"), (weight, "bytes"))]
    if lora_rank:
        lines.append(product("adapters", (count, f"of rank {lora_rank}"), (4, "bytes")))
    if gradients:
        lines.append(product("gradients", (count, "trained"), (of_trained, "bytes")))
    return [*lines, product("Adam's moments", (count, "trained"), (2 * of_trained, "bytes"))]


def _residual(run: SFTConfig | LocalGRPOConfig, computed: int) -> int:
    return computed if run.lora_rank else 4  # weights in float32 make it float32, whatever layers compute in


def _casts(size: ModelSize) -> Item:
    return product("weights in bfloat16", (size.parameters, "parameters"), (2, "bytes"))


def activations(size: ModelSize, tokens: int, computed: int, *, residual: int, adapters: bool, recompute: bool) -> Item:
    """What a forward pass stores for the backward pass, at `computed` bytes a number and `residual` between the layers.

    A layer stores of each token: of its two norms, always in float32, input, result and output (3 h each, 2 h where their weights
    are not trained), and of the norms of queries and keys two (one); of the attention queries, keys and values repeated for
    all heads, its result, and that again in the order of the row (5 q); of the MLP its four inner tensors (4 i). Recomputing
    stores each layer's input, and all this for one layer.
    """
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    norms = (4 if adapters else 6) * size.hidden
    if size.normalised_heads:
        norms += (1 if adapters else 2) * (queries + keys)
    layer = 4 * norms + computed * (5 * queries + 4 * size.intermediate)
    if not recompute:
        return product("activations", (tokens, "tokens"), (size.layers, "layers"), (layer, "bytes"))
    inputs = size.layers * size.hidden * residual
    return product("activations, recomputed", (tokens, "tokens"), (inputs + layer, "bytes"))


def _longest_sample(folder: Path) -> int:
    """Tokens of the longest sample, by its characters; 0 where there are none, which training itself will say."""
    path = folder / "samples.parquet"
    if not path.is_file():
        return 0
    table = pq.read_table(path, columns=["prompt", "completion"])
    characters = np.zeros(len(table))
    for column in table.columns:
        chats = column.combine_chunks()
        lengths = pc.utf8_length(chats.flatten().field("content"))
        characters += np.bincount(pc.list_parent_indices(chats), weights=lengths, minlength=len(table))
    return int(characters.max(initial=0)) // _CHARACTERS_A_TOKEN


def _remedies(run: SFTConfig | LocalGRPOConfig, phase: str) -> list[str]:
    """Options that would make the phase's sum smaller, those first that change least of what is learned."""
    names = {"plays": ["in_flight"], "updates": ["micro_batch_tokens"], "trains": ["micro_batch_size"]}[phase]
    values = dataclasses.asdict(run)
    options = [f"a lower --{name.replace('_', '-')} than {values[name]}" for name in names if values[name] > 1]
    if phase == "plays":
        options.append("a smaller --max-new-tokens or --set chunk_tokens=")
    if phase == "updates" and not values["gradient_checkpointing"]:
        options.append("--gradient-checkpointing")
    if run.dtype == "float32":
        options.append("--dtype bfloat16")
    if not run.lora_rank:
        options.append("--lora-rank 16")
    return options


# ------------------------------------------------------------------------------------------------------------- on a cluster


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


def gpu_memory_problems(run: ClusterGRPOConfig, size: ModelSize, gpu_memory: int) -> Iterator[str]:
    """What does not fit on GPUs with `gpu_memory` bytes each: the sum, and what would make it smaller."""
    for phase, items in gpu_memory_needed(run, size, gpu_memory).items():
        total = sum(item.size for item in items)
        if total > gpu_memory:
            yield (
                f"a GPU must have about {total / 1e9:.1f} GB while it {phase}; got {gpu_memory / 1e9:.1f} GB:\n"
                f"{written_sum(items)}\n  Smaller with {', '.join(_cluster_remedies(run, phase))}."
            )
    room, needed = _cache_room(run, size, gpu_memory), run.max_tokens * _cache_of_token(size)
    if room < needed:
        yield (
            f"an engine must have room for the keys and values of max_tokens = {run.max_tokens} tokens, {needed / 1e9:.1f} GB; "
            f"got {room / 1e9:.1f} GB, what {run.gpu_memory_utilization} of {gpu_memory / 1e9:.1f} GB leaves beside the weights. "
            f"Raise gpu_memory_utilization or tensor_parallel."
        )


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


def _cluster_remedies(run: ClusterGRPOConfig, phase: str) -> list[str]:
    """Settings that would make the phase's sum smaller, those first that cost least."""
    if phase == "samples":
        settings = ["a lower gpu_memory_utilization"]
    else:
        settings = ["a lower micro_batch_tokens"] if run.micro_batch_tokens > run.max_tokens else []
        settings += ["gradient_checkpointing = true"] if not run.gradient_checkpointing else []
    settings += ["zero_stage = 3"] if run.zero_stage < 3 else []
    if phase == "updates":
        settings += ["offload_optimizer = true"] if not run.offload_optimizer else []
        settings += ["a lower max_tokens with micro_batch_tokens"]
    return [*settings, "more GPUs"]


class EstimateRow(NamedTuple):
    """One line of the estimate."""

    what: str
    figure: str
    how: str


def estimate(run: ClusterGRPOConfig, size: ModelSize, task: TaskShape, gpu_memory: int) -> list[EstimateRow]:
    """Tokens, memory and time of a run on a cluster, by rules of thumb.

    A chunk has the usual length of its dataset, an entry and a reply 64 tokens, and one token of the environment is 1.3 of the
    model's. The time is that of H100s (989 TFLOP/s and 3.35 TB/s, of which prefill reaches 40 %, decoding 40 % and training
    35 %), with 2 FLOPs a parameter and token forward and 4 backward; attention, stragglers, the passing on of weights, the
    embedder and evaluations come on top.

    Args:
        gpu_memory: Bytes of each GPU.
    """
    turn, settings = task.turn, task.settings
    head = round(MODEL_TOKENS * (task.layout_tokens + SHORT * turn.questions))
    chunk = round(MODEL_TOKENS * turn.context / turn.reading)
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
    room = int(_cache_room(run, size, gpu_memory) // cache)
    at_once = max(1, min(rows, room))
    read = (2 * size.parameters + at_once * cache) / run.tensor_parallel
    decode = math.ceil(rows / at_once) * turn.turns * turn.reply * read / (_BANDWIDTH * _DECODE)

    passes = 2 + 6 + 2 * run.gradient_checkpointing + 2 * (run.kl_coef > 0)
    trained = passes * size.parameters * rollouts * tokens / (max(1, run.training_gpus) * _FLOPS * _TRAIN)
    seconds = max(prefill + decode, trained) if run.asynchronous else prefill + decode + trained

    sums = {name: sum(item.size for item in items) for name, items in gpu_memory_needed(run, size, gpu_memory).items()}
    gpus = f"{run.training_gpus} GPU{'s' if run.training_gpus > 1 else ''}"
    waiting = 2 * run.engines if run.colocate else 0  # bytes a parameter in a machine's memory: the engines' weights
    waiting += 14 if run.colocate or run.offload_optimizer else 0  # the trainer's copies and moments
    return [
        EstimateRow(
            "tokens a rollout",
            f"{_round(tokens):,}",
            f"{turn.reading} chunks × {chunk:,} + {turn.turns} turns × ({head} of layout and questions + {own} of memory + "
            f"{turn.reply} of reply)",
        ),
        EstimateRow(
            "tokens trained a step",
            f"{_round(rollouts * tokens):,}",
            f"{run.groups} groups × {run.group_size} rollouts × {tokens:,}",
        ),
        EstimateRow(
            "KV cache a rollout",
            f"{cache / 1e9:.2f} GB",
            f"{prompt + turn.reply:,} tokens × {_cache_of_token(size):,} bytes; an engine has room for {max(0, room)} that "
            f"share nothing, and gets {rows}",
        ),
        EstimateRow(
            "memory of a GPU, sampling",
            f"{sums['samples'] / 1e9:.0f} GB",
            f"of {gpu_memory / 1e9:.0f}; {run.gpu_memory_utilization:g} of it the engine's",
        ),
        EstimateRow(
            "memory of a GPU, updating",
            f"{sums['updates'] / 1e9:.0f} GB",
            f"ZeRO {run.zero_stage} over {gpus}, {run.micro_batch_tokens:,} tokens at a time",
        ),
        EstimateRow(
            "memory of a machine",
            f"{waiting * size.parameters / run.nodes / 1e9:.0f} GB",
            "what waits there while others have the GPUs: 2 bytes a parameter of each engine, 14 of the trainer",
        ),
        EstimateRow(
            "seconds of sampling",
            f"{_round(prefill + decode):,}",
            f"{prefilled / 1e6:.1f}e6 prompt tokens (shared ones once a group): {prefill:.0f} s; "
            f"{turn.turns * turn.reply} tokens decoded of {at_once} rollouts at once: {decode:.0f} s",
        ),
        EstimateRow(
            "seconds of training",
            f"{_round(trained):,}",
            f"{passes} FLOPs × {size.parameters / 1e9:.2f}e9 parameters × {rollouts * tokens / 1e6:.1f}e6 tokens / ({gpus} × "
            f"{_TRAIN * 100:.0f} % of {_FLOPS / 1e12:.0f} TFLOP/s)",
        ),
        EstimateRow(
            "seconds a step", f"{_round(seconds):,}", f"{run.steps} steps in {run.steps * seconds / 3600:.1f} hours"
        ),
    ]


def estimate_table(run: ClusterGRPOConfig, size: ModelSize | None, task: TaskShape, gpu_memory: int | None) -> Table:
    """The estimate as a table; where the memory of the GPUs is not known, for GPUs of 80 GB.

    Where the model's size is not known, the table says so.
    """
    table = Table(title="Estimate (an H100's speed; rules of thumb)", box=box.SIMPLE, title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("how")
    if size is None:
        table.add_row("size of the model", "unknown", f"{run.model} is not on this machine: hf download {run.model}")
    else:
        for row in estimate(run, size, task, gpu_memory or 80 * 10**9):
            table.add_row(*row)
    return table


def _round(value: float) -> int:
    """To two significant digits.

    >>> _round(36_512), _round(373.2), _round(4.2)
    (37000, 370, 4)
    """
    return round(value if value < 10 else round(value, 1 - math.floor(math.log10(value))))
