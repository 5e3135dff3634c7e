"""A draft inside a thought is never a reply."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.models.thinking import opens_thought, without_thought

DRAFT = "<final_answer>draft</final_answer>"


@pytest.mark.parametrize(
    ("text", "opened", "reply"),
    [
        (f"<think>{DRAFT}</think>\n\nRome", False, "Rome"),
        (f"\n <think>{DRAFT}</think>Rome", None, "Rome"),
        (f"{DRAFT}</think>Rome", True, "Rome"),
        (f"{DRAFT}</think>Rome", None, "Rome"),
        (f"{DRAFT}</think>Rome", False, f"{DRAFT}</think>Rome"),  # the prompt did not open a thought: the reply quotes
        (f"<think>{DRAFT}", False, ""),
        (DRAFT, True, ""),
        (f"<think>a</think>Ro<think>{DRAFT}</think>me", False, "Rome"),
        (f"<think>a</think>Rome<think>{DRAFT}", False, "Rome"),
        (f"<think>a</think><think>{DRAFT}</think>Rome", None, "Rome"),
        (f"<think>a <think> {DRAFT}</think> {DRAFT}</think>Rome", False, "Rome"),
        (f"a <think> {DRAFT}</think> {DRAFT}</think>Rome", True, "Rome"),
        ("It <think>s</think>.", False, "It <think>s</think>."),
        ("It <think>s</think>.", None, "It <think>s</think>."),
        ("Rome", False, "Rome"),
        (" Rome ", None, " Rome "),
        ("", True, ""),
    ],
)
def test_the_reply_is_what_stands_outside_of_thoughts(text: str, opened: bool | None, reply: str) -> None:
    assert without_thought(text, opened) == reply


@pytest.mark.parametrize("text", [DRAFT, f"Is it {DRAFT}", ""])
def test_a_truncated_text_without_a_tag_is_a_thought_only_where_one_may_have_been_opened(text: str) -> None:
    assert without_thought(text, None, thinking=True, truncated=True) == ""
    assert without_thought(text, None, thinking=True) == text
    assert without_thought(text, None, truncated=True) == text
    assert without_thought(text, False, thinking=True, truncated=True) == text


@given(st.lists(st.sampled_from(["<think>", "</think>", "x", " "]), max_size=12).map("".join))
def test_what_a_model_wrote_after_its_last_thought_is_always_in_the_reply(text: str) -> None:
    for begin in ("<think>", "<think>a</think>"):
        reply = without_thought(begin + text)
        assert "<think>" not in reply
        assert "</think>" not in reply
    _, _, last = f"<think>{text}".rpartition("</think>")
    if "<think>" not in last:
        assert without_thought(f"<think>{text}").endswith(last.lstrip())


def test_an_empty_thought_in_the_prompt_is_closed() -> None:
    assert not opens_thought("<think>\n\n</think>\n\n")
    assert opens_thought("<think>\n")
