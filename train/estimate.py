"""What training needs at its peak, summed before anything is loaded, so that what cannot fit is refused at once.

Weights, gradients, Adam's moments and copies are counted exactly: the model is built from its configuration on PyTorch's meta
device, where a tensor has a shape and no memory. The rest are rules of thumb that lean towards too little, because a run
that would have worked must not be refused: an entry and a reply are short (`SHORT` tokens), a document has the length that is
usual in its dataset, and what an allocator wastes is left out. Against the resident memory of small Qwen3 models on a CPU
(width 256 and 512), an update's sum came out 0 to 15 % too small, and the cache of keys and values 10 to 20 %.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from agents.models.find import find_model
from atommem_env.env import split_options
from atommem_env.errors import MissingDependency, SettingError
from atommem_env.tasks import Source, source_options
from atommem_env.tasks.haystack import MOST_QUESTIONS
from atommem_env.types import EpisodeSettings
from eval.options import EnvConfig, find_spec

if TYPE_CHECKING:
    from train.settings import LocalGRPOConfig, SFTConfig

SHORT = 64  # tokens of a usual entry or reply: a sentence or two
# Of a usual document, title included: the means over the paragraphs of each dataset.
_DOCUMENT_TOKENS = {"hotpotqa": 112, "2wikimultihopqa": 92, "musique": 98, "synthetic": 20}
_CHARACTERS_A_TOKEN = 5  # of English text, rounded up


class Item(NamedTuple):
    """One line of the sum."""

    what: str
    size: int  # bytes
    how: str  # the multiplication


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model's memory follows from."""

    parameters: int  # tied embeddings once
    linear_width: int  # inputs and outputs of all linear layers but the last: parameters of adapters of rank 1
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    normalised_heads: bool  # queries and keys, as in Qwen3
    vocabulary: int
    window: int  # most tokens of prompt and reply together

    @classmethod
    def of(cls, config: Any) -> ModelSize:
        """The size of the causal language model with this configuration of transformers."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        text = config.get_text_config()
        return cls(
            parameters=sum(weight.numel() for weight in model.parameters()),
            linear_width=sum(
                one.in_features + one.out_features for one in linear if one is not model.get_output_embeddings()
            ),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            normalised_heads=any(name.endswith("q_norm") for name, _ in model.named_modules()),
            vocabulary=text.vocab_size,
            window=text.max_position_embeddings,
        )


def check_memory(run: SFTConfig | LocalGRPOConfig, model: dict[str, Any] | None = None) -> None:
    """Refuses a run that cannot fit into the memory that is free now, of the GPU where there is one.

    Args:
        run: What is to be trained.
        model: The fields of its `config.json`, where the model is not on this machine yet.

    Raises:
        SettingError: it cannot fit; the message has the whole sum, and what would make it smaller.
        ModelNotFound: `model` is not given, and the model is not on this machine.
        MissingDependency: the extra `train` is not installed.
    """
    size = model_size(run.model, model)
    try:
        import psutil
        import torch
    except ImportError as error:
        raise MissingDependency(f"Training needs {error.name!r}: pip install 'atommem[train]'.") from error
    gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    refuse_too_large(run, size, free, gpu=gpu)


def model_size(name: str, fields: dict[str, Any] | None = None) -> ModelSize:
    """The size of a model.

    Args:
        name: As in `find_model`.
        fields: Those of its `config.json`, where the model is not on this machine yet.

    Raises:
        ModelNotFound: `fields` is not given, and the model is not on this machine.
        MissingDependency: the extra `train` is not installed.
    """
    folder = None if fields else find_model(name)
    try:
        from transformers import AutoConfig

        config = AutoConfig.for_model(**fields) if fields else AutoConfig.from_pretrained(folder, local_files_only=True)
        return ModelSize.of(config)
    except ImportError as error:
        raise MissingDependency(f"Training needs {error.name!r}: pip install 'atommem[train]'.") from error


def refuse_too_large(run: SFTConfig | LocalGRPOConfig, size: ModelSize, free: int, *, gpu: bool) -> None:
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
    from train.settings import SFTConfig

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
    if run.eval_every and not gpu:  # on a GPU they are kept beside it
        always.append(product("best weights so far", (_trained_count(size, run.lora_rank), "trained"), (4, "bytes")))

    turn = Turn.of(run)
    rows = min(run.in_flight, max(run.groups * run.group_size, run.eval_episodes if run.eval_every else 0))
    places = min(size.window, turn.chunk + turn.entries + run.max_new_tokens)
    cache = product(
        "keys and values",
        (rows, "rows"),
        (places, "tokens"),
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
    """The weights, and what the optimiser keeps for those that it trains; `weight` is bytes, adapters are float32."""
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
    """What a forward pass keeps for the backward pass, at `computed` bytes a number and `residual` between the layers.

    A layer keeps of each token: of its two norms, always in float32, input, result and output (3 h each, 2 h where their weights
    are not trained), and of the norms of queries and keys two (one); of the attention queries, keys and values repeated for
    all heads, its result, and that again in the order of the row (5 q); of the MLP its four inner tensors (4 i). Recomputing
    keeps each layer's input, and all this for one layer.
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


@dataclass(frozen=True, slots=True)
class Turn:
    """Usual lengths of a turn, in tokens of the environment."""

    chunk: int  # the longest
    entries: int
    reply: int
    context: int  # all chunks of an episode
    answering: int  # turns of an episode after the last chunk

    @property
    def reading(self) -> int:
        """Turns of an episode with a chunk."""
        return math.ceil(self.context / self.chunk)

    @property
    def turns(self) -> int:
        """Turns of an episode."""
        return self.reading + self.answering

    @property
    def own(self) -> int:
        """What a rollout does not share with its group."""
        return self.entries + self.reply

    @classmethod
    def of(cls, run: EnvConfig) -> Turn:
        """Turns in the environment of a run."""
        source, settings, options = environment_of(run)
        document = _DOCUMENT_TOKENS.get(str(source), 100)
        sized = source_options(source).get("num_docs")
        context = (options.get("num_docs") or sized.default) * document if sized else settings.chunk_tokens
        chunk, reply = min(settings.chunk_tokens, context), min(SHORT, run.max_new_tokens)
        return cls(
            chunk=chunk,
            entries=min(settings.memory_tokens, settings.top_k * min(reply, document)),
            reply=reply,
            context=context,
            answering=most_questions(options),
        )


def most_questions(source: Mapping[str, Any]) -> int:
    """Questions that a task can have, by the options of its source."""
    questions = source.get("questions", 1)
    return MOST_QUESTIONS if questions == "sampled" else int(questions)


def environment_of(run: EnvConfig) -> tuple[Source, EpisodeSettings, dict[str, Any]]:
    """Source, settings and source options of a run's environment, which is not made: it needs no data.

    Raises:
        SettingError: an option that the environment does not have.
    """
    options = {**find_spec(run.env_id).kwargs, **run.env_options()}
    options = {name: value for name, value in options.items() if name not in ("embedder", "store", "durability")}
    source = options.pop("source", None)
    return source, *split_options(source, options)


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
    told = [f"a lower --{name.replace('_', '-')} than {values[name]}" for name in names if values[name] > 1]
    if phase == "plays":
        told.append("a smaller --max-new-tokens or --set chunk_tokens=")
    if phase == "updates" and not values["gradient_checkpointing"]:
        told.append("--gradient-checkpointing")
    if run.dtype == "float32":
        told.append("--dtype bfloat16")
    if not run.lora_rank:
        told.append("--lora-rank 16")
    return told
