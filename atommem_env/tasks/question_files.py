"""Questions about your own files, and where their evidence is: JSON lines, a JSON list or CSV."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atommem_env.errors import DataError, DatasetNotFound
from atommem_env.tasks.file_types import file_type, short_path, unreadable
from atommem_env.tasks.jsonl import read_records
from atommem_env.tasks.readers import read_table
from atommem_env.tasks.records import checked, excerpt, required_text, some
from atommem_env.types import UNGRADED, Document, Evidence, Question

Located = tuple[str, Document]  # the file's name, and a document of it


def read_questions(path: Path, located: Sequence[Located]) -> tuple[Question, ...]:
    """The questions of a file, at least one.

    Raises:
        DatasetNotFound: there is no such file.
        DataError: a question has another form than `FilesSource` documents, or there is none.
    """
    if not path.is_file():
        raise DatasetNotFound(f"There is no file {path}, given as data=.")
    table = path.suffix.lower() in (".csv", ".tsv")
    questions = parse_questions(_table_records(path) if table else read_records(path), located)
    if not questions:
        raise DataError(f"{short_path(path)}: no question in it.")
    return questions


def parse_questions(rows: Iterator[tuple[str, dict[str, Any]]], located: Sequence[Located]) -> tuple[Question, ...]:
    """The questions of (location, record) pairs.

    Raises:
        DataError: one has another form; the message begins with its location.
    """
    seen: dict[str, str] = {}
    questions = []
    for number, (location, record) in enumerate(rows, 1):
        try:
            question = _question(record, f"q{number}", located)
            if question.id in seen:
                raise DataError(f"field 'id' is {excerpt(question.id)}, as in {seen[question.id]}; ids must differ.")
        except DataError as error:
            raise DataError(f"{location}: {error}") from error
        seen[question.id] = location
        questions.append(question)
    return tuple(questions)


def _table_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(location, record) of each row, in the form of the JSON records."""
    kind = file_type(path)
    if kind in ("html", "pdf", "docx"):
        raise unreadable(path, f"not CSV but {kind.upper()}; questions are read from CSV and JSON")
    rows = read_table(path)
    _, first = next(rows, (0, []))
    header = [name.strip().lower() for name in first]
    while header and not header[-1]:  # of empty columns of a spreadsheet
        header.pop()
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise DataError(f"{short_path(path)}: its header has the column {excerpt(twice)} twice.")
    if header and "question" not in header:
        raise DataError(f"{short_path(path)}: its header must have a column 'question', got {some(first)}.")
    for line, cells in rows:
        location = f"{short_path(path)}, line {line}"
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(header):
            raise DataError(f"{location}: expected {len(header)} cells as in the header, got {len(cells)}.")
        record: dict[str, Any] = {name: value for name, value in zip(header, cells, strict=True) if value}
        if "answers" in record:
            record["answers"] = record["answers"].split("|")
        if "evidence_text" in record or "evidence_file" in record:
            record["evidence"] = [{key: record.pop(f"evidence_{key}", "") for key in ("file", "text")}]
        yield location, record


def _question(record: Mapping[str, Any], default_id: str, located: Sequence[Located]) -> Question:
    if ("answer" in record) == ("answers" in record):
        raise DataError("expected either the field 'answer' or the field 'answers' (an empty list: no gold is known).")
    if "answer" in record:
        golds = [required_text(record, "answer")]
    else:
        listed = checked(record["answers"], list, "answers")
        golds = [required_text({"": gold}, "", f"answers[{number}]") for number, gold in enumerate(listed)]
    evidence = []
    for number, item in enumerate(checked(record.get("evidence", []), list, "evidence")):
        where = f"evidence[{number}]"
        passage = checked(item, dict, where)
        evidence.append(
            _evidence(
                required_text(passage, "file", f"{where}."), required_text(passage, "text", f"{where}."), where, located
            )
        )
    return Question(
        id=required_text(record, "id") if "id" in record else default_id,
        text=required_text(record, "question"),
        answers=tuple(dict.fromkeys(golds)),
        evidence=tuple(dict.fromkeys(evidence)),
        kind="question" if golds else UNGRADED,
        hops=max(1, len({item.title for item in evidence})),
    )


def _evidence(file: str, text: str, where: str, located: Sequence[Located]) -> Evidence:
    """The passage as it is in a document of the file; differences in whitespace are ignored."""
    names = dict.fromkeys(name for name, _ in located)
    if file not in names:
        raise DataError(f"field '{where}.file' must be one of {some(names)}; got {excerpt(file)}.")
    words = re.compile(r"\s+".join(map(re.escape, text.split())))
    for name, document in located:
        if name == file and (match := words.search(document.text)):
            return Evidence(document.title, match[0])
    raise DataError(f"field '{where}.text' is in no document (page, section or part) of {file}: {excerpt(text)}.")
