"""Rows of MuSiQue (Trivedi et al., TACL 2022, arXiv 2108.00573): twenty paragraphs a question, two to four hops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atommem_env.errors import DataError
from atommem_env.tasks.records import Record, checked, excerpt, required, required_rows, required_text
from atommem_env.types import Document, Evidence, Question


def parse(record: Mapping[str, Any]) -> Record | None:
    """One official row as a `Record`, or None where the row is marked unanswerable (as some of the "full" files are).

    The evidence is the supporting paragraphs; `kind` is the id's first part; `hops` the steps of the decomposition.

    Raises:
        DataError: a field is missing or wrong, or no paragraph is supporting.

    >>> row = {"id": "2hop__7_9", "question": "Where was the author of Emma born?", "answer": "Steventon",
    ...        "answer_aliases": ["Steventon, Hampshire"], "answerable": True, "question_decomposition": [{}, {}],
    ...        "paragraphs": [{"title": "Emma", "paragraph_text": "By Jane Austen.", "is_supporting": True},
    ...                       {"title": "Bath", "paragraph_text": "A city.", "is_supporting": False},
    ...                       {"title": "Austen", "paragraph_text": "Born in Steventon.", "is_supporting": True}]}
    >>> parsed = parse(row)
    >>> parsed.supporting, parsed.question.answers, parsed.question.kind, parsed.question.hops
    ((0, 2), ('Steventon', 'Steventon, Hampshire'), '2hop', 2)
    """
    if "answerable" in record and not required(record, "answerable", bool):
        return None
    identifier = required_text(record, "id")
    if "__" not in identifier:
        raise DataError(f"field 'id' must look like '2hop__86689_728109', got {excerpt(identifier)}.")
    documents: list[Document] = []
    supporting: list[int] = []
    for number, value in enumerate(required_rows(record, "paragraphs")):
        where = f"paragraphs[{number}]"
        paragraph = checked(value, dict, where)
        document = Document(
            required(paragraph, "title", str, f"{where}."), required(paragraph, "paragraph_text", str, f"{where}.")
        )
        holds_evidence = required(paragraph, "is_supporting", bool, f"{where}.")
        if document.text.strip():
            supporting += [len(documents)] * holds_evidence
            documents.append(document)
    if not supporting:
        raise DataError("field 'paragraphs' has none marked 'is_supporting'; a test split cannot be used.")
    aliases = [
        checked(alias, str, f"answer_aliases[{number}]")
        for number, alias in enumerate(required(record, "answer_aliases", list))
    ]
    question = Question(
        id=identifier,
        text=required_text(record, "question"),
        answers=tuple(dict.fromkeys([required_text(record, "answer"), *filter(str.strip, aliases)])),
        evidence=tuple(Evidence(documents[index].title, documents[index].text) for index in supporting),
        kind=identifier.split("__")[0],
        hops=len(required_rows(record, "question_decomposition")),
    )
    return Record(question, tuple(documents), tuple(supporting))
