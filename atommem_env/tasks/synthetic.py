"""A procedural world that needs no data: multi-hop questions over short passages, with corrections and gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from atommem_env.errors import SettingError
from atommem_env.tasks.records import check_range
from atommem_env.tasks.synthetic_world import (
    FILLERS,
    INSTRUMENT,
    INSTRUMENTS,
    MAX_HOPS,
    RELATIONS,
    SPLITS,
    UNKNOWN,
    Relation,
    chains,
    name_pools,
    vocabulary,
)
from atommem_env.types import Document, Evidence, Question, Task

__all__ = ["SyntheticSource", "vocabulary"]

MAX_DOCUMENTS = 800  # a held-out split has names for about 1000
TASKS = 1_000_000

_T = TypeVar("_T")

_RELATIONS_OF = {kind: [relation for relation in RELATIONS if relation.subject == kind] for kind in FILLERS}


@dataclass(kw_only=True)
class SyntheticSource:
    """Tasks about fictional people, towns, companies, novels, songs and paintings.

    A question composes relations ("Who leads the company where the sibling of Ada Brook works?"). A document is a passage of
    one to three sentences about the subject in its title. The documents state the facts of the question's chain, each in a
    separate document and in any order; facts of the same relation about subjects with similar names; facts about other
    subjects; and sentences without a fact.

    A corrected fact is first stated with an old value and corrected in a later document, in words such as "now", "no longer"
    or "Correction:"; the last statement counts. So the order of documents is part of the task. Facts outside the chain are
    corrected as often. An unanswerable question has a chain with one link that no document states: its gold is "unknown", its
    evidence the links before the gap (none where the first is missing), and its wording like any other.

    The index alone determines the questions with their answers and evidence; the seed determines all other documents and the
    order.

    Args:
        split: "train", "dev" or "test"; no full name of one split occurs in another, single words of names do.
        hops: lengths of chains, each from 1 to 4; drawn uniformly, with repeated lengths more often.
        num_docs: documents of a task, from `questions * (max(hops) + 1)` to 800. Near the minimum, there is no room for
            distractors.
        questions: questions of a task, from 1 to 10, on different subjects.
        corrections: probability that one fact of a question's chain is corrected, if at least one is stated.
        unanswerable: probability that a question cannot be answered.

    Raises:
        SettingError: a setting is out of range.
    """

    split: str = "dev"
    hops: Sequence[int] = (1, 2, 3, 4)
    num_docs: int = 20
    questions: int = 1
    corrections: float = 0.25
    unanswerable: float = 0.1
    dataset: str = field(default="synthetic", init=False)

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise SettingError(f"{name} must be {expected}, got {getattr(self, name)!r}.")

        def whole(value: object, least: int, most: int) -> bool:
            return isinstance(value, int) and least <= value <= most

        check("split", self.split in SPLITS, f"one of {SPLITS}")
        ok = (
            isinstance(self.hops, Sequence)
            and len(self.hops) > 0
            and all(whole(hops, 1, MAX_HOPS) for hops in self.hops)
        )
        check("hops", ok, f"a sequence of whole numbers from 1 to {MAX_HOPS}")
        self.hops = tuple(self.hops)
        check("questions", whole(self.questions, 1, 10), "a whole number from 1 to 10")
        least = self.questions * (max(self.hops) + 1)
        expected = f"a whole number from {least} (questions * (max(hops) + 1)) to {MAX_DOCUMENTS}"
        check("num_docs", whole(self.num_docs, least, MAX_DOCUMENTS), expected)
        for name in ("corrections", "unanswerable"):
            value = getattr(self, name)
            check(name, isinstance(value, (int, float)) and 0 <= value <= 1, "a probability from 0 to 1")

    def __len__(self) -> int:
        return TASKS

    def task(self, index: int, seed: int) -> Task:
        """The task at `index`, with the same questions under every `seed`.

        Raises:
            OutOfRange: there is no such index, or the seed is negative.
        """
        check_range("index", index, TASKS)
        check_range("seed", seed)
        name, split = f"synthetic-{self.split}-{index}", SPLITS.index(self.split)
        world = _World(self.split, np.random.default_rng([split, 0, index]))
        questions = tuple(self._question(world, f"{name}-q{number + 1}") for number in range(self.questions))
        world.rng = np.random.default_rng([split, 1, index, seed])
        world.fill(self.num_docs, self.corrections * len(self.hops) / sum(self.hops))
        return Task(name, self.dataset, world.documents(), questions)

    def _question(self, world: _World, name: str) -> Question:
        hops = world.pick(self.hops)
        stated = int(world.rng.random() * hops) if world.rng.random() < self.unanswerable else hops
        corrected = int(world.rng.random() * stated) if stated and world.rng.random() < self.corrections else None
        chain = world.pick(chains(hops))
        subject = world.new(chain[0].subject)
        text = world.ask(chain, subject)
        evidence = []
        for link, relation in enumerate(chain[:stated]):
            value = world.new(relation.object)
            old = world.new(relation.object, other_than=value) if link == corrected else None
            evidence.append(Evidence(subject, world.state(subject, relation, value, old)))
            world.distractors.append(_Distractor(relation=relation, near=subject, first=link == 0))
            if old and link + 1 < hops:  # a wrong chain for a reader that misses the correction
                world.distractors.append(_Distractor(relation=chain[link + 1], of=old, first=True))
            subject = value
        if stated < hops:
            world.leave_out(subject, chain[stated])
            world.distractors.append(_Distractor(relation=chain[stated], near=subject, first=True))
        # How often the documents state a relation of the question must not reveal whether there is an answer, nor which.
        world.distractors += [
            _Distractor(relation=relation) for relation in (*chain[stated:], *chain[stated + 1 :], *[chain[-1]] * 3)
        ]
        return Question(
            id=name,
            text=text,
            answers=(subject if stated == hops else UNKNOWN,),
            evidence=tuple(evidence),
            kind=f"{hops}hop{'' if corrected is None else '_corrected'}{'' if stated == hops else '_unanswerable'}",
            hops=hops,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Distractor:
    """A misleading fact: about `of`, or a new thing whose name is similar to `near`, or anything."""

    relation: Relation
    of: str = ""
    near: str = ""
    first: bool = False  # stated before the others, which few documents leave no room for


@dataclass(slots=True)
class _Draft:
    """A document under construction."""

    title: str
    kind: str  # of the subject
    sentences: list[str]
    corrects: int | None = None  # index of the draft whose fact it corrects, and which it must follow


class _World:
    """The facts of one task: each subject has at most one object of each relation, apart from corrections."""

    def __init__(self, split: str, rng: np.random.Generator) -> None:
        self.rng = rng
        self.distractors: list[_Distractor] = []
        self._facts: set[tuple[str, str]] = set()  # (subject, relation) that are stated, or must not be
        self._sealed: set[str] = set()  # subjects of gaps; a fact that points to one would hint at what is missing
        self._pools = name_pools(split)
        self._named: set[str] = set()
        self._things: dict[str, list[str]] = {kind: [] for kind in FILLERS}
        self._undocumented: dict[str, list[str]] = {kind: [] for kind in FILLERS}  # perhaps without their own document
        self._titles: set[str] = set()
        self._drafts: list[_Draft] = []

    def pick(self, items: Sequence[_T]) -> _T:
        return items[int(self.rng.random() * len(items))]  # several times faster than Generator.choice

    def new(self, kind: str, other_than: str = "") -> str:
        """A thing without any fact yet; an instrument, of which there are few, only differs from `other_than`."""
        if kind == INSTRUMENT:
            return self.pick([name for name in INSTRUMENTS if name != other_than])
        while (name := self.pick(self._pools[kind].names)) in self._named:
            pass
        return self._introduce(name, kind)

    def _near(self, name: str, kind: str) -> str:
        """A new thing whose name shares a word with `name`; any new one where all of those are taken."""
        sharing = self._pools[kind].by_word[self.pick(name.split())]
        free = [other for other in sharing if other not in self._named]
        return self._introduce(self.pick(free), kind) if free else self.new(kind)

    def _introduce(self, name: str, kind: str) -> str:
        self._named.add(name)
        self._things[kind].append(name)
        self._undocumented[kind].append(name)
        return name

    def ask(self, chain: Sequence[Relation], start: str) -> str:
        """The question for the last object of `chain`; only the innermost phrase may have words after its subject."""
        phrase = start
        for depth, relation in enumerate(chain[:-1]):
            forms = [form for form in relation.phrases if depth == 0 or form.endswith("{s}")]
            phrase = self.pick(forms).format(s=phrase)
        return self.pick(chain[-1].questions).format(s=phrase)

    def state(self, subject: str, relation: Relation, value: str, old: str | None = None) -> str:
        """Adds a document with a fact and, given an `old` value, one that corrects it; returns the valid sentence."""
        self._titles.add(subject)
        sentence = self._sentence(subject, relation, old or value)
        self._drafts.append(_Draft(subject, relation.subject, [sentence]))
        if old:
            self._add_fact(subject, relation, value)
            sentence = self.pick(self.pick(relation.corrections)).format(s=subject, o=value, old=old)
            self._drafts.append(_Draft(subject, relation.subject, [sentence], corrects=len(self._drafts) - 1))
        return sentence

    def leave_out(self, subject: str, relation: Relation) -> None:
        """Ensures that no document states the `relation` of `subject`."""
        self._facts.add((subject, relation.name))
        self._sealed.add(subject)

    def _sentence(self, subject: str, relation: Relation, value: str) -> str:
        self._add_fact(subject, relation, value)
        return self.pick(relation.statements).format(s=subject, o=value)

    def _add_fact(self, subject: str, relation: Relation, value: str) -> None:
        self._facts.add((subject, relation.name))
        if relation.symmetric:
            self._facts.add((value, relation.name))

    def fill(self, num_docs: int, corrections: float) -> None:
        """Adds documents outside the chains up to `num_docs`, a share of their facts corrected, and extra sentences to all."""
        distractors = sorted(self.distractors, key=lambda distractor: not distractor.first)[::-1]
        while (room := num_docs - len(self._drafts)) > 0:
            distractor = distractors.pop() if distractors else _Distractor(relation=self.pick(RELATIONS))
            relation, near = distractor.relation, distractor.near
            subject = distractor.of or (self._near(near, relation.subject) if near else self._subject(relation))
            value = self._object(subject, relation)
            corrected = room > 1 and self.rng.random() < corrections
            self.state(subject, relation, value, self.new(relation.object, other_than=value) if corrected else None)
        for draft in self._drafts:
            for _ in range(int(self.rng.random() * 3)):
                position = int(self.rng.random() * (len(draft.sentences) + 1))
                draft.sentences.insert(position, self._extra_sentence(draft))

    def _subject(self, relation: Relation) -> str:
        """A thing without a document: one that other documents mention, so that chains form, or a new one."""
        kind = relation.subject
        undocumented, things = self._undocumented[kind], self._things[kind]
        while undocumented and self.rng.random() < 0.6:
            index = int(self.rng.random() * len(undocumented))
            undocumented[index], undocumented[-1] = undocumented[-1], undocumented[index]
            name = undocumented.pop()
            if name not in self._titles and (name, relation.name) not in self._facts:
                return name
        return self._near(self.pick(things), kind) if things and self.rng.random() < 0.5 else self.new(kind)

    def _object(self, subject: str, relation: Relation) -> str:
        """The object of a fact outside the chains: equally often a known thing and a new one."""
        things = self._things.get(relation.object, ())
        # Each side of a symmetric relation has only one partner, so it must be new.
        if things and not relation.symmetric and self.rng.random() < 0.5:
            name = self.pick(things)
            if name != subject and name not in self._sealed:
                return name
        return self.new(relation.object)

    def _extra_sentence(self, draft: _Draft) -> str:
        """Another sentence about a document's subject, with or without a fact."""
        relation = self.pick(_RELATIONS_OF[draft.kind])
        if (draft.title, relation.name) not in self._facts and self.rng.random() < 0.7:
            return self._sentence(draft.title, relation, self._object(draft.title, relation))
        texts = [filler.format(s=draft.title) for filler in FILLERS[draft.kind]]
        return self.pick([text for text in texts if text not in draft.sentences])

    def documents(self) -> tuple[Document, ...]:
        """All documents in a random order in which corrections follow what they correct."""
        positions = self.rng.permutation(len(self._drafts))
        for number, draft in enumerate(self._drafts):
            if draft.corrects is not None and positions[number] < positions[draft.corrects]:
                positions[[number, draft.corrects]] = positions[[draft.corrects, number]]
        return tuple(
            Document(self._drafts[number].title, " ".join(self._drafts[number].sentences))
            for number in np.argsort(positions)
        )
