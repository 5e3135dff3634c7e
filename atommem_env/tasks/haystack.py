"""Contexts of many documents, with the few that answer the questions at random positions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import SettingError
from atommem_env.tasks.catalogue import Questions, open_dataset, open_file
from atommem_env.tasks.records import check_range
from atommem_env.types import Document, Evidence, Question, Task

MOST_QUESTIONS = 10  # per task


def check_questions(questions: int | str) -> None:
    """Raises `SettingError` unless `questions` is a number of questions that a task can have, or "sampled"."""
    if questions != "sampled" and (type(questions) is not int or not 1 <= questions <= MOST_QUESTIONS):
        raise SettingError(
            f"questions must be a whole number from 1 to {MOST_QUESTIONS}, or 'sampled', got {questions!r}."
        )


def group_starts(count: int, questions: int | str) -> NDArray[np.int64]:
    """[tasks + 1] offsets of each task's first question in a file of `count`, and the end; the last task may have fewer.

    >>> group_starts(7, 3).tolist(), group_starts(17, "sampled").tolist()
    ([0, 3, 6, 7], [0, 8, 14, 15, 16, 17])
    """
    if isinstance(questions, int):
        return np.append(np.arange(0, count, questions), count)
    draw = random.Random(0).random  # the same in every version of Python, so that the groups are too
    starts = [0]
    while starts[-1] < count:
        drawn = draw()
        starts.append(starts[-1] + (1 if drawn < 0.5 else 2 + int((drawn - 0.5) * 18)))
    starts[-1] = count
    return np.array(starts)


class HaystackSource:
    """Tasks over HotpotQA, 2WikiMultiHopQA or MuSiQue, as in the AtomMem paper (arXiv 2601.08323).

    Task `i` asks the questions `i·Q … i·Q + Q - 1` of the file, in its order (`Q = questions`; at the end of the file,
    fewer than `Q` are left unused). With `questions="sampled"` tasks have one question with probability 1/2 and two to ten
    with 1/18 each, as in the paper's public code; the file is divided once, independently of the seed, so that every question
    belongs to one task and `index` determines the questions.

    Its context always has the supporting documents of all of them; then the other documents of these questions' rows; then
    those of the corpus or, without a corpus, of other rows; up to `num_docs`. Documents whose title and text differ only in
    whitespace are used once. All documents are then shuffled together, each task by its own draw, so that the positions of
    the supporting documents are uniform. A task is a function of the data, the settings, `index` and `seed`.

    With 25 rows and `questions=10` there are two tasks: rows 0 to 9 and rows 10 to 19.

    Args:
        dataset: "hotpotqa", "2wikimultihopqa" or "musique".
        split: the import to open.
        data: an official file to use instead of an import.
        corpus: documents (`title`, `text`) that fill contexts; requires `data`.
        num_docs: documents of a context, 1 to 6400.
        questions: questions of a task, 1 to 10, or "sampled".

    Raises:
        DatasetNotFound: nothing is imported, or the given file does not exist.
        DataError: the given file is damaged.
        SettingError: a setting is out of range, or there are fewer rows than `questions`.
    """

    def __init__(
        self,
        dataset: str,
        *,
        split: str = "dev",
        data: str | Path | None = None,
        corpus: str | Path | None = None,
        num_docs: int = 200,
        questions: int | str = 1,
    ) -> None:
        if type(num_docs) is not int or not 1 <= num_docs <= 6400:
            raise SettingError(f"num_docs must be a whole number from 1 to 6400, got {num_docs!r}.")
        check_questions(questions)
        if data is None and corpus is not None:
            raise SettingError(
                "corpus= goes with data=; to give an import a corpus, import it again: "
                f"atommem data import {dataset} --split {split} FILE --corpus {corpus}"
            )
        self.dataset = dataset
        self.split = split
        self.data = None if data is None else Path(data).expanduser().resolve()
        self.corpus = None if corpus is None else Path(corpus).expanduser().resolve()
        self.num_docs = num_docs
        self.questions = questions
        self._open()

    def _open(self) -> None:
        self._questions: Questions = (
            open_dataset(self.dataset, self.split)
            if self.data is None
            else open_file(self.dataset, self.split, self.data, self.corpus)
        )
        count = len(self._questions.rows)
        self._starts = group_starts(count, self.questions)
        if isinstance(self.questions, int):
            self._starts = self._starts[: count // self.questions + 1]
        if not len(self):
            raise SettingError(f"questions={self.questions}, but there are only {count} in the file; lower questions.")

    @property
    def file_digests(self) -> dict[str, str]:
        """role -> SHA-256 of the files that the questions come from, as they were when they were imported.

        The roles are "data" ("data 1", "data 2" … of an import of several files), "corpus", and those of what the import made
        of them: "rows.jsonl", "documents.jsonl" and "pool.npy".
        """
        report = self._questions.report
        sources = [source.sha256 for source in report.sources]
        corpus = {} if report.corpus_documents is None else {"corpus": sources.pop()}
        data = {"data" if len(sources) == 1 else f"data {number}": value for number, value in enumerate(sources, 1)}
        return data | corpus | {name: report.files[name] for name in ("rows.jsonl", "documents.jsonl", "pool.npy")}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_questions", "_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def question_texts(self) -> Iterator[str]:
        """The text of every question; no context is drawn."""
        rows = self._questions.rows
        return (rows[number]["text"] for number in range(len(rows)))

    def task(self, index: int, seed: int) -> Task:
        """The task at `index` (0 ≤ index < len), its context drawn and shuffled by `seed` (≥ 0).

        Raises:
            OutOfRange: there is no such index, or the seed is negative.
            SettingError: the supporting documents alone are more than `num_docs`, or all documents together are fewer.
        """
        check_range("index", index, len(self))
        check_range("seed", seed)
        rows = [self._questions.rows[number] for number in range(self._starts[index], self._starts[index + 1])]
        rng = np.random.default_rng([seed, index])
        numbers = self._choose(rows, rng)
        rng.shuffle(numbers)
        documents = self._questions.documents
        return Task(
            id=f"{self.dataset}/{self.split}/{index}" + ("" if self.questions == 1 else f"x{self.questions}"),
            dataset=self.dataset,
            documents=tuple(Document(*documents[number]) for number in numbers),
            questions=tuple(_question(row) for row in rows),
        )

    def _choose(self, rows: list[dict[str, Any]], rng: np.random.Generator) -> list[int]:
        """The numbers of the documents of a context, supporting ones first."""
        identity, pool = self._questions.identity, self._questions.pool
        chosen = list(dict.fromkeys(number for row in rows for number in row["supporting"]))
        if len(chosen) > self.num_docs:
            raise SettingError(
                f"num_docs={self.num_docs}, but these {len(rows)} questions have {len(chosen)} supporting documents; "
                "raise num_docs or lower questions."
            )
        seen = {int(identity[number]) for number in chosen}
        distractors: dict[int, int] = {}  # identity -> number
        for row in rows:
            for number in row["documents"]:
                if identity[number] not in seen:
                    distractors.setdefault(int(identity[number]), number)
        room = self.num_docs - len(chosen)
        drawn = rng.permutation(list(distractors.values()))[:room].tolist()
        chosen += drawn
        seen.update(distractors)

        room = self.num_docs - len(chosen)
        if room:
            # All fillers differ, so that of any room + len(seen) of them at least `room` are new.
            candidates = pool[rng.choice(len(pool), min(len(pool), room + len(seen)), replace=False)]
            fillers = [number for number in candidates.tolist() if number not in seen][:room]
            chosen += fillers
        if len(chosen) < self.num_docs:
            raise SettingError(
                f"num_docs={self.num_docs}, but there are only {len(chosen)} different documents for this task; "
                "give a (larger) corpus, or lower num_docs."
            )
        return chosen


def _question(row: dict[str, Any]) -> Question:
    return Question(
        id=row["id"],
        text=row["text"],
        answers=tuple(row["answers"]),
        evidence=tuple(Evidence(*item) for item in row["evidence"]),
        kind=row["kind"],
        hops=row["hops"],
    )
