"""What a policy is.

The simplest is a function from observation to text; the most general is an object with a state for each episode.

    def policy(observation):
        return render_reply(EpisodeSettings(), Operation(OperationKind.CREATE, observation["chunk"][:200]))

`render_reply` (`agents.prompting`) writes operations as text, so that a document that spells one is stored, not carried out.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol, runtime_checkable

from atommem_env.errors import PolicyError
from atommem_env.packages import check_packages
from atommem_env.types import Observation, Reply, Task

check_packages("agents")  # here too: where another's `__init__.py` lies over ours, ours does not run

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


def begin_episode(policy: Policy, seed: int, task: Task) -> Act:
    """The policy's player of one episode; only a privileged policy is given the task.

    Raises:
        PolicyError: the policy called `sys.exit`, or returned no function.
    """
    with _exit_as_error():
        act = policy.begin(seed, task if policy.privileged else None)
    if not callable(act):
        raise PolicyError(f"begin() must return a function observation -> reply, got {act!r}.")
    return act


async def reply_to(act: Act, observation: Observation, timeout: float | None = None) -> Reply:
    """The reply of `act` to a copy of the observation, awaited where needed, plain text wrapped.

    Args:
        timeout: seconds until the reply must be there. With a limit, a function that is not asynchronous runs in a thread, still
            one at a time; when it is late, it is left behind there. An asynchronous one is cancelled, which works unless it
            blocks the event loop.

    Raises:
        PolicyError: the reply was late, the policy called `sys.exit` or cancelled itself, or it returned something that is
            neither a `str` nor a `Reply`.
    """
    seen = copy.copy(observation)  # what the policy does to it must not change what is recorded
    try:
        reply = await (_call(act, seen) if timeout is None else _call_within(timeout, act, seen))
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise PolicyError("The policy gave no reply: what it waited for was cancelled.") from error
    if isinstance(reply, str):
        return Reply(reply)
    if isinstance(reply, Reply):
        return reply
    raise PolicyError(f"A policy must reply with a str or a Reply, got {type(reply).__name__}.")


async def _call(act: Act, observation: Observation) -> Any:
    with _exit_as_error():
        reply = act(observation)
        return await reply if inspect.isawaitable(reply) else reply


async def _call_within(seconds: float, act: Act, observation: Observation) -> Any:
    end = time.monotonic() + seconds
    if inspect.iscoroutinefunction(act) or inspect.iscoroutinefunction(type(act).__call__):
        reply: Any = act(observation)
    else:
        reply = _call_in_thread(seconds, act, observation)
    if not inspect.isawaitable(reply):
        return reply
    call = asyncio.ensure_future(_call(lambda _: reply, observation))
    try:
        await asyncio.wait({call}, timeout=max(0.0, end - time.monotonic()))
        if not call.done():
            raise _late(seconds)
        return call.result()
    finally:
        call.cancel()


def _call_in_thread(seconds: float, act: Act, observation: Observation) -> Any:
    outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def call() -> None:
        try:
            outcome.put((act(observation), None))
        except BaseException as error:
            outcome.put((None, error))

    # No executor: the program would wait for its threads at its end.
    threading.Thread(target=contextvars.copy_context().run, args=(call,), name="policy", daemon=True).start()
    try:
        reply, error = outcome.get(timeout=min(seconds, threading.TIMEOUT_MAX))
    except Empty:
        raise _late(seconds) from None
    with _exit_as_error():
        if error is not None:
            raise error
    return reply


def _late(seconds: float) -> PolicyError:
    return PolicyError(f"The policy gave no reply within {seconds:g} s (reply_timeout).")


@contextmanager
def _exit_as_error() -> Iterator[None]:
    """`SystemExit` as an error: a policy that calls `sys.exit` would end the whole program, with the code of success."""
    try:
        yield
    except SystemExit as end:
        code = "" if end.code is None else repr(end.code)
        raise PolicyError(f"The policy called sys.exit({code}) instead of replying.") from end
