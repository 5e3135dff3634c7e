"""Tasks over your own files: text, Markdown, HTML, PDF, Word and tables."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from atommem_env.errors import DataError, DatasetNotFound, SettingError
from atommem_env.tasks.catalogue import sha256_of
from atommem_env.tasks.file_types import OTHER_DOCUMENTS, SUFFIXES, UnreadableFile, short_path
from atommem_env.tasks.folders import visible_files
from atommem_env.tasks.haystack import check_questions, group_starts
from atommem_env.tasks.question_files import Located, parse_questions, read_questions
from atommem_env.tasks.readers import read_documents
from atommem_env.tasks.records import check_range
from atommem_env.types import Task


class FilesSource:
    """Tasks over your own files, in order from the first page to the last: no shuffling, no distractors.

        gym.make("AtomMem-Files", files="handbook/", data="questions.jsonl")
        gym.make("AtomMem-Files", files=["part1.pdf", "part2.pdf"], question="Who signs the contract?")

    **Files** are read in the order given; those of a folder, and of its subfolders, by name, numbers by value (`ch2` before
    `ch10`). From a folder, files that end in .txt, .text, .md, .markdown, .html, .htm, .xhtml, .pdf, .docx, .csv or .tsv are
    used, except hidden ones and the file of questions; documents of other types, such as .doc or .epub, are an error, and
    pictures and the like are left out. A file that is listed itself can have any name. What a file is, its content says before
    its name: one of no readable type is an error that names it. At most 64 MiB of a file are read as text. Each file is split
    into documents:

    - PDF: one for each page with text, titled `report.pdf, page 3`.
    - Markdown, HTML, Word: one for each section under a heading, titled `notes.md: Safety › Fire`. Of HTML and Word the text
      alone, the cells of a table parted by ` | `; of Word not the headers and footers of its pages.
    - CSV, TSV: the rows under the first one; of a long table some at a time, titled `prices.csv, rows 2 to 81`.
    - Text: one for each page if form feeds separate pages, titled `log.txt, page 3`; else one, titled `log.txt`.
    - Text longer than 8,000 characters is split between paragraphs, titled `log.txt (2)` and so on from the second part.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark; of HTML also what the page declares. PDF, HTML and Word need the
    extra `files`.

    **Questions** are JSON lines, a JSON list, or CSV (with a header in upper or lower case, named `.csv` or `.tsv`, its cells
    separated by comma, semicolon or tab), with the fields

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
        skip_unreadable: leave out files that cannot be read, with a warning that names them, instead of an error.

    Raises:
        DatasetNotFound: a file does not exist.
        DataError: files cannot be read, or a question has another form; the message names the files, or file and line.
        MissingDependency: a PDF, HTML or Word file is given, but the extra `files` is not installed.
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
        skip_unreadable: bool = False,
    ) -> None:
        check_questions(questions)
        given = [files] if isinstance(files, str | Path) else list(files)
        if not given:
            raise SettingError("files= must name a file, a folder, or a list of them, which the questions are about.")
        if (data is None) == (question is None):
            raise SettingError(f"Give either data= (a file of questions) or question=, got {data!r} and {question!r}.")
        if answers and question is None:
            raise SettingError("answers= goes with question=; in a file of questions each has its own.")
        path = None if data is None else Path(data).expanduser()
        located, self.file_digests = _read(_find([Path(item).expanduser() for item in given], path), skip_unreadable)
        """role -> SHA-256: "data", the file of questions, and "files/NAME" for each file that was read."""
        if path is not None:
            self.all_questions = read_questions(path, located)
            self.file_digests["data"] = sha256_of(path)
        else:
            golds = [answers] if isinstance(answers, str) else list(answers)
            self.all_questions = parse_questions(
                iter([("question=", {"question": question, "answers": golds})]), located
            )
        self.documents = tuple(document for _, document in located)
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


def _find(given: Sequence[Path], data: Path | None) -> list[tuple[str, Path]]:
    """(name, path) of every file, in order; a name is the path relative to the deepest common folder.

    The file of questions, which has the golds, is never among them.
    """
    questions = data.resolve() if data else None
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            suffixes = {*SUFFIXES, *OTHER_DOCUMENTS}
            inside = [
                file for file in visible_files(path) if file.suffix.lower() in suffixes and file.resolve() != questions
            ]
            if not inside:
                raise DataError(f"{short_path(path)}: no file in this folder that ends in {', '.join(SUFFIXES)}.")
            paths += inside
        elif path.is_file():
            if path.resolve() == questions:
                raise SettingError(f"{short_path(path)} is both files= and data=: its golds would be shown.")
            paths.append(path)
        else:
            raise DatasetNotFound(f"There is no file or folder {path}, given as files=.")
    full = [path.resolve() for path in paths]
    if len(set(full)) < len(full):
        raise SettingError(f"files= names {next(path for path in full if full.count(path) > 1)} twice.")
    shared = os.path.commonpath([path.parent for path in full])
    return [(path.relative_to(shared).as_posix(), path) for path in full]


def _read(files: Sequence[tuple[str, Path]], skip_unreadable: bool) -> tuple[list[Located], dict[str, str]]:
    """The documents of all files, and role -> SHA-256 of those that were read."""
    located: list[Located] = []
    digests: dict[str, str] = {}
    failed: dict[str, UnreadableFile] = {}
    for name, path in files:
        try:
            located += ((name, document) for document in read_documents(name, path))
        except UnreadableFile as error:
            failed[name] = error
        else:
            digests[f"files/{name}"] = sha256_of(path)
    if failed:
        if len(failed) == len(files) == 1:
            raise next(iter(failed.values()))
        listed = "; ".join(f"{name[-40:]} ({error.what[:60]})" for name, error in list(failed.items())[:3])
        listed += f" … and {len(failed) - 3} more" if len(failed) > 3 else ""
        if not skip_unreadable or not located:
            way_out = ". skip_unreadable=True leaves them out." if located else "."
            count = f"{len(failed)} of {len(files)} files"
            raise DataError(f"{count} cannot be read: {listed}"[: 300 - len(way_out)] + way_out)
        warnings.warn(f"Left out, since they cannot be read: {listed}", stacklevel=3)
    return located, digests
