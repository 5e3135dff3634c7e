"""One episode as a pure state machine: no I/O, no clock, no randomness but its seed.

The Gymnasium environment, evaluation, both trainers and the tests all drive this class. A step has two halves, because the
caller computes the embeddings between them:

    requests = episode.submit(reply)      # parses and plans; changes nothing
    result = episode.resolve(vectors)     # carries out the plan, all of it or nothing
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atommem_env.chunking import chunk_documents
from atommem_env.dialects import get_dialect
from atommem_env.errors import EmbeddingError, EpisodeStateError, SettingError
from atommem_env.memory import WorkingMemory, unit
from atommem_env.rewards import final_reward
from atommem_env.scoring import holds, rule_of, score
from atommem_env.tokens import get_tokenizer, truncate
from atommem_env.types import (
    EmbeddingKind,
    EmbeddingRequest,
    Entry,
    EpisodeSettings,
    EpisodeSummary,
    Fault,
    Mutation,
    Observation,
    Operation,
    OperationKind,
    OperationResult,
    Phase,
    QuestionOutcome,
    Score,
    StepResult,
    StopReason,
    Task,
    Vector,
)

_ILLEGAL = re.compile("[\ud800-\udfff\x00]")
_EMBEDDED: dict[OperationKind, EmbeddingKind] = {
    OperationKind.CREATE: "document",
    OperationKind.UPDATE: "document",
    OperationKind.READ: "query",
}
_NOTICE_LINES = 8  # a reply can have a million faults; a notice lists this many different ones, each with its count
_SEPARATOR = "\x00"  # between entries when searching for evidence: in no text, so that no passage spans two entries


@dataclass(frozen=True, slots=True)
class _Plan:
    """The result of `submit`: all of a step but the vectors."""

    operations: tuple[Operation, ...]  # to carry out, in order; targets are entry ids
    results: tuple[OperationResult, ...]  # of all operations, in the order written; Creates get their ids in `resolve`
    requests: tuple[EmbeddingRequest, ...]  # in the order in which `operations` need them


class Episode:
    """One episode of a task.

    Args:
        task: the documents and the questions.
        settings: the dynamics.
        seed: of random retrieval; nothing else is random.

    Raises:
        SettingError: the task has no question, or a setting is unknown.
    """

    def __init__(self, task: Task, settings: EpisodeSettings, seed: int) -> None:
        if not task.questions:
            raise SettingError(f"A task needs at least one question; task {task.id!r} has none.")
        self.task = task
        self.settings = settings
        self.seed = seed
        self.chunks = chunk_documents(task.documents, settings.chunk_tokens, get_tokenizer(settings.tokenizer))
        self.max_steps = settings.max_steps or self._steps_needed()
        self.memory = WorkingMemory(settings.capacity)
        self.scratchpad = ""
        self.query = ""
        self.steps = 0
        self.reads = 0  # replies with a Read that was carried out
        self.faulty_replies = 0
        self.outcomes: tuple[QuestionOutcome, ...] = ()
        self.stop_reason: StopReason | None = None
        self._query_vector: Vector | None = None
        self._chunk = 0
        self._chunk_repeated = False  # with read latency 0: this chunk is shown a second time
        self._replies_to_question = 0
        self._plan: _Plan | None = None
        self._shown: tuple[Entry, ...] = ()
        self._observation = self._observe(())

    # ------------------------------------------------------------------------------------------------------- the policy

    @property
    def phase(self) -> Phase:
        return Phase.READ if self._chunk < len(self.chunks) else Phase.ANSWER

    @property
    def reward(self) -> float:
        """0 until the episode has ended, then the mean exact match over its graded questions and what `reward_terms` adds."""
        return 0.0 if self.stop_reason is None else final_reward(self.summary())

    def summary(self) -> EpisodeSummary:
        """The final state of the episode.

        Raises:
            EpisodeStateError: the episode is not over.
        """
        if self.stop_reason is None:
            raise EpisodeStateError("The episode is not over; call summary() once `stop_reason` is set.")
        return EpisodeSummary(
            task=self.task,
            settings=self.settings,
            outcomes=self.outcomes,
            stop_reason=self.stop_reason,
            steps=self.steps,
            max_steps=self.max_steps,
            reads=self.reads,
            faulty_replies=self.faulty_replies,
            scratchpad=self.scratchpad,
            entries=tuple(self.memory.entries()),
            chunks=tuple(self.chunks),
        )

    def observe(self) -> Observation:
        """What the policy sees now; the same until a reply has been carried out."""
        return self._observation.copy()

    def stored_text(self) -> str:
        """Scratchpad and entries as one text to search for evidence; no match can span two of them."""
        return _SEPARATOR.join([self.scratchpad, *(entry.text for entry in self.memory.entries())])

    def submit(self, reply: str) -> tuple[EmbeddingRequest, ...]:
        """Parses a reply and plans its operations. Changes nothing: it may be called again, with this reply or another.

        Returns:
            The texts whose vectors `resolve` needs, in order.

        Raises:
            EpisodeStateError: the episode is over.
            TypeError: `reply` is not a `str`. Any `str` is legal.
        """
        if self.stop_reason is not None:
            raise EpisodeStateError(f"The episode is over ({self.stop_reason}); start a new one.")
        if not isinstance(reply, str):
            raise TypeError(f"A reply must be a str, got {type(reply).__name__}.")
        self._plan = self._make_plan(reply)
        return self._plan.requests

    def resolve(self, vectors: ArrayLike) -> StepResult:
        """Carries out the submitted reply, in the order written, and advances the episode.

        Args:
            vectors: [len(requests), D], finite and none of them zero; an empty sequence where nothing was requested.

        Raises:
            EpisodeStateError: nothing was submitted.
            EmbeddingError: the vectors do not fit. The episode is unchanged, and the reply is still submitted.
        """
        if self._plan is None:
            raise EpisodeStateError("Nothing to resolve: call submit(reply) first.")
        plan = self._plan
        matrix = self._check_vectors(vectors, len(plan.requests))
        # Nothing below can fail.
        self._plan = None
        self.steps += 1
        results, mutations, answer = self._carry_out(plan, matrix)
        self.reads += any(operation.kind is OperationKind.READ for operation in plan.operations)
        self.faulty_replies += any(result.fault is not None for result in results)
        self._advance(plan, answer)
        self._observation = self._observe(results)
        ended = self.stop_reason is not None
        return StepResult(
            observation=self.observe(),
            reward=self.reward,
            terminated=ended and self.stop_reason is not StopReason.STEP_BUDGET,
            truncated=self.stop_reason is StopReason.STEP_BUDGET,
            results=results,
            mutations=mutations,
        )

    # --------------------------------------------------------------------------------------------------- copies of state

    def fork(self) -> Self:
        """An independent copy, taken between two steps.

        Raises:
            EpisodeStateError: a reply was submitted and not resolved.
        """
        if self._plan is not None:
            raise EpisodeStateError("Cannot copy between submit and resolve; resolve the reply first.")
        twin = copy.copy(self)  # everything but the memory is immutable, or replaced and never changed in place
        twin.memory = self.memory.fork()
        return twin

    def snapshot(self) -> dict[str, Any]:
        """The state between two steps, as plain picklable data without task and settings.

        Raises:
            EpisodeStateError: a reply was submitted and not resolved.
        """
        state = dict(vars(self.fork()))
        for constant in ("task", "settings", "chunks", "max_steps", "_plan"):
            del state[constant]
        state["memory"] = self.memory.snapshot()
        state["task_id"] = self.task.id
        return state

    @classmethod
    def restore(cls, task: Task, settings: EpisodeSettings, snapshot: dict[str, Any]) -> Self:
        """The episode that `snapshot` was taken from.

        Raises:
            SettingError: the snapshot is of another task.
        """
        state = dict(snapshot)
        if state.pop("task_id") != task.id:
            raise SettingError(f"The snapshot is of task {snapshot['task_id']!r}, not of {task.id!r}.")
        episode = cls(task, settings, state["seed"])
        vars(episode).update(state, memory=WorkingMemory.restore(state["memory"]))
        return episode

    # ----------------------------------------------------------------------------------------------------------- planning

    def _steps_needed(self) -> int:
        """The most replies that an episode can take; some settings let a chunk be shown twice."""
        views = 2 if self.settings.read_latency == 0 or self.settings.advance == "on_write" else 1
        return views * len(self.chunks) + self.settings.replies_per_question * len(self.task.questions)

    def _make_plan(self, reply: str) -> _Plan:
        results: list[OperationResult] = []
        operations: dict[int, Operation] = {}  # to carry out, by the position of their result
        counting: dict[OperationKind, int] = {}  # of the Read and the answer among them
        full = False  # whether `operations_per_reply` ended the reply
        text, replaced = legal_text(reply)
        if replaced:
            results.append(
                OperationResult(None, Fault.ILLEGAL_TEXT, f"{replaced} characters that cannot be stored became \ufffd.")
            )
        parsed = get_dialect(self.settings.dialect).parse(text)
        alive = {entry.id for entry in self.memory.entries()}
        created = 0
        for item in parsed:
            if isinstance(item, OperationResult):
                results.append(item)
                continue
            item = self._resolve_target(item)
            fault, detail = self._fault(item, alive, len(alive) + created)
            earlier = counting.get(item.kind)  # its place is free for this one
            full |= fault is None and earlier is None and len(operations) == self.settings.operations_per_reply
            if fault is None and full:
                fault = Fault.TOO_MANY
                detail = (
                    f"Only the first {len(operations)} operations of a turn are carried out; the {item.kind} was not."
                )
            if item.kind is OperationKind.SCRATCHPAD and fault is None:
                shorter = truncate(item.text, self.settings.scratchpad_tokens, get_tokenizer(self.settings.tokenizer))
                if shorter != item.text:
                    item = replace(item, text=shorter)
                    fault = Fault.TRUNCATED
                    detail = f"The scratchpad was cut to its first {self.settings.scratchpad_tokens} tokens."
            known = item.target if fault is None else ""
            results.append(OperationResult(item.kind, fault, detail, known))
            if fault in (None, Fault.TRUNCATED):
                if earlier is not None:
                    del operations[earlier]
                    detail = f"Only the last {item.kind} of a turn counts."
                    results[earlier] = OperationResult(item.kind, Fault.SUPERSEDED, detail)
                if item.kind in (OperationKind.READ, OperationKind.ANSWER):
                    counting[item.kind] = len(results) - 1
                operations[len(results) - 1] = item
                created += item.kind is OperationKind.CREATE
                if item.kind is OperationKind.DELETE:
                    alive.discard(item.target)
        planned = tuple(operations.values())
        kinds = {operation.kind for operation in planned}
        if self.phase is Phase.ANSWER and not kinds & {OperationKind.ANSWER, OperationKind.READ}:
            results.append(
                OperationResult(
                    None, Fault.NO_ANSWER, "A question was asked; the turn had neither an answer nor a search."
                )
            )
        requests = tuple(
            EmbeddingRequest(operation.text, _EMBEDDED[operation.kind])
            for operation in planned
            if operation.kind in _EMBEDDED
        )
        return _Plan(planned, tuple(results), requests)

    def _resolve_target(self, operation: Operation) -> Operation:
        """The operation with its target as written replaced by the entry id that it refers to in this observation."""
        if not operation.target:
            return operation
        shown = [entry.id for entry in self._shown]
        return replace(operation, target=get_dialect(self.settings.dialect).entry_id(operation.target, shown))

    def _fault(self, operation: Operation, alive: set[str], entries: int) -> tuple[Fault | None, str]:
        """(fault, detail) of the operation, (None, "") if it can be carried out.

        Args:
            alive: the ids that it can refer to.
            entries: in the memory by then, those that earlier operations of the reply create included.
        """
        kind = operation.kind
        optional = kind is OperationKind.SCRATCHPAD
        allowed = (
            self.settings.scratchpad if optional else kind is OperationKind.ANSWER or kind in self.settings.operations
        )
        if not allowed:
            return Fault.FORBIDDEN, f"There is no {kind} here."
        if kind is OperationKind.ANSWER and self.phase is Phase.READ:
            return Fault.OUT_OF_PHASE, "No question has been asked yet; the answer was ignored."
        if not operation.text and kind not in (OperationKind.DELETE, OperationKind.SCRATCHPAD):
            return Fault.EMPTY, f"The {kind} was empty."
        if kind in (OperationKind.UPDATE, OperationKind.DELETE) and operation.target not in alive:
            return Fault.UNKNOWN_ID, f"No entry is called {operation.target[:40]!r}; the {kind} was ignored."
        if kind is OperationKind.CREATE and self.settings.capacity is not None and entries >= self.settings.capacity:
            return Fault.FULL, f"The memory is full ({self.settings.capacity} entries); the new entry was not stored."
        return None, ""

    # --------------------------------------------------------------------------------------------------------- carrying out

    def _check_vectors(self, vectors: ArrayLike, expected: int) -> NDArray[np.float32]:
        if expected == 0 and np.size(vectors) == 0:
            return np.empty((0, 0), dtype=np.float32)
        matrix = unit(vectors)
        if matrix.ndim != 2 or len(matrix) != expected:
            raise EmbeddingError(f"Expected {expected} vectors as an array [{expected}, D], got shape {matrix.shape}.")
        known = self.memory.dimension if self._query_vector is None else len(self._query_vector)
        if known is not None and matrix.shape[1] != known:
            raise EmbeddingError(
                f"Expected {known}-dimensional vectors, as in this memory, got {matrix.shape[1]}; use one embedder."
            )
        return matrix

    def _carry_out(
        self, plan: _Plan, matrix: NDArray[np.float32]
    ) -> tuple[tuple[OperationResult, ...], tuple[Mutation, ...], str | None]:
        """Results, mutations and the answer given, if any."""
        mutations: list[Mutation] = []
        created: list[str] = []
        answer: str | None = None
        rows = iter(matrix)
        for operation in plan.operations:
            kind, text = operation.kind, operation.text
            if kind is OperationKind.CREATE:
                vector = next(rows)
                created.append(self.memory.create(text, vector))
                mutations.append(Mutation(kind, created[-1], text, vector))
            elif kind is OperationKind.UPDATE:
                vector = next(rows)
                self.memory.update(operation.target, text, vector)
                mutations.append(Mutation(kind, operation.target, text, vector))
            elif kind is OperationKind.DELETE:
                self.memory.delete(operation.target)
                mutations.append(Mutation(kind, operation.target, "", None))
            elif kind is OperationKind.READ:
                self.query, self._query_vector = text, next(rows)
                mutations.append(Mutation(kind, "", text, self._query_vector))
            elif kind is OperationKind.SCRATCHPAD:
                self.scratchpad = text
            else:
                answer = text
        new_ids = iter(created)
        results = tuple(
            replace(result, entry_id=next(new_ids))
            if result.kind is OperationKind.CREATE and result.fault is None
            else result
            for result in plan.results
        )
        return results, tuple(mutations), answer

    def _advance(self, plan: _Plan, answer: str | None) -> None:
        """Advances to the next chunk or question, and ends the episode when all is done or the step budget is used up."""
        kinds = {operation.kind for operation in plan.operations}
        if self.phase is Phase.READ:
            wrote = bool(kinds & {OperationKind.CREATE, OperationKind.UPDATE})
            repeats = self.settings.read_latency == 0 and OperationKind.READ in kinds and not self._chunk_repeated
            advances = not repeats and (wrote or self.settings.advance == "always")
            self._chunk_repeated = repeats or (self._chunk_repeated and not advances)
            self._chunk += advances
        else:
            self._replies_to_question += 1
            if answer is not None or self._replies_to_question == self.settings.replies_per_question:
                self._resolve_question(answer)
        if len(self.outcomes) == len(self.task.questions):
            missing = any(outcome.prediction is None for outcome in self.outcomes)
            self.stop_reason = StopReason.UNANSWERED if missing else StopReason.ANSWERED
        elif self.steps >= self.max_steps:
            self.stop_reason = StopReason.STEP_BUDGET
            while len(self.outcomes) < len(self.task.questions):
                self._resolve_question(None)

    def _resolve_question(self, answer: str | None) -> None:
        """Grades the current question, where it has a gold (None: unanswered), and moves to the next."""
        question = self.task.questions[len(self.outcomes)]
        if not question.answers:
            graded = None
        elif answer is None:
            graded = Score.exact(0.0)
        else:
            graded = score(answer, question.answers, rule_of(self.task))
        stored = self.stored_text()
        # What the policy had in view when it replied, not what a later operation of the reply changed.
        view = _SEPARATOR.join([self._observation["scratchpad"], *(entry.text for entry in self._shown)])
        outcome = QuestionOutcome(
            question_id=question.id,
            kind=question.kind,
            hops=question.hops,
            prediction=answer,
            em=graded.em if graded else None,
            f1=graded.f1 if graded else None,
            evidence=len(question.evidence),
            stored=sum(holds(stored, passage.text) for passage in question.evidence),
            retrieved=sum(holds(view, passage.text) for passage in question.evidence),
        )
        self.outcomes += (outcome,)
        self._replies_to_question = 0

    # ----------------------------------------------------------------------------------------------------------- observing

    def _observe(self, results: Sequence[OperationResult]) -> Observation:
        dialect = get_dialect(self.settings.dialect)
        notice = _notice_lines([result.detail for result in results if result.fault is not None])
        self._shown, hidden = self._retrieve()
        if hidden:
            notice.append(hidden)
        asked = self.phase is Phase.ANSWER and self.stop_reason is None
        return Observation(
            phase=self.phase.value,
            questions="\n".join(question.text for question in self.task.questions),
            question=self.task.questions[len(self.outcomes)].text if asked else "",
            chunk=self.chunks[self._chunk] if self.phase is Phase.READ else "",
            scratchpad=self.scratchpad,
            query=self.query,
            retrieved=dialect.show(self._shown),
            notice="\n".join(notice),
            step=self.steps,
            steps_left=self.max_steps - self.steps,
        )

    def _retrieve(self) -> tuple[tuple[Entry, ...], str]:
        """The active query's results, as far as they fit into `memory_tokens`, and a notice about the rest."""
        if self._query_vector is None or not len(self.memory):
            return (), ""
        if self.settings.retrieval == "random":
            ids = [entry.id for entry in self.memory.entries()]
            drawn = np.random.default_rng([self.seed, self.steps]).permutation(len(ids))[: self.settings.top_k]
            matches = [ids[row] for row in drawn]
        elif self.settings.retrieval == "bm25":
            matches = self.memory.search_words(self.query, self.settings.top_k)
        elif self.settings.retrieval == "hybrid":
            matches = self.memory.search_hybrid(self.query, self._query_vector, self.settings.top_k)
        else:
            matches = self.memory.search(self._query_vector, self.settings.top_k)
        tokenizer = get_tokenizer(self.settings.tokenizer)
        room = self.settings.memory_tokens
        shown: list[Entry] = []
        for entry in map(self.memory.get, matches):
            size = tokenizer.count(entry.text)
            if size > room:
                break
            shown.append(entry)
            room -= size
        if len(shown) == len(matches):
            return tuple(shown), ""
        total, limit = len(matches), self.settings.memory_tokens
        if not shown:  # better the start of the best entry than nothing
            best = self.memory.get(matches[0])
            shown.append(Entry(best.id, truncate(best.text, limit, tokenizer)))
            return tuple(shown), f"Of {total} entries found only the first {limit} tokens of {best.id} are shown."
        return tuple(shown), f"Of {total} entries found only {len(shown)} are shown: more exceed {limit} tokens."


def legal_text(text: str) -> tuple[str, int]:
    """`text` with each lone surrogate and NUL, which no file can hold, replaced by U+FFFD; and the number of replacements.

    >>> legal_text("a\\x00b")
    ('a\ufffdb', 1)
    """
    return _ILLEGAL.subn("\ufffd", text)


def _notice_lines(details: Sequence[str]) -> list[str]:
    """The different details in order of appearance, each with its count where that is more than one.

    >>> _notice_lines(["The read was empty.", "There is no delete here.", "The read was empty."])
    ['The read was empty. (2 times)', 'There is no delete here.']
    """
    counts = Counter(details)
    lines = [detail if count == 1 else f"{detail} ({count} times)" for detail, count in counts.items()]
    if len(lines) > _NOTICE_LINES:
        rest = sum(list(counts.values())[_NOTICE_LINES:])
        lines[_NOTICE_LINES:] = [f"And {rest} more faults."]
    return lines
