"""Official question files, imported once into a form that opens in milliseconds.

An import is a folder that never changes once it is complete:

    rows.jsonl        a line for each question, with the numbers of its documents (and rows.offsets.npy)
    documents.jsonl   every different document, title and text (and documents.offsets.npy)
    identity.npy      [documents] int64: the number of the first document that differs only in whitespace
    pool.npy          [fillers] int64: the numbers of the documents that may fill a context, all different
    report.json       what was read and repaired, and the hashes of these files

`data/DATASET/SPLIT.json` in the data folder names the active folder, so that one `os.replace` replaces an import by a new one.
Imports of files given as `data=` are in `cache/`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atommem_env.errors import DataError, DatasetNotFound, SettingError
from atommem_env.paths import data_folder
from atommem_env.plugins import suggest
from atommem_env.tasks import hotpotqa, musique, twowiki
from atommem_env.tasks.file_types import short_path
from atommem_env.tasks.folders import visible_files
from atommem_env.tasks.jsonl import JsonLines, JsonLinesWriter, read_records
from atommem_env.tasks.records import Record, excerpt, required, some
from atommem_env.types import Document

PARSERS: dict[str, Callable[[Mapping[str, Any]], Record | None]] = {
    "hotpotqa": hotpotqa.parse,
    "2wikimultihopqa": twowiki.parse,
    "musique": musique.parse,
}
FORMAT = 1  # of the folder; an import of another format must be repeated

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".gz")  # of the files used from a folder
_FILES = ("rows.jsonl", "rows.offsets.npy", "documents.jsonl", "documents.offsets.npy", "identity.npy", "pool.npy")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that an import was made from."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import read and wrote."""

    dataset: str
    split: str
    folder: str  # of the import
    rows: int  # usable questions
    unanswerable: int  # rows left out, because the dataset marks them so
    repairs: dict[str, int]  # problem -> rows repaired
    documents: int  # different documents, of rows and corpus together
    corpus_documents: (
        int | None
    )  # different documents of the corpus; None: no corpus, other rows' documents fill contexts
    corpus_left_out: int  # rows of the corpus that are blank, or equal to an earlier one
    sources: tuple[SourceFile, ...]  # the files of questions, then the corpus
    files: dict[str, str]  # file of the import -> sha256
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Questions:
    """An open import; rows and documents are read on access."""

    report: ImportReport
    rows: JsonLines  # id, text, answers, evidence [[title, text], …], kind, hops, documents, supporting (numbers)
    documents: JsonLines  # [title, text]
    identity: NDArray[np.int64]  # [documents]
    pool: NDArray[np.int64]  # [fillers]

    @classmethod
    def open(cls, folder: Path) -> Questions:
        """Opens the import in `folder`; raises `DatasetNotFound` if there is none that this version can read."""
        return cls(
            report=_read_report(folder),
            rows=JsonLines(folder / "rows.jsonl"),
            documents=JsonLines(folder / "documents.jsonl"),
            identity=np.asarray(np.load(folder / "identity.npy", mmap_mode="r")),
            pool=np.asarray(np.load(folder / "pool.npy", mmap_mode="r")),
        )


# ---------------------------------------------------------------------------------------------------------- the actions


def import_dataset(
    dataset: str,
    split: str,
    file: Path | Sequence[Path],
    corpus: Path | None = None,
    progress: Callable[[Path, int], object] | None = None,
) -> ImportReport:
    """Imports an official file, or all shards of one, and replaces the earlier import of this dataset and split.

    Args:
        dataset: "hotpotqa", "2wikimultihopqa" or "musique".
        split: the name of the import, e.g. "dev".
        file: one JSON list, JSON lines (both plain or gzipped) or parquet, with the dataset's own field names; several, or
            those of a folder (`question_files`), are read one after the other.
        corpus: documents that fill contexts, in the same forms, with the fields `title` and `text`.
        progress: called regularly with the file being read and the number of bytes read of it.

    Raises:
        DataError: a file is damaged; the message names file, line or index, and field. The earlier import stays.
        DatasetNotFound: there is no such file.
        SettingError: there is no such dataset, no file is given, or the split is not a valid file name.
    """
    check_names(dataset, split)
    files = question_files((file,) if isinstance(file, Path) else file)
    if not files:
        raise SettingError(f"file must name at least one file of {dataset}, got none.")
    parent = data_folder("data", dataset)
    folder = parent / f"{split}-{secrets.token_hex(4)}"
    with _complete_or_absent(folder):
        _build(folder, dataset, split, files, corpus, progress)
    pointer = parent / f"{split}.json"
    previous = _active_folder(dataset, split) if pointer.is_file() else None
    draft = parent / f"{folder.name}.json.new"
    draft.write_text(json.dumps({"folder": folder.name}), encoding="utf-8")
    os.replace(draft, pointer)
    if previous is not None and previous.is_dir():
        shutil.rmtree(previous)
    return Questions.open(folder).report


def question_files(given: Sequence[Path]) -> list[Path]:
    """The files given, and in place of a folder the files of records in it, in the order of their names.

    Raises:
        DataError: a folder has no such file, or files of several splits by their names.
    """
    files: list[Path] = []
    for path in given:
        if not path.is_dir():
            files.append(path)
            continue
        inside = [file for file in visible_files(path) if file.suffix.lower() in _SUFFIXES]
        if not inside:
            raise DataError(f"{short_path(path)}: no file in this folder that ends in {', '.join(_SUFFIXES)}.")
        splits = {
            "dev" if word.startswith("valid") else word
            for file in inside
            for word in re.split(r"[^a-z]+", str(file.relative_to(path)).lower())
            if word in ("train", "dev", "valid", "validation", "test")
        }
        if len(splits) > 1:
            raise DataError(
                f"{short_path(path)}: this folder has files of several splits ({', '.join(sorted(splits))}): "
                f"{some(file.name for file in inside)}. Name the files of one split."
            )
        files += inside
    return files


def shared_questions(dataset: str, split: str) -> dict[str, int]:
    """How many questions of an import are, by id or by text, also in another of the dataset: the other's split -> above 0."""
    own = list(_names(open_dataset(dataset, split)))
    shared: dict[str, int] = {}
    for other in imported_splits(dataset):
        if other == split:
            continue
        try:
            known = set(chain.from_iterable(_names(open_dataset(dataset, other))))
        except DatasetNotFound:  # imported by another version
            continue
        if count := sum(not known.isdisjoint(names) for names in own):
            shared[other] = count
    return shared


def _names(questions: Questions) -> Iterator[tuple[str, str]]:
    """Of each question its id, and its text without regard to case and whitespace."""
    for number in range(len(questions.rows)):
        row = questions.rows[number]
        yield f"id {row['id']}", f"text {' '.join(row['text'].split()).casefold()}"


def open_dataset(dataset: str, split: str) -> Questions:
    """The import of this dataset and split; raises `DatasetNotFound`, with the command to run, if there is none."""
    return Questions.open(_active_folder(dataset, split))


def open_file(dataset: str, split: str, file: Path, corpus: Path | None = None) -> Questions:
    """Your own file in the official form, imported into the cache the first time; safe in several processes at once.

    Raises:
        DataError: a file is damaged.
        DatasetNotFound: there is no such file.
        SettingError: there is no such dataset.
    """
    check_names(dataset, split)
    key = hashlib.blake2b(repr((FORMAT, dataset)).encode(), digest_size=12)
    for path in filter(None, (file, corpus)):
        if not path.is_file():
            raise DatasetNotFound(f"There is no file {path}, given as {'data' if path == file else 'corpus'}=.")
        state = path.stat()
        key.update(repr((str(path.resolve()), state.st_size, state.st_mtime_ns)).encode())
    folder = data_folder("cache", f"{dataset}-{key.hexdigest()}")
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}")
        with _complete_or_absent(draft):
            _build(draft, dataset, split, (file,), corpus, None)
        try:
            draft.rename(folder)
        except OSError:
            shutil.rmtree(draft)
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    return Questions.open(folder)


def imported_splits(dataset: str) -> list[str]:
    """The splits imported for a dataset, sorted."""
    return sorted(pointer.stem for pointer in data_folder("data", dataset).glob("*.json"))


def verify_dataset(dataset: str, split: str) -> ImportReport:
    """Checks an import against its recorded hashes and counts; returns its report.

    Raises:
        DataError: a file is missing or has changed.
        DatasetNotFound: nothing is imported.
    """
    folder = _active_folder(dataset, split)
    fix = f"import it again: atommem data import {dataset} --split {split} FILE --corpus FILE"
    report = _read_report(folder)
    for name in _FILES:  # before they are opened, which could fail on a damaged one
        actual = sha256_of(folder / name) if (folder / name).is_file() else "no file"
        if actual != report.files.get(name):
            raise DataError(f"{folder / name}: expected sha256 {report.files.get(name)}, got {actual}; {fix}")
    questions = Questions.open(folder)
    counts = len(questions.rows), len(questions.documents), len(questions.identity)
    if counts != (report.rows, report.documents, report.documents):
        raise DataError(f"{folder}: expected {report.rows} rows and {report.documents} documents, got {counts}; {fix}")
    return report


# ------------------------------------------------------------------------------------------------------- building one


def _build(
    folder: Path,
    dataset: str,
    split: str,
    files: Sequence[Path],
    corpus: Path | None,
    progress: Callable[[Path, int], object] | None,
) -> None:
    """Writes the import of `files` and `corpus` into the empty `folder`."""
    exact: dict[bytes, int] = {}
    loose: dict[bytes, int] = {}
    identity = array("q")
    ids: dict[str, str] = {}
    repairs: dict[str, int] = {}
    unanswerable = left_out = 0

    def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        return read_records(path, (lambda done: progress(path, done)) if progress else None)

    with JsonLinesWriter(folder / "rows.jsonl") as rows, JsonLinesWriter(folder / "documents.jsonl") as documents:

        def add(document: Document) -> int:
            number = documents.append([document.title, document.text])
            identity.append(loose.setdefault(_identity(document), number))
            return number

        for location, raw in chain.from_iterable(map(records, files)):
            with _prefix_errors(location):
                record = PARSERS[dataset](raw)
                if record is None:
                    unanswerable += 1
                    continue
                question = record.question
                if question.id in ids:
                    raise DataError(f"field 'id' is {excerpt(question.id)}, as in {ids[question.id]}; ids must differ.")
            ids[question.id] = location
            for repair in record.repairs:
                repairs[repair] = repairs.get(repair, 0) + 1
            numbers: list[int] = []
            for document in record.documents:
                key = _digest(f"{document.title}\0{document.text}")
                if key not in exact:
                    exact[key] = add(document)
                numbers.append(exact[key])
            rows.append(
                {
                    "id": question.id,
                    "text": question.text,
                    "answers": question.answers,
                    "evidence": [[item.title, item.text] for item in question.evidence],
                    "kind": question.kind,
                    "hops": question.hops,
                    "documents": numbers,
                    "supporting": [numbers[index] for index in record.supporting],
                }
            )
        if not len(rows):
            names = ", ".join(map(str, files))
            raise DataError(f"{names}: no usable {dataset} question in it ({unanswerable} unanswerable).")

        fillers: dict[int, None] = dict.fromkeys(identity)
        if corpus is not None:
            fillers.clear()
            for location, raw in records(corpus):
                with _prefix_errors(location):
                    document = Document(required(raw, "title", str), required(raw, "text", str))
                number = loose.get(_identity(document))
                if number in fillers or not document.text.strip():
                    left_out += 1
                else:
                    fillers[add(document) if number is None else number] = None
            if not fillers:
                raise DataError(f"{corpus}: no document in it.")
        counts = len(rows), len(documents)

    np.save(folder / "identity.npy", np.frombuffer(identity, dtype=np.int64))
    np.save(folder / "pool.npy", np.fromiter(fillers, dtype=np.int64, count=len(fillers)))
    report = ImportReport(
        dataset=dataset,
        split=split,
        folder="",  # set when it is opened
        rows=counts[0],
        unanswerable=unanswerable,
        repairs=repairs,
        documents=counts[1],
        corpus_documents=None if corpus is None else len(fillers),
        corpus_left_out=left_out,
        sources=tuple(
            SourceFile(str(path.resolve()), path.stat().st_size, sha256_of(path)) for path in (*files, corpus) if path
        ),
        files={name: sha256_of(folder / name) for name in _FILES},
    )
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")


def _identity(document: Document) -> bytes:
    """Equal for documents that differ only in whitespace, as the same document in a corpus and in a row can."""
    return _digest("".join(document.title.split()) + "\0" + "".join(document.text.split()))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _prefix_errors(location: str) -> Iterator[None]:
    """Puts the location in front of a parser's error."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{location}: {error}") from error


@contextmanager
def _complete_or_absent(folder: Path) -> Iterator[None]:
    """Creates `folder`, and removes it again if the block fails."""
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder)
        raise


def _read_report(folder: Path) -> ImportReport:
    try:
        values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetNotFound(f"{folder} has no import; run `atommem data import` again.") from error
    if values["format"] != FORMAT:
        raise DatasetNotFound(
            f"{folder} has format {values['format']}, but this version reads {FORMAT}; run `atommem data import` again."
        )
    sources = tuple(SourceFile(**source) for source in values["sources"])
    return ImportReport(**{**values, "folder": str(folder), "sources": sources})


def _active_folder(dataset: str, split: str) -> Path:
    check_names(dataset, split)
    pointer = data_folder("data", dataset, f"{split}.json")
    if not pointer.is_file():
        others = imported_splits(dataset)
        raise DatasetNotFound(
            f"No {dataset} questions are imported for the split {split!r} "
            + (f"(imported: {', '.join(others)}). " if others else "(none of this dataset are). ")
            + f"Import the official file: atommem data import {dataset} --split {split} FILE --corpus FILE"
            + " (without a corpus, contexts are filled from the file itself), or give data=FILE. "
            + f"Or download it: atommem data get {dataset} --split {split}"
        )
    return pointer.with_name(json.loads(pointer.read_text(encoding="utf-8"))["folder"])


def check_names(dataset: str, split: str = "dev") -> None:
    """Raises `SettingError` where there is no such dataset, or the split's name cannot be a file's."""
    if dataset not in PARSERS:
        near = suggest(dataset, PARSERS) or "."
        raise SettingError(f"dataset must be one of {', '.join(PARSERS)}; got {dataset!r}{near}")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", split):
        raise SettingError(f"split must be a name of letters, digits, '_', '-' and '.', got {split!r}.")
