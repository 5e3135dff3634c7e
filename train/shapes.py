"""What the memory and the time of a run follow from, before anything is loaded: the model's size and the task's shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from atommem_env.errors import MissingDependency
from atommem_env.prompts import get_layout
from atommem_env.tasks import Source, source_options
from atommem_env.tasks.haystack import MOST_QUESTIONS
from atommem_env.tokens import BuiltinTokenizer
from atommem_env.types import EpisodeSettings, Observation
from eval.options import EnvConfig
from eval.workload import environment_of

SHORT = 64  # tokens of a usual entry or reply: a sentence or two
# Of a usual document, title included: the means over the paragraphs of each dataset.
_DOCUMENT_TOKENS = {"hotpotqa": 112, "2wikimultihopqa": 92, "musique": 98, "synthetic": 20}


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
        """The size of the causal language model with this configuration of transformers.

        The model is built on PyTorch's meta device, where a tensor has a shape and no memory.
        """
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


def model_size(model: Path | dict[str, Any]) -> ModelSize:
    """The size of a model.

    Args:
        model: Its folder; or the fields of its `config.json`, where it is not on this machine.

    Raises:
        MissingDependency: the packages that read a model's configuration are not installed.
    """
    try:
        from transformers import AutoConfig

        if isinstance(model, Path):
            return ModelSize.of(AutoConfig.from_pretrained(model, local_files_only=True))
        return ModelSize.of(AutoConfig.for_model(**model))
    except ImportError as error:
        raise MissingDependency(f"Training needs {error.name!r}: pip install 'atommem[train]'.") from error


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """Usual lengths of a turn, in tokens of the environment."""

    chunk: int  # the longest
    entries: int
    reply: int
    context: int  # all chunks of an episode
    questions: int  # most that a task has; each takes a turn after the last chunk

    @property
    def reading(self) -> int:
        """Turns of an episode with a chunk."""
        return math.ceil(self.context / self.chunk)

    @property
    def turns(self) -> int:
        """Turns of an episode."""
        return self.reading + self.questions

    @property
    def own(self) -> int:
        """What a rollout does not share with its group."""
        return self.entries + self.reply

    @classmethod
    def of(cls, run: EnvConfig) -> TurnTokens:
        """Turns in the environment of a run.

        Raises:
            SettingError: as in `environment_of`.
        """
        return cls.in_environment(*environment_of(run), run.max_new_tokens)

    @classmethod
    def in_environment(
        cls, source: Source, settings: EpisodeSettings, options: Mapping[str, Any], max_new_tokens: int
    ) -> TurnTokens:
        """Turns in an environment as `environment_of` describes it."""
        document = _DOCUMENT_TOKENS.get(str(source), 100)
        sized = source_options(source).get("num_docs")
        context = (options.get("num_docs") or sized.default) * document if sized else settings.chunk_tokens
        reply = min(SHORT, max_new_tokens)
        questions = options.get("questions", 1)
        return cls(
            chunk=min(settings.chunk_tokens, context),
            entries=min(settings.memory_tokens, settings.top_k * min(reply, document)),
            reply=reply,
            context=context,
            questions=MOST_QUESTIONS if questions == "sampled" else int(questions),
        )


@dataclass(frozen=True, slots=True)
class TaskShape:
    """What an episode of a run is made of, as far as its prompts' lengths follow from it."""

    settings: EpisodeSettings
    turn: TurnTokens
    layout_tokens: int  # of a prompt that shows nothing yet, in tokens of the environment

    @classmethod
    def of(cls, run: EnvConfig) -> TaskShape:
        """The shape of a run's tasks; neither environment nor data are needed.

        Raises:
            SettingError: an option that the environment does not have, or a layout that does not exist.
        """
        source, settings, options = environment_of(run)
        empty: Any = {name: "" if kind is str else 0 for name, kind in get_type_hints(Observation).items()}
        chat = get_layout(run.layout)(empty | {"phase": "read"}, settings)
        return cls(
            settings=settings,
            turn=TurnTokens.in_environment(source, settings, options, run.max_new_tokens),
            layout_tokens=sum(BuiltinTokenizer().count(message["content"]) for message in chat),
        )
