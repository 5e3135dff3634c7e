"""Privileged policies: they know which passages are evidence, and give the gold only with all of it in view.

They differ in what they store while reading. The oracle stores the evidence: its score is what the environment lets a perfect
memory reach. The others store by a rule that knows nothing: their score is what that rule is worth to a perfect reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agents.policy import Act
from agents.prompting import render_reply
from atommem_env.scoring import holds
from atommem_env.tasks.synthetic_world import UNKNOWN
from atommem_env.types import EpisodeSettings, Evidence, Observation, Operation, OperationKind, Phase, Question, Task

Keep = Callable[[Task, int], Iterable[Evidence]]
"""The passages of a task to store, given a seed; each is stored once it has been read."""

# Where the public code of AtomMem puts the relevant documents of every task of 200, counted from 1.
LEAKED_POSITIONS = (7, 10, 17, 81, 88, 96, 109, 154, 177, 191)


@dataclass(frozen=True, slots=True)
class PerfectReader:
    """Stores what `keep` names; answers from the evidence in view, and searches as long as some of it is missing."""

    name: str
    settings: EpisodeSettings
    keep: Keep
    searches_for: Literal["evidence", "question"] = "evidence"  # the second is what a policy without golds can do
    privileged: bool = True

    def begin(self, seed: int, task: Task | None) -> Act:
        assert task is not None, "a privileged policy is given the task"
        waiting = dict.fromkeys(self.keep(task, seed))  # in order, each once

        def act(observation: Observation) -> str:
            operations = []
            if observation["phase"] == Phase.READ:
                read = [passage for passage in waiting if holds(observation["chunk"], passage.text)]
                for passage in read:
                    del waiting[passage]
                    operations.append(Operation(OperationKind.CREATE, f"{passage.title}: {passage.text}"))
                if not observation["query"]:
                    operations += self._search(task.questions[0], task.questions[0].evidence)
            else:
                operations = self._answer(task, observation)
            return render_reply(self.settings, *operations)

        return act

    def _answer(self, task: Task, observation: Observation) -> list[Operation]:
        # The first of that text: where a dataset asks the same twice in one task, both are answered as the first.
        number = next(i for i, question in enumerate(task.questions) if question.text == observation["question"])
        question = task.questions[number]
        view = observation["scratchpad"] + "\n" + observation["retrieved"]
        missing = [passage for passage in question.evidence if not holds(view, passage.text)]
        if not missing:
            following = task.questions[number + 1 : number + 2]
            answer = Operation(OperationKind.ANSWER, question.answers[0] if question.answers else UNKNOWN)
            return [answer, *(operation for later in following for operation in self._search(later, later.evidence))]
        # More evidence than one search shows: what is in view goes to the scratchpad, the next search is for the rest.
        seen = "\n".join(passage.text for passage in question.evidence if passage not in missing)
        notes = [Operation(OperationKind.SCRATCHPAD, seen)] if seen and self.settings.scratchpad else []
        return [*notes, *self._search(question, missing)]

    def _search(self, question: Question, missing: Sequence[Evidence]) -> list[Operation]:
        query = " ".join(f"{passage.title}: {passage.text}" for passage in missing)
        if self.searches_for == "question":
            query = question.text
        return [Operation(OperationKind.READ, query)] if missing else []


def keep_evidence(task: Task, seed: int) -> Iterable[Evidence]:
    """What the questions rest on: the oracle."""
    return (passage for question in task.questions for passage in question.evidence)


def keep_everything(task: Task, seed: int) -> Iterable[Evidence]:
    """Every document, whole: perfect-rag."""
    return (Evidence(document.title, document.text) for document in task.documents)


def keep_leaked_positions(task: Task, seed: int) -> Iterable[Evidence]:
    """The documents at the positions where the public code always puts the relevant ones."""
    return _at(task, [position - 1 for position in LEAKED_POSITIONS])


def keep_random_positions(task: Task, seed: int) -> Iterable[Evidence]:
    """As many documents, at positions drawn for each episode: what the leaked ones are to be compared with."""
    size = min(len(LEAKED_POSITIONS), len(task.documents))
    return _at(task, np.random.default_rng(seed).choice(len(task.documents), size, replace=False).tolist())


def _at(task: Task, positions: Sequence[int]) -> Iterable[Evidence]:
    documents = [task.documents[position] for position in positions if position < len(task.documents)]
    return (Evidence(document.title, document.text) for document in documents)
