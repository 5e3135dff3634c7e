"""What tells whether data have changed between two runs: SHA-256 of the files behind a task source, and of a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from atommem_env.types import Task, TaskSource


def files_of(source: TaskSource) -> dict[str, str]:
    """The files that a task source reads: role -> SHA-256 in hexadecimal, of the content that was read.

    The roles are those of `HaystackSource.file_digests` and `FilesSource.file_digests`; a source of your own takes part by an
    attribute of that name. Any other source has no files: {}.
    """
    digests: Mapping[str, str] = getattr(source, "file_digests", {})
    return dict(digests)


def task_digest(task: Task) -> str:
    """SHA-256, in hexadecimal, of what a task asks and shows: questions, golds, evidence and documents, in order.

    It is that of the JSON text, ASCII and without whitespace, of
    `[[[id, text, [gold, …], [[title, text], …], kind, hops], …], [[title, text], …]]`. The task's id, its dataset's name and
    its scoring rule are settings, and have no part in it.
    """
    questions = [
        [
            question.id,
            question.text,
            list(question.answers),
            [[item.title, item.text] for item in question.evidence],
            question.kind,
            question.hops,
        ]
        for question in task.questions
    ]
    documents = [[document.title, document.text] for document in task.documents]
    return hashlib.sha256(json.dumps([questions, documents], separators=(",", ":")).encode()).hexdigest()
