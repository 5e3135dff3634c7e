"""A chat model as the agent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from playing import SPECS, make_driver

from agents import load_policy
from agents.chat_policy import ChatPolicy, Sampling
from atommem_env.errors import PolicyError, SettingError
from atommem_env.types import Message, Reply


def test_fault_8_a_model_is_shown_the_system_text_apart_from_the_observation_and_every_episode_is_played() -> None:
    seen: list[list[Message]] = []

    class Model:
        name = "echo"

        async def complete(self, messages: Any, **sampling: Any) -> Reply:
            seen.append(messages)
            return Reply("<final_answer>unknown</final_answer>")

    driver = make_driver()
    rollouts = asyncio.run(driver.run(SPECS, ChatPolicy(Model(), driver.settings)))
    assert len(rollouts) == len(SPECS)
    assert len(seen) == sum(len(rollout.turns) for rollout in rollouts)
    for messages in seen:
        assert [message["role"] for message in messages] == ["system", "user"]
        assert "<create_memory>" in messages[0]["content"]
        assert "<create_memory>" not in messages[1]["content"]


@pytest.mark.parametrize(
    ("complete", "returned"),
    [(lambda *chat, **sampling: "text", "str"), (lambda *chat, **sampling: Reply("text"), "Reply")],
)
def test_a_model_that_is_not_asynchronous_is_rejected_with_what_to_do(complete: Any, returned: str) -> None:
    model = SimpleNamespace(name="mine", complete=complete)
    with pytest.raises(PolicyError, match=f"of the model 'mine' must be an async function .* it returned {returned}"):
        check(model)


def test_a_model_that_replies_with_plain_text_is_rejected_with_what_to_do() -> None:
    async def complete(*chat: Any, **sampling: Any) -> str:
        return "text"

    with pytest.raises(PolicyError, match="that returns a Reply, it returned str"):
        check(SimpleNamespace(name="mine", complete=complete))


def check(model: Any) -> None:
    driver = make_driver()
    for policy in (load_policy(model, driver.settings), load_policy("no-memory", driver.settings, model=model)):
        asyncio.run(driver.run(SPECS[:1], policy))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_no_model_has_is_rejected(temperature: float) -> None:
    with pytest.raises(SettingError, match="temperature must be a finite number of at least 0"):
        Sampling(temperature=temperature)
