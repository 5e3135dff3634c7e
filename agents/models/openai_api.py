"""A chat model behind a service that speaks the OpenAI API: `vllm serve` on your own machine, for example."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from agents.models.chat_answer import Answer, NoChoice, read_answer
from agents.models.chat_tokenizer import fold_system
from atommem_env.background import in_background
from atommem_env.errors import ModelError, PromptTooLong, ReplyRefused, SettingError
from atommem_env.openai_client import Malformed, Rejected, Service, Unavailable, import_openai, sentence
from atommem_env.service_words import is_refused, is_too_long, is_unknown_field, prompt_lengths
from atommem_env.types import Message, Reply

_CONCURRENT = 64  # requests
_TIMEOUT = 1800.0  # seconds for an answer: a service on a CPU works long through what waits there
_PATIENCE = 300.0  # seconds of an outage in which requests are tried again; vLLM on a CPU takes 200 to start
_PAUSES = 0.25, 15.0  # seconds after the first failure, doubled with each further one, and the longest
_TRIES = 4  # times in all that a request is sent whose answers hold no reply
_SEEDS = 2**31  # services take seeds below this
_LONG, _SPARSE = 2_000, 8  # characters of a prompt, and of them for a token, above which it was not read whole

# Fields of a request that may be left out, in groups: vLLM's for what was sampled; its way to say whether to think, and that what
# the model's own `generation_config.json` adds to the temperature is left out; the API's.
_SAMPLED = frozenset({"return_token_ids", "logprobs"})
_VLLM = frozenset({"chat_template_kwargs", "top_k", "min_p", "repetition_penalty"})
_SAMPLING = frozenset({"seed", "top_p"})
_LIMITS = "max_tokens", "max_completion_tokens", None  # the name of the limit in the API, in its later form; none
_OPTIONAL = _SAMPLED | _VLLM | _SAMPLING | {"temperature"}


@dataclass(frozen=True, slots=True)
class _Form:
    """In which form a request is sent."""

    without: frozenset[str] = frozenset()  # fields that are left out
    limit: str | None = "max_tokens"  # what the limit of the reply is called
    folded: bool = False  # whether a system message opens the user's

    def unused(self) -> str:
        """What of the API is not used, for a message."""
        limits = _LIMITS[: _LIMITS.index(self.limit)]
        return ", ".join([*sorted(self.without), *map(str, limits), *(["a system message"] if self.folded else [])])


# Forms to try where a rejection does not say what it is about.
_FORMS = (
    _Form(_SAMPLED),
    _Form(_SAMPLED | _VLLM),
    _Form(_SAMPLED | _VLLM, "max_completion_tokens"),
    _Form(_SAMPLED | _VLLM | _SAMPLING),
    _Form(_OPTIONAL - {"temperature"}, "max_completion_tokens"),
    _Form(_OPTIONAL),
    _Form(_OPTIONAL, "max_completion_tokens"),
)


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

    @property
    def characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


class OpenAIModel:
    """The chat model that the service at OPENAI_BASE_URL calls `model`; OPENAI_API_KEY where it asks for a key.

        vllm serve Qwen/Qwen3-8B
        OPENAI_BASE_URL=http://localhost:8000/v1 atommem eval … --policy openai:Qwen/Qwen3-8B

    Requests are sent again for five minutes of an outage: a service that was killed and started again costs time, and no reply.
    The log has one line when an outage begins and one when it ends. What is sent is the same at each try. A service that has
    never answered is given up after seconds.

    Fields of a request that a service rejects are left out from then on, and a warning lists them. Seeds are sent modulo 2³¹.

    With vLLM a reply has its exact token ids, and log-probabilities where they are those sampled from: at temperature 0 or 1.
    With a service that does not report them they are empty. `Usage.cached_tokens` needs vLLM's
    `--enable-prompt-tokens-details`. A service tokenizes by itself: unlike with a model on this machine a document that spells a
    control token can end its message.

    Where the service's chat template rejects a system message, that opens the first user message from then on. A template that
    drops it silently is not noticed.

    Attributes:
        name: What tables call it.
        notices: How often each thing happened of which the log has one warning: "thought_only", a reply that is empty because
            all that the model wrote is its reasoning; "prompt_truncated", a prompt of which the service read only a part.

    Raises:
        MissingDependency: the extra `openai` is not installed.
        SettingError: OPENAI_BASE_URL is not set, or is no address.
    """

    def __init__(self, model: str) -> None:
        import_openai(f"The model 'openai:{model}'")
        url = os.environ.get("OPENAI_BASE_URL")
        if not url:
            raise SettingError(
                f"The model 'openai:{model}' needs the address of a service in OPENAI_BASE_URL, for example "
                f"http://localhost:8000/v1 after `vllm serve {model}`; it is not set."
            )
        self.name = f"openai:{model}"
        self._model = model
        key = os.environ.get("OPENAI_API_KEY")
        self._service = Service(self.name, url, key, patience=_PATIENCE, pauses=_PAUSES, timeout=_TIMEOUT, tries=_TRIES)
        self.notices = self._service.notices
        self._gate = asyncio.Semaphore(_CONCURRENT)
        self._first_call = asyncio.Lock()
        self._form = _Form()
        self._accepted: set[bool] = set()  # whether a chat with (True), or without a system message was accepted

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
            ReplyRefused: it will not answer this prompt: its policy on content blocks it, or its answers have no choice.
            ModelError: it rejected the request, was out of reach for five minutes, or sent no reply again and again.
        """
        call = _Call(messages, max_new_tokens, temperature, thinking, seed)
        return await in_background(self._complete(call))

    async def _complete(self, call: _Call) -> Reply:
        async with self._gate:
            async with self._first_call:  # it determines the form for those that wait here
                if not self._knows_form(call):
                    return await self._in_some_form(call)
            return await self._in_some_form(call)

    def _knows_form(self, call: _Call) -> bool:
        return True in self._accepted or (bool(self._accepted) and not call.has_system)

    async def _in_some_form(self, call: _Call) -> Reply:
        """The reply to the first form of the request that the service accepts; that form is used from then on."""
        reasons: list[str] = []
        began = form = self._form
        others, tried = self._forms(call), {form}
        while True:
            try:
                answer = await self._service.ask(
                    "/chat/completions",
                    self._request(call, form),
                    lambda answer: read_answer(answer, call.temperature, call.thinking),
                )
            except Rejected as rejection:
                self._raise_unless_of_form(rejection, call)
                reasons.append(rejection.reason)
                left_out = form.without
                candidates = (
                    _without_named(form, rejection, call),
                    *(replace(other, without=other.without | left_out) for other in others),
                )
                untried = [candidate for candidate in candidates if candidate not in tried]
                if not untried:
                    raise self._error(f"rejected the request: {' | '.join(dict.fromkeys(reasons))}") from None
                form = untried[0]
                tried.add(form)
            except Unavailable as outage:
                raise self._error(str(outage)) from None
            except NoChoice as empty:
                raise ReplyRefused(f"{self._who()} {empty}, as the last of {_TRIES} answers to this prompt.") from None
            except Malformed as error:
                raise self._error(f"{error}, as the last of {_TRIES} answers without one") from None
            else:
                self._accept(form, began, call)
                self._check(answer, call)
                return answer.reply

    def _forms(self, call: _Call) -> list[_Form]:
        """What else to try where a rejection does not say what it is about; nothing once such a chat was accepted."""
        if self._knows_form(call):
            return []
        forms = [self._form] if self._accepted else [self._form, *_FORMS]
        return [
            replace(form, folded=folded)
            for form in forms
            for folded in ((False, True) if call.has_system else (False,))
        ]

    def _accept(self, form: _Form, began: _Form, call: _Call) -> None:
        """Remembers what a request had to leave out; `began` is the form that it was sent in first."""
        if form != began:
            before, now = self._form, replace(form, without=form.without | self._form.without)
            self._form = replace(now, folded=form.folded or before.folded)
            unused = self._form.unused()
            self._service.note(
                f"without {unused}", f"does not accept {unused}: requests are sent without, from now on."
            )
        self._accepted.add(call.has_system)

    def _request(self, call: _Call, form: _Form) -> dict[str, Any]:
        """What is sent."""
        fields: dict[str, Any] = {
            "temperature": call.temperature,
            "top_p": 1.0,
            "seed": None if call.seed is None else call.seed % _SEEDS,
            "chat_template_kwargs": {"enable_thinking": call.thinking},
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "return_token_ids": True,
            "logprobs": True,
        }
        return {
            "model": self._model,
            "messages": fold_system(call.messages) if form.folded and call.has_system else list(call.messages),
            **({form.limit: call.max_new_tokens} if form.limit else {}),
            **{name: value for name, value in fields.items() if value is not None and name not in form.without},
        }

    def _check(self, answer: Answer, call: _Call) -> None:
        """Logs what makes a number of a run another than it seems; once each."""
        if answer.is_thought_only:
            self._service.note(
                "thought_only",
                "replied by reasoning alone; such a reply is empty. Make max_new_tokens larger, serve the model without a "
                "reasoning parser, or turn thinking off.",
            )
        assert answer.reply.usage is not None
        read = answer.reply.usage.prompt_tokens
        if read and call.characters > max(_LONG, _SPARSE * read):
            self._service.note(
                "prompt_truncated",
                f"read {read:,} tokens of a prompt of {call.characters:,} characters: it truncates prompts silently. Serve the "
                "model with a larger window (Ollama: num_ctx), or make chunk_tokens or memory_tokens smaller.",
            )

    def _raise_unless_of_form(self, rejection: Rejected, call: _Call) -> None:
        """Raises what a rejection means, unless another form of the request may help."""
        if is_too_long(rejection.said):
            raise PromptTooLong(
                f"{self._who()} says: {sentence(rejection.reason)} Make chunk_tokens, memory_tokens or max_new_tokens smaller, "
                "or serve the model with a larger window.",
                *prompt_lengths(rejection.said, call.max_new_tokens),
            ) from None
        if is_refused(rejection.said) and rejection.status not in (401, 404):
            raise ReplyRefused(f"{self._who()} will not answer this prompt: {sentence(rejection.reason)}") from None
        if not rejection.is_of_form:
            raise self._error(rejection.clause("the request")) from None

    def _who(self) -> str:
        return f"The service of {self.name} at {self._service.address}"

    def _error(self, what: str) -> ModelError:
        return ModelError(
            f"{self._who()} (OPENAI_BASE_URL) {sentence(what)} Check that it runs and serves this model: vllm serve "
            f"{self._model}"
        )


def _without_named(form: _Form, rejection: Rejected, call: _Call) -> _Form:
    """The form without what a rejection names, as far as that can be left out."""
    named = rejection.names(_OPTIONAL - form.without)
    named = named - {"temperature"} or named  # of several fields those that change least go first
    better = replace(form, without=form.without | named)
    if form.limit and rejection.names([form.limit]):
        later = _LIMITS[_LIMITS.index(form.limit) + 1]
        # A limit whose value is rejected, too large for example, is not dropped: replies would have none.
        if later is not None or is_unknown_field(rejection.said):
            better = replace(better, limit=later)
    if call.has_system and not form.folded and rejection.names(["system", "System", "roles"]):
        better = replace(better, folded=True)
    return better
