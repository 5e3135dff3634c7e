"""A chat model through `transformers`, on this machine's CPU or GPU, with every reply kept as it was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agents.batching import Batcher
from agents.models.chat_tokenizer import ChatTokenizer
from atommem_env.errors import MissingDependency, PromptTooLong, SettingError
from atommem_env.types import Message, Reply

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache

Dtype = Literal["bfloat16", "float32"]
Device = Literal["auto", "cpu"]


@dataclass(frozen=True, slots=True)
class _Call:
    """One waiting `complete`."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    seed: int | None


class TransformersModel:
    """A causal language model with a chat template, loaded from a folder; nothing is fetched.

    The same prompts in the same batches give the same replies, bit for bit. Which prompts share a batch changes the
    last bits of the logits (matrix products round by their shape), and so now and then a token, in bfloat16 more often
    than in float32; `max_batch=1` makes every reply independent of what else is running.

    Args:
        folder: A Hugging Face model folder, see `agents.models.download.find_model`.
        dtype: Of weights and activations; probabilities are always computed in float32.
        device: "auto" is the GPU where there is one.
        max_batch: Most calls of `complete` that are answered together.

    Raises:
        MissingDependency: torch or transformers is not installed.
        SettingError: the model has no chat template.
    """

    def __init__(
        self, folder: Path, *, dtype: Dtype = "bfloat16", device: Device = "auto", max_batch: int = 16
    ) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise MissingDependency(f"A local model needs {error.name!r}: pip install 'atommem[local]'.") from error
        self.name = folder.name
        self._device = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
        self.chat = ChatTokenizer(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        self._model = model.to(self._device).eval()
        self.window: int = model.config.get_text_config().max_position_embeddings  # tokens of prompt and reply together
        ends = model.generation_config.eos_token_id
        self._eos_ids = {self.chat.backend.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._batcher: Batcher[_Call, Reply] = Batcher(self._run, max_batch, size=lambda call: len(call.prompt_ids))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of chat messages, up to where the reply begins."""
        return self.chat.prompt_ids(messages)

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
        tokens out. Log-probabilities are those of the distribution sampled from, softmax(logits / temperature); at
        temperature 0 (the most probable token always) they are those at temperature 1.

        Args:
            prompts: [B, T_in], of any lengths.
            max_new_tokens: T_out at most.
            temperature: At least 0.
            seeds: [B], one for each prompt: its draws depend on nothing else. Unused, and not needed, at temperature 0.

        Raises:
            PromptTooLong: a prompt and `max_new_tokens` together exceed `window`.
            SettingError: a temperature below 0, or above it without a seed for each prompt.
        """
        import torch

        for prompt in prompts:
            self._check_length(prompt, max_new_tokens)
        if temperature < 0 or (temperature > 0 and len(seeds or ()) != len(prompts)):
            raise SettingError(
                f"temperature must be 0, or above 0 with one seed for each of the {len(prompts)} prompts; "
                f"got temperature={temperature} and seeds={seeds}."
            )
        if not prompts:
            return []
        draws = None  # [B, T_out], uniform in [0, 1)
        if temperature > 0:
            rows = [np.random.default_rng(seed).random(max_new_tokens) for seed in seeds or ()]
            draws = torch.from_numpy(np.stack(rows)).to(self._device)

        completions: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        live = list(range(len(prompts)))  # the prompt that each row of the batch belongs to
        with torch.inference_mode():
            cache, mask, logits_B_V = self._read(prompts)
            positions = mask.sum(-1, keepdim=True)  # [B, 1], of the next token
            for step in range(max_new_tokens):
                logp_B_V = torch.log_softmax(logits_B_V.float() / (temperature or 1.0), dim=-1)
                tokens_B = logp_B_V.argmax(-1) if draws is None else _sample(logp_B_V, draws[live, step])
                chosen_B = logp_B_V.gather(-1, tokens_B[:, None])[:, 0]
                unfinished = []
                for row, (token, logprob) in enumerate(zip(tokens_B.tolist(), chosen_B.tolist(), strict=True)):
                    completions[live[row]].append(token)
                    logprobs[live[row]].append(logprob)
                    if token not in self._eos_ids:
                        unfinished.append(row)
                if not unfinished or step + 1 == max_new_tokens:
                    break
                if len(unfinished) < len(live):  # finished rows cost nothing from here on
                    live = [live[row] for row in unfinished]
                    kept = torch.tensor(unfinished, device=self._device)
                    cache.batch_select_indices(kept)
                    tokens_B, mask, positions = tokens_B[kept], mask[kept], positions[kept]
                mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
                output = self._model(
                    input_ids=tokens_B[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache
                )
                logits_B_V, positions = output.logits[:, -1], positions + 1
        return [
            Reply(
                text=self.chat.text(ids),
                prompt_ids=tuple(prompt),
                completion_ids=tuple(ids),
                logprobs=tuple(logp),
                stop="stop" if ids and ids[-1] in self._eos_ids else "length",
            )
            for prompt, ids, logp in zip(prompts, completions, logprobs, strict=True)
        ]

    async def complete(
        self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float, seed: int | None = None
    ) -> Reply:
        """`generate` for one chat; calls that wait at the same time share batches with prompts of about their length.

        Raises:
            PromptTooLong: as in `generate`, in this call alone.
            SettingError: as in `generate`.
        """
        prompt = self.prompt_ids(messages)
        self._check_length(prompt, max_new_tokens)
        if temperature < 0 or (temperature > 0 and seed is None):
            raise SettingError(f"temperature must be 0, or above 0 with a seed; got {temperature=} and {seed=}.")
        return await self._batcher(_Call(prompt, max_new_tokens, temperature, seed))

    def _run(self, calls: list[_Call]) -> list[Reply]:
        """Answers the calls of one batch, together where their settings are the same."""
        groups: dict[tuple[int, float], list[int]] = {}
        for index, call in enumerate(calls):
            groups.setdefault((call.max_new_tokens, call.temperature), []).append(index)
        replies: dict[int, Reply] = {}
        for (max_new_tokens, temperature), members in groups.items():
            answers = self.generate(
                [calls[index].prompt_ids for index in members],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seeds=[calls[index].seed or 0 for index in members],
            )
            replies.update(zip(members, answers, strict=True))
        return [replies[index] for index in range(len(calls))]

    def _check_length(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        if len(prompt) + max_new_tokens > self.window:
            raise PromptTooLong(
                f"The prompt's {len(prompt)} tokens and up to {max_new_tokens} new ones exceed {self.name}'s window of "
                f"{self.window} tokens. Make chunk_tokens, memory_tokens or max_new_tokens smaller."
            )

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[DynamicCache, Tensor, Tensor]:
        """Cache, attention mask [B, T_in] and logits [B, V] after the prompts, each of which ends where its row ends.

        Each prompt is read alone, and once however often it is there (a group samples one prompt many times): a long one
        keeps the machine busy by itself, and padding would cost as much as text.
        For prompts (7, 8, 9) and (5,) the mask is ((1, 1, 1), (0, 0, 1)).
        """
        import torch
        from torch.nn.functional import pad
        from transformers import DynamicCache

        width = max(len(prompt) for prompt in prompts)
        lefts = [width - len(prompt) for prompt in prompts]
        mask = torch.tensor([[0] * left + [1] * (width - left) for left in lefts], device=self._device)
        read: dict[tuple[int, ...], tuple[DynamicCache, Tensor]] = {}
        for prompt in dict.fromkeys(map(tuple, prompts)):
            cache = DynamicCache()
            inputs = torch.tensor([prompt], device=self._device)
            logits = self._model(input_ids=inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            read[prompt] = cache, logits
        caches, logits_B = zip(*(read[tuple(prompt)] for prompt in prompts), strict=True)
        if len(prompts) == 1:
            return caches[0], mask, logits_B[0]
        joined = DynamicCache()
        for index in range(len(caches[0].layers)):
            layers = [cache.layers[index] for cache in caches]
            keys = torch.cat([pad(layer.keys, (0, 0, left, 0)) for layer, left in zip(layers, lefts, strict=True)])
            values = torch.cat([pad(layer.values, (0, 0, left, 0)) for layer, left in zip(layers, lefts, strict=True)])
            joined.update(keys, values, index)
            for layer in layers:
                layer.keys = layer.values = None  # else every prompt would be held twice
        return joined, mask, torch.cat(logits_B)


def _sample(logp_B_V: Tensor, draws_B: Tensor) -> Tensor:
    """[B] tokens by inversion: the first whose cumulative probability exceeds the row's draw from [0, 1).

    One draw a token keeps a row's randomness apart from its neighbours' and the same on every device.

    >>> import torch
    >>> _sample(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log(), torch.tensor([0.4, 0.6])).tolist()
    [0, 1]
    """
    import torch

    cumulative = logp_B_V.double().exp().cumsum(-1)
    targets = draws_B.double() * cumulative[:, -1]  # the sum is 1 but for rounding
    tokens = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
    return tokens.clamp(max=logp_B_V.shape[-1] - 1)
