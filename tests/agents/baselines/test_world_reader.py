import asyncio
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents.baselines.world_reader import Link, facts, query, read_fact, read_query, read_question
from agents.registry import load_policy
from agents.rollout import Driver, EpisodeSpec
from atommem_env.errors import PolicyError
from atommem_env.tasks.synthetic import SyntheticSource
from atommem_env.tasks.synthetic_world import FILLERS, INSTRUMENT, RELATIONS
from atommem_env.types import EpisodeSettings, Observation, OperationKind, Rollout

READERS = ("chain-match", "type-match", "first-link", "random-70", "store-all")
QUESTION = "Who leads the company where Ada Brook works?"
SEARCH = "<read_memory>Ada Brook employer</read_memory>"


def play(policy: str, episodes: int = 100, **options: Any) -> list[Rollout]:
    """Small tasks that all have an answer, and a memory of four entries."""
    small = {"hops": (1, 2), "num_docs": 8, "chunk_tokens": 48, "capacity": 4, "top_k": 3, "corrections": 0.0}
    fixed = {"split": "train", "durability": "off", "scratchpad": False, "unanswerable": 0.0}
    driver = Driver.of(gym.make("AtomMem-Synthetic", **{**fixed, **small, **options}))
    specs = [EpisodeSpec(index, index + 7, index + 13) for index in range(episodes)]
    return asyncio.run(driver.run(specs, load_policy(policy, driver.settings)))


def mean_reward(rollouts: list[Rollout]) -> float:
    return float(np.mean([rollout.reward for rollout in rollouts]))


def created(rollout: Rollout) -> int:
    return sum(result.kind is OperationKind.CREATE for turn in rollout.turns for result in turn.results)


def see(**shown: Any) -> Observation:
    """An observation: while a chunk is shown it is read, otherwise the question is asked."""
    nothing: dict[str, Any] = {"chunk": "", "scratchpad": "", "query": "", "retrieved": "", "notice": ""}
    phase = "read" if "chunk" in shown else "answer"
    asked = {"phase": phase, "questions": QUESTION, "question": QUESTION * (phase == "answer")}
    return Observation(**{**nothing, **asked, "step": 0, "steps_left": 9, **shown})  # type: ignore[typeddict-item]


def reply(policy: str, *observations: Observation, seed: int = 0, **settings: Any) -> str:
    """What a policy says to the last of these."""
    act = load_policy(policy, EpisodeSettings(**settings)).begin(seed, None)
    replies = [act(observation) for observation in observations]
    assert isinstance(replies[-1], str)
    return replies[-1]


# --------------------------------------------------------------------------------------------------------------- grammar


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_every_sentence_is_read_as_the_fact_that_it_states(relation: Any) -> None:
    new, old = ("flute", "tuba") if relation.object == INSTRUMENT else ("Jade Mills", "Iron Bank")
    for template in (*relation.statements, *(text for group in relation.corrections for text in group)):
        sentence = template.format(s="Ada Brook", o=new, old=old)
        assert read_fact(sentence) == (Link("Ada Brook", relation.name), new, sentence)


def test_sentences_without_a_fact_state_none() -> None:
    fillers = {template.format(s="Ada Brook") for templates in FILLERS.values() for template in templates}
    assert [sentence for sentence in fillers if read_fact(sentence)] == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_question_is_understood_as_the_chain_of_its_evidence(split: str) -> None:
    source = SyntheticSource(split=split, num_docs=10, unanswerable=0.0)
    for index in range(300):
        question = source.task(index, 0).questions[0]
        links = [fact.link for passage in question.evidence if (fact := read_fact(passage.text))]
        assert read_question(question.text) == (links[0].subject, tuple(link.relation for link in links))


def test_a_query_says_which_link_it_is_for() -> None:
    for relation in RELATIONS:
        link = Link("Ada Brook", relation.name)
        assert read_query(query(link)) == link
    assert read_query("") is None


def test_of_two_facts_about_the_same_in_a_chunk_the_later_holds() -> None:
    text = "Ada Brook\nAda Brook works at Iron Bank.\n\nAda Brook\nAda Brook now works at Jade Mills."
    assert [fact.object for fact in facts(text).values()] == ["Jade Mills"]


def test_other_questions_are_rejected_with_the_environment_to_play() -> None:
    with pytest.raises(PolicyError, match="AtomMem-Synthetic"):
        reply("type-match", see(chunk="Rome", questions="Where was the author of Emma born?"))


# --------------------------------------------------------------------------------------------------------------- replies


def test_the_first_link_is_searched_for_at_once_and_stays_in_force() -> None:
    chunk = "Ada Brook\nAda Brook works at Iron Bank. Ada Brook lives in Big Hill."
    keeping = "<create_memory>Ada Brook works at Iron Bank.</create_memory>"
    assert reply("type-match", see(chunk=chunk)) == f"{keeping}\n{SEARCH}"
    assert reply("type-match", see(chunk=chunk, query="Ada Brook employer")) == keeping
    nothing = see(chunk="Ada Brook\nAda Brook is a good cook.", query="Ada Brook employer")
    assert reply("type-match", nothing) == SEARCH


def test_a_fact_in_view_is_updated_and_one_out_of_view_stored_again() -> None:
    old = see(chunk="Ada Brook\nAda Brook works at Iron Bank.")
    new = "Ada Brook has left Iron Bank and now works at Jade Mills."
    chunk = f"Ada Brook\n{new}"
    seen = see(chunk=chunk, query="Ada Brook employer", retrieved="m1: Ada Brook works at Iron Bank.")
    hidden = see(chunk=chunk, query="Ada Brook employer", retrieved="m2: Big Hill is an old town.")
    assert reply("type-match", old, seen, capacity=1) == f"<update_memory>m1: {new}</update_memory>"
    assert reply("type-match", old, hidden, capacity=2) == f"<create_memory>{new}</create_memory>"
    assert reply("type-match", old, hidden, capacity=1) == SEARCH
    assert reply("type-match", old, {**old, "query": "Ada Brook employer"}) == SEARCH  # the same chunk once more


def test_an_answer_is_reached_link_by_link_in_what_is_in_view() -> None:
    works, leads = "m10: Ada Brook works at Jade Mills.", "m3: Otto Knox leads Jade Mills."
    both = f"{leads}\n{works}"
    assert reply("type-match", see(query="")) == SEARCH
    # Even where the next link is in view it is searched for first: a reply looks up a single link.
    step = "<read_memory>Jade Mills leader</read_memory>"
    assert reply("type-match", see(query="Ada Brook employer", retrieved=both)) == step
    answer = "<final_answer>Otto Knox</final_answer>"
    assert reply("type-match", see(query="Jade Mills leader", retrieved=both)) == answer


def test_of_two_entries_on_one_link_the_newer_counts() -> None:
    shown = "m10: Ada Brook now works at Jade Mills.\nm9: Ada Brook works at Iron Bank."
    step = "<read_memory>Jade Mills leader</read_memory>"
    assert reply("type-match", see(query="Ada Brook employer", retrieved=shown)) == step


def test_what_is_not_in_view_is_guessed_by_the_last_relation() -> None:
    shown = "m1: Ada Brook lives in Big Hill.\nm2: Otto Knox leads Iron Bank."
    guess = "<final_answer>Otto Knox</final_answer>"
    assert reply("type-match", see(query="Ada Brook employer", retrieved=shown)) == guess
    unknown = "<final_answer>unknown</final_answer>"
    assert reply("type-match", see(query="Ada Brook employer", retrieved=shown.splitlines()[0])) == unknown


@pytest.mark.parametrize("policy", READERS)
def test_no_reply_is_empty_or_has_a_fault_and_no_task_is_given(policy: str) -> None:
    assert not load_policy(policy, EpisodeSettings()).privileged
    for rollout in play(policy, 40, corrections=0.5, questions=2, num_docs=12):
        assert all(turn.reply.text for turn in rollout.turns)
        assert all(result.fault is None for turn in rollout.turns for result in turn.results)


# ------------------------------------------------------------------------------------------------------------- what pays


def test_with_room_for_everything_every_question_is_answered() -> None:
    everything = {"capacity": None, "top_k": 100, "num_docs": 20, "hops": (1, 2, 3, 4), "corrections": 0.5}
    assert mean_reward(play("store-all", 40, questions=2, **everything)) == 1.0


def test_random_keeps_seven_tenths_and_the_same_ones_for_the_same_seed() -> None:
    total, kept = (sum(map(created, play(policy, capacity=None))) for policy in ("store-all", "random-70"))
    assert kept / total == pytest.approx(0.7, abs=0.04)
    assert play("random-70", 5) == play("random-70", 5)


def test_first_link_keeps_the_first_relation_and_three_tenths_of_the_later_ones() -> None:
    chunk = "\n".join(f"{name}\n{name} works at Iron Bank." for name in ("Ada Brook", "Leo Snow", "Ida Pike"))
    late = [
        f"{first} {last}" for first in ("Acorn", "Amber", "Apex", "Lion") for last in ("Bank", "Mills", "Foods", "Labs")
    ]
    chunk += "\n" + "\n".join(f"{name}\n{name} is led by Otto Knox." for name in late)
    replies = [reply("first-link", see(chunk=chunk), seed=seed) for seed in range(40)]
    assert all(text.count("works at") == 3 for text in replies)
    kept = sum(text.count("is led by") for text in replies) / (40 * len(late))
    assert kept == pytest.approx(0.3, abs=0.06)


def test_in_a_bounded_memory_a_rule_that_selects_pays() -> None:
    reached = {policy: mean_reward(play(policy)) for policy in ("store-all", "type-match", "chain-match")}
    assert 0.3 < reached["store-all"] < reached["type-match"] - 0.1
    assert reached["type-match"] < reached["chain-match"] - 0.1
