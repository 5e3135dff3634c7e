"""The planner: honest in what it sees, writes and names; and it plans with the operations that there are."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import gymnasium as gym
import pytest

from agents.baselines.planner import Planner
from agents.registry import load_policy
from agents.rollout import Driver, EpisodeSpec
from atommem_env.dialects import get_dialect
from atommem_env.errors import PolicyError
from atommem_env.types import (
    Document,
    EpisodeSettings,
    Evidence,
    Fault,
    Observation,
    Operation,
    OperationKind,
    Question,
    Rollout,
    Task,
)

ALL = ("create", "read", "update", "delete")
DROPPED: list[tuple[str, ...]] = [(), *((name,) for name in ALL), ("update", "delete")]

OLD, NEW = "Ada Brook works at Iron Bank.", "Ada Brook now works at Jade Mills."
LEADS, ASIDE = "Otto Knox leads Jade Mills.", "Lake Hill is an old town."
WRONG_WAY = "Leo Snow leads Iron Bank."
TASK = Task(
    id="hand/1",
    dataset="synthetic",
    documents=tuple(Document("", text) for text in (OLD, WRONG_WAY, NEW, LEADS)),
    questions=(
        Question(
            "q1",
            "Who leads the company where Ada Brook works?",
            ("Otto Knox",),
            (Evidence("", NEW), Evidence("", LEADS)),
            "2hop_corrected",
            2,
        ),
    ),
)


def left(*dropped: str) -> tuple[str, ...]:
    return tuple(name for name in ALL if name not in dropped)


def play(episodes: int, dropped: tuple[str, ...] = (), **options: Any) -> list[Rollout]:
    kwargs = {
        "split": "test",
        "durability": "off",
        "questions": 4,
        "hops": [2],
        "num_docs": 24,
        "corrections": 1.0,
        "chunk_tokens": 24,
        "capacity": 6,
        "top_k": 2,
        "operations_per_reply": 1,
        "scratchpad": False,
        **options,
    }
    driver = Driver.of(gym.make("AtomMem-Synthetic", operations=left(*dropped), **kwargs))
    specs = [EpisodeSpec(index, index, index) for index in range(episodes)]
    return asyncio.run(driver.run(specs, load_policy("planner", driver.settings)))


def see(**fields: Any) -> Observation:
    observation: Observation = {
        "phase": "read",
        "questions": TASK.questions[0].text,
        "question": "",
        "chunk": "",
        "scratchpad": "",
        "query": "",
        "retrieved": "",
        "notice": "",
        "step": 0,
        "steps_left": 9,
    }
    return {**observation, **fields}


def replies(*observations: Observation, dropped: tuple[str, ...] = (), capacity: int = 2) -> list[str]:
    act = Planner(EpisodeSettings(operations=left(*dropped), capacity=capacity)).begin(0, TASK)
    return [str(act(observation)) for observation in observations]


def operations(text: str) -> list[Operation]:
    return [item for item in get_dialect("tags").parse(text) if isinstance(item, Operation)]


# --------------------------------------------------------------------------------------------------------------- honesty


@pytest.mark.parametrize("dropped", DROPPED)
def test_a_reply_is_one_operation_that_exists_and_is_carried_out(dropped: tuple[str, ...]) -> None:
    for rollout in play(12, dropped):
        for turn in rollout.turns:
            assert len(operations(turn.reply.text)) <= 1
            assert not {str(operation.kind) for operation in operations(turn.reply.text)} & set(dropped)
            assert {result.fault for result in turn.results} <= {None, Fault.NO_ANSWER}


@pytest.mark.parametrize("dropped", DROPPED)
def test_it_writes_names_and_answers_only_what_is_in_view(dropped: tuple[str, ...]) -> None:
    written = answered = 0
    for rollout in play(12, dropped):
        for turn in rollout.turns:
            seen = turn.observation
            for operation in operations(turn.reply.text):
                if operation.kind in (OperationKind.CREATE, OperationKind.UPDATE):
                    written += 1
                    assert operation.text == "No longer true." or operation.text in seen["chunk"]
                if operation.target:
                    assert re.search(rf"(?m)^{operation.target}: ", seen["retrieved"])
                if operation.kind is OperationKind.ANSWER:
                    answered += 1
                    assert operation.text == "unknown" or operation.text in seen["retrieved"]
    assert answered == 12 * 4
    assert (written > 0) is ("create" not in dropped)


def test_it_is_privileged_and_rejects_other_questions() -> None:
    assert Planner(EpisodeSettings()).privileged
    foreign = Question("q", "Where was the author of Emma born?", ("x",), (), "bridge", 1)
    with pytest.raises(PolicyError, match="AtomMem-Synthetic"):
        Planner(EpisodeSettings()).begin(0, Task("t", "synthetic", TASK.documents, (foreign,)))


# -------------------------------------------------------------------------------------------------------------- planning


def test_a_correction_goes_over_the_entry_in_view_else_into_a_new_one_and_the_old_is_deleted_later() -> None:
    old, new = see(chunk=OLD), see(chunk=NEW, retrieved=f"m1: {OLD}")
    idle = see(chunk=ASIDE, retrieved=f"m1: {OLD}\nm2: {NEW}")
    keep, create = f"<create_memory>{OLD}</create_memory>", f"<create_memory>{NEW}</create_memory>"
    assert replies(old, new) == [keep, f"<update_memory>m1: {NEW}</update_memory>"]
    assert replies(old, new, idle, dropped=("update",)) == [keep, create, "<delete_memory>m1</delete_memory>"]
    hidden, search = see(chunk=NEW), f"<read_memory>{OLD}</read_memory>"
    assert replies(old, hidden, see(chunk=ASIDE)) == [keep, create, search]
    assert replies(old, hidden, idle, dropped=("delete",)) == [keep, create, ""]  # stays in view until there is a use


def test_what_is_stated_of_an_outdated_object_is_of_no_more_use() -> None:
    view = f"m2: {WRONG_WAY}\nm1: {NEW}"
    before = [see(chunk=OLD), see(chunk=WRONG_WAY), see(chunk=NEW, retrieved=f"m1: {OLD}")]
    end = see(chunk=LEADS, retrieved=view)
    assert replies(*before, end)[-1] == f"<update_memory>m2: {LEADS}</update_memory>"
    assert replies(*before, see(chunk=ASIDE, retrieved=view))[-1] == "<delete_memory>m2</delete_memory>"
    assert replies(*before, see(chunk=ASIDE, retrieved=f"m1: {NEW}"))[-1] == f"<read_memory>{WRONG_WAY}</read_memory>"


def test_a_full_memory_without_update_is_cleared_too_late_for_the_fact_at_hand() -> None:
    before = [see(chunk=OLD), see(chunk=WRONG_WAY)]
    text = replies(*before, see(chunk=NEW, retrieved=f"m1: {OLD}"), dropped=("update",))[-1]
    assert text == "<delete_memory>m1</delete_memory>"


def test_no_question_is_begun_that_the_memory_cannot_hold_to_its_end() -> None:
    assert replies(see(chunk=OLD), capacity=1)[0] == ""
    both = ("update", "delete")
    assert replies(see(chunk=OLD), capacity=2, dropped=both)[0] == ""  # its correction would need a third entry
    assert replies(see(chunk=OLD), capacity=3, dropped=both)[0] == f"<create_memory>{OLD}</create_memory>"


def test_a_question_whose_evidence_went_by_is_given_up() -> None:
    shown = see(chunk=LEADS, retrieved=f"m1: {OLD}\nm2: {WRONG_WAY}")
    missed = [see(chunk=OLD), see(chunk=WRONG_WAY), see(chunk=NEW), shown]  # full when the correction came
    assert replies(*missed)[-1] == "<delete_memory>m1</delete_memory>"


def test_an_outdated_entry_that_hides_the_right_one_is_removed_before_answering() -> None:
    reading = [see(chunk=OLD), see(chunk=NEW), see(chunk=LEADS)]
    ask = {"phase": "answer", "question": TASK.questions[0].text, "chunk": ""}
    asked = [see(**ask), see(**ask, retrieved=f"m1: {OLD}")]
    found = [see(**ask, retrieved=f"m2: {NEW}"), see(**ask, retrieved=f"m3: {LEADS}")]
    first, then = "<read_memory>Ada Brook employer</read_memory>", "<read_memory>Jade Mills leader</read_memory>"
    answer = "<final_answer>Otto Knox</final_answer>"
    for dropped, removal in (
        ((), "<delete_memory>m1</delete_memory>"),
        (("delete",), "<update_memory>m1: No longer true.</update_memory>"),
    ):
        assert replies(*reading, *asked, *found, capacity=9, dropped=dropped)[3:] == [first, removal, then, answer]
    # With neither, what is in view is believed.
    wrong = replies(*reading, *asked, see(**ask), capacity=9, dropped=("update", "delete"))[3:]
    assert wrong == [first, "<read_memory>Iron Bank leader</read_memory>", "<final_answer>unknown</final_answer>"]


def test_with_room_and_no_corrections_every_question_is_answered() -> None:
    assert all(rollout.reward == 1 for rollout in play(12, corrections=0.0, capacity=None, top_k=3, questions=1))
