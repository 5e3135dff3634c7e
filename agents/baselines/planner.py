"""A privileged planner of the synthetic world with one operation a reply: shows what each operation is worth.

It knows which facts lie on the questions' chains, but makes no use of knowing which will be corrected: until its correction
has been read a fact counts, and so does what is stated of its object. So its memory ages, as that of any reader does. (With that
foresight it would store nothing in vain, and have no use for Update and Delete.) In everything else it is a reader
who sees the observation and no more: an entry is one fact, word for word from the chunk in view; only entries in view are
updated or deleted, for nobody is shown the ids of others; answers are read off the entries in view, link by link, or "unknown".

It plans with the operations that there are:

- a fact to store replaces an entry in view that is of no more use (Update), else it becomes a new one (Create);
- a reply without a fact to store tidies up: an entry in view that is of no more use is removed (Delete), else one
  that is, or that may yet be corrected, is retrieved (Read);
- a question of whose evidence something was missed is given up, and what was stored for it is of no more use;
- where nothing can be removed, an entry is held in reserve for the correction of each question that was begun.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from agents.baselines.world_reader import Fact, Inquiry, Link, facts, query, read_question
from agents.policy import Act
from agents.prompting import render_reply
from atommem_env.tasks.synthetic_world import UNKNOWN
from atommem_env.types import EpisodeSettings, Observation, Operation, OperationKind, Phase, Task

_VOID = "No longer true."  # overwrites an entry that cannot be deleted


@dataclass(frozen=True, slots=True)
class Planner:
    """One operation a reply, of those that `settings` allow.

    Raises:
        PolicyError: when an episode begins, where the questions are not of the synthetic world.
    """

    settings: EpisodeSettings
    name: str = "planner"
    privileged: bool = True

    def begin(self, seed: int, task: Task | None) -> Act:
        assert task is not None, "a privileged policy is given the task"
        episode = _Episode(task, self.settings)

        def act(observation: Observation) -> str:
            reading = observation["phase"] == Phase.READ
            operation = episode.take_in(observation) if reading else episode.answer(observation)
            return render_reply(self.settings, operation) if operation else ""

        return act


class _Episode:
    """What the planner knows in one episode."""

    def __init__(self, task: Task, settings: EpisodeSettings) -> None:
        self.settings = settings
        self.capacity = float("inf") if settings.capacity is None else settings.capacity
        self.inquiries = [read_question(question.text) for question in task.questions]
        self.evidence = [{passage.text for passage in question.evidence} for question in task.questions]
        self.stated: dict[Link, list[Fact]] = {}  # what the documents state of a link, and then its correction
        for document in task.documents:
            for link, fact in facts(document.text).items():
                self.stated.setdefault(link, []).append(fact)
        self.chunk = ""
        self.gone: set[str] = set()  # the facts of earlier chunks, as sentences
        self.latest: dict[Link, Fact] = {}  # read of each link
        self.entries: dict[str, Fact | None] = {}  # entry id -> what it states; None: overwritten with nothing
        self.created = 0
        self.link: Link | None = None  # looked up for the question asked now
        self.replies = 0  # to that question

    # ----------------------------------------------------------------------------------------------------------- reading

    def take_in(self, observation: Observation) -> Operation | None:
        """The operation for a chunk, if there is one worth doing."""
        if observation["chunk"] != self.chunk:  # some settings show one twice
            self.gone |= {fact.sentence for fact in facts(self.chunk).values()}
            self.chunk = observation["chunk"]
        chunk = facts(self.chunk)
        self.latest |= chunk
        stored = {fact for fact in self.entries.values() if fact}
        useful = self._useful(stored)
        useless = [entry_id for entry_id, fact in self.entries.items() if not any(fact in facts_ for facts_ in useful)]
        shown = _shown(observation)
        within_reach = [entry_id for entry_id in useless if entry_id in shown]
        if news := self._worth_keeping(
            [fact for fact in chunk.values() if fact not in stored], useful, stored, useless
        ):
            if within_reach and self._can("update"):
                outdated = [entry_id for entry_id in within_reach if _is_about(self.entries[entry_id], news[0].link)]
                return self._update((outdated or within_reach)[0], news[0])
            if self._can("create") and len(self.entries) < self.capacity:
                return self._create(news[0])
        if within_reach:
            return self._delete(within_reach[0]) if self._can("delete") else None
        correctable = [entry_id for entry_id, fact in self.entries.items() if fact and self._is_first(fact)]
        wanted = useless or correctable
        if not wanted or set(wanted) & set(shown) or not self._can("read") or not self._can_renew:
            return None
        return Operation(OperationKind.READ, _text(self.entries[wanted[0]]))

    def _useful(self, stored: set[Fact]) -> list[set[Fact]]:
        """For each question the facts that it may rest on, as far as is known by now; none if it is given up."""
        sentences = {fact.sentence for fact in stored}
        return [
            set() if (evidence & self.gone) - sentences else self._on_chain(inquiry)
            for inquiry, evidence in zip(self.inquiries, self.evidence, strict=True)
        ]

    def _on_chain(self, inquiry: Inquiry) -> set[Fact]:
        """All facts on the ways from the question's subject along its relations, but those that were read to be wrong."""
        on_chain: set[Fact] = set()
        subjects = [inquiry.start]
        for relation in inquiry.chain:
            standing = [fact for subject in subjects for fact in self._standing(Link(subject, relation))]
            on_chain.update(standing)
            subjects = [fact.object for fact in standing]
        return on_chain

    def _standing(self, link: Link) -> list[Fact]:
        stated = self.stated.get(link, [])
        return stated[stated.index(self.latest[link]) :] if link in self.latest else stated

    def _worth_keeping(
        self, news: list[Fact], useful: list[set[Fact]], stored: set[Fact], useless: list[str]
    ) -> list[Fact]:
        """The useful facts, first of questions that were begun; then of others that the memory can hold to their end."""
        free = self.capacity - len(self.entries) + (len(useless) if self._can_renew else 0)
        begun: list[Fact] = []
        others: list[tuple[int, Fact]] = []
        for inquiry, facts_ in zip(self.inquiries, useful, strict=True):
            held = facts_ & stored
            entries = len(inquiry.chain) - len({fact.link.relation for fact in held})
            if not self._can_renew and all(map(self._is_first, held)):
                entries += 1  # for the correction that may come
            if held:
                free -= entries
                begun += [fact for fact in news if fact in facts_]
            else:
                others += [(entries, fact) for fact in news if fact in facts_]
        return begun + [fact for entries, fact in others if entries <= free]

    def _is_first(self, fact: Fact) -> bool:
        """Whether it corrects nothing, which the wording of the sentence shows."""
        return fact == self.stated[fact.link][0]

    # --------------------------------------------------------------------------------------------------------- answering

    def answer(self, observation: Observation) -> Operation:
        """The answer; or what brings it into view: a Read, or the removal of an outdated entry that hides the right one."""
        inquiry = self.inquiries[observation["questions"].splitlines().index(observation["question"])]
        self.replies += 1
        last = self.replies == self.settings.replies_per_question
        in_view: dict[Link, str] = {}  # -> entry id; of two entries on one link, the correction's
        for entry_id in _shown(observation):
            fact = self.entries[entry_id]
            if fact and (fact.link not in in_view or not self._is_first(fact)):
                in_view[fact.link] = entry_id
        link = self.link or inquiry.first
        while link in in_view:
            fact = self.entries[in_view[link]]
            assert fact is not None
            right = self.latest[link]
            if fact != right and right in self.entries.values() and self._can_renew and not last:
                return self._delete(in_view[link]) if self._can("delete") else self._update(in_view[link], None)
            following = inquiry.chain[inquiry.chain.index(link.relation) + 1 :]
            if not following:
                return self._resolve(fact.object)
            link = Link(fact.object, following[0])
        if link == self.link or last or not self._can("read"):
            return self._resolve(UNKNOWN)
        self.link = link
        return Operation(OperationKind.READ, query(link))

    def _resolve(self, answer: str) -> Operation:
        self.link, self.replies = None, 0
        return Operation(OperationKind.ANSWER, answer)

    # -------------------------------------------------------------------------------------------------------- operations

    def _can(self, name: str) -> bool:
        return name in self.settings.operations

    @property
    def _can_renew(self) -> bool:
        return self._can("update") or self._can("delete")

    def _create(self, fact: Fact) -> Operation:
        self.created += 1
        self.entries[f"m{self.created}"] = fact
        return Operation(OperationKind.CREATE, fact.sentence)

    def _update(self, entry_id: str, fact: Fact | None) -> Operation:
        self.entries[entry_id] = fact
        return Operation(OperationKind.UPDATE, _text(fact), entry_id)

    def _delete(self, entry_id: str) -> Operation:
        del self.entries[entry_id]
        return Operation(OperationKind.DELETE, target=entry_id)


def _text(fact: Fact | None) -> str:
    return fact.sentence if fact else _VOID


def _is_about(fact: Fact | None, link: Link) -> bool:
    return fact is not None and fact.link == link


def _shown(observation: Observation) -> list[str]:
    """The ids of the entries in view."""
    return re.findall(r"(?m)^(m\d+): ", observation["retrieved"])
