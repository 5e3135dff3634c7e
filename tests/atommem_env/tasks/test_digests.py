"""Changed data are noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from atommem_env.tasks.catalogue import import_dataset
from atommem_env.tasks.digests import files_of, task_digest
from atommem_env.tasks.files import FilesSource
from atommem_env.tasks.haystack import HaystackSource
from atommem_env.tasks.task_list import TaskList
from atommem_env.types import Document, Evidence, Task


def row(number: int, answer: str = "a") -> dict[str, Any]:
    context = [[f"T{number}", ["One.", "Two."]], [f"U{number}", ["Three."]]]
    facts = [[f"T{number}", 0]]
    return {"_id": f"q{number}", "question": "Who?", "answer": answer, "type": "bridge", "context": context} | {
        "supporting_facts": facts
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_an_import_and_of_a_given_file(tmp_path: Path) -> None:
    first, second, corpus = (tmp_path / name for name in ("first", "second", "corpus"))
    first.write_text(json.dumps([row(0)]))
    second.write_text(json.dumps([row(1)]))
    corpus.write_text(json.dumps([{"title": "C", "text": "D."}]))
    import_dataset("hotpotqa", "dev", [first, second], corpus)
    digests = files_of(HaystackSource("hotpotqa", num_docs=2))
    made = ("rows.jsonl", "documents.jsonl", "pool.npy")
    assert set(digests) == {"data 1", "data 2", "corpus", *made}
    assert [digests[role] for role in ("data 1", "data 2", "corpus")] == [sha256(first), sha256(second), sha256(corpus)]
    source = HaystackSource("hotpotqa", data=first, num_docs=2)
    assert set(files_of(source)) == {"data", *made}
    assert files_of(source)["data"] == sha256(first)
    assert files_of(pickle.loads(pickle.dumps(source))) == files_of(source)
    before = files_of(source)
    first.write_text(json.dumps([row(0, answer="another")]))
    after = files_of(HaystackSource("hotpotqa", data=first, num_docs=2))
    assert {role for role in after if after[role] != before[role]} == {"data", "rows.jsonl"}


def test_files_of_your_own(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    notes, more, data = tmp_path / "notes" / "a.txt", tmp_path / "notes" / "b.md", tmp_path / "q.csv"
    notes.write_text("Ada lives in Rome.")
    more.write_text("# More\nBo cooks.")
    data.write_text("question,answer\nWho?,Ada\n")
    source = FilesSource(tmp_path / "notes", data=data)
    assert files_of(source) == {"files/a.txt": sha256(notes), "files/b.md": sha256(more), "data": sha256(data)}
    assert files_of(pickle.loads(pickle.dumps(source))) == files_of(source)
    assert files_of(FilesSource(notes, question="Who?")) == {"files/a.txt": sha256(notes)}


def test_a_source_without_files_has_none(task: Task) -> None:
    assert files_of(TaskList([task])) == {}


def test_the_digest_of_a_task_is_stable_and_sees_every_part(task: Task) -> None:
    assert task_digest(task) == "749ae9b40775b2d836e01c03f23bd7907406ff39fdb7d0bc49151de8d42a1416"
    question, document = task.questions[0], task.documents[0]
    changed = [
        dataclasses.replace(
            task, documents=(dataclasses.replace(document, text="Ada lives in Paris."), *task.documents[1:])
        ),
        dataclasses.replace(task, documents=task.documents[::-1]),
        dataclasses.replace(task, documents=(Document("A", "da"), *task.documents[1:])),
        *(
            dataclasses.replace(task, questions=(dataclasses.replace(question, **change), task.questions[1]))
            for change in (
                {"id": "q9"},
                {"text": "Where?"},
                {"answers": ("Rome",)},
                {"answers": ("RomeRoma",)},
                {"evidence": (Evidence("Ada", "Ada"),)},
                {"kind": "comparison"},
                {"hops": 2},
            )
        ),
    ]
    assert len({task_digest(each) for each in (task, *changed)}) == len(changed) + 1


@pytest.mark.parametrize("name", ["id", "dataset", "scoring"])
def test_settings_of_a_task_have_no_part_in_its_digest(task: Task, name: str) -> None:
    assert task_digest(dataclasses.replace(task, **{name: "another"})) == task_digest(task)


def test_a_lone_surrogate_has_a_digest() -> None:
    assert task_digest(Task.of(["\ud800"], [("?", "a")])) != task_digest(Task.of(["\udc00"], [("?", "a")]))
