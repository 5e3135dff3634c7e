"""Readers of the synthetic world: they know its grammar, and of an episode no more than what they are shown.

The oracle is a teacher with hindsight: while it reads it stores just what will matter, which cannot be learned from the
observation alone. These know the relations and the sentences of `AtomMem-Synthetic`, and decide what to store by a rule on
what has been read so far: what they do can be learned, as far as the rule uses neither chance nor anything out of view.

Questions are answered link by link. The active query names one link of the question's chain, as in "Ada Brook employer". Where
the fact is among the entries in view, its object is the answer, or goes into the query for the next link: every reply is a
single look-up, and the query alone shows how far one has come. That takes a reply for each link.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import numpy as np

from agents.policy import Act
from agents.prompting import render_reply
from atommem_env.errors import PolicyError
from atommem_env.tasks.synthetic_world import INSTRUMENT, RELATIONS, UNKNOWN, Relation
from atommem_env.types import EpisodeSettings, Observation, Operation, OperationKind, Phase, Task


class Link(NamedTuple):
    """What is asked of one thing: `subject` and the name of a relation."""

    subject: str
    relation: str


class Fact(NamedTuple):
    """What a sentence states."""

    link: Link
    object: str
    sentence: str  # verbatim


class Inquiry(NamedTuple):
    """A question, understood: the last object of a chain of relations, each about the one before's object."""

    start: str
    chain: tuple[str, ...]  # names of relations, no two alike

    @property
    def first(self) -> Link:
        return Link(self.start, self.chain[0])


class Situation(NamedTuple):
    """What a rule knows when it decides on a fact."""

    inquiries: tuple[Inquiry, ...]  # of all questions
    stored: Mapping[Link, Fact]
    room: float  # entries that the memory can still take; infinite where it is unbounded
    seed: int


Keep = Callable[[Fact, Situation], bool]
"""Whether a fact that has just been read is worth an entry."""


@dataclass(frozen=True, slots=True)
class WorldReader:
    """Stores the facts that `keep` selects, a sentence an entry, and walks the chain of each question over them.

    A fact that replaces one in view is an Update. A link that is not in view is guessed: the object of another fact of
    the last relation, else "unknown". The first link is searched for from the first reply on, and no reply is empty.

    Raises:
        PolicyError: on the first observation, where the questions are not of the synthetic world.
    """

    name: str
    settings: EpisodeSettings
    keep: Keep
    privileged: bool = False

    def begin(self, seed: int, task: Task | None) -> Act:
        stored: dict[Link, Fact] = {}
        entries = 0

        def act(observation: Observation) -> str:
            nonlocal entries
            if observation["phase"] == Phase.READ:
                room = float("inf") if self.settings.capacity is None else self.settings.capacity - entries
                operations = self._read_chunk(observation, stored, room, seed)
                entries += sum(operation.kind is OperationKind.CREATE for operation in operations)
            else:
                operations = _answer(observation)
            return render_reply(self.settings, *operations)

        return act

    def _read_chunk(
        self, observation: Observation, stored: dict[Link, Fact], room: float, seed: int
    ) -> list[Operation]:
        """What to do about a chunk; adds to `stored`."""
        inquiries = tuple(map(read_question, observation["questions"].splitlines()))
        in_view = {fact.link: entry_id for entry_id, fact in _view(observation).items()}
        operations = []
        for link, fact in facts(observation["chunk"]).items():
            if stored.get(link) == fact:  # some settings show a chunk twice
                continue
            if link in in_view:
                operations.append(Operation(OperationKind.UPDATE, fact.sentence, in_view[link]))
            elif room > 0 and self.keep(fact, Situation(inquiries, stored, room, seed)):
                operations.append(Operation(OperationKind.CREATE, fact.sentence))
                room -= 1
            else:
                continue
            stored[link] = fact
        if not operations or not observation["query"]:
            operations.append(_search(inquiries[0].first))
        return operations


def _answer(observation: Observation) -> list[Operation]:
    """The answer, or the search for the next link."""
    question = read_question(observation["question"])
    asked = read_query(observation["query"])
    if asked is None or (asked != question.first and asked.relation not in question.chain[1:]):
        return [_search(question.first)]
    in_view = {fact.link: fact.object for fact in _view(observation).values()}
    following = question.chain[question.chain.index(asked.relation) + 1 :]
    if asked in in_view and following:
        return [_search(Link(in_view[asked], following[0]))]
    guesses = [thing for link, thing in in_view.items() if link.relation == question.chain[-1]]
    answer = in_view.get(asked) or (guesses[0] if guesses else UNKNOWN)
    questions = observation["questions"].splitlines()
    later = questions[questions.index(observation["question"]) + 1 :][:1]
    return [Operation(OperationKind.ANSWER, answer), *(_search(read_question(text).first) for text in later)]


def _search(link: Link) -> Operation:
    return Operation(OperationKind.READ, query(link))


def _view(observation: Observation) -> dict[str, Fact]:
    """The facts of the entries in view by entry id, oldest first: of two on one link, the later holds."""
    entries = re.findall(r"(?m)^m(\d+): (.*)$", observation["retrieved"])
    in_order = sorted((int(number), text) for number, text in entries)
    return {f"m{number}": fact for number, text in in_order if (fact := read_fact(text))}


# ----------------------------------------------------------------------------------------------------------------- rules


def _draw(fact: Fact, now: Situation) -> float:
    """In [0, 1), the same for a fact however often the episode is played."""
    return np.random.default_rng([now.seed, zlib.crc32(fact.sentence.encode())]).random()


def keep_all(fact: Fact, now: Situation) -> bool:
    """Every fact, until the memory is full."""
    return True


def keep_at_random(fact: Fact, now: Situation) -> bool:
    """70 % of the facts, drawn for each episode."""
    return _draw(fact, now) < 0.7


def keep_by_type(fact: Fact, now: Situation) -> bool:
    """Facts of a relation that a question asks for, about any subject."""
    return any(fact.link.relation in inquiry.chain for inquiry in now.inquiries)


def keep_first_link(fact: Fact, now: Situation) -> bool:
    """Facts of the relation that a question begins with, about any subject, and 30 % of those that it needs after that.

    Right for one link, short-sighted for more: a model trained on it has seen what is missing, but seldom.
    """
    first = any(fact.link.relation == inquiry.chain[0] for inquiry in now.inquiries)
    return first or (keep_by_type(fact, now) and _draw(fact, now) < 0.3)


def keep_by_chain(fact: Fact, now: Situation) -> bool:
    """Facts that continue where what was stored ends; of later links any, as long as another entry stays free."""
    for inquiry in now.inquiries:
        reached = list(walk(inquiry, now.stored))
        if fact.link in reached or (now.room > 1 and fact.link.relation in inquiry.chain[len(reached) :]):
            return True
    return False


def walk(inquiry: Inquiry, stored: Mapping[Link, Fact]) -> Iterator[Link]:
    """The links of a chain whose subject is known: each but the last has its fact among `stored`.

    >>> link = Link("Ada Brook", "employer")
    >>> stored = {link: Fact(link, "Jade Mills", "Ada Brook works at Jade Mills.")}
    >>> list(walk(Inquiry("Ada Brook", ("employer", "leader", "home")), stored))[-1]
    Link(subject='Jade Mills', relation='leader')
    """
    subject = inquiry.start
    for relation in inquiry.chain:
        link = Link(subject, relation)
        yield link
        if link not in stored:
            return
        subject = stored[link].object


# --------------------------------------------------------------------------------------------------------------- grammar

_NAME = r"[A-Z]\w+ [A-Z]\w+"


def _pattern(template: str, subject: str = _NAME, thing: str = _NAME) -> re.Pattern[str]:
    text = re.escape(template)
    for slot, pattern in (("s", f"(?P<s>{subject})"), ("o", f"(?P<o>{thing})"), ("old", thing)):
        text = text.replace(re.escape(f"{{{slot}}}"), pattern)
    return re.compile(text)


# Compiled at first use: hundreds of patterns that most commands never need.
@cache
def _sentences() -> tuple[tuple[re.Pattern[str], Relation], ...]:
    """How facts are stated or corrected."""
    return tuple(
        (_pattern(template, thing=r"[a-z]+" if relation.object == INSTRUMENT else _NAME), relation)
        for relation in RELATIONS
        for template in (*relation.statements, *(text for group in relation.corrections for text in group))
    )


@cache
def _askings(forms: Literal["questions", "phrases"]) -> tuple[tuple[re.Pattern[str], Relation], ...]:
    """How an object is asked for, by a question or by a phrase within one; the subject may be a phrase itself."""
    return tuple((_pattern(text, ".+"), relation) for relation in RELATIONS for text in getattr(relation, forms))


@lru_cache(maxsize=4096)
def read_fact(sentence: str) -> Fact | None:
    """The fact that a sentence of the synthetic world states, if any.

    >>> read_fact("Ada Brook no longer works at Jade Mills but at Iron Bank.")[:2]
    (Link(subject='Ada Brook', relation='employer'), 'Iron Bank')
    """
    for pattern, relation in _sentences():
        if match := pattern.fullmatch(sentence):
            return Fact(Link(match["s"], relation.name), match["o"], sentence)
    return None


def facts(chunk: str) -> dict[Link, Fact]:
    """The facts of a chunk in order; of two about the same, the later.

    >>> [fact.sentence for fact in facts("Ada Brook\\nAda Brook is a good cook. Ada Brook lives in Big Hill.").values()]
    ['Ada Brook lives in Big Hill.']
    """
    sentences = re.split(r"(?<=\.)\s+|\n", chunk)
    return {fact.link: fact for sentence in sentences if (fact := read_fact(sentence))}


@lru_cache(maxsize=1024)
def read_question(text: str) -> Inquiry:
    """What a question of the synthetic world asks.

    >>> read_question("Who leads the company where the sibling of Ada Brook works?")
    Inquiry(start='Ada Brook', chain=('sibling', 'employer', 'leader'))

    Raises:
        PolicyError: it is not one.
    """
    if inquiry := _unfold(text, "questions"):
        return inquiry
    raise PolicyError(
        f"This policy understands only the questions of AtomMem-Synthetic, got {text[:100]!r}. Play that environment."
    )


def _unfold(text: str, forms: Literal["questions", "phrases"], kind: str = "") -> Inquiry | None:
    """The chain that `text` spells from its outermost link inwards; a phrase must stand for a thing of that `kind`."""
    for pattern, relation in _askings(forms):
        if (match := pattern.fullmatch(text)) and kind in ("", relation.object):
            subject = match["s"]
            named = re.fullmatch(_NAME, subject)
            inner = Inquiry(subject, ()) if named else _unfold(subject, "phrases", relation.subject)
            if inner:
                return Inquiry(inner.start, (*inner.chain, relation.name))
    return None


def query(link: Link) -> str:
    """What to search for: the subject and the relation's name.

    Almost as good for the hashing embedder as the question for that link (the fact is among the best three of eight in
    99.3 % against 99.7 %), with half the words, and trivial to read back.

    >>> query(Link("Ada Brook", "employer"))
    'Ada Brook employer'
    """
    return " ".join(link)


def read_query(text: str) -> Link | None:
    """The link that a query of this form is for."""
    match = re.fullmatch(f"({_NAME}) (.+)", text)
    return Link(*match.groups()) if match else None
