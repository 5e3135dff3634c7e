"""A chat model behind a service that speaks the OpenAI API: `vllm serve` on your own machine, for example."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.models.background import in_background
from agents.models.chat_tokenizer import fold_system
from agents.models.thinking import without_thought
from atommem_env.errors import ModelError, PromptTooLong, SettingError
from atommem_env.openai_client import Attempts, Rejected, Service, Unavailable, import_openai
from atommem_env.types import Message, Reply, Usage

_CONCURRENT = 64  # requests
_TIMEOUT = 1800.0  # seconds for an answer: a service on a CPU works long through what waits there
_CONNECT = 10.0  # seconds for a connection
_PATIENCE = 300.0  # seconds of an outage in which requests are tried again; vLLM on a CPU takes 200 to start
_PAUSES = 0.25, 15.0  # seconds after the first failure, doubled with each further one, and the longest
_TRIES = 4  # times in all that a request is sent whose answers hold no reply
_TOO_LONG = "context_length_exceeded", "context length", "context size", "max_model_len"  # in what a service says then


@dataclass(frozen=True, slots=True)
class _Call:
    """What a caller of `complete` wants."""

    messages: Sequence[Message]
    max_new_tokens: int
    temperature: float
    thinking: bool
    seed: int | None

    @property
    def has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"


class _NoReply(Exception):
    """An answer without a reply in it."""


class OpenAIModel:
    """The chat model that the service at OPENAI_BASE_URL calls `model`; OPENAI_API_KEY where it asks for a key.

        vllm serve Qwen/Qwen3-8B
        OPENAI_BASE_URL=http://localhost:8000/v1 atommem eval … --policy openai:Qwen/Qwen3-8B

    Requests are sent again for five minutes of an outage: a service that was killed and started again costs time, and no reply.
    The log has one line when an outage begins and one when it ends. What is sent is the same at each try.

    With vLLM a reply has its exact token ids, and log-probabilities where they are those sampled from: at temperature 0 or 1.
    With a service that does not report them they are empty. `Usage.cached_tokens` needs vLLM's
    `--enable-prompt-tokens-details`. A service tokenizes by itself: unlike with a model on this machine a document that spells a
    control token can end its message.

    Where the service's chat template rejects a system message, that opens the first user message from then on. A template that
    drops it silently is not noticed.

    Attributes:
        name: What tables call it.

    Raises:
        MissingDependency: the extra `openai` is not installed.
        SettingError: OPENAI_BASE_URL is not set.
    """

    def __init__(self, model: str) -> None:
        openai = import_openai(f"The model 'openai:{model}'")
        url = os.environ.get("OPENAI_BASE_URL")
        if not url:
            raise SettingError(
                f"The model 'openai:{model}' needs the address of a service in OPENAI_BASE_URL, for example "
                f"http://localhost:8000/v1 after `vllm serve {model}`; it is not set."
            )
        self.name = f"openai:{model}"
        self._openai, self._model = openai, model
        key = os.environ.get("OPENAI_API_KEY")
        self._service = Service(self.name, url, key, patience=_PATIENCE, pauses=_PAUSES)
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=self._service.key,
            max_retries=0,  # the package's own add chance to the pauses, and end early
            http_client=openai.DefaultAsyncHttpxClient(),
        )
        self._gate = asyncio.Semaphore(_CONCURRENT)
        self._first_call = asyncio.Lock()
        self._forms: Sequence[int] = range(4)  # of a request, see `_request`: those that may work
        self._folds: Sequence[bool] = (False, True)  # whether a system message must open the user's: what may work

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        thinking: bool = False,
        seed: int | None = None,
    ) -> Reply:
        """The reply to a chat, sampled with `seed` as far as the service honours it.

        Raises:
            PromptTooLong: the service says that the prompt, or prompt and reply, exceed the model's window.
            ModelError: it rejected the request, was out of reach for five minutes, or sent no reply again and again.
        """
        call = _Call(messages, max_new_tokens, temperature, thinking, seed)
        return await in_background(self._complete(call))

    async def _complete(self, call: _Call) -> Reply:
        async with self._gate:
            async with self._first_call:  # it determines the form for those that wait here
                if len(self._forms) > 1 or (call.has_system and len(self._folds) > 1):
                    return await self._in_some_form(call)
            return await self._in_some_form(call)

    async def _in_some_form(self, call: _Call) -> Reply:
        """The reply to the first form of the request that the service takes; that form is used from then on."""
        reasons: list[str] = []
        for form in self._forms:
            for fold in self._folds if call.has_system else (False,):
                try:
                    answer = await self._answer(self._request(call, form, fold))
                except Rejected as rejection:
                    if any(words in rejection.body.lower() for words in _TOO_LONG):
                        raise self._too_long(rejection.reason, call.max_new_tokens) from None
                    if rejection.status not in (400, 422):
                        what = f"rejected the request with status {rejection.status}: {rejection.reason}"
                        raise self._error(what) from None
                    reasons.append(rejection.reason)
                    continue
                except Unavailable as outage:
                    raise self._error(str(outage)) from None
                self._forms = (form,)
                if call.has_system:
                    self._folds = (fold,)
                return _reply(answer, call.temperature)
        raise self._error(f"rejected the request: {' | '.join(dict.fromkeys(reasons))}")

    def _request(self, call: _Call, form: int, fold: bool) -> dict[str, Any]:
        """What is sent; the lower the form, the more is asked for beyond the API.

        0: vLLM's fields for what was sampled; 1: its way to say whether to think, and that what the model's own
        `generation_config.json` adds to the temperature is left out; 2: the API; 3: the API of OpenAI's later models.
        """
        body: dict[str, Any] = {
            "model": self._model,
            "messages": fold_system(call.messages) if fold else list(call.messages),
            "temperature": call.temperature,
            "top_p": 1.0,
            "max_completion_tokens" if form == 3 else "max_tokens": call.max_new_tokens,
        }
        if call.seed is not None:
            body["seed"] = call.seed
        beyond: dict[str, Any] = {}
        if form <= 1:
            beyond = {"chat_template_kwargs": {"enable_thinking": call.thinking}}
            beyond |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        if form == 0:
            beyond |= {"return_token_ids": True, "logprobs": True}
        return {**body, "extra_body": beyond}

    async def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The service's answer to one request, asked for again while it is out of reach, overloaded or sends no reply.

        Raises:
            Rejected: the service does not take the request in this form.
            Unavailable: the outage lasts too long.
            ModelError: no answer had a reply in it.
        """
        attempts, without_reply = Attempts(self._service), 0
        while True:
            try:
                response = await self._client.chat.completions.with_raw_response.create(
                    **request, timeout=self._openai.Timeout(_TIMEOUT, connect=_CONNECT)
                )
                answer = _checked(response.http_response)
            except (self._openai.APIStatusError, self._openai.APIConnectionError) as error:
                pause = attempts.pause_after(error)
            except _NoReply as error:
                without_reply, why = without_reply + 1, self._service.safe(f"sent no reply but {error}")
                if without_reply == _TRIES:
                    raise self._error(f"{why}, as the last of {_TRIES} answers without one") from None
                pause = attempts.pause(why)
            else:
                self._service.answered()
                return answer
            await asyncio.sleep(pause)

    def _too_long(self, message: str, max_new_tokens: int) -> PromptTooLong:
        return PromptTooLong(
            f"The service of {self.name} at {self._service.address} says: {message} Make chunk_tokens, memory_tokens or "
            "max_new_tokens smaller, or serve the model with a larger window.",
            *_lengths(message, max_new_tokens),
        )

    def _error(self, what: str) -> ModelError:
        return ModelError(
            f"The service of {self.name} at {self._service.address} (OPENAI_BASE_URL) {what}. Check that it runs and serves "
            f"this model: vllm serve {self._model}"
        )


def _checked(response: Any) -> dict[str, Any]:
    """The JSON of an answer with a reply in it.

    Raises:
        _NoReply: there is none.
    """
    try:
        answer = response.json()
        message = answer["choices"][0]["message"]
        # A service that reports the thought separately has no content where the limit came before the reply.
        if isinstance(message["content"], str) or message.get("reasoning") or message.get("reasoning_content"):
            return dict(answer)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        pass
    raise _NoReply(repr(response.text[:200]))


def _reply(answer: Mapping[str, Any], temperature: float) -> Reply:
    choice = answer["choices"][0]
    completion_ids = tuple(choice.get("token_ids") or ())
    logprobs = tuple(item["logprob"] for item in (choice.get("logprobs") or {}).get("content") or ())
    # vLLM reports those at temperature 1, unless it was started otherwise; at 0 they are what `Reply` defines.
    sampled_from = temperature in (0, 1) and len(logprobs) == len(completion_ids)
    usage = answer.get("usage") or {}
    prompt_ids = tuple(answer.get("prompt_token_ids") or ())
    return Reply(
        text=without_thought(choice["message"]["content"] or "", opened=None),
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        logprobs=logprobs if sampled_from else (),
        stop="length" if choice.get("finish_reason") == "length" else "stop",
        usage=Usage(
            calls=1,
            prompt_tokens=usage.get("prompt_tokens") or len(prompt_ids),
            completion_tokens=usage.get("completion_tokens") or len(completion_ids),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        ),
    )


def _lengths(message: str, max_new_tokens: int) -> tuple[int | None, int | None]:
    """The prompt's tokens, and the most that it could have had, in a service's message, as far as it has them.

    vLLM stops counting one token behind what there is room for, and then says "at least".

    >>> _lengths("maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.", 256)
    (9000, 7936)
    >>> _lengths("maximum context length is 2048 tokens. However, you requested 48 output tokens and your prompt contains at "
    ...          "least 2001 input tokens, for a total of at least 2049 tokens.", 48)
    (None, 2000)
    """
    tokens = re.search(
        r"(?:contains|resulted in|\() ?(\d+) (?:input tokens|tokens|in the messages)|Input length \((\d+)\)", message
    )
    window = re.search(r"context length (?:is |of |\()(\d+)|max_total_tokens=(\d+)", message)
    return (
        int(tokens[1] or tokens[2]) if tokens else None,
        max(int(window[1] or window[2]) - max_new_tokens, 0) if window else None,
    )
