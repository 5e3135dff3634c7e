"""Rows of HotpotQA's form."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atommem_env.errors import DataError
from atommem_env.tasks import hotpotqa, twowiki
from atommem_env.types import Document, Evidence


def row() -> dict[str, Any]:
    return {
        "_id": "5a8b",
        "question": "Where was the author of Emma born?",
        "answer": "Steventon",
        "type": "bridge",
        "level": "hard",
        "context": [
            ["Bath", ["Bath is a city.", " It lies on the Avon."]],
            ["Emma", ["Emma is a novel.", " Jane Austen wrote it. "]],
            ["Jane Austen", ["She was born in Steventon.", " ", " She died in 1817."]],
        ],
        "supporting_facts": [["Jane Austen", 0], ["Emma", 1], ["Jane Austen", 2]],
    }


def test_row_becomes_question_and_documents() -> None:
    record = hotpotqa.parse(row())
    assert record.documents == (
        Document("Bath", "Bath is a city. It lies on the Avon."),
        Document("Emma", "Emma is a novel. Jane Austen wrote it."),
        Document("Jane Austen", "She was born in Steventon. She died in 1817."),
    )
    assert record.supporting == (1, 2)
    assert record.repairs == ()
    question = record.question
    assert (question.id, question.kind, question.hops, question.answers) == ("5a8b", "bridge", 2, ("Steventon",))
    assert question.evidence == (
        Evidence("Jane Austen", "She was born in Steventon."),
        Evidence("Emma", "Jane Austen wrote it."),
        Evidence("Jane Austen", "She died in 1817."),
    )


def test_form_of_the_hub_gives_the_same_record() -> None:
    hub = row()
    hub["id"] = hub.pop("_id")
    titles, sentences = zip(*hub["context"], strict=True)
    hub["context"] = {"title": list(titles), "sentences": list(sentences)}
    titles, indices = zip(*hub["supporting_facts"], strict=True)
    hub["supporting_facts"] = {"title": list(titles), "sent_id": list(indices)}
    assert hotpotqa.parse(hub) == hotpotqa.parse(row())


def test_nested_fields_may_be_json_text() -> None:
    fields = ("context", "supporting_facts")
    assert twowiki.parse(row() | {name: json.dumps(row()[name]) for name in fields}) == twowiki.parse(row())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.text(), min_size=1), min_size=1), st.data())
def test_evidence_is_a_verbatim_piece_of_its_document(contexts: list[list[str]], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(contexts) - 1))
    sentence = data.draw(st.integers(-2, len(contexts[index]) + 1))
    contexts[index].append("So that the document is not blank.")
    raw = row() | {
        "context": [[f"title {number}", sentences] for number, sentences in enumerate(contexts)],
        "supporting_facts": [[f"title {index}", sentence]],
    }
    record = hotpotqa.parse(raw)
    [evidence] = record.question.evidence
    [supporting] = record.supporting
    assert evidence.title == record.documents[supporting].title == f"title {index}"
    assert evidence.text
    assert evidence.text in record.documents[supporting].text
    real = 0 <= sentence < len(contexts[index]) and contexts[index][sentence].strip()
    assert bool(record.repairs) == (not real)
    assert evidence.text == (contexts[index][sentence].strip() if real else record.documents[supporting].text)


def test_null_id_is_made_from_the_content() -> None:
    first, again, other = (twowiki.parse(row() | {"_id": None} | change) for change in ({}, {}, {"answer": "Bath"}))
    assert first.question.id == again.question.id
    assert first.question.id != other.question.id
    assert len(first.repairs) == 1


def test_document_given_twice_supports_once() -> None:
    raw = row()
    raw["context"].append(copy.deepcopy(raw["context"][1]))
    assert hotpotqa.parse(raw).supporting == (1, 2)


def test_sentence_is_looked_up_in_the_document_of_that_title_that_has_it() -> None:
    raw = row()
    raw["context"].insert(0, ["Emma", ["Emma is a name."]])
    record = hotpotqa.parse(raw)
    assert record.supporting == (2, 3)
    assert record.repairs == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ...}, "'answer' is missing"),
        ({"answer": 7}, "'answer' must be text, got 7"),
        ({"answer": " "}, "'answer' is blank"),
        ({"question": None}, "'question' must be text, got None"),
        ({"question": "half \ud800"}, "'question' has a lone surrogate"),
        ({"_id": ...}, "'id' is missing"),
        ({"_id": 5}, "'_id' must be text"),
        ({"type": ...}, "'type' is missing"),
        ({"context": "Bath"}, "'context' must be a list"),
        ({"context": [["Bath"]]}, r"'context\[0\]' must be a pair"),
        ({"context": [["Bath", "Bath is a city."]]}, r"'context\[0\].sentences' must be a list"),
        ({"context": [["Bath", ["A city.", 3]]]}, r"'context\[0\].sentences\[1\]' must be text"),
        (
            {"context": {"title": ["Bath"], "sentences": []}},
            "'context' must have columns of one length, got 1 of 'title', 0 of",
        ),
        ({"context": {"title": ["Bath"], "sentences": None}}, "'context.sentences' must be a list, got None"),
        ({"context": {"title": ["Bath"]}}, r"'context\[0\].sentences' is missing"),
        ({"context": '[["Bath", ["A city."]'}, "'context' is text that is not JSON"),
        ({"context": '"Bath"'}, "'context' must be a list"),
        ({"supporting_facts": [{"title": "Emma"}]}, r"'supporting_facts\[0\].sent_id' is missing"),
        ({"supporting_facts": [{"title": 5, "sent_id": 0}]}, r"'supporting_facts\[0\].title' must be text, got 5"),
        ({"supporting_facts": []}, "'supporting_facts' is empty"),
        ({"supporting_facts": [["Emma", True]]}, r"'supporting_facts\[0\].sent_id' must be a whole number, got True"),
        ({"supporting_facts": [["Persuasion", 0]]}, r"'supporting_facts\[0\]' names the document 'Persuasion'"),
    ],
)
def test_bad_field_is_named(change: dict[str, Any], message: str) -> None:
    raw = {name: value for name, value in (row() | change).items() if value is not ...}
    with pytest.raises(DataError, match=message):
        hotpotqa.parse(raw)
