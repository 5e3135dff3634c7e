"""Questions as spreadsheets write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from atommem_env.errors import DataError, SettingError
from atommem_env.tasks.files import FilesSource
from atommem_env.tasks.question_files import UNGRADED, read_questions
from atommem_env.types import Question

ROWS = (
    Question("q1", "Who, then?", ("Ada",), kind="question"),
    Question("q2", 'He said "so"', ("Bo; Bob",), kind="question"),
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        'question,answer\n"Who, then?",Ada\n"He said ""so""",Bo; Bob\n',
        'Question;ANSWER\r\nWho, then?;Ada\r\n"He said ""so""";"Bo; Bob"\r\n',
        'sep=;\r\nQuestion;Answer\r\nWho, then?;Ada\r\n;\r\n\r\n"He said ""so""";"Bo; Bob"\r\n',
        '\n question\tanswer \tnotes\t\t\nWho, then?\tAda\tcheck\t\t\n\t\t\t\t\n"He said ""so"""\tBo; Bob\t\t\t\n',
    ],
    ids=["commas", "semicolons", "sep line and empty rows", "tabs and empty columns"],
)
def test_every_spreadsheet_says_the_same(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "q.csv").write_bytes(text.encode(encoding))
    assert read_questions(tmp_path / "q.csv", []) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Question,question,answer\nWho?,Who?,Ada\n", "its header has the column 'question' twice"),
        (b"q;a\nWho?;Ada\n", "its header must have a column 'question', got q, a"),
        (b"question,answer\nWho?,Ada,Bo\n", "line 2: expected 2 cells as in the header, got 3"),
        (b"PK\x03\x04", "a damaged or encrypted zip archive"),
        (b"<!DOCTYPE html><table>", "not CSV but HTML"),
        (b"\x89PNG\r\n\x1a\n\0", "a PNG picture"),
        (b"question,answer\n", "no question in it"),
        (",".join(f"{n}{'x' * 400}" for n in range(50)).encode(), "got 0x+…, 1x+…, .* .50 in all"),
    ],
)
def test_what_is_no_table_of_questions_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "q.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_questions(tmp_path / "q.csv", [])
    assert len(str(caught.value)) <= 300


def test_the_file_of_questions_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ada lives in Rome.")
    (tmp_path / "q.csv").write_text("question,answer\nWho?,Ada\n")
    source = FilesSource(tmp_path, data=tmp_path / "q.csv")
    assert [document.title for document in source.documents] == ["a.txt"]
    with pytest.raises(SettingError, match=r"q\.csv is both files= and data=: its golds would be shown"):
        FilesSource([tmp_path / "a.txt", tmp_path / "q.csv"], data=tmp_path / "q.csv")


def test_a_question_without_a_gold_is_the_same_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ada lives in Rome.")
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "answers": []}')
    from_file = FilesSource(tmp_path / "a.txt", data=tmp_path / "q.jsonl").task(0, seed=0).questions
    given = FilesSource(tmp_path / "a.txt", question="Who?").task(0, seed=0).questions
    assert from_file == given == (Question("q1", "Who?", (), kind=UNGRADED),)


def test_unreadable_files_of_a_folder_are_listed_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ada lives in Rome.")
    (tmp_path / "b.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (tmp_path / "c.epub").write_bytes(b"not even a zip")
    (tmp_path / "d.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError) as caught:
        FilesSource(tmp_path, question="Who?")
    assert str(caught.value) == (
        "2 of 3 files cannot be read: b.txt (a PNG picture); c.epub (an e-book (EPUB) by its name). "
        "skip_unreadable=True leaves them out."
    )
    with pytest.warns(UserWarning, match=r"Left out, since they cannot be read: b\.txt \(a PNG picture\); c\.epub"):
        source = FilesSource(tmp_path, question="Who?", skip_unreadable=True)
    assert [document.title for document in source.documents] == ["a.txt"]
    assert set(source.file_digests) == {"files/a.txt"}
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"2 of 2 files cannot be read: .*\.$"):
        FilesSource(tmp_path, question="Who?", skip_unreadable=True)
    for number in range(50):
        (tmp_path / f"{'long' * 40}{number}.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    with pytest.raises(DataError, match=r"52 of 52 files cannot be read: .* … and 49 more\.$") as caught:
        FilesSource(tmp_path, question="Who?")
    assert len(str(caught.value)) <= 300
