"""The data contract: what tasks, observations, operations, replies and rollouts are.

Everything here is plain, frozen data. Shapes in comments use these axes: `D` the embedder's dimension, `T_in` the tokens of
a prompt, `T_out` the tokens of a completion.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from hashlib import sha256
from typing import Any, Literal, Protocol, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import PolicyError, SettingError
from atommem_env.plugins import name_of

Vector = NDArray[np.float32]
EmbeddingKind = Literal["document", "query"]
_END_OF_COUNTS = 2**63  # of what the columns of a table hold
_END_OF_IDS = 2**31
UNGRADED = "ungraded"  # the kind of a question without a gold

# ---------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a context."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """A passage that supports an answer: a sentence (HotpotQA, 2WikiMultiHopQA, synthetic) or a paragraph (MuSiQue)."""

    title: str  # of the document that contains it
    text: str  # verbatim substring of that document's text


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold answers."""

    id: str
    text: str
    answers: tuple[str, ...]  # the gold answer first, then its aliases; empty: the question is asked, but not graded
    evidence: tuple[Evidence, ...] = ()  # in the order of the dataset
    kind: str = ""  # the dataset's own question type, e.g. "bridge", "comparison", "2hop"
    hops: int = 1  # reasoning steps; for HotpotQA the number of supporting documents


@dataclass(frozen=True, slots=True)
class Score:
    """How well a prediction matches; each metric lies in [0, 1]."""

    em: float  # exact match: 1 where the normalised texts are equal
    f1: float  # harmonic mean of precision and recall
    precision: float  # share of the prediction's words that are in the gold
    recall: float  # share of the gold's words that are in the prediction

    @classmethod
    def exact(cls, match: float) -> Self:
        """The score of a rule that yields a single number in [0, 1]: all four metrics are `match`."""
        return cls(match, match, match, match)


ScoringRule = Callable[[str, Sequence[str]], Score]
"""(prediction, golds) -> score; there is at least one gold."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one episode is about: a context and the questions about it."""

    id: str
    dataset: str  # any name; selects the scoring rule unless `scoring` is set
    documents: tuple[Document, ...]
    questions: tuple[Question, ...]
    scoring: str | ScoringRule | None = (
        None  # a name of `scoring.RULES`, module:attribute, or a function; None: the dataset's
    )

    @classmethod
    def of(
        cls,
        documents: Sequence[str | tuple[str, str] | Document],
        questions: Sequence[str | tuple[str, str | Sequence[str]] | Question],
        *,
        id: str | None = None,
        dataset: str = "custom",
        scoring: str | ScoringRule | None = None,
    ) -> Self:
        """A task from plain texts.

        Args:
            documents: each a text, (title, text) or a `Document`; a bare text is titled "Document N".
            questions: each (text, answer), (text, answers) or a `Question`; a bare text, or one with an empty list of answers,
                has no gold: it is asked, and its answer recorded, but it is not graded.
            id: of the task in records; by default a hash of the texts, so that equal tasks have equal ids.
            dataset: the dataset's name in records.
            scoring: as the field `scoring`.

        >>> task = Task.of(["Ada moved to Rome."], [("Where does Ada live?", "Rome")])
        >>> task.documents[0].title, task.questions[0].answers
        ('Document 1', ('Rome',))

        Raises:
            SettingError: a document or a question has another form.
        """
        for name, value in (("documents", documents), ("questions", questions)):
            if isinstance(value, str):  # or each of its characters would be one
                raise SettingError(f"{name} must be a list, got the text {value[:40]!r}.")
        parsed_documents = tuple(_parse_document(number, value) for number, value in enumerate(documents, 1))
        parsed_questions = tuple(_parse_question(number, value) for number, value in enumerate(questions, 1))
        content = repr((parsed_documents, parsed_questions))
        digest = sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return cls(f"{dataset}/{digest}" if id is None else id, dataset, parsed_documents, parsed_questions, scoring)


def _parse_document(number: int, value: object) -> Document:
    match value:
        case Document():
            return value
        case str():
            return Document(f"Document {number}", value)
        case (str() as title, str() as text):
            return Document(title, text)
    raise SettingError(f"A document must be a text, (title, text) or a Document, got {value!r} as number {number}.")


def _parse_question(number: int, value: object) -> Question:
    match value:
        case Question():
            return value
        case str():
            return Question(f"q{number}", value, (), kind=UNGRADED)
        case (str() as text, str() as answer):
            return Question(f"q{number}", text, (answer,))
        case (str() as text, [*answers]) if all(isinstance(answer, str) for answer in answers):
            return Question(f"q{number}", text, tuple(map(str, answers)), kind="" if answers else UNGRADED)
    raise SettingError(
        f"A question must be a text, (text, answer), (text, answers) or a Question, got {value!r} as number {number}."
    )


class TaskSource(Protocol):
    """Makes tasks. The same index and seed give the same task in every process."""

    dataset: str  # any name

    def __len__(self) -> int:
        """How many different tasks there are."""
        ...

    def task(self, index: int, seed: int) -> Task:
        """The task at `index` (0 ≤ index < len), its context drawn and shuffled by `seed`."""
        ...


# ------------------------------------------------------------------------------------------------------------- settings


# Optional terms of the reward, each a share in [0, 1] (`atommem_env.rewards`)
REWARD_TERMS = {
    "faults": "replies with a fault, of all replies",
    "reads": "replies with a Read that was carried out, of all replies",
    "steps": "replies, of the step budget",
    "memory_size": "tokens stored at the end in entries and scratchpad, of the document's tokens; at most 1",
    "evidence_stored": "evidence passages of graded questions stored when these were resolved, of all; 1 where there are none",
}

# The AtomMem paper's ablations: name -> the settings that it changes
ABLATIONS: dict[str, dict[str, object]] = {
    "no_update": {"operations": ("create", "read", "delete")},
    "no_delete": {"operations": ("create", "read", "update")},
    "no_scratchpad": {"scratchpad": False},
    "no_storage": {"operations": ()},  # the scratchpad alone
    "no_memory": {"operations": (), "scratchpad": False},
    "random_retrieval": {"retrieval": "random"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSettings:
    """The dynamics of an episode. The defaults are the AtomMem paper's (arXiv 2601.08323); other values are ablations."""

    dialect: str | Dialect = "tags"  # how operations are written as text: a name, module:attribute or an object
    tokenizer: str = "builtin"  # counts tokens: "builtin", or the path of a tokenizer.json
    chunk_tokens: int = 4096  # most tokens of the chunk of document shown at each reading step
    operations: tuple[str, ...] = ("create", "read", "update", "delete")  # the memory operations that exist
    operations_per_reply: int | None = None  # most operations of one reply carried out, in order; None: all
    scratchpad: bool = True  # whether there is a scratchpad
    scratchpad_tokens: int = 2048  # a longer scratchpad is truncated, and a notice says so
    top_k: int = 6  # how many entries a query retrieves
    memory_tokens: int = (
        4096  # retrieved entries whose texts exceed this many tokens are not shown, and a notice says so
    )
    retrieval: str = "top_k"  # by cosine similarity; "bm25": by words; "hybrid": by the ranks of both; "random" entries
    read_latency: int = 1  # 1: a Read's results are shown with the next chunk; 0: with the same chunk, shown once more
    advance: str = "always"  # which replies advance to the next chunk; "on_write": only those that create or update
    capacity: int | None = None  # most entries at a time; a Create beyond it is a fault
    replies_per_question: int = 4  # after this many replies without an answer the question stays unanswered
    max_steps: int | None = None  # step budget; None: as many steps as the episode can need
    reward: str | Reward = "exact_match"  # a name, module:attribute or a function of the `EpisodeSummary`
    reward_terms: tuple[tuple[str, float], ...] = ()  # (name, weight) pairs of `REWARD_TERMS`; a dict works as well

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise SettingError(f"{name} must be {expected}, got {getattr(self, name)!r}.")

        known = ("create", "read", "update", "delete")
        check("tokenizer", isinstance(self.tokenizer, str), "'builtin' or a path, as text")
        check("scratchpad", isinstance(self.scratchpad, bool), "True or False")
        listed = isinstance(self.operations, Collection) and not isinstance(self.operations, str)
        check("operations", listed, f"a list, a selection of {known}")
        object.__setattr__(self, "operations", tuple(str(name) for name in self.operations))
        pairs = _pairs(self.reward_terms)
        ok = all(name in tuple(REWARD_TERMS) and _finite(weight) for name, weight in pairs)
        check("reward_terms", ok, f"finite weights of {', '.join(REWARD_TERMS)}")
        object.__setattr__(self, "reward_terms", tuple(sorted((name, float(weight)) for name, weight in pairs)))
        check("operations", set(self.operations) <= set(known), f"a selection of {known}")
        kinds = ("top_k", "bm25", "hybrid", "random")
        check("retrieval", self.retrieval in kinds, f"one of {kinds}")
        check("advance", self.advance in ("always", "on_write"), "'always' or 'on_write'")
        check("read_latency", self.read_latency in (0, 1), "0 or 1")
        for name in ("chunk_tokens", "scratchpad_tokens", "top_k", "memory_tokens", "replies_per_question"):
            check(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number of at least 1"
            )
        for name in ("operations_per_reply", "capacity", "max_steps"):
            value = getattr(self, name)
            check(
                name, value is None or (isinstance(value, int) and value >= 1), "None or a whole number of at least 1"
            )

    def record(self) -> dict[str, Any]:
        """The settings as plain data, as records and stores hold them; user-defined parts as `module:attribute`."""
        named = {name: name_of(getattr(self, name)) for name in ("dialect", "reward")}
        return {field.name: getattr(self, field.name) for field in fields(self)} | named


def _pairs(terms: object) -> list[tuple[Any, Any]]:
    """The items of a dict, or of a list of pairs; for anything else a pair that is wrong."""
    if isinstance(terms, Mapping):
        return list(terms.items())
    if isinstance(terms, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in terms):
        return [(name, weight) for name, weight in terms]
    return [("", None)]


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# --------------------------------------------------------------------------------------------------------- observations


class Observation(TypedDict):
    """What the policy sees at one step; the value of the Gymnasium `Dict` space, with the same keys."""

    phase: str  # "read" while the document is shown, "answer" after its last chunk
    questions: str  # all questions of the task, one a line
    question: str  # the one to be answered now; "" while reading
    chunk: str  # the piece of the document shown now; "" while answering
    scratchpad: str  # the entry that is always shown
    query: str  # the active query, that of the last Read; "" before the first
    retrieved: str  # its results, as the dialect writes entries, best first
    notice: str  # what was wrong with the last reply or truncated, one thing a line
    step: int  # replies given so far
    steps_left: int  # replies left in the step budget, this one included


class Message(TypedDict):
    """One chat message, in the form of the chat templates of `transformers` and of OpenAI-compatible servers."""

    role: str  # "system" or "user"
    content: str


class Phase(StrEnum):
    """The phase of an episode."""

    READ = "read"  # a chunk is shown with each observation
    ANSWER = "answer"  # the questions are asked, one at a time


# ----------------------------------------------------------------------------------------------------------- operations


class OperationKind(StrEnum):
    """What a reply can do."""

    CREATE = "create"  # a new entry
    READ = "read"  # set the active query, whose results are shown from the next step on
    UPDATE = "update"  # replace an entry's text
    DELETE = "delete"  # remove an entry
    SCRATCHPAD = "scratchpad"  # replace the scratchpad
    ANSWER = "answer"  # answer the question asked now


class Fault(StrEnum):
    """Why an operation was not carried out as written. Nothing is raised: the policy reads it in the next `notice`."""

    MALFORMED = "malformed"  # a tag that was not closed, or content that does not have the operation's form
    EMPTY = "empty"  # an operation without content
    UNKNOWN_ID = "unknown_id"  # no entry of that id exists
    FORBIDDEN = "forbidden"  # an ablation switched the operation off
    OUT_OF_PHASE = "out_of_phase"  # an answer before any question was asked
    SUPERSEDED = "superseded"  # a later Read, or answer, of the same reply was carried out instead
    TOO_MANY = "too_many"  # one more operation than a reply may have carried out
    FULL = "full"  # a Create when the memory holds as many entries as its capacity
    TRUNCATED = "truncated"  # carried out, but the text was too long and was truncated
    ILLEGAL_TEXT = "illegal_text"  # carried out, with lone surrogates and NUL characters replaced by U+FFFD
    NO_ANSWER = "no_answer"  # a question was asked, and the reply neither answered nor sent a Read


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation as written in a reply."""

    kind: OperationKind
    text: str = ""  # entry text, query, scratchpad or answer
    target: str = ""  # the id an Update or Delete names, as written


@dataclass(frozen=True, slots=True)
class OperationResult:
    """The result of one operation, or of a piece of a reply that could not be parsed as one."""

    kind: OperationKind | None  # None: the reply as a whole
    fault: Fault | None = None  # None: carried out as written
    detail: str = ""  # one sentence for the policy, where there is a fault
    entry_id: str = ""  # the entry created, updated or deleted


class Dialect(Protocol):
    """Parses the operations of a reply, and writes operations and entries as text."""

    name: str

    def parse(self, reply: str) -> list[Operation | OperationResult]:
        """The operations in `reply`, in order; an `OperationResult` is a piece that could not be parsed. Never raises."""
        ...

    def write(self, operation: Operation) -> str:
        """The text that `parse` reads back as `operation`, provided that the dialect can represent the operation's text.

        No dialect can represent outer whitespace, NUL and lone surrogates. The tag dialects cannot represent their own tags,
        nor an answer that contains `\\boxed{…}`; JSON can represent everything else.
        """
        ...

    def show(self, entries: Sequence[Entry]) -> str:
        """The entries as an observation shows them, best first."""
        ...

    def entry_id(self, target: str, shown: Sequence[str]) -> str:
        """The entry id that `target` refers to, given the ids shown in the observation; no such entry need exist."""
        ...

    def describe(self, settings: EpisodeSettings) -> str:
        """The operations that these settings allow, explained to a language model."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A text whose vector the episode needs before it can carry a reply out."""

    text: str
    kind: EmbeddingKind


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the memory."""

    id: str  # "m1", "m2", … in order of creation, never used twice
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Mutation:
    """One change that a reply made to the memory or to the active query; a row of the store's journal."""

    kind: OperationKind  # CREATE, UPDATE, DELETE, or READ (a new active query)
    entry_id: str  # "" for READ
    text: str  # new entry text or query; "" for DELETE
    vector: Vector | None  # [D], unit length; None for DELETE


class StopReason(StrEnum):
    """Why an episode ended."""

    ANSWERED = "answered"  # every question got an answer
    UNANSWERED = "unanswered"  # all questions were asked, and at least one used up its replies without an answer
    STEP_BUDGET = "step_budget"  # the step budget ran out first; `truncated`


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of one reply."""

    observation: Observation
    reward: float  # 0 until the end, then the mean exact match over the task's graded questions, and `reward_terms`
    terminated: bool
    truncated: bool
    results: tuple[OperationResult, ...]  # in the order written
    mutations: tuple[Mutation, ...]  # in the order carried out


@dataclass(frozen=True, slots=True)
class QuestionOutcome:
    """How one question of a rollout ended."""

    question_id: str
    kind: str  # the dataset's own type
    hops: int
    prediction: str | None  # None: unanswered
    em: float | None  # None: not graded, because the question has no gold
    f1: float | None  # None: not graded
    evidence: int  # passages that support the answer
    stored: int  # of these, in some entry or the scratchpad when the question was resolved
    retrieved: int  # of these, in view (entries shown, or scratchpad) when the question was resolved


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """The final state of an episode; the argument of a reward function."""

    task: Task
    settings: EpisodeSettings
    outcomes: tuple[QuestionOutcome, ...]  # one a question of the task, in its order
    stop_reason: StopReason
    steps: int  # replies
    max_steps: int  # the step budget
    reads: int  # replies with a Read that was carried out
    faulty_replies: int  # replies with a fault
    scratchpad: str
    entries: tuple[Entry, ...]  # in the memory at the end
    chunks: tuple[str, ...]  # the document in chunks, as shown


Reward = Callable[[EpisodeSummary], float]
"""A function of the `EpisodeSummary`; its value is paid once, at the end of the episode."""


# ------------------------------------------------------------------------------------------------------------- rollouts


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of a reply, summed over its model calls.

    A count is None where the service did not report it; so is a sum with such a part.

    >>> Usage(calls=1, prompt_tokens=70, cached_tokens=64) + Usage(calls=1, prompt_tokens=30, cached_tokens=None)
    Usage(calls=2, prompt_tokens=100, completion_tokens=0, cached_tokens=None, dropped_tokens=0)

    Raises:
        PolicyError: a count is no whole number of at least 0, nor None where it may be.
    """

    calls: int = 0  # model calls
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0  # reasoning before the reply included
    cached_tokens: int | None = 0  # prompt tokens served from a prefix cache
    dropped_tokens: int = 0  # of the document, left out to fit the model's context window; in the environment's tokens

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is None and name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < _END_OF_COUNTS:
                expected = "a whole number from 0 to 2**63 - 1" + (
                    "" if name in ("calls", "dropped_tokens") else ", or None"
                )
                raise PolicyError(f"{name} of a Usage must be {expected}, got {value!r}.")
            object.__setattr__(self, name, int(value))

    def __add__(self, other: Usage) -> Usage:
        pairs = [(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__]
        sums: list[Any] = [None if None in pair else sum(pair) for pair in pairs]
        return Usage(*sums)


@dataclass(frozen=True, slots=True)
class Reply:
    """A policy's reply, as sampled. Policies that are not language models set `text` only.

    Raises:
        PolicyError: a field has another form; there is neither one log-probability for each token of the completion nor none.
    """

    text: str
    prompt_ids: tuple[int, ...] = ()  # [T_in]
    completion_ids: tuple[int, ...] = ()  # [T_out]
    logprobs: tuple[float, ...] = ()  # [T_out], natural logarithm, at the sampling temperature
    stop: Literal["stop", "length"] = "stop"  # "length": truncated at the token limit
    usage: Usage | None = None  # None: not reported

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise PolicyError(f"{name} of a Reply must be {expected}, got {reprlib.repr(getattr(self, name))}.")

        check("text", isinstance(self.text, str), "a str")
        check("stop", self.stop in ("stop", "length"), "'stop' or 'length'")
        check("usage", self.usage is None or isinstance(self.usage, Usage), "a Usage or None")
        # Copies: what is done to a list later does not change the reply.
        object.__setattr__(self, "text", str.__str__(self.text))
        for name, convert in (("prompt_ids", operator.index), ("completion_ids", operator.index), ("logprobs", float)):
            values = _as_tuple(getattr(self, name), convert)
            if name == "logprobs":
                check(name, values is not None and all(map(math.isfinite, values)), "finite numbers")
            else:
                within = values is not None and (not values or 0 <= min(values) <= max(values) < _END_OF_IDS)
                check(name, within, "whole numbers from 0 to 2**31 - 1")
            object.__setattr__(self, name, values)
        check(
            "logprobs",
            len(self.logprobs) in (0, len(self.completion_ids)),
            f"one for each of the {len(self.completion_ids)} completion_ids, or none",
        )


def _as_tuple(values: Any, convert: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    """The values, converted; None where they are no sequence of what can be."""
    try:
        return tuple(map(convert, values))
    except (TypeError, ValueError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class Turn:
    """One observation, the reply to it, and the results of its operations."""

    observation: Observation
    reply: Reply
    results: tuple[OperationResult, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished episode."""

    task_id: str
    seed: int
    turns: tuple[Turn, ...]
    reward: float
    stop_reason: StopReason
    questions: tuple[QuestionOutcome, ...] = field(default=())
    task_digest: str = ""  # SHA-256 of what the task asked and showed, see `atommem_env.tasks.digests`
