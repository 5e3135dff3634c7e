import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizer_files import NAMES, load, made, texts

from atommem_env.dialects import get_dialect
from atommem_env.embedders import embed, get_embedder
from atommem_env.episode import Episode
from atommem_env.errors import EmbeddingError, EpisodeStateError, SettingError
from atommem_env.types import (
    UNGRADED,
    EpisodeSettings,
    Fault,
    Operation,
    OperationKind,
    Phase,
    StepResult,
    StopReason,
    Task,
)

Say = Callable[[Episode, str], StepResult]
SMALL = EpisodeSettings(chunk_tokens=8)


def play(say: Say, episode: Episode, *replies: str) -> StepResult:
    for reply in replies:
        result = say(episode, reply)
    return result


def faults(result: StepResult) -> list[Fault]:
    return [item.fault for item in result.results if item.fault is not None]


def test_an_episode_from_the_first_chunk_to_the_reward(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    first = episode.observe()
    assert first == {
        "phase": "read",
        "questions": "Where does Ada live?\nWho cooks for Ada?",
        "question": "",
        "chunk": "Ada\nAda lives in Rome.",
        "scratchpad": "",
        "query": "",
        "retrieved": "",
        "notice": "",
        "step": 0,
        "steps_left": 3 + 2 * 4,
    }
    result = say(episode, "<create_memory>Ada lives in Rome.</create_memory><read_memory>Ada's home</read_memory>")
    assert result.observation["chunk"] == "Bo\nBo cooks for Ada."
    assert result.observation["retrieved"] == "m1: Ada lives in Rome."
    result = play(say, episode, "<update_scratchpad>Bo cooks for Ada.</update_scratchpad>", "")
    assert result.observation["phase"] == Phase.ANSWER
    assert result.observation["question"] == "Where does Ada live?"
    assert result.observation["chunk"] == ""
    assert result.observation["retrieved"] == "m1: Ada lives in Rome."
    result = say(episode, "<final_answer>The Roma.</final_answer>")
    assert (result.reward, result.terminated) == (0.0, False)
    result = say(episode, "<final_answer>nobody</final_answer>")
    assert (result.reward, result.terminated, result.truncated) == (0.5, True, False)
    assert episode.stop_reason is StopReason.ANSWERED
    assert [(outcome.em, outcome.stored, outcome.retrieved) for outcome in episode.outcomes] == [(1, 1, 1), (0, 1, 1)]
    with pytest.raises(EpisodeStateError, match="over"):
        episode.submit("")


# ------------------------------------------------------------------------------------------- reads, ids, the order of things


def test_a_read_is_answered_one_step_later_from_the_memory_after_that_replys_writes(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    result = say(episode, "<read_memory>hills</read_memory><create_memory>seven hills</create_memory>")
    assert result.observation["retrieved"] == "m1: seven hills"  # written after the Read in the same reply
    assert result.observation["query"] == "hills"


def test_a_query_stays_in_force_and_is_searched_anew(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    play(say, episode, "<read_memory>hills</read_memory>")
    assert say(episode, "<create_memory>seven hills</create_memory>").observation["retrieved"] == "m1: seven hills"


def test_the_last_read_of_a_reply_wins_and_the_others_are_told(task: Task, say: Say) -> None:
    result = say(
        Episode(task, SMALL, 0), "<read_memory>a</read_memory><read_memory>b</read_memory><read_memory> </read_memory>"
    )
    assert result.observation["query"] == "b"
    assert faults(result) == [Fault.SUPERSEDED, Fault.EMPTY]


def test_ids_are_frozen_when_the_observation_is_made(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    play(say, episode, "<create_memory>one</create_memory><create_memory>two</create_memory>")
    reply = (
        "<delete_memory>m1</delete_memory><create_memory>three</create_memory>"
        "<update_memory>m2: TWO</update_memory><update_memory>m1: back</update_memory><update_memory>m3: guess</update_memory>"
    )
    result = say(episode, reply)
    assert {entry.id: entry.text for entry in episode.memory.entries()} == {"m2": "TWO", "m3": "three"}
    assert faults(result) == [Fault.UNKNOWN_ID, Fault.UNKNOWN_ID]
    assert [item.entry_id for item in result.results if item.fault is None] == ["m1", "m3", "m2"]
    assert "'m1'" in result.observation["notice"]


# ------------------------------------------------------------------------------------------- faults of the public AtomMem code


def test_fault_1_and_3_two_entries_of_equal_text_are_two_entries(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    other = Episode(task, SMALL, seed=0)
    for each in (episode, other):
        say(each, "<create_memory>same</create_memory><create_memory>same</create_memory>")
    say(episode, "<update_memory>m2: changed</update_memory><delete_memory>m1</delete_memory>")
    assert [entry.text for entry in episode.memory.entries()] == ["changed"]
    assert [entry.text for entry in other.memory.entries()] == ["same", "same"]


@pytest.mark.parametrize(
    "reply", ["", "no tags", "<update_scratchpad>x</update_scratchpad>", "<delete_memory>m1</delete_memory>"]
)
def test_fault_2_every_reply_turns_the_page(reply: str, task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    before = episode.observe()["chunk"]
    assert say(episode, reply).observation["chunk"] != before


@pytest.mark.parametrize("target", ["m0", "m2", "0", "-1", "Memory 0", "m1 m1", ""])
def test_fault_3_an_id_that_does_not_exist_edits_nothing(target: str, task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    play(say, episode, "<create_memory>one</create_memory><read_memory>one</read_memory>")
    result = say(episode, f"<update_memory>{target}: x</update_memory><delete_memory>{target}</delete_memory>")
    assert faults(result) == [Fault.UNKNOWN_ID, Fault.UNKNOWN_ID]
    assert [entry.text for entry in episode.memory.entries()] == ["one"]


def test_fault_3_two_updates_of_one_entry_leave_one_entry_with_the_last_text(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    play(say, episode, "<create_memory>one</create_memory>")
    say(episode, "<update_memory>m1: two</update_memory><update_memory>m1: three</update_memory>")
    assert [(entry.id, entry.text) for entry in episode.memory.entries()] == [("m1", "three")]


def test_fault_4_reads_while_reading_skip_no_question(task: Task, say: Say) -> None:
    episode = Episode(task, replace(SMALL, chunk_tokens=5), seed=0)
    while episode.phase is Phase.READ:
        say(episode, "<read_memory>a</read_memory>")
    assert episode.observe()["question"] == "Where does Ada live?"


def test_fault_4_a_scratchpad_write_does_not_buy_more_reads(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    play(say, episode, "", "", "")
    for _ in range(4):
        assert episode.observe()["question"] == "Where does Ada live?"
        say(episode, "<read_memory>a</read_memory><update_scratchpad>again</update_scratchpad>")
    assert episode.observe()["question"] == "Who cooks for Ada?"
    assert episode.outcomes[0].prediction is None


def test_fault_4_an_answer_written_while_reading_is_a_fault_and_nothing_more(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    result = say(episode, "<final_answer>Rome</final_answer>")
    assert faults(result) == [Fault.OUT_OF_PHASE]
    assert (result.terminated, result.reward, episode.outcomes) == (False, 0.0, ())


def test_fault_5_answers_are_matched_to_their_own_question(task: Task, say: Say) -> None:
    permuted = Episode(task, SMALL, seed=0)
    result = play(say, permuted, "", "", "", "<final_answer>Bo</final_answer>", "<final_answer>Rome</final_answer>")
    assert result.reward == 0.0


def test_fault_5_a_gold_in_every_turn_earns_at_most_one(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    rewards = []
    while episode.stop_reason is None:
        rewards.append(say(episode, "<final_answer>\\boxed{Rome}</final_answer><final_answer>Bo</final_answer>").reward)
    assert rewards == [0.0] * 4 + [0.5]  # the last answer of a reply counts: "Bo", twice


def test_fault_10_the_default_budget_is_never_less_than_an_episode_needs(task: Task, say: Say) -> None:
    ten = replace(task, questions=task.questions * 5)
    for settings in (SMALL, replace(SMALL, read_latency=0), replace(SMALL, replies_per_question=1)):
        episode = Episode(ten, settings, seed=0)
        while episode.stop_reason is None:
            say(episode, "<read_memory>as slow as it gets</read_memory>")
        assert episode.stop_reason is StopReason.UNANSWERED


# ---------------------------------------------------------------------------------------------------- budgets and ablations


def test_evidence_torn_over_two_entries_is_not_stored(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    play(say, episode, "<create_memory>Ada lives</create_memory><create_memory>in Rome.</create_memory>", "", "")
    say(episode, "<final_answer>Rome</final_answer>")
    assert (episode.outcomes[0].stored, episode.outcomes[0].retrieved) == (0, 0)


def test_the_step_budget_truncates_and_unanswered_questions_count_as_zero(task: Task, say: Say) -> None:
    episode = Episode(task, replace(SMALL, max_steps=4), seed=0)
    result = play(say, episode, "", "", "", "<final_answer>Rome</final_answer>")
    assert (result.truncated, result.terminated, result.reward) == (True, False, 0.5)
    assert episode.stop_reason is StopReason.STEP_BUDGET
    assert [outcome.prediction for outcome in episode.outcomes] == ["Rome", None]


def test_read_latency_0_shows_the_same_chunk_once_more(task: Task, say: Say) -> None:
    episode = Episode(task, replace(SMALL, read_latency=0), seed=0)
    result = say(episode, "<create_memory>Ada</create_memory><read_memory>Ada</read_memory>")
    assert (result.observation["chunk"], result.observation["retrieved"]) == ("Ada\nAda lives in Rome.", "m1: Ada")
    assert say(episode, "<read_memory>Ada</read_memory>").observation["chunk"] == "Bo\nBo cooks for Ada."
    assert say(episode, "<read_memory>Ada</read_memory>").observation["chunk"] == "Bo\nBo cooks for Ada."


def test_advance_on_write_is_the_public_codes_rule(task: Task, say: Say) -> None:
    episode = Episode(task, replace(SMALL, advance="on_write"), seed=0)
    assert say(episode, "<update_scratchpad>x</update_scratchpad>").observation["chunk"] == "Ada\nAda lives in Rome."
    assert say(episode, "<create_memory>x</create_memory>").observation["chunk"] == "Bo\nBo cooks for Ada."


@pytest.mark.parametrize("kind", ["create", "read", "update", "delete"])
def test_an_operation_that_an_ablation_forbids_is_a_fault(kind: str, task: Task, say: Say) -> None:
    allowed = tuple(name for name in ("create", "read", "update", "delete") if name != kind)
    episode = Episode(task, replace(SMALL, operations=allowed), seed=0)
    text = {"update": "m1: x", "delete": "m1"}.get(kind, "x")
    result = say(episode, f"<{kind}_memory>{text}</{kind}_memory>")
    assert faults(result) == [Fault.FORBIDDEN]
    assert not result.mutations


def test_without_a_scratchpad_writing_it_is_a_fault(task: Task, say: Say) -> None:
    result = say(Episode(task, replace(SMALL, scratchpad=False), 0), "<update_scratchpad>x</update_scratchpad>")
    assert faults(result) == [Fault.FORBIDDEN]
    assert result.observation["scratchpad"] == ""


def test_a_full_memory_refuses_and_says_so(task: Task, say: Say) -> None:
    episode = Episode(task, replace(SMALL, capacity=2), seed=0)
    result = say(episode, "<create_memory>a</create_memory>" * 2 + "<create_memory>b</create_memory>")
    assert faults(result) == [Fault.FULL]
    assert "full (2 entries)" in result.observation["notice"]
    result = say(episode, "<delete_memory>m1</delete_memory><create_memory>c</create_memory>")
    assert faults(result) == []
    assert [entry.id for entry in episode.memory.entries()] == ["m2", "m3"]


def test_a_scratchpad_that_is_too_long_is_cut_and_the_policy_is_told(task: Task, say: Say) -> None:
    result = say(Episode(task, replace(SMALL, scratchpad_tokens=2), 0), "<update_scratchpad>a b c</update_scratchpad>")
    assert result.observation["scratchpad"] == "a b"
    assert "cut to its first 2 tokens" in result.observation["notice"]


def test_entries_beyond_the_shown_tokens_are_not_shown_and_the_policy_is_told(task: Task, say: Say) -> None:
    episode = Episode(task, replace(SMALL, memory_tokens=3), seed=0)
    result = say(
        episode,
        "<create_memory>a b</create_memory><create_memory>a b c d e</create_memory>" + "<read_memory>a b</read_memory>",
    )
    assert result.observation["retrieved"] == "m1: a b"
    assert "only 1 are shown" in result.observation["notice"]
    result = say(episode, "<delete_memory>m1</delete_memory>")
    assert result.observation["retrieved"] == "m2: a b c"
    assert "first 3 tokens of m2" in result.observation["notice"]


def test_random_retrieval_depends_on_the_seed_alone(task: Task, say: Say) -> None:
    replies = [f"<create_memory>{number}</create_memory>" for number in range(20)]
    reply = "".join(replies) + "<read_memory>5</read_memory>"
    settings = replace(SMALL, retrieval="random", top_k=3)
    shown = [say(Episode(task, settings, seed), reply).observation["retrieved"] for seed in (1, 1, 2)]
    assert shown[0] == shown[1] != shown[2]


def test_retrieval_by_words_finds_what_shares_one_and_follows_every_change(task: Task, say: Say) -> None:
    episode = Episode(task, replace(SMALL, retrieval="bm25", top_k=2, read_latency=0), seed=0)
    notes = "".join(
        f"<create_memory>{text}</create_memory>" for text in ("red boat", "boats", "old red house", "a boat")
    )
    result = say(episode, notes + "<read_memory>Boat?</read_memory>")
    assert result.observation["retrieved"] == "m1: red boat\nm4: a boat"
    twins = [episode, episode.fork(), Episode.restore(task, episode.settings, episode.snapshot())]
    changes = "<update_memory>m2: boat, boat</update_memory><delete_memory>m1</delete_memory>"
    for twin in twins:
        assert say(twin, changes).observation["retrieved"] == "m2: boat, boat\nm4: a boat"
        assert say(twin, "<read_memory>nothing</read_memory>").observation["retrieved"] == ""


def test_hybrid_retrieval_also_finds_what_shares_no_word(task: Task, say: Say) -> None:
    episode = Episode(task, replace(SMALL, retrieval="hybrid", top_k=3), seed=0)
    reply = "<create_memory>boats</create_memory><create_memory>red boat</create_memory><read_memory>boat</read_memory>"
    assert say(episode, reply).observation["retrieved"] == "m2: red boat\nm1: boats"


def test_illegal_characters_are_replaced_and_counted(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    result = say(episode, "<create_memory>a\ud800b\x00c</create_memory>")
    assert episode.memory.get("m1").text == "a\ufffdb\ufffdc"
    assert faults(result) == [Fault.ILLEGAL_TEXT]
    assert "2 characters" in result.observation["notice"]


def test_a_notice_stays_short_whatever_the_reply(task: Task, say: Say) -> None:
    reply = (
        "".join(f"<delete_memory>x{number}</delete_memory>" for number in range(5000))
        + "<read_memory></read_memory>" * 9
    )
    notice = say(Episode(task, SMALL, 0), reply).observation["notice"]
    assert len(notice.splitlines()) == 9
    assert "more faults" in notice


# ------------------------------------------------------------------------------------------------------- submit and resolve


def test_a_failed_embedding_leaves_the_episode_as_it_was(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    say(episode, "<create_memory>one</create_memory><read_memory>one</read_memory>")
    before = pickle.dumps(episode.snapshot())
    reply = "<create_memory>two</create_memory><update_memory>m1: ONE</update_memory>"
    good = np.ones((2, 256), dtype=np.float32)
    bad: list[np.ndarray] = [good[:1], good[:, :3], good * np.nan, good * 0, np.ones(2), np.ones((3, 256))]
    for vectors in bad:
        episode.submit(reply)
        with pytest.raises(EmbeddingError):
            episode.resolve(vectors)
    episode.resolve(good)  # still submitted
    assert [entry.text for entry in episode.memory.entries()] == ["ONE", "two"]
    assert before != pickle.dumps(episode.snapshot())


def test_a_broken_embedding_changes_nothing_before_the_retry(task: Task, say: Say) -> None:
    episode, twin = Episode(task, SMALL, seed=0), Episode(task, SMALL, seed=0)
    episode.submit("<create_memory>lost</create_memory>")
    with pytest.raises(EmbeddingError):
        episode.resolve([[float("nan")] * 256])
    reply = "<create_memory>kept</create_memory><read_memory>kept</read_memory>"
    assert say(episode, reply).observation == say(twin, reply).observation


def test_calls_out_of_order_are_refused(task: Task) -> None:
    episode = Episode(task, SMALL, seed=0)
    with pytest.raises(EpisodeStateError, match="submit"):
        episode.resolve([])
    episode.submit("")
    for call in (episode.fork, episode.snapshot):
        with pytest.raises(EpisodeStateError, match="between submit and resolve"):
            call()
    with pytest.raises(TypeError, match="str"):
        episode.submit(None)  # type: ignore[arg-type]


def test_observations_cannot_be_changed_from_outside(task: Task) -> None:
    episode = Episode(task, SMALL, seed=0)
    episode.observe()["chunk"] = "changed"
    assert episode.observe()["chunk"] == "Ada\nAda lives in Rome."


def test_forks_and_snapshots_go_on_alike_and_apart(task: Task, say: Say) -> None:
    episode = Episode(task, replace(SMALL, read_latency=0), seed=3)
    play(say, episode, "<create_memory>a b</create_memory><create_memory>c</create_memory><read_memory>b</read_memory>")
    fork = episode.fork()
    restored = Episode.restore(task, episode.settings, pickle.loads(pickle.dumps(episode.snapshot())))
    replies = [
        "<delete_memory>m1</delete_memory>",
        "<create_memory>d b</create_memory>",
        "",
        "",
        "<final_answer>Rome</final_answer>",
    ]
    say(fork, "<delete_memory>m2</delete_memory>")
    assert len(episode.memory) == 2
    for reply in replies:
        ours, theirs = say(episode, reply), say(restored, reply)
        assert ours.observation == theirs.observation
        assert ours.results == theirs.results
    assert episode.outcomes == restored.outcomes


def test_a_snapshot_of_another_task_is_refused(task: Task) -> None:
    snapshot = Episode(task, SMALL, seed=0).snapshot()
    with pytest.raises(SettingError, match="hand/1"):
        Episode.restore(replace(task, id="other"), SMALL, snapshot)


def test_mutations_say_what_changed_in_order(task: Task, say: Say) -> None:
    episode = Episode(task, SMALL, seed=0)
    result = say(episode, "<create_memory>a</create_memory><read_memory>q</read_memory>")
    assert [(item.kind, item.entry_id, item.text) for item in result.mutations] == [
        (OperationKind.CREATE, "m1", "a"),
        (OperationKind.READ, "", "q"),
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("operations", ("creat",)),
        ("retrieval", "best"),
        ("top_k", 0),
        ("capacity", 0),
        ("read_latency", 2),
        ("advance", "no"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SettingError, match=name):
        EpisodeSettings(**{name: value})  # type: ignore[arg-type]


def test_a_question_may_come_without_a_gold_and_its_answer_is_recorded(say: Say) -> None:
    asked = Task.of(["Ada moved to Rome."], ["Where does Ada live?", ("Since when?", []), ("Who moved?", "Ada")])
    assert [(question.answers, question.kind) for question in asked.questions] == [
        ((), UNGRADED),
        ((), UNGRADED),
        (("Ada",), ""),
    ]
    episode = Episode(asked, EpisodeSettings(), seed=0)
    say(episode, "")
    for answer in ("Rome", "1907", "Bo"):
        say(episode, f"<final_answer>{answer}</final_answer>")
    assert [(one.prediction, one.em) for one in episode.outcomes] == [("Rome", None), ("1907", None), ("Bo", 0.0)]
    assert episode.stop_reason is StopReason.ANSWERED


_WRITTEN = {
    "r": "<read_memory>{n}</read_memory>",
    "a": "<final_answer>{n}</final_answer>",
    "c": "<create_memory>{n}</create_memory>",
    "e": "<read_memory></read_memory>",
    "u": "<update_memory>m9: {n}</update_memory>",
}


@pytest.mark.parametrize(
    ("kinds", "limit", "carried_out", "superseded", "too_many"),
    [
        ("rcr", 1, [0], [], [1, 2]),
        ("rcr", 2, [1, 2], [0], []),
        ("rcr", None, [1, 2], [0], []),
        ("ccr", 2, [0, 1], [], [2]),
        ("rrr", 1, [2], [0, 1], []),
        ("rrcr", 1, [1], [0], [2, 3]),
        ("arar", 1, [0], [], [1, 2, 3]),
        ("arar", 2, [2, 3], [0, 1], []),
        ("aca", 1, [0], [], [1, 2]),
        ("rece", 2, [0, 2], [], []),  # an empty Read supersedes nothing
        ("ruc", 1, [0], [], [2]),  # nor does what cannot be carried out take a place
    ],
)
def test_a_read_or_answer_is_superseded_only_by_one_that_is_carried_out(
    kinds: str,
    limit: int | None,
    carried_out: list[int],
    superseded: list[int],
    too_many: list[int],
    task: Task,
    say: Say,
) -> None:
    episode = Episode(task, EpisodeSettings(chunk_tokens=4096, operations_per_reply=limit), seed=0)
    say(episode, "")
    assert episode.phase is Phase.ANSWER
    result = say(episode, "".join(_WRITTEN[kind].format(n=number) for number, kind in enumerate(kinds)))
    faulty = {fault: [n for n, item in enumerate(result.results) if item.fault is fault] for fault in (None, *Fault)}
    assert (faulty[None], faulty[Fault.SUPERSEDED], faulty[Fault.TOO_MANY]) == (carried_out, superseded, too_many)
    reads = [number for number in carried_out if kinds[number] == "r"]
    answers = [number for number in carried_out if kinds[number] == "a"]
    assert episode.query == "".join(map(str, reads))
    assert [outcome.prediction for outcome in episode.outcomes] == [str(number) for number in answers]
    limited = "Only the first" in result.observation["notice"]
    assert limited == bool(too_many)


@examples(max_examples=300, deadline=None)
@given(st.text("rrace", max_size=9), st.integers(1, 5))
def test_under_a_limit_the_longest_start_of_a_reply_is_carried_out(kinds: str, limit: int) -> None:
    """As many operations as fit, each Read and answer but the last of them taking no place."""

    def size(start: str) -> int:
        return start.count("c") + ("r" in start) + ("a" in start)

    start = next(kinds[:end] for end in range(len(kinds), -1, -1) if size(kinds[:end]) <= limit)
    episode = Episode(Task.of(["Ada"], ["Who?"]), EpisodeSettings(operations_per_reply=limit), seed=0)
    episode.submit("")
    episode.resolve([])
    requests = episode.submit("".join(_WRITTEN[kind].format(n=number) for number, kind in enumerate(kinds)))
    last = [start.rfind(kind) for kind in "r" if kind in start]
    creates = [number for number, kind in enumerate(start) if kind == "c"]
    assert [request.text for request in requests] == [str(number) for number in sorted([*creates, *last])]


@pytest.mark.parametrize("name", ["builtin", *NAMES])
@examples(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.integers(1, 30))
def test_scratchpad_and_shown_entries_hold_their_limits_by_any_tokenizer(
    name: str, written: list[str], limit: int
) -> None:
    tokenizer, path = load(name), made(name) if name != "builtin" else name
    given = EpisodeSettings(tokenizer=path, scratchpad_tokens=limit, memory_tokens=limit)
    episode = Episode(Task.of(["Ada"], ["Who?"]), given, seed=0)
    operations = [Operation(OperationKind.CREATE, " ".join(text.split())) for text in written]
    operations += [Operation(OperationKind.SCRATCHPAD, "".join(written)), Operation(OperationKind.READ, "Ada")]
    reply = "".join(map(get_dialect("tags").write, operations))
    result = episode.resolve(embed(get_embedder("hashing"), episode.submit(reply)))
    assert tokenizer.count(result.observation["scratchpad"]) <= limit
    shown = result.observation["retrieved"].splitlines()
    assert bool(shown) == bool(len(episode.memory))
    assert sum(tokenizer.count(line.partition(": ")[2]) for line in shown) <= limit
