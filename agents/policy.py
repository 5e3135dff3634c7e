"""What a policy is.

The least: a function from observation to text. The most: an object that keeps something for each episode.

    def policy(observation):
        return f"<create_memory>{observation['chunk'][:200]}</create_memory>"
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from atommem_env.errors import PolicyError
from atommem_env.packages import check_packages
from atommem_env.types import Observation, Reply, Task

check_packages("agents")  # here too: where another's `__init__.py` lies over ours, ours does not run

Act = Callable[[Observation], str | Reply | Awaitable[str | Reply]]
"""Replies to an observation, at once or as a coroutine."""


@runtime_checkable
class Policy(Protocol):
    """Plays any number of episodes at the same time: what belongs to one of them lives in what `begin` returns."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def privileged(self) -> bool:
        """Whether it is given the task, golds and all; every table says so."""
        ...

    def begin(self, seed: int, task: Task | None) -> Act:
        """A player of one episode.

        Args:
            seed: for whatever is random; the same seed and observations must give the same replies.
            task: the task, if the policy is privileged, else None.
        """
        ...


@dataclass(frozen=True, slots=True)
class FunctionPolicy:
    """A plain or asynchronous function as a policy."""

    act: Act
    name: str
    privileged: bool = False

    def begin(self, seed: int, task: Task | None) -> Act:
        return self.act


def as_policy(policy: Policy | Act, name: str | None = None) -> Policy:
    """`policy` itself, or the function `policy` as one, called `name` or else as the function is.

    Raises:
        PolicyError: it is neither.
    """
    if isinstance(policy, Policy):
        return policy
    if callable(policy) and not isinstance(policy, type):
        return FunctionPolicy(policy, name or str(getattr(policy, "__name__", type(policy).__name__)))
    raise PolicyError(f"A policy is a function observation -> str or an agents.Policy object, got {policy!r}.")


async def reply_to(act: Act, observation: Observation) -> Reply:
    """The reply of `act`, awaited where needed, plain text wrapped.

    Raises:
        PolicyError: it gave something that is neither a `str` nor a `Reply`.
    """
    reply = act(observation)
    if inspect.isawaitable(reply):
        reply = await reply
    if isinstance(reply, str):
        return Reply(reply)
    if isinstance(reply, Reply):
        return reply
    raise PolicyError(f"A policy must reply with a str or a Reply, got {type(reply).__name__}.")
