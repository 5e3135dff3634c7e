"""Questions about your own files: text, Markdown and PDF."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atommem_env.errors import DataError, DatasetNotFound, MissingDependency, SettingError
from atommem_env.tasks.catalogue import sha256_of
from atommem_env.tasks.haystack import check_questions, group_starts
from atommem_env.tasks.jsonl import read_records
from atommem_env.tasks.records import check_range, checked, required_text
from atommem_env.types import UNGRADED, Document, Evidence, Question, Task

SUFFIXES = (".txt", ".text", ".md", ".markdown", ".pdf")  # of the files used from a folder
_LONGEST_PART = 8_000  # characters, about 1,600 tokens: several parts fit into a chunk of the default size
_HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*\s*$")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")
_NUMBER = re.compile(r"(\d+)")

Located = tuple[str, Document]  # the file's name, and a document of it


class FilesSource:
    """Tasks over your own files, in order from the first page to the last: no shuffling, no distractors.

        gym.make("AtomMem-Files", files="handbook/", data="questions.jsonl")
        gym.make("AtomMem-Files", files=["part1.pdf", "part2.pdf"], question="Who signs the contract?")

    **Files** are read in the order given; those of a folder, and of its subfolders, by name, numbers by value (`ch2` before
    `ch10`). From a folder, files that end in .txt, .text, .md, .markdown or .pdf are used, except hidden ones; a file that is
    listed itself can have any name. Text is UTF-8. Each file is split into documents:

    - PDF: one for each page with text, titled `report.pdf, page 3`. Needs the extra `files`.
    - Markdown: one for each section under a heading (`# …`), titled `notes.md: Safety › Fire`.
    - Text: one for each page if form feeds separate pages, titled `log.txt, page 3`; else one, titled `log.txt`.
    - Text longer than 8,000 characters is split between paragraphs, titled `log.txt (2)` and so on from the second part.

    **Questions** are JSON lines, a JSON list, or CSV (with a header, named `.csv`), with the fields

    - `question`,
    - `answer`, a text, or `answers`, the gold and its aliases: a list, in CSV separated by `|`,
    - `id` (optional), and
    - `evidence` (optional): a list of `{"file": …, "text": …}`, passages that support the answer; in CSV the columns
      `evidence_file` and `evidence_text`. A passage must be part of one document; differences in whitespace are ignored.

    Answers are scored as HotpotQA's. A question whose `answers` are the empty list `[]`, or that is given as `question=` without
    `answers=`, has **no gold**: it is asked, its answer is in `info`, its kind is "ungraded", and it is not graded: exact
    match and F1 are None, and no mean or reward counts it.

    Task `i` asks the questions of group `i` of the file, as in `HaystackSource`, except that the last group may be smaller: no
    question is left out. The seed has no effect.

    Args:
        files: a file, a folder, or a list of them.
        data: the file of questions.
        question: one question, instead of a file of questions.
        answers: the gold and aliases of `question`.
        questions: questions of a task, 1 to 10, or "sampled".

    Raises:
        DatasetNotFound: a file does not exist.
        DataError: a file cannot be read as text, or a question has another form; the message names file and line.
        MissingDependency: a PDF is given, but the extra `files` is not installed.
        SettingError: a setting is missing, contradicts another or is out of range.
    """

    dataset = "files"

    def __init__(
        self,
        files: str | Path | Sequence[str | Path] = (),
        *,
        data: str | Path | None = None,
        question: str | None = None,
        answers: str | Sequence[str] = (),
        questions: int | str = 1,
    ) -> None:
        check_questions(questions)
        given = [files] if isinstance(files, str | Path) else list(files)
        if not given:
            raise SettingError("files= must name a file, a folder, or a list of them, which the questions are about.")
        if (data is None) == (question is None):
            raise SettingError(f"Give either data= (a file of questions) or question=, got {data!r} and {question!r}.")
        if answers and question is None:
            raise SettingError("answers= goes with question=; in a file of questions each has its own.")
        found = _find([Path(item).expanduser() for item in given])
        located = list(_read(found))
        if data is not None:
            path = Path(data).expanduser()
            rows = _csv_records(path) if path.suffix.lower() == ".csv" else read_records(path)
        else:
            golds = [answers] if isinstance(answers, str) else list(answers)
            rows = iter([("question=", {"question": question, "answers": golds})])
        self.file_digests = {f"files/{name}": sha256_of(file) for name, file in found}
        """role -> SHA-256: "data", the file of questions, and "files/NAME" for each file that was read."""
        self.documents = tuple(document for _, document in located)
        self.all_questions = tuple(_questions(rows, located))
        if not self.all_questions:
            raise DataError(f"{data}: no question in it.")
        if data is not None:
            self.file_digests["data"] = sha256_of(path)
        self.questions = questions
        self._starts = group_starts(len(self.all_questions), questions)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def task(self, index: int, seed: int) -> Task:
        """The task at `index` (0 ≤ index < len); the same for every seed. Raises `OutOfRange` for another index."""
        check_range("index", index, len(self))
        return Task(
            id=f"files/{index}" + ("" if self.questions == 1 else f"x{self.questions}"),
            dataset=self.dataset,
            documents=self.documents,
            questions=self.all_questions[self._starts[index] : self._starts[index + 1]],
        )


# ------------------------------------------------------------------------------------------------------------ documents


def _find(given: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, path) of every file, in order; a name is the path relative to the deepest common folder."""
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
            visible = [
                file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
            if not visible:
                raise DataError(f"{path}: no file in this folder that ends in {', '.join(SUFFIXES)}.")
            paths += sorted(visible, key=_reading_order)
        elif path.is_file():
            paths.append(path)
        else:
            raise DatasetNotFound(f"There is no file or folder {path}, given as files=.")
    full = [path.resolve() for path in paths]
    if len(set(full)) < len(full):
        raise SettingError(f"files= names {next(path for path in full if full.count(path) > 1)} twice.")
    shared = os.path.commonpath([path.parent for path in full])
    return [(path.relative_to(shared).as_posix(), path) for path in full]


def _reading_order(path: Path) -> list[list[Any]]:
    """
    >>> [path.name for path in sorted(map(Path, ("ch10.md", "ch2.md", "Ch1.md")), key=_reading_order)]
    ['Ch1.md', 'ch2.md', 'ch10.md']
    """
    return [
        [int(piece) if number % 2 else piece.casefold() for number, piece in enumerate(_NUMBER.split(part))]
        for part in path.parts
    ]


def _read(files: Sequence[tuple[str, Path]]) -> Iterator[Located]:
    for name, path in files:
        with path.open("rb") as file:
            start = file.read(5)
        if start == b"%PDF-":
            pieces = _paged(name, _pdf_pages(path))
        else:
            text = _text(path)
            if path.suffix.lower() in (".md", ".markdown"):
                pieces = _sections(name, text)
            else:
                pieces = _paged(name, text.split("\f")) if "\f" in text else iter([(name, text)])
        documents = [Document(*part) for title, piece in pieces for part in _parts(title, piece)]
        if not documents:
            raise DataError(
                f"{path}: no text in it"
                + (
                    "; the pages may be pictures: recognise their text (OCR) first."
                    if path.suffix.lower() == ".pdf"
                    else "."
                )
            )
        yield from ((name, document) for document in documents)


def _text(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data:
        raise DataError(
            f"{path}: not a text file (a zero byte at {data.index(0)}); expected UTF-8 text, Markdown or PDF."
        )
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (at byte {error.start}: {error.reason}); save it as UTF-8.") from error


def _pdf_pages(path: Path) -> list[str]:
    try:
        import pypdf
    except ImportError as error:
        raise MissingDependency(f"{path} is a PDF, which needs 'pypdf': pip install 'atommem[files]'.") from error
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError(f"{path}: the PDF is encrypted; save a copy without a password.")
        # pypdf extracts some glyphs as half a character or as NUL.
        return [page.extract_text().encode("utf-8", "replace").decode().replace("\0", " ") for page in reader.pages]
    except DataError:
        raise
    except pypdf.errors.DependencyError as error:
        raise DataError(f"{path}: the PDF is encrypted ({error}); save a copy without a password.") from error
    except Exception as error:  # pypdf raises errors of many types on a damaged file
        raise DataError(f"{path}: the PDF is damaged ({type(error).__name__}: {error}).") from error


def _paged(name: str, pages: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((f"{name}, page {number}", page) for number, page in enumerate(pages, 1))


def _sections(name: str, text: str) -> Iterator[tuple[str, str]]:
    """(title, text) of Markdown before the first heading, and under each heading.

    >>> list(_sections("a.md", "Hello.\\n# Safety\\n## Fire\\nRun.\\n# End\\nBye."))
    [('a.md', 'Hello.\\n'), ('a.md: Safety', ''), ('a.md: Safety › Fire', 'Run.\\n'), ('a.md: End', 'Bye.')]
    """
    path: list[tuple[int, str]] = []  # (level, heading) from the top to the current section
    lines: list[str] = []
    fence = ""

    def section() -> tuple[str, str]:
        return name + (": " + " › ".join(heading for _, heading in path) if path else ""), "".join(lines)

    for line in io.StringIO(text):
        if mark := _FENCE.match(line):
            fence = "" if fence == mark[1] else fence or mark[1]
        heading = None if fence else _HEADING.match(line)
        if heading:
            yield section()
            path, lines = [item for item in path if item[0] < len(heading[1])], []
            path.append((len(heading[1]), heading[2]))
        else:
            lines.append(line)
    yield section()


def _parts(title: str, text: str) -> Iterator[tuple[str, str]]:
    """(title, text) of the parts of a text; none of a blank one. A paragraph that is too long is not split."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if parts and len(parts[-1]) + 2 + len(paragraph) <= _LONGEST_PART:
            parts[-1] += "\n\n" + paragraph
        else:
            parts.append(paragraph)
    stripped = (part.strip("\n") for part in parts if part.strip())
    return ((title if number == 1 else f"{title} ({number})", part) for number, part in enumerate(stripped, 1))


# ------------------------------------------------------------------------------------------------------------ questions


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(location, record) of each row, in the form of the JSON records."""
    if not path.is_file():
        raise DatasetNotFound(f"There is no file {path}, given as data=.")
    reader = csv.DictReader(io.StringIO(_text(path)), strict=True)
    try:
        for row in reader:
            location = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{location}: expected {len(reader.fieldnames or ())} cells as in the header.")
            record: dict[str, Any] = {name: value for name, value in row.items() if value}
            if "answers" in record:
                record["answers"] = record["answers"].split("|")
            if "evidence_text" in record or "evidence_file" in record:
                record["evidence"] = [{key: record.pop(f"evidence_{key}", "") for key in ("file", "text")}]
            yield location, record
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not CSV ({error}).") from error


def _questions(rows: Iterator[tuple[str, dict[str, Any]]], located: Sequence[Located]) -> Iterator[Question]:
    seen: dict[str, str] = {}
    for number, (location, record) in enumerate(rows, 1):
        try:
            question = _question(record, f"q{number}", located)
            if question.id in seen:
                raise DataError(f"field 'id' is {question.id!r}, as in {seen[question.id]}; ids must differ.")
        except DataError as error:
            raise DataError(f"{location}: {error}") from error
        seen[question.id] = location
        yield question


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
        raise DataError(f"field '{where}.file' must be one of {', '.join(names)}; got {file!r}.")
    words = re.compile(r"\s+".join(map(re.escape, text.split())))
    for name, document in located:
        if name == file and (match := words.search(document.text)):
            return Evidence(document.title, match[0])
    raise DataError(f"field '{where}.text' is in no document (page, section or part) of {file}: {text[:80]!r}.")
