"""The synthetic world, read back from its text by a solver that knows nothing of how tasks are made."""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from atommem_env.errors import SettingError
from atommem_env.tasks.synthetic import SyntheticSource, vocabulary
from atommem_env.tasks.synthetic_world import FILLERS, INSTRUMENTS, RELATIONS
from atommem_env.types import Document, Question, Task

NAME = re.compile(r"\b[A-Z][a-z]+ [A-Z][a-z]+\b|\b(?:" + "|".join(INSTRUMENTS) + r")\b")
SPLITS = ("train", "dev", "test")

# ------------------------------------------------------------------------------------------------------------- a reader


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: str
    object: str
    old: str | None
    correction: bool


def _forms() -> dict[str, list[tuple[str, list[str], bool]]]:
    """Sentence with # for its names → (relation, what the names are, whether it corrects)."""
    forms = collections.defaultdict(list)
    for relation in RELATIONS:
        for texts, correction in [(relation.statements, False), *((group, True) for group in relation.corrections)]:
            for text in texts:
                slots = re.findall(r"{(\w+)}", text)
                forms[re.sub(r"{\w+}", "#", text)].append((relation.name, slots, correction))
    return dict(forms)


FORMS = _forms()
IDLE = {text.replace("{s}", "#") for texts in FILLERS.values() for text in texts}


def sentences(document: Document) -> list[str]:
    return re.split(r"(?<=\.) ", document.text)


def read(sentence: str) -> Fact | None:
    """The fact that a sentence states; None if it states none. A sentence that can be read in two ways is an error."""
    shape = NAME.sub("#", sentence)
    if shape in IDLE:
        return None
    [(relation, slots, correction)] = FORMS[shape]
    names = dict(zip(slots, NAME.findall(sentence), strict=True))
    return Fact(names["s"], relation, names["o"], names.get("old"), correction)


def facts(task: Task) -> Iterator[tuple[int, Fact]]:
    for number, document in enumerate(task.documents):
        for sentence in sentences(document):
            if fact := read(sentence):
                yield number, fact


@functools.cache
def relations_asked(shape: str) -> tuple[str, ...]:
    """The relations that a question composes, innermost first; one that can be read in two ways is an error."""
    kinds = {relation.name: (relation.subject, relation.object) for relation in RELATIONS}

    def parse(text: str, outermost: bool) -> Iterator[tuple[str, ...]]:
        for relation in RELATIONS:
            for form in relation.questions if outermost else relation.phrases:
                before, after = form.split("{s}")
                if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
                    inner = text[len(before) : len(text) - len(after)]
                    if inner == "#":
                        yield (relation.name,)
                    for chain in parse(inner, False):
                        if kinds[chain[-1]][1] == relation.subject:
                            yield (*chain, relation.name)

    [chain] = set(parse(shape, True))
    return chain


def asked(question: Question) -> tuple[str, tuple[str, ...]]:
    [subject] = NAME.findall(question.text)
    return subject, relations_asked(NAME.sub("#", question.text))


def solve(task: Task, question: Question, same: Callable[[str, str], bool] = str.__eq__) -> tuple[str | None, int]:
    """(the answer or None, how many links there are); of several facts that match the last one counts."""
    subject, chain = asked(question)
    for number, relation in enumerate(chain):
        objects = [fact.object for _, fact in facts(task) if fact.relation == relation and same(fact.subject, subject)]
        if not objects:
            return None, number
        subject = objects[-1]
    return subject, len(chain)


def shares_one_word(one: str, other: str) -> bool:
    return len(set(one.split()) & set(other.split())) == 1


def tasks(count: int, **settings: Any) -> Iterator[Task]:
    source = SyntheticSource(**settings)
    return (source.task(index, seed=index) for index in range(count))


# -------------------------------------------------------------------------------------------------------- right answers


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2000, {}),
        (500, {"split": "dev", "num_docs": 5}),
        (300, {"split": "test", "corrections": 1.0, "unanswerable": 0.5, "hops": (4,), "num_docs": 12}),
        (100, {"split": "dev", "questions": 10, "num_docs": 60}),
        (3, {"split": "test", "questions": 10, "num_docs": 800}),
    ],
)
def test_the_documents_give_exactly_the_gold_answer(count: int, settings: dict[str, Any]) -> None:
    for task in tasks(count, **settings):
        assert len(task.documents) == settings.get("num_docs", 20)
        assert len({asked(question)[0] for question in task.questions}) == len(task.questions)
        for question in task.questions:
            answer, links = solve(task, question)
            assert len(asked(question)[1]) == question.hops
            assert question.answers == (answer or "unknown",), task
            assert ("unanswerable" in question.kind) == (answer is None)
            assert links == len(question.evidence)  # all links that exist, up to the gap


def test_evidence_is_the_sentence_that_counts() -> None:
    for task in tasks(500, corrections=0.5, unanswerable=0.3):
        [question] = task.questions
        subject, chain = asked(question)
        corrected = 0
        for relation, evidence in zip(chain, question.evidence, strict=False):
            fact = read(evidence.text)
            assert fact is not None
            assert (fact.subject, fact.relation, evidence.title) == (subject, relation, subject)
            assert any(
                document.title == evidence.title and evidence.text in sentences(document) for document in task.documents
            )
            corrected += fact.correction
            subject = fact.object
        assert corrected == ("corrected" in question.kind)
        if "unanswerable" not in question.kind:
            assert question.answers == (subject,)


def test_a_fact_changes_only_by_a_correction_in_a_later_document() -> None:
    for task in tasks(500, corrections=0.6):
        stated: dict[tuple[str, str], tuple[int, str]] = {}
        for number, fact in facts(task):
            key = (fact.subject, fact.relation)
            assert fact.correction == (key in stated)
            if fact.correction:
                before, old = stated[key]
                assert before < number
                assert fact.old in (None, old)
                assert fact.object != old
            stated[key] = (number, fact.object)


def test_each_partner_of_a_symmetric_relation_has_no_other() -> None:
    symmetric = {relation.name for relation in RELATIONS if relation.symmetric}
    assert symmetric == {"spouse", "sibling"}
    for task in tasks(300, num_docs=60):
        owners = collections.defaultdict(set)
        for _, fact in facts(task):
            if fact.relation in symmetric:
                owners[fact.relation, fact.object].add(fact.subject)
                owners[fact.relation, fact.subject].add(fact.subject)
        assert all(len(subjects) == 1 for subjects in owners.values())


def test_nothing_points_to_the_subject_of_a_gap() -> None:
    """For example "Ada Brook leads Iron Forge", which would hint at where Ada Brook works."""
    for task in tasks(300, unanswerable=1.0):
        [question] = task.questions
        links = [fact for evidence in question.evidence if (fact := read(evidence.text))]
        subject = links[-1].object if links else asked(question)[0]
        pointing = {(fact.subject, fact.relation) for _, fact in facts(task) if fact.object == subject}
        assert pointing == {(fact.subject, fact.relation) for fact in links[-1:]}


def test_documents_are_short_passages_about_their_title() -> None:
    for task in tasks(300):
        corrected = collections.Counter(fact.subject for _, fact in facts(task) if fact.correction)
        titles = collections.Counter(document.title for document in task.documents)
        assert all(titles[title] == 1 + corrected[title] for title in titles)
        for document in task.documents:
            assert 1 <= len(sentences(document)) <= 3
            for sentence in sentences(document):
                assert document.title in sentence
                assert (fact := read(sentence)) is None or fact.subject == document.title


def test_sentences_are_short() -> None:
    longest = max((*FORMS, *IDLE), key=lambda shape: len(shape.replace("#", "two words").split()))
    assert len(longest.replace("#", "two words").split()) <= 14, longest


# -------------------------------------------------------------------------------------------------- shares and no tells


def test_hops_corrections_and_gaps_come_as_often_as_set() -> None:
    questions = [task.questions[0] for task in tasks(2500, num_docs=5, corrections=0.4, unanswerable=0.2)]
    for hops in (1, 2, 3, 4):
        assert sum(question.hops == hops for question in questions) / 2500 == pytest.approx(0.25, abs=0.03)
    assert sum("unanswerable" in question.kind for question in questions) / 2500 == pytest.approx(0.2, abs=0.03)
    correctable = [question for question in questions if question.evidence]
    assert sum("_corrected" in question.kind for question in correctable) / len(correctable) == pytest.approx(
        0.4, abs=0.03
    )
    assert {question.kind for question in questions} >= {"1hop", "2hop_corrected", "3hop_unanswerable"}


def test_the_extremes_are_exact() -> None:
    assert all(task.questions[0].kind == "2hop" for task in tasks(50, hops=(2,), corrections=0, unanswerable=0))
    assert all(
        task.questions[0].kind == "1hop_corrected" for task in tasks(50, hops=(1,), corrections=1, unanswerable=0)
    )
    assert all(task.questions[0].answers == ("unknown",) for task in tasks(50, unanswerable=1))


def test_evidence_lies_uniformly_and_in_any_order() -> None:
    counts, first_before_last = collections.Counter[int](), 0
    for task in tasks(3000, hops=(3,), corrections=0, unanswerable=0):
        titles = [document.title for document in task.documents]
        positions = [titles.index(evidence.title) for evidence in task.questions[0].evidence]
        counts.update(positions)
        first_before_last += positions[0] < positions[-1]
    assert all(counts[position] / 9000 == pytest.approx(1 / 20, abs=0.01) for position in range(20))
    assert first_before_last / 3000 == pytest.approx(0.5, abs=0.04)


def test_corrections_are_no_sign_of_relevance() -> None:
    counts = {True: [0, 0], False: [0, 0]}  # of the question's chain or not → documents that state or correct
    for task in tasks(1500):
        chain = {evidence.title for evidence in task.questions[0].evidence}
        corrected = {fact.subject for _, fact in facts(task) if fact.correction}
        for title in {document.title for document in task.documents}:
            counts[title in chain][0] += 1
            counts[title in chain][1] += title in corrected
    relevant, other = (corrected / titles for titles, corrected in (counts[True], counts[False]))
    assert relevant == pytest.approx(0.25 / 2.5, abs=0.02)
    assert other == pytest.approx(relevant, abs=0.03)


def test_guessing_does_not_pay() -> None:
    golds = collections.Counter(task.questions[0].answers[0] for task in tasks(3000, num_docs=5, unanswerable=0.1))
    assert golds.pop("unknown") / 3000 == pytest.approx(0.1, abs=0.02)
    assert golds.most_common(1)[0][1] / 3000 < 0.01


def test_the_relation_asked_for_is_stated_often_enough_to_tell_nothing() -> None:
    counts: dict[bool, list[int]] = {True: [], False: []}
    for task in tasks(1000, unanswerable=0.5, corrections=0):
        [question] = task.questions
        relation = asked(question)[1][-1]
        counts[question.answers == ("unknown",)].append(sum(fact.relation == relation for _, fact in facts(task)))
    unknown, known = (sum(values) / len(values) for values in (counts[True], counts[False]))
    assert unknown == pytest.approx(known, rel=0.04)
    assert min(counts[True]) == min(counts[False]) >= 4


def test_near_equal_names_defeat_a_loose_match() -> None:
    loose = lambda one, other: bool(set(one.split()) & set(other.split()))  # noqa: E731
    right = misled = 0
    for task in tasks(500, unanswerable=0):
        [question] = task.questions
        subject, chain = asked(question)
        misled += any(shares_one_word(fact.subject, subject) and fact.relation == chain[0] for _, fact in facts(task))
        right += solve(task, question, loose)[0] == question.answers[0]
    assert misled / 500 > 0.97
    assert right / 500 < 0.5


def test_overlooking_a_correction_leads_to_a_wrong_answer_rather_than_to_none() -> None:
    wrong = total = 0
    for task in tasks(300, corrections=1.0, unanswerable=0, num_docs=40):
        [question] = task.questions
        known: dict[tuple[str, str], str] = {}
        for _, fact in facts(task):
            known.setdefault((fact.subject, fact.relation), fact.object)
        subject, chain = asked(question)
        answer: str | None = subject
        for relation in chain[:2]:
            answer = known.get((answer or "", relation))
        total += 1
        wrong += answer is not None
    assert wrong / total > 0.95


# --------------------------------------------------------------------------------------------- splits, words, processes


def names(split: str) -> set[str]:
    matches = set()
    for task in tasks(700, split=split):
        for document in task.documents:
            matches |= {document.title, *NAME.findall(document.text)}
        matches |= {name for question in task.questions for name in NAME.findall(question.text)}
    return {name for name in matches if " " in name}


def test_full_names_of_two_splits_never_meet_but_their_words_do() -> None:
    names_of = {split: names(split) for split in SPLITS}
    words = {split: {word for name in names_of[split] for word in name.split()} for split in SPLITS}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not names_of[one] & names_of[other]
        assert words[one] == words[other]
    assert len(names_of["train"]) > 3000


def test_the_vocabulary_covers_every_word_and_little_else() -> None:
    seen = {"unknown"}
    for split in SPLITS:
        for task in tasks(1000, split=split, corrections=0.6):
            for text in [part for document in task.documents for part in (document.title, document.text)]:
                seen |= set(re.findall(r"\w+", text))
            for question in task.questions:
                seen |= set(re.findall(r"\w+", " ".join((question.text, *question.answers))))
    assert seen == set(vocabulary())
    assert list(vocabulary()) == sorted(vocabulary())
    assert len(vocabulary()) <= 900
    # Names differ from all other words even in lower case.
    assert len({word.lower() for word in vocabulary()}) >= len(vocabulary()) - 10


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(repr(list(tasks(30, **settings))).encode()).hexdigest()


def test_another_process_makes_the_same_tasks() -> None:
    settings = {"split": "dev", "questions": 3, "num_docs": 30}
    code = (
        "import hashlib\nfrom atommem_env.tasks.synthetic import SyntheticSource\n"
        f"source = SyntheticSource(**{settings})\n"
        "made = [source.task(index, seed=index) for index in range(30)]\n"
        "print(hashlib.sha256(repr(made).encode()).hexdigest())"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert made.stdout.strip() == digest(settings)


def test_the_index_gives_the_questions_and_the_seed_the_context() -> None:
    source = SyntheticSource()
    one, other = source.task(5, seed=1), source.task(5, seed=2)
    assert one == source.task(5, seed=1)
    assert one.questions == other.questions
    assert set(one.documents) != set(other.documents)
    assert source.task(6, seed=1).questions != one.questions
    assert SyntheticSource(split="train").task(5, seed=1).questions != one.questions
    assert len({SyntheticSource(split="train").task(index, 0).questions[0].text for index in range(500)}) == 500


def test_source_and_task_survive_pickling() -> None:
    source = SyntheticSource(hops=[1, 2], num_docs=8)  # a list, as JSON gives it
    copy = pickle.loads(pickle.dumps(source))
    assert copy.task(3, 4) == pickle.loads(pickle.dumps(source.task(3, 4)))


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("split", {"split": "validation"}),
        ("hops", {"hops": ()}),
        ("hops", {"hops": (0, 1)}),
        ("hops", {"hops": (5,)}),
        ("hops", {"hops": 2}),
        ("num_docs", {"num_docs": 4}),
        ("num_docs", {"num_docs": 801}),
        ("num_docs", {"num_docs": 20.0}),
        ("num_docs", {"questions": 5, "num_docs": 24}),
        ("questions", {"questions": 0}),
        ("questions", {"questions": 11, "num_docs": 100}),
        ("corrections", {"corrections": -0.1}),
        ("corrections", {"corrections": "often"}),
        ("unanswerable", {"unanswerable": 1.1}),
    ],
)
def test_a_setting_that_cannot_work_is_an_error_that_names_it(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"^{name} must be "):
        SyntheticSource(**settings)


def test_an_index_or_seed_out_of_range_is_an_error() -> None:
    source = SyntheticSource()
    assert source.task(len(source) - 1, seed=2**64).dataset == "synthetic"
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=str(index)):
            source.task(index, 0)
    with pytest.raises(SettingError, match="seed"):
        source.task(0, -1)
