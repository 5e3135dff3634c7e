"""Rows of MuSiQue."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atommem_env.errors import DataError
from atommem_env.tasks import musique
from atommem_env.types import Document, Evidence


def paragraph(number: int, supporting: bool) -> dict[str, Any]:
    text = f"Paragraph {number}.\nSecond line. "
    return {"idx": number, "title": f"T{number % 3}", "paragraph_text": text, "is_supporting": supporting}


def row() -> dict[str, Any]:
    return {
        "id": "3hop1__1_2_3",
        "question": "Who?",
        "answer": "Ada",
        "answer_aliases": ["Ada L.", "", "Ada"],
        "answerable": True,
        "paragraphs": [paragraph(number, number in (1, 4, 5)) for number in range(6)],
        "question_decomposition": [{"id": 1}, {"id": 2}, {"id": 3}],
    }


def test_row_becomes_question_and_documents() -> None:
    record = musique.parse(row())
    assert record is not None
    assert record.supporting == (1, 4, 5)
    assert record.documents[4] == Document("T1", "Paragraph 4.\nSecond line. ")  # verbatim
    question = record.question
    assert question.answers == ("Ada", "Ada L.")
    assert (question.id, question.kind, question.hops) == ("3hop1__1_2_3", "3hop1", 3)
    assert question.evidence == tuple(
        Evidence(f"T{number % 3}", f"Paragraph {number}.\nSecond line. ") for number in (1, 4, 5)
    )


def test_columns_and_json_text_give_the_same_record() -> None:
    columns = {name: [item[name] for item in row()["paragraphs"]] for name in paragraph(0, False)}
    assert musique.parse(row() | {"paragraphs": columns, "question_decomposition": {"id": [1, 2, 3]}}) == musique.parse(
        row()
    )
    assert musique.parse(row() | {"paragraphs": json.dumps(row()["paragraphs"])}) == musique.parse(row())


def test_unanswerable_row_is_left_out() -> None:
    assert musique.parse(row() | {"answerable": False}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "5a8b"}, "'id' must look like"),
        ({"id": None}, "'id' must be text"),
        ({"answerable": "yes"}, "'answerable' must be true or false"),
        ({"answer_aliases": "Ada"}, "'answer_aliases' must be a list"),
        ({"answer_aliases": [1]}, r"'answer_aliases\[0\]' must be text"),
        ({"paragraphs": [paragraph(0, False)]}, "'paragraphs' has none marked"),
        ({"paragraphs": ["text"]}, r"'paragraphs\[0\]' must be an object"),
        ({"paragraphs": [{"title": "T", "paragraph_text": "t"}]}, r"'paragraphs\[0\].is_supporting' is missing"),
        ({"question_decomposition": ...}, "'question_decomposition' is missing"),
    ],
)
def test_bad_field_is_named(change: dict[str, Any], message: str) -> None:
    raw = {name: value for name, value in (row() | change).items() if value is not ...}
    with pytest.raises(DataError, match=message):
        musique.parse(raw)
