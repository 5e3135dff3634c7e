"""Tasks over your own files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import atommem_env  # noqa: F401
from atommem_env.chunking import chunk_documents
from atommem_env.errors import DataError, DatasetNotFound, MissingDependency, SettingError
from atommem_env.tasks.files import FilesSource
from atommem_env.tokens import BuiltinTokenizer
from atommem_env.types import UNGRADED, Document, Evidence


def write_pdf(path: Path, pages: list[str]) -> Path:
    """A PDF with one line of text on each page, and nothing that is not needed."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {5 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    entries = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{entries}"
    tail = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    path.write_bytes(data + (head + tail).encode())
    return path


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A folder with a file of each kind, and some that are none."""
    folder = tmp_path / "book"
    (folder / "10 more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "1 start.txt").write_text("Ada lives\nin Rome.", encoding="utf-8")
    (folder / "2 rules.md").write_text(
        "Read this.\n\n# Safety\n\n## Fire\n\nRun.\n```\n# no heading\n```\n## Water #\n\nSwim.\n\n# End\nBye.\n"
    )
    (folder / "10 more" / "notes.TXT").write_bytes("\ufeffPage one, é.\r\n\fPage\r\ntwo.\n\f \n\fPage four.".encode())
    for name in ("picture.png", ".secret.txt", ".hidden/a.txt"):
        (folder / name).write_text("no")
    write_pdf(folder / "3 report.pdf", ["The first page.", "", "Bo cooks for Ada."])
    return folder


def ask(files: Any, **options: Any) -> FilesSource:
    return FilesSource(files, **({"question": "Who?"} | options))


def write_questions(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_files_become_documents_in_reading_order(book: Path) -> None:
    pytest.importorskip("pypdf")
    assert ask(book).documents == (
        Document("1 start.txt", "Ada lives\nin Rome."),
        Document("2 rules.md", "Read this."),
        Document("2 rules.md: Safety › Fire", "Run.\n```\n# no heading\n```"),
        Document("2 rules.md: Safety › Water", "Swim."),
        Document("2 rules.md: End", "Bye."),
        Document("3 report.pdf, page 1", "The first page."),
        Document("3 report.pdf, page 3", "Bo cooks for Ada."),
        Document("10 more/notes.TXT, page 1", "Page one, é."),
        Document("10 more/notes.TXT, page 2", "Page\ntwo."),
        Document("10 more/notes.TXT, page 4", "Page four."),
    )


def test_a_list_keeps_its_order_and_a_named_file_may_be_called_anything(book: Path) -> None:
    (book / "LICENSE").write_text("Free.")
    source = ask([str(book / "10 more"), book / "LICENSE", book / "1 start.txt"])
    assert [document.title for document in source.documents][2:] == [
        "10 more/notes.TXT, page 4",
        "LICENSE",
        "1 start.txt",
    ]
    assert ask(book / "1 start.txt").documents[0].title == "1 start.txt"


def test_a_long_text_is_parted_between_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}: " + f"word{number} " * 100 for number in range(40)]
    paragraphs[20] = "One long paragraph. " * 1000
    (tmp_path / "long.txt").write_text("\n \n".join(paragraphs))
    documents = ask(tmp_path / "long.txt").documents
    assert [document.title for document in documents[:3]] == ["long.txt", "long.txt (2)", "long.txt (3)"]
    assert "\n\n".join(document.text for document in documents) == "\n\n".join(paragraphs)
    assert max(len(document.text) for document in documents if "One long" not in document.text) <= 8000
    chunks = chunk_documents(documents, 4096, BuiltinTokenizer())
    assert [word for chunk in chunks for word in chunk.split() if word.startswith("word")] == [
        f"word{number}" for number in range(40) if number != 20 for _ in range(100)
    ]


ROWS: list[dict[str, Any]] = [
    {"question": "Where does Ada live?", "answer": "Rome"},
    {
        "id": "cook",
        "question": "Who cooks for Ada?",
        "answers": ["Bo", "Bob", "Bo"],
        "evidence": [{"file": "1 start.txt", "text": "lives in  Rome"}, {"file": "2 rules.md", "text": "Swim."}],
    },
    {"question": "Why?", "answers": []},
]


def test_questions_golds_and_evidence(book: Path, tmp_path: Path) -> None:
    source = FilesSource([book / "1 start.txt", book / "2 rules.md"], data=write_questions(tmp_path / "q.jsonl", ROWS))
    first, second, third = (source.task(index, seed=0).questions[0] for index in range(len(source)))
    assert (first.id, first.text, first.answers, first.evidence, first.hops) == (
        "q1", "Where does Ada live?", ("Rome",), (), 1,
    )  # fmt: skip
    assert (second.id, second.answers, second.hops) == ("cook", ("Bo", "Bob"), 2)
    assert second.evidence == (
        Evidence("1 start.txt", "lives\nin Rome"),
        Evidence("2 rules.md: Safety › Water", "Swim."),
    )
    assert (third.answers, third.kind, first.kind) == ((), UNGRADED, "question")


def test_csv_says_the_same_as_json(book: Path, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(
        "\ufeffid,question,answer,answers,evidence_file,evidence_text\r\n"
        ",Where does Ada live?,Rome,,,\r\n"
        'cook,"Who cooks\nfor Ada?",,Bo|Bob,1 start.txt,lives in Rome\r\n'
    )
    rows = [ROWS[0], ROWS[1] | {"question": "Who cooks\nfor Ada?", "evidence": ROWS[1]["evidence"][:1]}]
    files = [book / "1 start.txt", book / "2 rules.md"]
    from_json = FilesSource(files, data=write_questions(tmp_path / "q.jsonl", rows))
    assert FilesSource(files, data=tmp_path / "q.csv").all_questions == from_json.all_questions


def test_tasks_group_questions_and_leave_none_out(book: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "q.jsonl", [{"question": f"{n}?", "answer": "a"} for n in range(25)])
    for questions, tasks in ((1, 25), (10, 3), ("sampled", None)):
        source = FilesSource(book / "1 start.txt", data=data, questions=questions)
        assert tasks in (None, len(source))
        drawn = [source.task(index, seed=index) for index in range(len(source))]
        assert [question.text for task in drawn for question in task.questions] == [f"{n}?" for n in range(25)]
        assert all(task.documents == source.documents for task in drawn)
        assert pickle.loads(pickle.dumps(source)).task(1, seed=7) == source.task(1, seed=7)
        with pytest.raises(SettingError, match="index must be from 0 to"):
            source.task(len(source), seed=0)


def play(env: gym.Env[Any, Any], answer: str) -> tuple[str, float, dict[str, Any]]:
    """What was read, the last reward and the last info."""
    observation, _ = env.reset(seed=0)
    read, over, reward, info = "", False, 0.0, {}
    while not over:
        read += observation["chunk"]
        reply = f"<final_answer>{answer}</final_answer>" if observation["phase"] == "answer" else "."
        observation, reward, terminated, truncated, info = env.step(reply)  # type: ignore[assignment]
        over = terminated or truncated
    return read, reward, info


def test_an_episode_scores_with_golds_and_goes_without(book: Path) -> None:
    options = {"files": book / "1 start.txt", "question": "Where does Ada live?", "durability": "off"}
    read, reward, info = play(gym.make("AtomMem-Files", answers=["Rome", "Roma"], **options), "the Roma!")
    assert "Ada lives\nin Rome." in read
    assert (reward, info["em"], info["golds"]) == (1.0, (1.0,), (("Rome", "Roma"),))
    _, reward, info = play(gym.make("AtomMem-Files", **options), "Rome")
    assert (reward, info["em"], info["f1"], info["golds"], info["predictions"]) == (
        0,
        (None,),
        (None,),
        ((),),
        ("Rome",),
    )


def proof(item: Any) -> dict[str, Any]:
    return {"question": "Who?", "answer": "a", "evidence": [item]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?"}, "either the field 'answer' or the field 'answers'"),
        ({"question": "Who?", "answer": "a", "answers": ["a"]}, "either the field 'answer' or"),
        ({"question": "Who?", "answer": 3}, "'answer' must be text, got 3"),
        ({"question": "Who?", "answers": "a"}, "'answers' must be a list"),
        ({"question": "Who?", "answers": ["a", " "]}, r"'answers\[1\]' is blank"),
        ({"answer": "a"}, "'question' is missing"),
        ({"question": "Who?", "answer": "a", "id": "first"}, "'id' is 'first', as in .*q.jsonl, line 1"),
        (proof({"file": "x.txt", "text": "a"}), "'evidence.0..file' must be one of 1 start.txt; got 'x.txt'"),
        (proof({"file": "1 start.txt", "text": "Ada flies"}), "'evidence.0..text' is in no document"),
        (proof({"file": "1 start.txt"}), "'evidence.0..text' is missing"),
        (proof("Ada"), "'evidence.0.' must be an object"),
    ],
)
def test_a_bad_question_is_named_with_file_and_line(book: Path, tmp_path: Path, row: Any, message: str) -> None:
    data = write_questions(tmp_path / "q.jsonl", [{"id": "first", "question": "?", "answer": "a"}, row])
    with pytest.raises(DataError, match=rf"q\.jsonl, line 2: .*{message}"):
        FilesSource(book / "1 start.txt", data=data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answer\nWho?,Bo,more\n", "line 2: expected 2 cells"),
        ("question,answer\nWho?\n", "line 2: expected 2 cells"),
        ('question,answer\nWho?,"Bo" x\n', "line 2: not CSV"),
        ("question,answer\nWho?,\n", "line 2: expected either the field 'answer'"),
        ("text,answer\nWho?,Bo\n", "line 2: field 'question' is missing"),
        ("question,answer\n", "no question in it"),
        ("", "no question in it"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(book: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q.csv").write_text(content)
    with pytest.raises(DataError, match=rf"q\.csv.*{message}"):
        FilesSource(book / "1 start.txt", data=tmp_path / "q.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "Frühling".encode("latin-1"), "not UTF-8 text .at byte 2"),
        ("wide.md", "Frühling".encode("utf-16"), "not UTF-8 text|zero byte"),
        ("garbage.txt", bytes(range(256)), "zero byte at 0"),
        ("blank.md", b" \n\n", "no text in it"),
        ("empty.txt", b"", "no text in it"),
        ("broken.pdf", b"%PDF-1.4\n" + bytes(range(256)) * 4, "the PDF is damaged"),
        ("short.pdf", b"%PDF-1.4\n", "the PDF is damaged"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    pytest.importorskip("pypdf")
    (tmp_path / name).write_bytes(content)
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=rf"{name}: .*({message})"):
            ask(given)


def test_pdf_without_text_cut_off_or_encrypted(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    whole = write_pdf(tmp_path / "whole.pdf", ["Secret."])
    with pytest.raises(DataError, match=r"blank\.pdf: no text in it; the pages may be pictures"):
        ask(write_pdf(tmp_path / "blank.pdf", ["", ""]))
    for password, opens in (("key", False), ("", True)):
        writer = pypdf.PdfWriter(clone_from=whole)
        writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
        writer.write(tmp_path / "locked.pdf")
        if opens:  # one that only forbids printing and the like
            assert ask(tmp_path / "locked.pdf").documents[0].text == "Secret."
        else:
            with pytest.raises(DataError, match=r"locked\.pdf: the PDF is encrypted"):
                ask(tmp_path / "locked.pdf")
    (tmp_path / "cut.pdf").write_bytes(whole.read_bytes()[:150])
    with pytest.raises(DataError, match=r"cut\.pdf: "):
        ask(tmp_path / "cut.pdf")


def test_pdf_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(MissingDependency, match=r"pip install 'atommem\[files\]'"):
        ask(write_pdf(tmp_path / "a.pdf", ["Text."]))


def test_text_needs_no_package(book: Path) -> None:
    code = (
        "import sys; from atommem_env.tasks.files import FilesSource\n"
        "FilesSource(sys.argv[1], question='?'); print('pypdf' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(book / "2 rules.md")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_bad_settings(book: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "picture.png").write_bytes(b"")
    for options, message in (
        ({}, "either data="),
        ({"data": "q.jsonl", "question": "Who?"}, "either data="),
        ({"data": "q.jsonl", "answers": ["a"]}, "answers= goes with question="),
        ({"question": "Who?", "questions": 11}, "questions must be"),
        ({"question": "Who?", "files": []}, "files= must name"),
        ({"question": "Who?", "files": [book, book / "1 start.txt"]}, "start.txt twice"),
    ):
        with pytest.raises(SettingError, match=message):
            FilesSource(**{"files": book / "1 start.txt", **options})
    with pytest.raises(SettingError, match="files= must name"):
        gym.make("AtomMem-Files")
    with pytest.raises(DatasetNotFound, match=r"no file or folder .*absent"):
        ask(tmp_path / "absent")
    with pytest.raises(DataError, match=r"nothing: no file in this folder that ends in \.txt"):
        ask(tmp_path / "nothing")
    for name in ("absent.csv", "absent.jsonl"):
        with pytest.raises(DatasetNotFound, match=rf"no file .*{name}"):
            FilesSource(book / "1 start.txt", data=tmp_path / name)
    with pytest.raises(DataError, match=r"question=: field 'question' is blank"):
        ask(book / "1 start.txt", question=" ")
