"""What is a policy, and what is none."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from agents import as_policy
from agents.policy import FunctionPolicy, is_method
from atommem_env.errors import PolicyError
from atommem_env.types import Reply


class Player:
    name, privileged = "player", False

    def begin(self, seed: int, task: Any) -> Any:
        return lambda observation: "text"


class Nameless:
    privileged = False

    def begin(self, seed: int, task: Any) -> Any:
        return lambda observation: "text"


class Model:
    name = "model"

    async def complete(self, messages: Any, **sampling: Any) -> Reply:
        return Reply("text")


class Callable:
    def __call__(self, observation: Any, words: int = 3) -> str:
        return "text"


def method(settings: Any, ask: Any) -> Any:
    return lambda observation: "text"


def replies(observation: Any, *, words: int = 3) -> str:
    return "text"


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (Player(), "player"),
        (replies, "replies"),
        (lambda *seen: "text", "<lambda>"),
        (Callable(), "Callable"),
        (functools.partial(replies, words=2), "partial"),
    ],
)
def test_functions_of_an_observation_and_policy_objects_are_policies(policy: Any, name: str) -> None:
    taken = as_policy(policy)
    assert taken.name == name
    assert taken.begin(0, None)({}) == "text"  # type: ignore[typeddict-item]
    assert as_policy(taken) is taken


def test_a_function_is_called_as_its_caller_says() -> None:
    assert as_policy(replies, "my_module:replies") == FunctionPolicy(replies, "my_module:replies")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (3, r"a function observation -> str or an agents\.Policy object, got 3"),
        ("oracle", "got 'oracle'"),
        (Player, r"must be an object, got the class Player: give Player\(…\)"),
        (Nameless(), "must also have name, see"),
        (Model(), r"is a chat model; load_policy\(model, settings\)"),
        (method, r"method takes two arguments, .* load_policy\(method, settings, model=…\)"),
        (lambda: "text", "cannot be called with one"),
        (lambda observation, words, letters: "text", "cannot be called with one"),
    ],
)
def test_what_is_no_policy_is_rejected_with_what_to_do(policy: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        as_policy(policy)


def test_a_method_is_a_function_that_needs_two_arguments() -> None:
    assert is_method(method)
    assert is_method(lambda settings, ask, words=3: None)
    assert is_method(functools.partial(lambda settings, ask, words: None, words=2))
    assert not any(map(is_method, (replies, Callable(), Player(), Player, Model(), print, 3, "rag")))
