"""The baselines with a model: what the environment sees of each, with a model that finds what stands in its prompt."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import NAMES, made

from agents import load_policy
from agents.baselines.answering import answer_in
from agents.baselines.full_context import without_middle
from agents.baselines.rag import WholeDocuments
from agents.chat_policy import Sampling
from agents.prompting import PromptedPolicy
from agents.registry import METHODS
from agents.rollout import Driver, EpisodeSpec
from atommem_env.chunking import chunk_documents
from atommem_env.dialects import get_dialect
from atommem_env.errors import PromptTooLong, SettingError
from atommem_env.scoring import holds
from atommem_env.tokens import get_tokenizer
from atommem_env.types import (
    Document,
    EpisodeSettings,
    Message,
    Operation,
    OperationKind,
    Phase,
    Question,
    Reply,
    Rollout,
    Task,
    Turn,
    Usage,
)

SPECS = [EpisodeSpec(index, index + 100, index + 200) for index in range(4)]


@dataclass
class Reader:
    """Answers by the gold where all evidence stands in the prompt, else "?"; asked for anything else, it copies the evidence."""

    source: Any
    window: int | None = None  # words
    tells: bool = True  # how long the window is
    name: str = "reader"
    prompts: list[str] = field(default_factory=list)

    def questions(self) -> list[Question]:
        return [question for spec in SPECS for question in self.source.task(spec.index, spec.task_seed).questions]

    async def complete(self, messages: Sequence[Message], *, max_new_tokens: int, **sampling: Any) -> Reply:
        prompt = "\n".join(message["content"] for message in messages)
        size = len(prompt.split())
        if self.window is not None and size > self.window:
            raise PromptTooLong("too long", *((size, self.window) if self.tells else ()))
        self.prompts.append(prompt)
        asked = [question for question in self.questions() if prompt.endswith(f"Question: {question.text}\nAnswer:")]
        if asked:
            known = all(holds(prompt, passage.text) for passage in asked[0].evidence)
            text = f"\n{asked[0].answers[0] if known else '?'}\n"
        else:
            found = [passage.text for question in self.questions() for passage in question.evidence]
            text = "\n".join(passage for passage in dict.fromkeys(found) if holds(prompt, passage)) or "nothing yet"
        return Reply(text, (1,) * size, (2,), (-0.1,), "stop", Usage(1, size, 1))


def driver(**options: Any) -> Driver:
    defaults = {"split": "test", "durability": "off", "num_docs": 15, "questions": 3, "chunk_tokens": 200}
    return Driver.of(gym.make("AtomMem-Synthetic", **{**defaults, **options}))


def run(method: str, drive: Driver, **options: Any) -> tuple[list[Rollout], Reader]:
    reader = Reader(drive.source, **options)
    policy = PromptedPolicy(f"{method}@reader", METHODS[method][0], reader, drive.settings)
    return asyncio.run(drive.run(SPECS, policy, in_flight=1)), reader


def tasks(drive: Driver) -> list[Task]:
    return [drive.source.task(spec.index, spec.task_seed) for spec in SPECS]


def texts(drive: Driver, turns: Sequence[Turn], kind: OperationKind) -> list[str]:
    """Of the operations of that kind that were carried out as written."""
    parse = get_dialect(drive.settings.dialect).parse
    written = [item for turn in turns for item in parse(turn.reply.text)]
    assert [result.fault for turn in turns for result in turn.results] == [None] * len(written)
    return [item.text for item in written if isinstance(item, Operation) and item.kind is kind]


def answering(rollout: Rollout) -> list[Turn]:
    return [turn for turn in rollout.turns if turn.observation["phase"] == Phase.ANSWER]


def kinds(drive: Driver, rollouts: Sequence[Rollout]) -> set[OperationKind]:
    return {kind for rollout in rollouts for kind in OperationKind if texts(drive, rollout.turns, kind)}


# ------------------------------------------------------------------------------------------------------ rag and append-all


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dialect": "tool_calls"},
        {"dialect": "public_code", "read_latency": 0},
        {"retrieval": "bm25", "chunk_tokens": 4096},
        {"retrieval": "hybrid", "questions": 1},
    ],
)
def test_rag_stores_every_document_once_and_searches_for_every_question_in_time(options: dict[str, Any]) -> None:
    drive = driver(**options)
    rollouts, reader = run("rag", drive)
    for rollout, task in zip(rollouts, tasks(drive), strict=True):
        stored = texts(drive, rollout.turns, OperationKind.CREATE)
        assert sorted(stored) == sorted(f"{document.title}\n{document.text}" for document in task.documents)
        asked = answering(rollout)
        assert [turn.observation["query"] for turn in asked] == [question.text for question in task.questions]
        assert [turn.observation["question"] for turn in asked] == [question.text for question in task.questions]
        assert all(turn.observation["retrieved"] for turn in asked)
        assert all(outcome.stored == outcome.evidence for outcome in rollout.questions)
        assert [outcome.prediction for outcome in rollout.questions] == [
            question.answers[0] if outcome.retrieved == outcome.evidence else "?"
            for question, outcome in zip(task.questions, rollout.questions, strict=True)
        ]
        assert [turn.reply.usage.calls for turn in rollout.turns if turn.reply.usage] == [
            int(turn in asked) for turn in rollout.turns
        ]
    assert len(reader.prompts) == sum(len(task.questions) for task in tasks(drive))
    found = [outcome.retrieved / outcome.evidence for r in rollouts for outcome in r.questions if outcome.evidence]
    assert sum(found) / len(found) > 0.3
    assert kinds(drive, rollouts) == {OperationKind.CREATE, OperationKind.READ, OperationKind.ANSWER}


def test_append_all_stores_every_chunk_whole_and_searches_in_time() -> None:
    drive = driver(read_latency=0)
    rollouts, _ = run("append-all", drive)
    for rollout, task in zip(rollouts, tasks(drive), strict=True):
        chunks = chunk_documents(task.documents, 200, get_tokenizer("builtin"))
        assert texts(drive, rollout.turns, OperationKind.CREATE) == list(chunks)
        assert [turn.observation["query"] for turn in answering(rollout)] == [q.text for q in task.questions]
        assert all(outcome.stored == outcome.evidence for outcome in rollout.questions)


def test_a_document_held_back_to_the_end_is_stored_before_the_first_answer() -> None:
    drive = driver(chunk_tokens=40)  # a document fills more than half a chunk
    rollouts, _ = run("rag", drive)
    for rollout, task in zip(rollouts, tasks(drive), strict=True):
        stored = texts(drive, rollout.turns, OperationKind.CREATE)
        assert len(stored) == len(task.documents)
        assert all(outcome.stored == outcome.evidence for outcome in rollout.questions)
        assert len(answering(rollout)) <= len(task.questions) + 1


def test_a_question_asked_twice_is_searched_for_again_and_so_is_the_next() -> None:
    task = tasks(driver())[0]
    first, second = task.questions[:2]

    class Twice:
        dataset = "synthetic"

        def task(self, index: int, seed: int) -> Task:
            return Task(task.id, task.dataset, task.documents, (first, first, second))

        def __len__(self) -> int:
            return len(SPECS)

    env = driver()
    drive = Driver(env.env_id, Twice(), env.settings, env.embedder, env.store)
    for rollout in run("rag", drive)[0]:
        searched = [t.observation for t in answering(rollout) if t.reply.usage and t.reply.usage.calls]
        assert [seen["query"] for seen in searched] == [first.text, first.text, second.text]


def test_a_model_that_says_nothing_leaves_the_search_for_its_question_in_force() -> None:
    drive = driver(replies_per_question=2)

    class Mute(Reader):
        async def complete(self, messages: Sequence[Message], **options: Any) -> Reply:
            return Reply(" \n", usage=Usage(1, 1, 1))

    policy = PromptedPolicy("rag@mute", METHODS["rag"][0], Mute(drive.source), drive.settings)
    for rollout in asyncio.run(drive.run(SPECS, policy)):
        asked = [turn.observation for turn in answering(rollout) if turn.reply.usage and turn.reply.usage.calls]
        assert asked
        assert all(seen["query"] == seen["question"] for seen in asked)
        assert all(outcome.prediction is None for outcome in rollout.questions)


@st.composite
def contexts(draw: st.DrawFn) -> list[Document]:
    """Documents of short sentences, some longer than a chunk."""
    documents = []
    for number, title in enumerate(draw(st.lists(st.sampled_from(["Ada", "Bo", "Rome"]), min_size=1, max_size=8))):
        sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=14))
        sentences = [" ".join(f"w{number}x{place}" for place in range(size)) + "." for size in sizes]
        documents.append(Document(title, " ".join(sentences)))
    return documents


@pytest.mark.parametrize("tokenizer", ["builtin", *NAMES])
@settings(max_examples=80, deadline=None)
@given(contexts(), st.integers(18, 60))
def test_documents_come_out_of_chunks_as_they_went_in(tokenizer: str, documents: list[Document], limit: int) -> None:
    path = "builtin" if tokenizer == "builtin" else made(tokenizer)
    if tokenizer != "builtin":
        limit *= 4  # as many words
    whole = WholeDocuments(EpisodeSettings(chunk_tokens=limit, tokenizer=path))
    chunks = chunk_documents(documents, limit, get_tokenizer(path))
    taken = [text for chunk in (*chunks, "") for text in whole.take(chunk)]
    titles = [document.title for document in documents]
    if all(title != following for title, following in itertools.pairwise(titles)):
        assert taken == [f"{document.title}\n{document.text}" for document in documents]
    # Neighbours of one title can be cut just as one document would be: then they come out as one, but nothing is lost.
    text = " ".join(text.partition("\n")[2] for text in taken)
    assert text == " ".join(document.text for document in documents)
    assert len(taken) <= len(documents)


# ------------------------------------------------------------------------------------------------- full context, no memory


def test_full_context_shows_all_of_a_document_that_fits() -> None:
    drive = driver()
    rollouts, reader = run("full-context", drive)
    for rollout, task in zip(rollouts, tasks(drive), strict=True):
        assert rollout.reward == 1.0
        assert len(answering(rollout)) == len(task.questions)
        assert all(turn.reply.usage and turn.reply.usage.dropped_tokens == 0 for turn in rollout.turns)
    assert all(all(document.text in reader.prompts[0] for document in task.documents) for task in tasks(drive)[:1])
    assert kinds(drive, rollouts) == {OperationKind.ANSWER}


@pytest.mark.parametrize(("tells", "least"), [(True, 0.9), (False, 0.4)])
def test_full_context_leaves_out_the_middle_as_far_as_it_must_and_says_how_much(tells: bool, least: float) -> None:
    drive, window = driver(), 200
    rollouts, reader = run("full-context", drive, window=window, tells=tells)
    prompts = iter(reader.prompts)
    for rollout, task in zip(rollouts, tasks(drive), strict=True):
        chunks = chunk_documents(task.documents, 200, get_tokenizer("builtin"))
        document = "\n\n".join(chunks)
        total = get_tokenizer("builtin").count(document)
        for turn in answering(rollout):
            prompt = next(prompts)
            start, end = prompt.split("[…]")
            assert document.startswith(start.partition("unknown\n\n")[2].strip())
            assert document.endswith(end.rpartition("\n\nQuestion:")[0].strip())
            assert least * window < len(prompt.split()) <= window
            shown = get_tokenizer("builtin").count(start.partition("unknown\n\n")[2])
            shown += get_tokenizer("builtin").count(end.rpartition("\n\nQuestion:")[0])
            assert turn.reply.usage is not None
            assert turn.reply.usage.dropped_tokens == total - shown > 0
            assert turn.reply.usage.calls == 1


@pytest.mark.parametrize("tells", [True, False])
def test_a_question_that_does_not_fit_by_itself_is_an_error(tells: bool) -> None:
    with pytest.raises(PromptTooLong):
        run("full-context", driver(), window=5, tells=tells)


@given(st.text("ab ", max_size=30), st.integers(0, 12))
def test_what_is_left_of_a_text_is_its_ends(text: str, kept: int) -> None:
    spans = list(get_tokenizer("builtin").spans(text))
    words = text.split()
    ends = without_middle(text, spans, kept).split()
    if kept >= len(words):
        assert ends == words
    else:
        assert ends == [*words[: kept - kept // 2], "[…]", *words[len(words) - kept // 2 :]]


def test_without_memory_the_model_sees_the_question_and_no_more() -> None:
    drive = driver()
    rollouts, reader = run("no-memory", drive)
    assert {outcome.prediction for rollout in rollouts for outcome in rollout.questions} <= {"?", "unknown"}
    names = {document.title for task in tasks(drive) for document in task.documents}
    asked = " ".join(question.text for question in reader.questions())
    assert not any(name in prompt for prompt in reader.prompts for name in names if name not in asked)
    assert kinds(drive, rollouts) == {OperationKind.ANSWER}


# --------------------------------------------------------------------------------------------------------------- memagent


def test_memagent_writes_its_one_memory_at_every_chunk_and_answers_from_it() -> None:
    drive = driver(operations=[], operations_per_reply=1)
    rollouts, reader = run("memagent", drive)
    assert kinds(drive, rollouts) == {OperationKind.SCRATCHPAD, OperationKind.ANSWER}
    assert len(reader.prompts) == sum(len(rollout.turns) for rollout in rollouts)
    for rollout, task in zip(rollouts, tasks(drive), strict=True):
        assert rollout.reward == 1.0
        assert len(answering(rollout)) == len(task.questions)
        assert all(outcome.retrieved == outcome.evidence for outcome in rollout.questions)
        for turn in rollout.turns:
            assert turn.reply.usage is not None
            assert turn.reply.usage.calls == 1
            assert turn.reply.completion_ids == (2,)
    prompts = iter(reader.prompts)
    for turn in (turn for rollout in rollouts for turn in rollout.turns):
        assert turn.observation["scratchpad"] in (prompt := next(prompts))
        assert turn.observation["chunk"] in prompt


# ------------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("method", METHODS)
def test_every_method_plays_with_a_real_model(method: str) -> None:
    pytest.importorskip("torch")
    drive = driver(num_docs=10, questions=2, chunk_tokens=200)
    policy = load_policy(f"{method}@tiny", drive.settings, Sampling(max_new_tokens=8))
    assert (policy.name, policy.privileged) == (f"{method}@tiny", False)
    first, again = (asyncio.run(drive.run(SPECS[:2], policy)) for _ in range(2))
    assert first == again
    for rollout in first:
        usages = [turn.reply.usage for turn in rollout.turns]
        assert all(usages)
        total = sum(filter(None, usages), Usage())
        assert total.calls >= 2
        assert total.prompt_tokens > 2 * total.calls
        assert 0 < total.completion_tokens <= 8 * total.calls
        assert total.dropped_tokens == 0


@pytest.mark.parametrize(
    ("method", "options", "needs"),
    [
        ("rag", {"operations": ("read",)}, "operations"),
        ("rag", {"operations_per_reply": 4}, "operations_per_reply"),
        ("append-all", {"operations": ("create",)}, "operations"),
        ("memagent", {"scratchpad": False}, "scratchpad"),
        *((method, {"advance": "on_write"}, "advance") for method in METHODS),
    ],
)
def test_an_environment_that_lacks_what_a_method_needs_is_rejected(method: str, options: Any, needs: str) -> None:
    with pytest.raises(SettingError, match=f"{method} needs {needs}"):
        PromptedPolicy(method, METHODS[method][0], Reader(None), EpisodeSettings(**options))


@pytest.mark.parametrize(
    ("dialect", "text", "answer"),
    [
        ("tags", "Rome", "Rome"),
        ("tags", "\n\n  Rome \nbecause", "Rome"),
        ("tags", "It is <final_answer> Rome </final_answer> I think", "Rome"),
        ("public_code", "<final_answer>\\boxed{New {York}}</final_answer>", "New {York}"),
        ("tool_calls", '<tool_call>{"name": "final_answer", "arguments": {"answer": "Rome"}}</tool_call>', "Rome"),
        ("tool_calls", "The answer:\n\\boxed{Rome}", "Rome"),
        ("tags", "<create_memory>x</create_memory>", "<create_memory>x</create_memory>"),
        ("tags", " \n", ""),
        ("tags", "\\boxed{}", ""),
    ],
)
def test_an_answer_is_taken_from_what_a_model_wrote(dialect: str, text: str, answer: str) -> None:
    assert answer_in(text, EpisodeSettings(dialect=dialect)) == answer
