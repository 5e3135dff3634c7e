"""A chat model through `transformers`, on this machine's CPU or GPU, with every reply as it was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agents.models.chat_tokenizer import ChatTokenizer, check_room
from atommem_env.errors import MissingDependency, SettingError
from atommem_env.types import Message, Reply, Usage

if TYPE_CHECKING:
    from torch.nn import Module

    from agents.models.decoding import Generation

Dtype = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu"]
_CACHE_BYTES = 4 * 2**30


class TransformersModel:
    """A causal language model with a chat template, loaded from a folder; nothing is fetched.

    The same calls in the same order give the same replies, bit for bit. Which prompts share a batch changes the last
    bits of the logits (matrix products round by their shape), and so now and then a token, in bfloat16 more often than
    in float32; `max_batch=1` makes every reply independent of what else is running.

    Args:
        folder: A Hugging Face model folder, see `agents.models.download.find_model`.
        dtype: Of weights and activations, "auto" as they were saved; probabilities are always computed in float32.
        device: "auto" is the GPU where there is one.
        max_batch: Most calls of `complete` that are answered together. None: as many as have room for the keys and values of
            full windows in 4 GiB, but from 16 to 128.

    Attributes:
        name: What tables call it.
        folder: Where its files are; None: it was made from a module.
        model: The `torch.nn.Module`. Its weights may change while no reply is being sampled.
        chat: Turns messages into ids and back.
        window: Most tokens of prompt and reply together.

    Raises:
        MissingDependency: torch or transformers is not installed.
        SettingError: the model has no chat template, or an attention that continuous batching does not know.
    """

    folder: Path | None = None

    def __init__(
        self, folder: Path, *, dtype: Dtype = "auto", device: Device = "auto", max_batch: int | None = None
    ) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise MissingDependency(f"A local model needs {error.name!r}: pip install 'atommem[local]'.") from error
        chat = ChatTokenizer(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        model.to("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
        self._set_up(model.eval(), chat, folder.name, max_batch or _rows_for(model))
        self.folder = folder

    @classmethod
    def of(cls, model: Module, chat: ChatTokenizer, *, name: str, max_batch: int = 16) -> TransformersModel:
        """Samples from a module that is there already, for example the one being trained; a peft model will do.

        Raises:
            SettingError: as for the class.
        """
        made = cls.__new__(cls)
        made._set_up(model, chat, name, max_batch)
        return made

    def _set_up(self, model: Any, chat: ChatTokenizer, name: str, max_batch: int) -> None:
        from agents.models.decoding import ContinuousBatcher

        config = model.config.get_text_config()
        attention, kinds = config._attn_implementation, set(getattr(config, "layer_types", None) or ())
        if attention != "sdpa" or kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
            raise SettingError(
                f"Continuous batching needs full attention in every layer, by PyTorch's own function; {name} has "
                f"layer_types={sorted(kinds)}, sliding_window={getattr(config, 'sliding_window', None)} and "
                f"attn_implementation={attention!r}. Load it with attn_implementation='sdpa', or take another model."
            )
        self.name, self.model, self.chat = name, model, chat
        self.window: int = config.max_position_embeddings
        ends = model.generation_config.eos_token_id
        self._eos_ids = {chat.backend.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._batcher = ContinuousBatcher(model, self._eos_ids, max_batch, self.window)

    def prompt_ids(self, messages: Sequence[Message], thinking: bool = False) -> list[int]:
        """The ids of chat messages, up to where the reply begins."""
        return self.chat.prompt_ids(messages, thinking)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        """Samples one reply to each prompt, all in one batch.

        The completion ids are exactly those sampled, the end-of-sequence token included; `Reply.text` leaves special
        tokens out, and what the model thought before it replied. Log-probabilities are those of the distribution sampled
        from, softmax(logits / temperature); at temperature 0 (the most probable token always) they are those at temperature 1.

        Args:
            prompts: [B, T_in], of any lengths.
            max_new_tokens: T_out at most.
            temperature: At least 0.
            seeds: [B], one for each prompt: its draws depend on nothing else. Unused, and not needed, at temperature 0.

        Raises:
            PromptTooLong: a prompt and `max_new_tokens` together exceed `window`.
            SettingError: a temperature below 0, or above it without a seed for each prompt; nothing to read or to write.
        """
        from agents.models.decoding import Batch

        if temperature < 0 or (temperature > 0 and len(seeds or ()) != len(prompts)):
            raise SettingError(
                f"temperature must be 0, or above 0 with one seed for each of the {len(prompts)} prompts; "
                f"got temperature={temperature} and seeds={seeds}."
            )
        each = seeds if temperature > 0 and seeds else [None] * len(prompts)
        generations = [
            self._generation(prompt, max_new_tokens, temperature, seed)
            for prompt, seed in zip(prompts, each, strict=True)
        ]
        batch = Batch(self.model, self._eos_ids, len(generations), self.window)
        batch.join(generations)
        while batch.rows:
            batch.step()
        return [self._reply(generation) for generation in generations]

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        thinking: bool = False,
        seed: int | None = None,
    ) -> Reply:
        """`generate` for one chat; it joins the batch that is running and returns as soon as its own reply ends.

        Raises:
            PromptTooLong: as in `generate`, in this call alone.
            SettingError: as in `generate`.
        """
        if temperature < 0 or (temperature > 0 and seed is None):
            raise SettingError(f"temperature must be 0, or above 0 with a seed; got {temperature=} and {seed=}.")
        generation = self._generation(self.prompt_ids(messages, thinking), max_new_tokens, temperature, seed)
        await self._batcher(generation)
        return self._reply(generation)

    def _generation(
        self, prompt: Sequence[int], max_new_tokens: int, temperature: float, seed: int | None
    ) -> Generation:
        from agents.models.decoding import Generation

        check_room(len(prompt), max_new_tokens, self.window, self.name)
        return Generation(tuple(prompt), max_new_tokens, temperature, seed)

    def _reply(self, generation: Generation) -> Reply:
        return Reply(
            text=self.chat.reply_text(generation.prompt, generation.ids),
            prompt_ids=generation.prompt,
            completion_ids=tuple(generation.ids),
            logprobs=tuple(generation.logprobs),
            stop="stop" if generation.ids[-1] in self._eos_ids else "length",
            usage=Usage(calls=1, prompt_tokens=len(generation.prompt), completion_tokens=len(generation.ids)),
        )


def _rows_for(model: Any) -> int:
    """A batch that no machine is too small for, larger where the model is small."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * size * model.dtype.itemsize
    return max(16, min(128, _CACHE_BYTES // (bytes_per_token * config.max_position_embeddings)))
