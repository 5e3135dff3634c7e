"""Replies and their costs are checked where they are made."""

from __future__ import annotations

import pickle
from enum import StrEnum
from typing import Any

import numpy as np
import pytest

from atommem_env.errors import PolicyError
from atommem_env.types import Reply, Usage


@pytest.mark.parametrize("value", [-1, float("nan"), 1.0, True, "3", 2**63, [1], np.int64(-2), np.float32(1)])
@pytest.mark.parametrize("name", ["calls", "prompt_tokens", "completion_tokens", "cached_tokens", "dropped_tokens"])
def test_a_count_is_a_whole_number_of_at_least_zero(name: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=rf"^{name} of a Usage must be a whole number from 0 to 2\*\*63 - 1"):
        Usage(**{name: value})
    assert type(getattr(Usage(**{name: np.int64(7)}), name)) is int


@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "cached_tokens"])
def test_a_sum_with_a_part_that_was_not_reported_is_not_known(name: str) -> None:
    silent = Usage(1, **{name: None})  # type: ignore[arg-type]
    for total in (silent + Usage(1, 5, 6, 7), Usage(1, 5, 6, 7) + silent, silent + silent):
        assert getattr(total, name) is None
        assert total.calls == 2
    assert Usage(1, 5, 6, 7, 8) + Usage(1, 50, 60, 70, 80) == Usage(2, 55, 66, 77, 88)


@pytest.mark.parametrize("name", ["calls", "dropped_tokens"])
def test_what_the_caller_counts_itself_is_always_known(name: str) -> None:
    with pytest.raises(PolicyError, match=rf"^{name} of a Usage .*- 1, got None"):
        Usage(**{name: None})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": b"x"}, "text of a Reply must be a str, got b'x'"),
        ({"text": None}, "text of a Reply must be a str, got None"),
        ({"stop": "eos"}, "stop of a Reply must be 'stop' or 'length', got 'eos'"),
        ({"usage": {"calls": 1}}, "usage of a Reply must be a Usage or None"),
        ({"prompt_ids": (1.5,)}, "prompt_ids of a Reply must be whole numbers from 0"),
        ({"prompt_ids": 3}, "prompt_ids of a Reply must be whole numbers from 0 to .*, got 3"),
        ({"prompt_ids": (10**30,)}, "prompt_ids of a Reply must be whole numbers from 0"),
        ({"completion_ids": (4, -1)}, "completion_ids of a Reply must be whole numbers from 0"),
        ({"completion_ids": (4,), "logprobs": (float("nan"),)}, "logprobs of a Reply must be finite numbers"),
        ({"completion_ids": (4,), "logprobs": (float("-inf"),)}, "logprobs of a Reply must be finite numbers"),
        ({"completion_ids": (4,), "logprobs": (None,)}, "logprobs of a Reply must be finite numbers"),
        ({"completion_ids": (4, 5), "logprobs": (-0.1,)}, "one for each of the 2 completion_ids, or none"),
    ],
)
def test_a_reply_of_another_form_is_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Reply(**{"text": "x", **fields})


def test_a_reply_keeps_its_own_copy_of_what_it_is_given() -> None:
    class Word(StrEnum):
        ROME = "Rome"

    class Loud(str):
        def __str__(self) -> str:
            return "LOUD"

    ids, logprobs = [np.int32(1), np.int32(2)], [-0.5, np.float32(-0.25)]
    reply = Reply(Loud("quiet"), prompt_ids=ids, completion_ids=ids, logprobs=logprobs)  # type: ignore[arg-type]
    ids.clear()
    logprobs.clear()
    assert reply == Reply("quiet", (1, 2), (1, 2), (-0.5, -0.25))
    assert [type(text) for text in (reply.text, Reply(Word.ROME).text)] == [str, str]
    assert Reply(Word.ROME).text == "Rome"
    assert pickle.loads(pickle.dumps(reply)) == reply
