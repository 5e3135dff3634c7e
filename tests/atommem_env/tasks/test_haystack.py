"""Contexts: their documents, the positions of these, and reproducibility."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atommem_env.errors import DatasetNotFound, SettingError
from atommem_env.tasks.catalogue import import_dataset
from atommem_env.tasks.haystack import HaystackSource, group_starts
from atommem_env.types import Document, Task

DATASETS = ("hotpotqa", "2wikimultihopqa", "musique")


def row(number: int) -> dict[str, Any]:
    """Ten documents each; the first three are also in the next row, and the two at 4 and 5 are supporting."""
    titles = [f"T{number * 7 + k}" for k in range(10)]
    return {
        "_id": f"q{number}",
        "question": f"What is {number}?",
        "answer": f"answer {number}",
        "type": "bridge",
        "context": [[title, [f"{title} is here.", f" {title} was there."]] for title in titles],
        "supporting_facts": [[titles[4], 0], [titles[5], 1]],
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row(number) for number in range(25)]))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"title": f"C{number}", "text": f"C{number} is elsewhere."} for number in range(100)]
    # All documents of the rows are in the corpus too, spaced in another way.
    rows += [{"title": f"T{k}", "text": f"T{k} is here.  T{k} was there. "} for k in range(25 * 7 + 3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real development files, imported once for this module; gives the data folder that holds them."""
    folder = tmp_path_factory.mktemp("real")
    patch = pytest.MonkeyPatch()
    patch.setenv("ATOMMEM_DATA", str(folder))
    for dataset in DATASETS:
        import_dataset(
            dataset, "dev", shared_data / f"{dataset}_dev.jsonl.gz", shared_data / f"{dataset}_corpus.jsonl.gz"
        )
    patch.undo()
    return folder


def supporting(task: Task) -> list[int]:
    """Where the documents that hold evidence lie."""
    positions = {
        position
        for position, document in enumerate(task.documents)
        for question in task.questions
        for evidence in question.evidence
        if evidence.title == document.title and evidence.text in document.text
    }
    return sorted(positions)


def squeezed(document: Document) -> tuple[str, str]:
    return "".join(document.title.split()), "".join(document.text.split())


# -------------------------------------------------------------------------------------------------- what is in contexts


def test_questions_are_the_next_ones_of_the_file(file: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, num_docs=100, questions=10)
    assert len(source) == 2
    task = source.task(1, seed=3)
    assert [question.id for question in task.questions] == [f"q{number}" for number in range(10, 20)]
    assert (task.id, task.dataset) == ("hotpotqa/dev/1x10", "hotpotqa")
    assert HaystackSource("hotpotqa", data=file, split="mine", num_docs=20).task(7, seed=3).id == "hotpotqa/mine/7"


@pytest.mark.parametrize("with_corpus", [False, True])
@pytest.mark.parametrize(("num_docs", "questions"), [(2, 1), (7, 1), (50, 1), (20, 10), (60, 10), (150, 10)])
def test_supporting_documents_first_then_distractors_then_corpus(
    file: Path, corpus: Path, own_data_folder: Path, with_corpus: bool, num_docs: int, questions: int
) -> None:
    source = HaystackSource(
        "hotpotqa", data=file, corpus=corpus if with_corpus else None, num_docs=num_docs, questions=questions
    )
    for seed in range(5):
        task = source.task(1, seed)
        assert len(task.documents) == num_docs
        assert len({squeezed(document) for document in task.documents}) == num_docs  # fault 9: none of them twice
        own = {f"T{number * 7 + k}" for number in range(questions, 2 * questions) for k in range(10)}
        titles = {document.title for document in task.documents}
        assert len(supporting(task)) == 2 * questions
        assert len(titles & own) == min(num_docs, len(own))


def test_every_document_may_fill(file: Path, corpus: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, corpus=corpus, num_docs=20)
    seen = Counter(document.title for seed in range(2000) for document in source.task(0, seed).documents)
    own = {f"T{k}" for k in range(10)}
    others = {f"C{k}" for k in range(100)} | {f"T{k}" for k in range(10, 178)}
    assert set(seen) == own | others
    assert {seen[title] for title in own} == {2000}
    expected = 2000 * 10 / len(others)
    chi_square = sum((seen[title] - expected) ** 2 / expected for title in others)
    assert chi_square < 370  # 267 degrees of freedom: exceeded by chance once in 30,000


def test_every_distractor_may_be_the_one_left_out(file: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, num_docs=7)
    seen = Counter(document.title for seed in range(100) for document in source.task(0, seed).documents)
    assert {title for title, count in seen.items() if count == 100} == {"T4", "T5"}
    assert len(seen) == 10


def test_evidence_wins_over_the_corpus_spelling(file: Path, corpus: Path, own_data_folder: Path) -> None:
    task = HaystackSource("hotpotqa", data=file, corpus=corpus, num_docs=278).task(0, seed=0)
    [text] = [document.text for document in task.documents if document.title == "T4"]
    assert text == "T4 is here. T4 was there."


def test_too_many_and_too_few_documents(file: Path, corpus: Path, own_data_folder: Path) -> None:
    with pytest.raises(SettingError, match="num_docs=19, but these 10 questions have 20 supporting documents"):
        HaystackSource("hotpotqa", data=file, num_docs=19, questions=10).task(0, seed=0)
    with pytest.raises(SettingError, match=r"num_docs=179, but there are only 178 .*corpus.*lower num_docs"):
        HaystackSource("hotpotqa", data=file, num_docs=179).task(0, seed=0)
    assert len(HaystackSource("hotpotqa", data=file, num_docs=178).task(0, seed=0).documents) == 178
    with pytest.raises(SettingError, match="num_docs=279, but there are only 278"):
        HaystackSource("hotpotqa", data=file, corpus=corpus, num_docs=279).task(0, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_docs": 0}, "num_docs must be a whole number from 1 to 6400, got 0"),
        ({"num_docs": 6401}, "num_docs must be"),
        ({"num_docs": 200.0}, "num_docs must be"),
        ({"questions": 0}, "questions must be a whole number from 1 to 10, or 'sampled', got 0"),
        ({"questions": 11}, "questions must be"),
        ({"questions": True}, "questions must be"),
        ({"questions": "all"}, "questions must be"),
    ],
)
def test_bad_settings(file: Path, own_data_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        HaystackSource("hotpotqa", data=file, **options)


def test_bad_calls(file: Path, corpus: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, num_docs=20)
    for index in (-1, 25):
        with pytest.raises(SettingError, match=f"index must be from 0 to 24, got {index}"):
            source.task(index, seed=0)
    with pytest.raises(SettingError, match="seed must be at least 0"):
        source.task(0, seed=-1)
    with pytest.raises(SettingError, match="corpus= goes with data="):
        HaystackSource("hotpotqa", corpus=corpus)
    with pytest.raises(DatasetNotFound, match="atommem data import musique --split train FILE"):
        HaystackSource("musique", split="train")
    with pytest.raises(DatasetNotFound, match="given as data="):
        HaystackSource("musique", data="nothing.json")
    file.write_text(json.dumps([row(0)]))
    with pytest.raises(SettingError, match="questions=2, but there are only 1"):
        HaystackSource("hotpotqa", data=file, questions=2)


# -------------------------------------------------------------------------------------------------- questions of a task


def test_sampled_questions_have_the_public_codes_distribution() -> None:
    sizes = np.diff(group_starts(100_000, "sampled"))[:-1]
    shares = np.bincount(sizes, minlength=11) / len(sizes)
    assert shares[0] == 0
    assert len(shares) == 11
    assert abs(shares[1] - 0.5) < 0.015  # about 30,000 tasks: four standard deviations
    assert np.abs(shares[2:] - 0.5 / 9).max() < 0.006


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.one_of(st.just("sampled"), st.integers(1, 10)))
def test_groups_divide_the_file(count: int, questions: int | str) -> None:
    starts = group_starts(count, questions)
    sizes = np.diff(starts)
    assert (starts[0], starts[-1]) == (0, count)
    assert sizes.min() >= 1
    assert sizes.max() <= 10
    if questions == "sampled":  # more questions at the end of the file change no task but the last
        longer = group_starts(count + 100, "sampled")
        assert starts[:-1].tolist() == longer[: len(starts) - 1].tolist()
    else:
        assert set(sizes[:-1].tolist()) <= {questions}


def test_sampled_questions_are_asked_once_whatever_the_seed(file: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, num_docs=40, questions="sampled")
    for seed in (0, 7):
        tasks = [source.task(index, seed) for index in range(len(source))]
        assert [question.id for task in tasks for question in task.questions] == [f"q{n}" for n in range(25)]
        assert all(len(supporting(task)) == 2 * len(task.questions) for task in tasks)
    assert tasks[1].id == "hotpotqa/dev/1xsampled"
    with pytest.raises(SettingError, match=f"from 0 to {len(source) - 1}"):
        source.task(len(source), 0)


def test_6400_real_documents(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOMMEM_DATA", str(real))
    task = HaystackSource("hotpotqa", num_docs=6400, questions="sampled").task(0, seed=0)
    assert len({squeezed(document) for document in task.documents}) == len(task.documents) == 6400
    assert len(task.questions) == 8
    for question in task.questions:
        assert all(any(item.text in document.text for document in task.documents) for item in question.evidence)


# -------------------------------------------------------------------------------------------------------- where it lies


def uniform(positions: list[int], num_docs: int) -> bool:
    """Whether positions 0 … num_docs - 1 are drawn alike: chi-square below what chance exceeds once in 30,000 times."""
    counts = np.bincount(positions, minlength=num_docs)
    expected = len(positions) / num_docs
    freedom = num_docs - 1
    return bool(((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom) + 8)


def test_fault_7_supporting_documents_lie_uniformly(file: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, num_docs=50)
    tasks = [source.task(index, seed) for index in range(25) for seed in range(40)]  # 1,000
    assert uniform([position for task in tasks for position in supporting(task)], 50)
    own = [{title for title, _ in row(index)["context"]} for index in range(25) for _ in range(40)]
    placed = [
        position
        for task, titles in zip(tasks, own, strict=True)
        for position, document in enumerate(task.documents)
        if document.title in titles
    ]
    assert uniform(placed, 50)
    assert not uniform([7, 10, 17, 41, 48] * 400, 50)  # what the test is there to find


def test_fault_7_one_seed_gives_each_task_its_own_order(file: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, num_docs=50)
    assert len({tuple(supporting(source.task(index, seed=0))) for index in range(25)}) > 20
    assert len({tuple(supporting(source.task(0, seed=seed))) for seed in range(25)}) > 20


@pytest.mark.parametrize("dataset", DATASETS)
def test_fault_7_on_real_questions(real: Path, monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    monkeypatch.setenv("ATOMMEM_DATA", str(real))
    source = HaystackSource(dataset, num_docs=200)
    positions = [position for draw in range(1000) for position in supporting(source.task(draw % len(source), draw))]
    assert len(positions) >= 2000
    assert uniform(positions, 200)


def test_fault_9_no_document_twice_on_real_grouped_questions(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOMMEM_DATA", str(real))
    for dataset in DATASETS:
        source = HaystackSource(dataset, num_docs=800, questions=10)
        for index in range(10):
            task = source.task(index, seed=index)
            assert len({squeezed(document) for document in task.documents}) == len(task.documents) == 800
            for question in task.questions:
                for evidence in question.evidence:
                    assert any(
                        evidence.title == document.title and evidence.text in document.text
                        for document in task.documents
                    )


@pytest.mark.parametrize(("dataset", "least"), [("hotpotqa", 1.0), ("2wikimultihopqa", 0.98), ("musique", 1.0)])
def test_answers_stand_in_the_evidence(real: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, least: float) -> None:
    """2WikiMultiHopQA's answers are now and then a name's other form, or a date spelt in another way."""
    monkeypatch.setenv("ATOMMEM_DATA", str(real))
    source = HaystackSource(dataset, num_docs=20)
    answered = []
    for index in range(len(source)):
        [question] = source.task(index, seed=0).questions
        evidence = "\n".join(f"{item.title}\n{item.text}" for item in question.evidence).casefold()
        if question.answers[0] not in ("yes", "no"):
            answered.append(any(answer.casefold() in evidence for answer in question.answers))
    assert np.mean(answered) >= least


# ------------------------------------------------------------------------------------------------- the same everywhere

DIGEST = """
import hashlib, sys
from atommem_env.tasks.haystack import HaystackSource
source = HaystackSource("hotpotqa", data=sys.argv[1], corpus=sys.argv[2], num_docs=60, questions=3)
print(hashlib.sha256(repr([source.task(index, seed) for index in range(8) for seed in (0, 5)]).encode()).hexdigest())
"""


def test_same_tasks_in_processes_of_other_hash_seeds(file: Path, corpus: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, corpus=corpus, num_docs=60, questions=3)
    here = hashlib.sha256(repr([source.task(index, seed) for index in range(8) for seed in (0, 5)]).encode())
    for hash_seed in ("1", "2"):
        # A data folder of its own: the import is made again, too.
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "ATOMMEM_DATA": str(own_data_folder / hash_seed)}
        command = [sys.executable, "-c", DIGEST, str(file), str(corpus)]
        there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert there.strip() == here.hexdigest()


def test_order_of_calls_does_not_matter(file: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, num_docs=30)
    forwards = [source.task(index, seed=1) for index in range(25)]
    backwards = [source.task(index, seed=1) for index in reversed(range(25))]
    assert forwards == backwards[::-1]
    assert source.task(0, seed=1) != source.task(0, seed=2)


def test_copies_and_pickles_make_the_same_tasks(file: Path, own_data_folder: Path) -> None:
    source = HaystackSource("hotpotqa", data=file, num_docs=30, questions=2)
    sent = pickle.dumps(source)
    assert len(sent) < 1000  # the data do not travel
    for other in (pickle.loads(sent), copy.deepcopy(source)):
        assert other.task(3, seed=4) == source.task(3, seed=4)


def test_relative_path_survives_a_change_of_folder(
    file: Path, own_data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    source = HaystackSource("hotpotqa", data=file.name, num_docs=20)
    sent = pickle.dumps(source)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert pickle.loads(sent).task(0, seed=0) == source.task(0, seed=0)
