"""Rows of HotpotQA (Yang et al., EMNLP 2018, arXiv 1809.09600), in the distractor setting: ten paragraphs a question.

A row can have three forms: the official file's (`context=[[title, [sentence, …]], …]`), the Hugging Face hub's
(`context={title: […], sentences: [[…], …]}`), and either of them as JSON text, as in conversions of 2WikiMultiHopQA.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from atommem_env.errors import DataError
from atommem_env.tasks.records import Record, checked, excerpt, present, required, required_rows, required_text
from atommem_env.types import Document, Evidence, Question

NO_ID = "no id; one was made from the content"
NO_SENTENCE = "a supporting sentence does not exist; the whole document is the evidence"


def parse(record: Mapping[str, Any]) -> Record:
    """One official row as a `Record`.

    Sentences are stripped and joined by single spaces, so that each is a verbatim part of its document. `hops` is the number
    of supporting documents.

    Raises:
        DataError: a field is missing or wrong, or a supporting title is not in the context.

    >>> row = {"_id": "5a8b", "question": "Where was the author of Emma born?", "answer": "Steventon", "type": "bridge",
    ...        "context": [["Bath", ["Bath is a city."]], ["Emma", ["Emma is a novel.", " Jane Austen wrote it."]],
    ...                    ["Jane Austen", ["She was born in Steventon."]]],
    ...        "supporting_facts": [["Emma", 1], ["Jane Austen", 0]]}
    >>> parsed = parse(row)
    >>> parsed.documents[1].text, parsed.supporting, parsed.question.hops
    ('Emma is a novel. Jane Austen wrote it.', (1, 2), 2)
    >>> parsed.question.evidence[0]
    Evidence(title='Emma', text='Jane Austen wrote it.')
    """
    repairs: list[str] = []
    sentences_of: list[list[str]] = []  # parallel to `documents`
    documents: list[Document] = []
    for number, (title, raw) in enumerate(_pairs(record, "context", "sentences")):
        sentences = [
            checked(sentence, str, f"context[{number}].sentences[{index}]").strip()
            for index, sentence in enumerate(checked(raw, list, f"context[{number}].sentences"))
        ]
        if any(sentences):
            documents.append(Document(title, " ".join(filter(None, sentences))))
            sentences_of.append(sentences)

    evidence: dict[Evidence, None] = {}
    supporting: set[int] = set()
    for number, (title, sentence) in enumerate(_pairs(record, "supporting_facts", "sent_id")):
        index = checked(sentence, int, f"supporting_facts[{number}].sent_id")
        titled = [position for position, document in enumerate(documents) if document.title == title]
        if not titled:
            raise DataError(
                f"field 'supporting_facts[{number}]' names the document {excerpt(title)}, which is not in 'context'; "
                "the file must be of the distractor setting, where all supporting documents are given."
            )
        exact = [at for at in titled if 0 <= index < len(sentences_of[at]) and sentences_of[at][index]]
        position = (exact or titled)[0]
        if not exact:
            repairs.append(NO_SENTENCE)
        evidence[Evidence(title, sentences_of[position][index] if exact else documents[position].text)] = None
        supporting.add(position)
    if not supporting:
        raise DataError("field 'supporting_facts' is empty; a file of a test split has no evidence and cannot be used.")

    text, answer = required_text(record, "question"), required_text(record, "answer")
    name = "_id" if "_id" in record else "id"
    if record.get(name, "") is None:
        repairs.append(NO_ID)
        content = json.dumps([text, answer, [[document.title, document.text] for document in documents]])
        identifier = "content-" + hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    else:
        identifier = required_text(record, name)
    question = Question(
        id=identifier,
        text=text,
        answers=(answer,),
        evidence=tuple(evidence),
        kind=required_text(record, "type"),
        hops=len({item.title for item in evidence}),
    )
    return Record(question, tuple(documents), tuple(sorted(supporting)), tuple(dict.fromkeys(repairs)))


def _pairs(record: Mapping[str, Any], name: str, second: str) -> list[tuple[str, Any]]:
    """(title, value) pairs of a field whose rows are pairs, or objects with `title` and `second`."""
    pairs = []
    for number, row in enumerate(required_rows(record, name)):
        where = f"{name}[{number}]"
        if isinstance(row, dict):
            pairs.append((required(row, "title", str, f"{where}."), present(row, second, f"{where}.")))
        elif len(checked(row, list, where)) != 2:
            raise DataError(f"field '{where}' must be a pair of title and {second}, got {len(row)} values.")
        else:
            pairs.append((checked(row[0], str, f"{where}.title"), row[1]))
    return pairs
