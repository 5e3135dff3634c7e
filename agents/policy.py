"""What a policy is.

The simplest is a function from observation to text; the most general is an object with a state for each episode.

    def policy(observation):
        return f"<create_memory>{observation['chunk'][:200]}</create_memory>"
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from atommem_env.errors import PolicyError
from atommem_env.types import Observation, Reply, Task

Act = Callable[[Observation], str | Reply | Awaitable[str | Reply]]
"""Replies to an observation, at once or as a coroutine."""


@runtime_checkable
class Policy(Protocol):
    """Plays any number of episodes at the same time: the state of one lives in what `begin` returns."""

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
        PolicyError: it is neither; a chat model or a method becomes a policy by `agents.load_policy`.
    """
    if isinstance(policy, type):
        raise PolicyError(f"A policy must be an object, got the class {policy.__name__}: give {policy.__name__}(…).")
    if isinstance(policy, Policy):
        return policy
    if hasattr(policy, "begin"):
        absent = [name for name in ("name", "privileged") if not hasattr(policy, name)]
        raise PolicyError(
            f"A policy with begin() must also have {' and '.join(absent)}, see agents.policy.Policy; got {policy!r}."
        )
    if hasattr(policy, "complete"):
        raise PolicyError(f"{policy!r} is a chat model; load_policy(model, settings) makes a policy of it.")
    if not callable(policy):
        raise PolicyError(f"A policy is a function observation -> str or an agents.Policy object, got {policy!r}.")
    name = name or name_of_function(policy)
    if is_method(policy):
        raise PolicyError(
            f"{name} takes two arguments, as a method (settings, ask) does; load_policy(method, settings, model=…) makes a "
            "policy of it."
        )
    if not _accepts(policy, 1):
        raise PolicyError(f"A policy is a function of one argument, the observation; {name} cannot be called with one.")
    return FunctionPolicy(policy, name)


def name_of_function(function: Callable[..., object]) -> str:
    """The name of a function, or of the class of another callable."""
    return str(getattr(function, "__name__", type(function).__name__))


def is_method(function: object) -> bool:
    """Whether a function takes two arguments, as `agents.prompting.Method` does, and cannot do with one, as a policy does."""
    return callable(function) and not isinstance(function, type) and not _accepts(function, 1) and _accepts(function, 2)


def _accepts(function: Callable[..., object], count: int) -> bool:
    """Whether a function can be called with `count` arguments by position."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # of some built-in functions nothing is known
        pass
    return True


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
