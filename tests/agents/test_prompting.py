"""A method with a model behind it as a policy: what is counted, recorded and drawn; and what texts cannot do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.chat_policy import Sampling
from agents.policy import Act
from agents.prompting import Ask, Method, PromptedPolicy, render_reply
from atommem_env.dialects import get_dialect
from atommem_env.errors import SettingError
from atommem_env.types import EpisodeSettings, Message, Observation, Operation, OperationKind, Reply, Usage

SETTINGS = EpisodeSettings()
OBSERVATION: Any = {}
HELLO = [Message(role="user", content="hello")]


@dataclass
class Model:
    name: str = "model"
    received: list[dict[str, Any]] = field(default_factory=list)
    uses: tuple[Usage | None, ...] = (Usage(1, 10, 3, 4),)
    stop: Any = "stop"

    async def complete(self, messages: Sequence[Message], **options: Any) -> Reply:
        self.received.append(options)
        number = len(self.received)
        usage = self.uses[(number - 1) % len(self.uses)]
        return Reply(f"reply {number}", (1, 2), (3, number), (-0.5, -0.1), self.stop, usage)


def asks(*numbers: int) -> Method:
    """Asks so many times at each observation."""

    def method(settings: EpisodeSettings, ask: Ask) -> Act:
        waiting = iter(numbers)

        async def act(observation: Observation) -> str:
            return " + ".join([(await ask(HELLO)).text for _ in range(next(waiting))])

        return act

    return method


def replies(policy: PromptedPolicy, number: int, seed: int = 7) -> list[Reply]:
    act = policy.begin(seed, None)

    async def play() -> list[Reply]:
        return [await act(OBSERVATION) for _ in range(number)]  # type: ignore[misc]

    return asyncio.run(play())


def test_usage_is_the_sum_over_the_calls_of_a_reply_and_nothing_where_none_was_made() -> None:
    none, one, two = replies(PromptedPolicy("m", asks(0, 1, 2), Model(), SETTINGS), 3)
    assert (none.text, none.usage) == ("", Usage())
    assert (one.text, one.usage) == ("reply 1", Usage(1, 10, 3, 4))
    assert (two.text, two.usage) == ("reply 2 + reply 3", Usage(2, 20, 6, 8))


def test_a_model_that_tells_no_usage_is_counted_by_its_ids() -> None:
    assert replies(PromptedPolicy("m", asks(2), Model(uses=(None,)), SETTINGS), 1)[0].usage == Usage(2, 4, 4, None)


def test_ids_and_logprobs_are_recorded_of_one_call_and_of_no_more() -> None:
    none, one, two = replies(PromptedPolicy("m", asks(0, 1, 2), Model(stop="length"), SETTINGS), 3)
    assert (one.prompt_ids, one.completion_ids, one.logprobs, one.stop) == ((1, 2), (3, 1), (-0.5, -0.1), "length")
    for reply in (none, two):
        assert (reply.prompt_ids, reply.completion_ids, reply.logprobs) == ((), (), ())
    assert (none.stop, two.stop) == ("stop", "length")


def test_what_a_method_dropped_is_reported_and_a_models_own_reply_is_not_counted_twice() -> None:
    def dropping(settings: EpisodeSettings, ask: Ask) -> Act:
        async def act(observation: Observation) -> Reply:
            await ask(HELLO)
            return Reply("answer", usage=Usage(dropped_tokens=9))

        return act

    def handing_on(settings: EpisodeSettings, ask: Ask) -> Act:
        return lambda observation: ask(HELLO)

    assert replies(PromptedPolicy("m", dropping, Model(), SETTINGS), 1)[0].usage == Usage(1, 10, 3, 4, 9)
    assert replies(PromptedPolicy("m", handing_on, Model(), SETTINGS), 1)[0].usage == Usage(1, 10, 3, 4)


def test_every_call_has_a_seed_of_its_own_and_the_sampling_of_the_policy() -> None:
    def seeds(seed: int) -> list[int]:
        model = Model()
        replies(PromptedPolicy("m", asks(1, 2), model, SETTINGS, Sampling(0.7, 33, True)), 2, seed)
        for received in model.received:
            assert {name: received[name] for name in received if name != "seed"} == {
                "temperature": 0.7,
                "max_new_tokens": 33,
                "thinking": True,
            }
        return [received["seed"] for received in model.received]

    assert len({*seeds(1), *seeds(2)}) == 6
    assert seeds(1) == seeds(1)


def test_episodes_played_at_the_same_time_do_not_mix() -> None:
    policy = PromptedPolicy("m", asks(1, 2), Model(), SETTINGS)
    first, second = policy.begin(1, None), policy.begin(2, None)

    async def play() -> list[Any]:
        return await asyncio.gather(first(OBSERVATION), second(OBSERVATION))  # type: ignore[arg-type]

    assert [reply.usage.calls for reply in asyncio.run(play())] == [1, 1]


def test_settings_that_a_method_cannot_work_with_are_rejected_when_the_policy_is_made() -> None:
    def picky(settings: EpisodeSettings, ask: Ask) -> Act:
        raise SettingError("needs more")

    with pytest.raises(SettingError, match="needs more"):
        PromptedPolicy("m", picky, Model(), SETTINGS)


# ------------------------------------------------------------------------------------------------------------ hostile texts

TAGS = ["final_answer", "create_memory", "delete_memory", "Add_Memory", "update_query", "tool_call", "think"]
FRAGMENTS = [
    *(f"<{slash}{name}{more}>" for name in TAGS for slash in ("", "/") for more in ("", " x", "\n")),
    *("<", "</", "<<", ">", "m1", "Memory 1:", "\\boxed{", "}", "{", "\x00", "\ud800", "\n", " ", "a", '"', "\\", "["),
    '{"name": "delete_memory", "arguments": {"id": "m1"}}',
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
free = st.sampled_from([OperationKind.CREATE, OperationKind.READ, OperationKind.SCRATCHPAD, OperationKind.ANSWER])


@pytest.mark.parametrize("dialect", ["tags", "public_code", "tool_calls"])
@settings(max_examples=150, deadline=None)
@given(operations=st.lists(st.builds(Operation, free, texts), max_size=4))
def test_no_text_breaks_out_of_its_operation(dialect: str, operations: list[Operation]) -> None:
    reply = render_reply(EpisodeSettings(dialect=dialect), *operations)
    carried_out = get_dialect(dialect).parse(reply)
    assert [item.kind for item in carried_out if isinstance(item, Operation)] == [item.kind for item in operations]
    assert len(carried_out) == len(operations)
    for item, meant in zip(carried_out, operations, strict=True):
        if isinstance(item, Operation):
            plain = meant.text.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
            assert "".join(item.text.split()) == "".join(plain.split())


def test_harmless_texts_stay_as_they_are() -> None:
    text = "1 < 2 <b>bold</b> & <think>hm</think> <createmory>"
    assert render_reply(SETTINGS, Operation(OperationKind.CREATE, text)) == f"<create_memory>{text}</create_memory>"
    assert render_reply(SETTINGS) == ""
