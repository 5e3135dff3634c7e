"""The checker accepts all that `load_policy` does and rejects what is broken, with a sentence that names the fault."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import atommem_env  # noqa: F401  registers the environments
from agents.prompting import render_reply
from agents.registry import POLICIES
from agents.testing import check_policy
from atommem_env.types import EpisodeSettings, Observation, Operation, OperationKind, Reply, Task


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dialect", ["tags", "public_code"])
def test_every_policy_passes(name: str, dialect: str) -> None:
    options: dict[str, Any] = {"chunk_tokens": 128, "dialect": dialect, "capacity": 8}
    check_policy(name, questions=2, num_docs=20, **options)


def test_plain_and_asynchronous_functions_pass() -> None:
    async def slow(observation: Observation) -> Reply:
        return Reply("<final_answer>yes</final_answer>", (1,), (2, 3), (-0.5, -0.1))

    check_policy(slow)
    check_policy(lambda observation: observation["chunk"])


class Answering:
    """A model of yours: two members, and no base class."""

    name = "answering"

    async def complete(self, messages: Any, **sampling: Any) -> Reply:
        return Reply("<final_answer>yes</final_answer>")


def method(settings: EpisodeSettings, ask: Any) -> Any:
    async def act(observation: Observation) -> str:
        reply = await ask([{"role": "user", "content": observation["questions"]}])
        return render_reply(settings, Operation(OperationKind.SCRATCHPAD, reply.text))

    return act


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (Answering(), {}),
        (Answering(), {"layout": "terse"}),
        (method, {"model": Answering()}),
        ("rag", {"model": Answering()}),
        (f"{__name__}:method", {"model": Answering()}),
    ],
)
def test_models_and_methods_pass_as_load_policy_takes_them(policy: Any, options: dict[str, Any]) -> None:
    check_policy(policy, **options)


@dataclass
class Beginner:
    begin: Callable[[int, Task | None], Any]
    name: str = "beginner"
    privileged: bool = False


def trusting(observation: Any) -> str:
    """Believes that what it stored is found."""
    if observation["phase"] == "answer":
        return f"<final_answer>{observation['retrieved'].splitlines()[0]}</final_answer>"
    return f"<create_memory>{observation['chunk']}</create_memory><read_memory>{observation['questions']}</read_memory>"


def shared_state() -> Any:
    steps = itertools.count()
    return lambda observation: f"<create_memory>{next(steps)}</create_memory>"


def beside_others() -> Any:
    """Keeps what belongs to an episode where all episodes see it, and overwrites it with each."""
    state = {"seed": 0}

    def begin(seed: int, task: Task | None) -> Any:
        state["seed"] = seed
        return lambda observation: f"<create_memory>{state['seed']}</create_memory>"

    return Beginner(begin)


class Nameless:
    privileged = False

    def begin(self, seed: int, task: Task | None) -> Any:
        return lambda observation: ""


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (3, r"Taking it as a policy raised PolicyError"),
        (method, r"Taking it as a policy raised PolicyError: method needs a model"),
        (Answering, r"Taking it as a policy raised PolicyError: .* class Answering"),
        (Nameless(), r"must also have name, see"),
        (Beginner(lambda seed, task: "text"), "begin.. must return a function observation -> reply, got 'text'"),
        (lambda observation: None, r"step 0 \(phase 'read', seed 0\) raised PolicyError: .*got NoneType"),
        (lambda observation: "" if observation["phase"] == "read" else 7, r"phase 'answer', seed 0\) raised .*got int"),
        (lambda observation: Reply(b"x"), "raised PolicyError: text of a Reply must be a str, got b'x'"),  # type: ignore[arg-type]
        (trusting, r"phase 'answer', seed 2\) raised IndexError"),
        (shared_state(), r"same seed must give the same replies: with seed 0, .* reply 0 differs"),
        (beside_others(), r"same seed must give the same replies: with seed 0, .* reply \d differs"),
        (lambda observation: str(random.random()), "or pass deterministic=False"),
    ],
)
def test_a_broken_policy_is_rejected(broken: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_policy(broken)


def test_a_policy_that_samples_freely_passes_where_the_user_says_so() -> None:
    check_policy(lambda observation: str(random.random()), deterministic=False)
