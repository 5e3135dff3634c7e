"""A language model as a policy: observation → layout → model → reply."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agents.policy import Act
from atommem_env.prompts import get_layout
from atommem_env.types import EpisodeSettings, Message, Observation, Reply, Task


class ChatModel(Protocol):
    """A model back end (`agents/models/`)."""

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
            thinking: whether a model that can think before it replies shall; `Reply.text` is without what it thought.

        Raises:
            PromptTooLong: the prompt and `max_new_tokens` together exceed the model's window.
            ModelError, EngineDied: the service, or the engine, failed; never a reply.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a language model's replies are drawn."""

    temperature: float = 0.0  # 0 is greedy; the AtomMem paper evaluates at 0.7
    max_new_tokens: int = 256  # a longer reply is cut
    thinking: bool = False  # whether a model that can think before it replies shall


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class ChatPolicy:
    """A chat model that is shown each observation as a fresh chat, as in the AtomMem paper."""

    model: ChatModel
    settings: EpisodeSettings
    sampling: Sampling = GREEDY
    layout: str = "shared_prefix"
    privileged: bool = False

    def __post_init__(self) -> None:
        get_layout(self.layout)  # a wrong one is refused before anything is played

    @property
    def name(self) -> str:
        return self.model.name

    def begin(self, seed: int, task: Task | None) -> Act:
        async def act(observation: Observation) -> Reply:
            return await self.model.complete(
                get_layout(self.layout)(observation, self.settings),
                **dataclasses.asdict(self.sampling),
                seed=zlib.crc32(f"{seed}/{observation['step']}".encode()),
            )

        return act
