"""Terms of the reward, each against a count by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import pytest

from atommem_env.episode import Episode
from atommem_env.errors import SettingError
from atommem_env.types import ABLATIONS, REWARD_TERMS, EpisodeSettings, StepResult, Task

Say = Callable[[Episode, str], StepResult]

# Three chunks and two questions: one of five replies has a fault, two have a Read, one question is right.
REPLIES = [
    "<create_memory>Ada lives in Rome.</create_memory>",
    "<read_memory>Ada</read_memory><read_memory>Rome</read_memory>",  # the first is superseded: a fault
    "<read_memory>Rome</read_memory>",
    "<final_answer>Rome</final_answer>",
    "<final_answer>Ada</final_answer>",
]


def played(task: Task, say: Say, replies: list[str], **settings: Any) -> Episode:
    episode = Episode(task, EpisodeSettings(chunk_tokens=8, **settings), seed=0)
    assert len(episode.chunks) == 3
    rewards = [say(episode, reply).reward for reply in replies]
    assert rewards[:-1] == [0] * (len(replies) - 1)
    assert rewards[-1] == episode.reward
    return episode


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("faults", 1 / 5),
        ("reads", 2 / 5),
        ("steps", 5 / (3 + 2 * 4)),
        ("memory_size", 5 / 18),  # "Ada lives in Rome ." of the document's words and stops, titles included
        ("evidence_stored", 1 / 2),
    ],
)
def test_a_term_is_the_share_that_its_name_says(task: Task, say: Say, term: str, expected: float) -> None:
    episode = played(task, say, REPLIES, reward_terms={term: 1})
    assert episode.reward == pytest.approx(0.5 + expected)
    assert played(task, say, REPLIES, reward_terms={term: -2}).reward == pytest.approx(0.5 - 2 * expected)


def test_without_terms_the_reward_is_exact_match_alone(task: Task, say: Say) -> None:
    assert played(task, say, REPLIES).reward == 0.5


@pytest.mark.parametrize("term", REWARD_TERMS)
@pytest.mark.parametrize(
    "replies",
    [
        [""] * 11,
        ["<create_memory>" + "Ada lives in Rome. Bo cooks for Ada. " * 9 + "</create_memory>"] * 3
        + ["<read_memory>"] * 8,
        ["<update_scratchpad>Rome has seven hills.</update_scratchpad>"] * 3
        + ["<final_answer>Rome</final_answer>"] * 2,
        ["<read_memory>Rome</read_memory>"] * 11,
    ],
)
def test_a_term_stays_within_its_range(task: Task, say: Say, term: str, replies: list[str]) -> None:
    without = played(task, say, replies).reward
    assert 0 <= played(task, say, replies, reward_terms={term: 1}).reward - without <= 1


def test_terms_come_as_a_dict_or_as_json_gives_them_back() -> None:
    given = EpisodeSettings(reward_terms={"reads": 1, "faults": -0.5})  # type: ignore[arg-type]
    assert given.reward_terms == (("faults", -0.5), ("reads", 1.0))
    assert EpisodeSettings(reward_terms=[["faults", -0.5], ["reads", 1]]) == given  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", [{"fault": 1}, {"faults": float("nan")}, {"faults": "much"}, [["faults"]]])
def test_a_term_that_cannot_be_is_refused_with_those_that_can(terms: Any) -> None:
    with pytest.raises(SettingError, match="evidence_stored"):
        EpisodeSettings(reward_terms=terms)


def test_an_episode_goes_on_after_a_copy_with_the_terms_it_had_counted(task: Task, say: Say) -> None:
    settings = {"reward_terms": {"faults": -1, "reads": 1}}
    episode = Episode(task, EpisodeSettings(chunk_tokens=8, **settings), seed=0)  # type: ignore[arg-type]
    for reply in REPLIES[:3]:
        say(episode, reply)
    twins = [episode.fork(), Episode.restore(task, episode.settings, episode.snapshot()), episode]
    for twin in twins:
        for reply in REPLIES[3:]:
            say(twin, reply)
    assert [twin.reward for twin in twins] == [pytest.approx(0.5 - 1 / 5 + 2 / 5)] * 3


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_of_the_paper_goes_by_its_name(name: str) -> None:
    env = gym.make("AtomMem-Synthetic", ablation=name, durability="off")
    settings: Any = env.get_wrapper_attr("settings")
    for setting, value in ABLATIONS[name].items():
        assert getattr(settings, setting) == value
    assert settings != EpisodeSettings(chunk_tokens=128)


def test_an_ablation_that_does_not_exist_or_is_contradicted_is_refused() -> None:
    with pytest.raises(SettingError, match="no_delete"):
        gym.make("AtomMem-Synthetic", ablation="no-delete")
    with pytest.raises(SettingError, match="scratchpad"):
        gym.make("AtomMem-Synthetic", ablation="no_scratchpad", scratchpad=True)


def test_only_so_many_operations_of_a_reply_are_carried_out(task: Task, say: Say) -> None:
    episode = Episode(task, EpisodeSettings(chunk_tokens=8, operations_per_reply=1), seed=0)
    result = say(episode, "<create_memory>a</create_memory><create_memory>b</create_memory>")
    assert [entry.text for entry in episode.memory.entries()] == ["a"]
    assert [outcome.fault for outcome in result.results] == [None, "too_many"]
    assert "first 1 operations" in result.observation["notice"]


@pytest.mark.parametrize("reward", ["exact_match", "f1"])
def test_a_question_without_a_gold_is_in_no_reward_and_in_no_term(task: Task, say: Say, reward: str) -> None:
    first, second = task.questions
    half = replace(task, questions=(first, replace(second, answers=())))
    episode = played(half, say, REPLIES, reward=reward, reward_terms={"evidence_stored": 1})
    assert [(outcome.em, outcome.f1, outcome.prediction) for outcome in episode.outcomes] == [
        (1.0, 1.0, "Rome"),
        (None, None, "Ada"),
    ]
    assert episode.reward == 1.0 + 1.0  # one graded question, right; its one passage, stored


@pytest.mark.parametrize("reward", ["exact_match", "f1"])
def test_the_reward_is_zero_where_no_question_is_graded(task: Task, say: Say, reward: str) -> None:
    none = replace(task, questions=tuple(replace(question, answers=()) for question in task.questions))
    assert played(none, say, REPLIES, reward=reward).reward == 0.0
    assert played(none, say, REPLIES, reward_terms={"reads": 1}).reward == pytest.approx(2 / 5)
    unanswered = played(none, say, [""] * 11)
    assert [(outcome.em, outcome.prediction) for outcome in unanswered.outcomes] == [(None, None)] * 2
