"""Every layout shows everything; in ours what the rollouts of a group share comes first, in the public code's its own order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

import atommem_env  # noqa: F401  (registers the environments)
from agents.registry import load_policy
from agents.rollout import play_episode
from atommem_env.env import AtomMemEnv
from atommem_env.errors import SettingError
from atommem_env.prompts import get_layout
from atommem_env.tokens import get_tokenizer
from atommem_env.types import EpisodeSettings, Message, Observation

LAYOUTS = ("shared_prefix", "terse")  # the third, public_code:PATH, has tests of its own at the end
ORDER = ("questions", "chunk", "notice", "scratchpad", "query", "retrieved", "question")  # of what a prompt shows
SETTINGS = EpisodeSettings()
EMPTY = Observation(
    phase="read",
    questions="Who?",
    question="",
    chunk="Ada did.",
    scratchpad="",
    query="",
    retrieved="",
    notice="",
    step=0,
    steps_left=9,
)


def observed(**parts: Any) -> Observation:
    return cast(Observation, {**EMPTY, **parts})


def content(messages: list[Message]) -> str:
    return "".join(f"\0{message['role']}\0{message['content']}" for message in messages)


def shown(layout: str, observation: Observation, settings: EpisodeSettings = SETTINGS) -> str:
    return content(get_layout(layout)(observation, settings))


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """Of both phases; each text holds its field's name, so that no part can be taken for another."""
    text = st.text(max_size=20)
    answering = draw(st.booleans())
    parts: dict[str, str] = {"questions": "questions" + draw(text)}
    parts["question" if answering else "chunk"] = f"({'question' if answering else 'chunk'}){draw(text)}(end)"
    parts["chunk" if answering else "question"] = ""
    for name in ("notice", "scratchpad", "query", "retrieved"):
        parts[name] = f"({name}){draw(text)}(end)" if draw(st.booleans()) else ""
    return observed(phase="answer" if answering else "read", **parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(observation=observations())
def test_every_part_is_shown_once_in_the_order_of_shared_prefixes(layout: str, observation: Observation) -> None:
    text = shown(layout, observation)
    fields = cast(dict[str, str], observation)
    end = 0
    for name in ORDER:
        if fields[name]:
            end = text.index(fields[name], end) + len(fields[name])
    asked_last = observation["question"] or fields[[name for name in ORDER if fields[name]][-1]]
    assert layout == "shared_prefix" or text.endswith(asked_last)  # the other says "(none)" of what is empty


@pytest.mark.parametrize("layout", LAYOUTS)
@given(one=observations(), other=observations(), chunk=st.text(min_size=1, max_size=30))
def test_all_up_to_the_chunks_end_is_the_same_for_rollouts_that_differ_afterwards(
    layout: str, one: Observation, other: Observation, chunk: str
) -> None:
    # What a chat is before anything that a policy did: the longest prefix that a group can share.
    shared = {"phase": "read", "questions": "(questions)", "question": "", "chunk": f"(chunk){chunk}(end)"}
    first, second = (shown(layout, cast(Observation, {**seen, **shared})) for seen in (one, other))
    prefix = first[: first.index(shared["chunk"]) + len(shared["chunk"])]
    assert second.startswith(prefix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_rollouts_of_a_task_share_each_steps_prompt_up_to_the_chunks_end(layout: str) -> None:
    env = gym.make("AtomMem-Synthetic", durability="off", chunk_tokens=64)
    settings = cast(AtomMemEnv, env.unwrapped).settings
    names = ("oracle", "random", "silent")
    played = [play_episode(env, load_policy(name, settings), seed=4).turns for name in names]
    read = [[turn.observation for turn in turns if turn.observation["chunk"]] for turns in played]
    assert len(read[0]) > 2
    differ = 0
    for step in zip(*read, strict=True):
        texts = [shown(layout, observation, settings) for observation in step]
        ends = [text.index(seen["chunk"]) + len(seen["chunk"]) for text, seen in zip(texts, step, strict=True)]
        for (one, end), (other, _) in itertools.combinations(zip(texts, ends, strict=True), 2):
            assert one[:end] == other[:end]
            differ += one != other
    assert differ > len(read[0])  # or there was nothing to tell apart


@pytest.mark.parametrize(
    ("off", "words"),
    [
        ({"scratchpad": False}, ("Scratchpad", "NOTES", "update_scratchpad")),
        (
            {"operations": ("create", "update", "delete")},
            ("Search", "QUERY", "Memory entries", "MEMORY", "read_memory"),
        ),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_settings_switch_off_is_not_shown(layout: str, off: dict[str, Any], words: tuple[str, ...]) -> None:
    def every_turn(**options: Any) -> str:
        env = gym.make("AtomMem-Synthetic", durability="off", **options)
        settings = cast(AtomMemEnv, env.unwrapped).settings

        def policy(observation: Observation) -> str:
            seen.append(shown(layout, observation, settings))
            return (
                "<create_memory>a</create_memory><update_scratchpad>b</update_scratchpad><read_memory>c</read_memory>"
            )

        seen: list[str] = []
        play_episode(env, policy, seed=0)
        # Without the notices, which tell of the very operations that are off.
        return "\n".join(line for text in seen for line in text.splitlines() if "was not" not in line)

    assert not any(word in every_turn(**off) for word in words if word.isupper() or layout == "shared_prefix")
    assert any(word in every_turn() for word in words)


def test_terse_is_one_user_message_of_which_a_word_tokenizer_adds_one_token_a_part() -> None:
    observation = observed(notice="It was cut.", query="Ada", retrieved="m1: Ada did.")
    assert get_layout("terse")(observation, SETTINGS) == [
        {
            "role": "user",
            "content": "QUESTIONS\nWho?\nTEXT\nAda did.\nNOTICE\nIt was cut.\nQUERY\nAda\nMEMORY\nm1: Ada did.",
        }
    ]
    asked = observed(phase="answer", chunk="", question="Who?", scratchpad="Ada did.")
    (message,) = get_layout("terse")(asked, SETTINGS)
    assert message["content"] == "QUESTIONS\nWho?\nNOTES\nAda did.\nANSWER\nWho?"
    count = get_tokenizer("builtin").count
    assert count(message["content"]) == 3 + count("Who? Ada did. Who?")


def test_an_unknown_layout_is_refused_with_those_there_are() -> None:
    with pytest.raises(SettingError, match=r"one of shared_prefix, terse, public_code:PATH, .*, got 'brief'"):
        get_layout("brief")


# ------------------------------------------------------------------------------------------------------ public_code:PATH

PUBLIC = EpisodeSettings(dialect="public_code")
# A file with the names and the slots of the public code's, in words of our own. To run it would be an error.
SOURCE = '''
import a_package_that_nobody_has
from another import Base

SYSTEM_PROMPT = """Mind the {braces}: they are text here.
"""

TEMPLATE_MEMORY = """Asked: {prompt}
Note: {short_memory}
Sought: {query}
Found: {long_memory}
Text: {chunk}
"""
RULES = "Searches: {query_times} of {{3}}"
TEMPLATE_MEMORY = TEMPLATE_MEMORY + RULES

TEMPLATE_FINAL_BOXED = """Answer \\\\boxed{{{{here}}}}: {prompt}
Note: {short_memory}
Sought: {query}
Found: {long_memory}
Searches: {query_times}"""


class Agent(Base):
    def __init__(self, size):
        raise RuntimeError("not to be run")
        self.NO_MEMORY_TOKENS = "nothing"

    def start(self):
        self.query = ["no search yet"] * self.size
        self.query[0] = "another"
'''.replace("{{{{", "{{").replace("}}}}", "}}")
PLACE = "AtomMem/recurrent/impls/memory_long_short_multiquery.py"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder as a clone of the public code is."""
    (tmp_path / PLACE).parent.mkdir(parents=True)
    (tmp_path / PLACE).write_text(SOURCE)
    return tmp_path


def test_public_code_fills_the_slots_of_the_checkouts_templates_in_their_order(checkout: Path) -> None:
    layout = get_layout(f"public_code:{checkout}")
    seen = observed(notice="It was cut.", scratchpad="a {note}", query="Ada", retrieved="Memory 1: Ada did.")
    system = {"role": "system", "content": "Mind the {braces}: they are text here.\n"}
    assert layout(seen, PUBLIC) == [
        system,
        {
            "role": "user",
            "content": "Asked: Who?\nNote: a {note}\nSought: Ada\nFound: Memory 1: Ada did.\nText: Ada did.\n"
            "Searches: 0 of {3}",
        },
    ]
    asked = observed(phase="answer", chunk="", questions="Who?\nWhere?", question="Where?")
    assert layout(asked, PUBLIC) == [
        system,
        {
            "role": "user",
            "content": "Answer \\boxed{here}: Where?\nNote: \nSought: no search yet\nFound: nothing\nSearches: 0",
        },
    ]


def test_public_code_is_found_from_each_of_its_folders_and_read_once(checkout: Path) -> None:
    names = [f"public_code:{path}" for path in (checkout, checkout / "AtomMem", checkout / PLACE)]
    first = [get_layout(name)(EMPTY, PUBLIC) for name in names]
    assert first[0] == first[1] == first[2]
    (checkout / PLACE).write_text("")  # a run keeps the words that it began with
    assert [get_layout(name)(EMPTY, PUBLIC) for name in names] == first


def test_public_code_is_found_in_the_home_folder(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkout.parent))
    assert get_layout(f"public_code:~/{checkout.name}")(EMPTY, PUBLIC)


@pytest.mark.parametrize(
    "name", ["public_code", "public_code:", "public_code:no/such/folder", "public_code:no/such.py"]
)
def test_public_code_without_a_checkout_says_where_it_looked(name: str) -> None:
    with pytest.raises(SettingError, match=r"RUCBM/AtomMem; got PATH .*there is no .*\.py.*Clone"):
        get_layout(name)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (SOURCE, "x = 1", "SYSTEM_PROMPT, TEMPLATE_MEMORY, TEMPLATE_FINAL_BOXED, self.NO_MEMORY_TOKENS, self.query"),
        ("SYSTEM_PROMPT = ", "OTHER = ", "text assigned to SYSTEM_PROMPT and found none"),
        ("TEMPLATE_MEMORY + RULES", "make(TEMPLATE_MEMORY)", "text assigned to TEMPLATE_MEMORY and"),
        ('["no search yet"]', "[None]", "text assigned to self.query and"),
        (
            "Text: {chunk}",
            "",
            "TEMPLATE_MEMORY in .*found .'long_memory', 'prompt', 'query', 'query_times', 'short_memory'",
        ),
        ("{chunk}", "{chunk} {prompt.__class__}", "TEMPLATE_MEMORY in .*__class__"),
        ("{chunk}", "{chunk!r}", "each as {name}"),
        ("Answer", "Answer {", "expected a template in TEMPLATE_FINAL_BOXED"),
        ("class Agent(Base):", "class Agent(Base:", "expected Python source"),
    ],
)
def test_public_code_of_another_form_is_refused_with_what_is_missing(
    checkout: Path, old: str, new: str, message: str
) -> None:
    assert old in SOURCE
    (checkout / PLACE).write_text(SOURCE.replace(old, new))
    with pytest.raises(SettingError, match=message):
        get_layout(f"public_code:{checkout}")


def test_public_code_refuses_the_dialect_that_its_words_do_not_explain(checkout: Path) -> None:
    with pytest.raises(SettingError, match="dialect 'tags'"):
        get_layout(f"public_code:{checkout}")(EMPTY, SETTINGS)
