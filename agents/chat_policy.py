"""A language model as a policy: observation → layout → model → reply."""

from __future__ import annotations

import dataclasses
import inspect
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from agents.policy import Act
from atommem_env.errors import PolicyError, SettingError
from atommem_env.prompts import Layout, get_layout
from atommem_env.types import EpisodeSettings, Message, Observation, Reply, Task


@runtime_checkable
class ChatModel(Protocol):
    """A language model that replies to chats: one of `agents/models/`, or your own object with these two members."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    async def complete(
        self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float, thinking: bool, seed: int
    ) -> Reply:
        """The reply to a chat, sampled with `seed`, with its `usage`; temperature 0 is greedy.

        Args:
            max_new_tokens: most tokens of the reply, what is thought before it included.
            thinking: whether a model that can think before it replies is to; `Reply.text` leaves the thought out.

        Raises:
            PromptTooLong: the prompt and `max_new_tokens` together exceed the model's window.
            ModelError, EngineDied: the service, or the engine, failed; never a reply.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a language model's replies are drawn."""

    temperature: float = 0.0  # 0 is greedy; the AtomMem paper evaluates at 0.7
    max_new_tokens: int = 256  # a longer reply is truncated
    thinking: bool = False  # whether a model that can think before it replies is to

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # nan neither; a service would be asked again without it
            raise SettingError(f"temperature must be a finite number of at least 0, got {self.temperature}.")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class ChatPolicy:
    """A chat model that is shown each observation as a fresh chat, as in the AtomMem paper."""

    model: ChatModel
    settings: EpisodeSettings
    sampling: Sampling = GREEDY
    layout: str | Layout = "shared_prefix"
    privileged: bool = False

    def __post_init__(self) -> None:
        get_layout(self.layout)  # a wrong one is rejected before anything is played

    @property
    def name(self) -> str:
        return self.model.name

    def begin(self, seed: int, task: Task | None) -> Act:
        async def act(observation: Observation) -> Reply:
            messages = get_layout(self.layout)(observation, self.settings)
            return await sample(self.model, messages, self.sampling, seed, observation["step"])

        return act


async def sample(model: ChatModel, messages: Sequence[Message], sampling: Sampling, seed: int, call: int) -> Reply:
    """A model's reply to a chat, its randomness drawn from the seed of the episode and the number of the call in it.

    Raises:
        PolicyError: `complete` is no asynchronous function, or returned something else than a `Reply`.
        Exception: what the model raises.
    """
    call_seed = zlib.crc32(f"{seed}/{call}".encode())
    completion = model.complete(messages, **dataclasses.asdict(sampling), seed=call_seed)
    reply = await completion if inspect.isawaitable(completion) else None
    if not isinstance(reply, Reply):
        returned = completion if reply is None else reply
        raise PolicyError(
            f"complete() of the model {model.name!r} must be an async function that returns a Reply, it returned "
            f"{type(returned).__name__}."
        )
    return reply
