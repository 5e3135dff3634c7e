"""Imports: complete or absent, verified, and opened again."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atommem_env.errors import DataError, DatasetNotFound, SettingError
from atommem_env.tasks.catalogue import (
    ImportReport,
    import_dataset,
    imported_splits,
    open_dataset,
    open_file,
    verify_dataset,
)
from atommem_env.tasks.catalogue_commands import import_command, list_command, verify_command


def row(number: int) -> dict[str, Any]:
    return {
        "_id": f"q{number}",
        "question": f"What is {number}?",
        "answer": f"answer {number}",
        "type": "bridge",
        "context": [[f"T{number + k}", [f"Sentence {number + k}.", " Another."]] for k in range(4)],
        "supporting_facts": [[f"T{number}", 0], [f"T{number + 1}", 1]],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"title": f"C{number}", "text": f"Corpus {number}."} for number in range(6)]
    # The same as a document of row 0, but for the spaces; the same as another of the corpus; blank.
    rows += [{"title": "T1", "text": "Sentence 1.  Another. "}, rows[0], {"title": "Blank", "text": " "}]
    return write(tmp_path / "corpus", rows)


def test_list_lines_and_gzip_import_the_same(tmp_path: Path, own_data_folder: Path) -> None:
    rows = [row(number) for number in range(5)]
    lines = write(tmp_path / "lines", rows)
    (tmp_path / "list").write_text(json.dumps(rows, indent=1))
    (tmp_path / "list.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "lines.gz").write_bytes(gzip.compress(lines.read_bytes()))
    reports = [
        import_dataset("hotpotqa", name.replace(".", "_"), tmp_path / name)
        for name in ("lines", "list", "list.gz", "lines.gz")
    ]
    assert all(report.files == reports[0].files for report in reports)
    assert reports[0].rows == 5
    assert reports[0].documents == 8
    assert imported_splits("hotpotqa") == ["lines", "lines_gz", "list", "list_gz"]


def test_same_documents_are_kept_once(tmp_path: Path, own_data_folder: Path, corpus: Path) -> None:
    report = import_dataset("hotpotqa", "dev", write(tmp_path / "rows", [row(0), row(1)]), corpus)
    assert (report.documents, report.corpus_documents, report.corpus_left_out) == (5 + 6, 7, 2)
    questions = open_dataset("hotpotqa", "dev")
    assert sorted(questions.documents[number][0] for number in questions.pool) == [f"C{n}" for n in range(6)] + ["T1"]
    assert questions.rows[1]["documents"][:3] == questions.rows[0]["documents"][1:]


def test_new_import_takes_the_place_of_the_old(tmp_path: Path, own_data_folder: Path, corpus: Path) -> None:
    import_dataset("hotpotqa", "dev", write(tmp_path / "rows", [row(0)]), corpus)
    old = open_dataset("hotpotqa", "dev")
    before = len(files_in(own_data_folder))
    import_dataset("hotpotqa", "dev", write(tmp_path / "rows", [row(7), row(8)]))
    assert [open_dataset("hotpotqa", "dev").rows[index]["id"] for index in (0, 1)] == ["q7", "q8"]
    assert len(files_in(own_data_folder)) == before  # nothing of the old one is left
    assert old.rows[0]["id"] == "q0"  # and who has it open still reads it


# ------------------------------------------------------------------------------------------------------ files of the hub


def official(dataset: str, number: int) -> dict[str, Any]:
    """A row as the official file has it."""
    if dataset != "musique":
        return row(number) | ({"evidences": [["a", "b", "c"]]} if dataset == "2wikimultihopqa" else {"level": "hard"})
    paragraphs = [
        {"idx": k, "title": f"T{number + k}", "paragraph_text": f"Text {number + k}.", "is_supporting": k < 2}
        for k in range(4)
    ]
    return {
        "id": f"2hop__{number}_1",
        "question": f"What is {number}?",
        "answer": f"answer {number}",
        "answer_aliases": [f"alias {number}"] if number % 2 else [],
        "answerable": True,
        "paragraphs": paragraphs,
        "question_decomposition": [{"id": k, "question": "?", "answer": "!"} for k in range(2)],
    }


def by_column(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [item[name] for item in rows] for name in rows[0]}


def as_structs(raw: dict[str, Any]) -> dict[str, Any]:
    """Nested rows as columns: hotpotqa/hotpot_qa and framolfese/2WikiMultihopQA."""
    raw = {"id": raw["_id"]} | {name: value for name, value in raw.items() if name not in ("_id", "evidences")}
    raw["context"] = by_column([{"title": title, "sentences": texts} for title, texts in raw["context"]])
    raw["supporting_facts"] = by_column([{"title": title, "sent_id": at} for title, at in raw["supporting_facts"]])
    return raw


def as_json_text(raw: dict[str, Any]) -> dict[str, Any]:
    """Nested fields as text: xanhho/2WikiMultihopQA."""
    nested = ("context", "supporting_facts", "evidences", "paragraphs", "question_decomposition")
    return {name: json.dumps(value) if name in nested else value for name, value in raw.items()}


def musique_columns(raw: dict[str, Any]) -> dict[str, Any]:
    return raw | {name: by_column(raw[name]) for name in ("paragraphs", "question_decomposition")}


HUB: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("hotpotqa", as_structs),
    ("2wikimultihopqa", as_structs),
    ("2wikimultihopqa", as_json_text),
    ("musique", lambda raw: raw),
    ("musique", musique_columns),
    ("musique", as_json_text),
]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("dataset", "conversion"), HUB)
def test_parquet_of_the_hub_imports_as_the_official_file(
    tmp_path: Path, dataset: str, conversion: Callable[[dict[str, Any]], dict[str, Any]], shards: int
) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [official(dataset, number) for number in range(7)]
    expected = import_dataset(dataset, "official", write(tmp_path / "rows", rows))
    files = [tmp_path / f"{shard:05}-of-{shards:05}.parquet" for shard in range(shards)]
    for shard, file in enumerate(files):
        part = [conversion(raw) for raw in rows[7 * shard // shards : 7 * (shard + 1) // shards]]
        parquet.write_table(pyarrow.Table.from_pylist(part), file, row_group_size=2)
    report = import_dataset(dataset, "hub", files)
    assert (report.rows, report.files) == (7, expected.files)
    assert [Path(source.path) for source in report.sources] == files
    assert verify_dataset(dataset, "hub") == report


@pytest.mark.parametrize("dataset", ["hotpotqa", "2wikimultihopqa", "musique"])
@pytest.mark.parametrize("form", ["lines", "list", "gzip", "parquet"])
def test_bad_rows_are_named_in_every_form_of_every_dataset(
    tmp_path: Path, own_data_folder: Path, form: str, dataset: str
) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    good, path = write(tmp_path / "good", [official(dataset, 9)]), tmp_path / "bad.file"
    import_dataset(dataset, "dev", good)
    before = files_in(own_data_folder)
    rows = [official(dataset, number) for number in range(3)]
    name = "id" if dataset == "musique" else "_id"
    nested = "paragraphs" if dataset == "musique" else "context"
    location = {"list": "index 2 of the list", "parquet": "row 2"}.get(form, "line 3")
    for change, message in (
        ({"answer": None}, "field 'answer' must be text, got None"),
        ({"question": " "}, "field 'question' is blank"),
        ({name: rows[0][name]}, f"field 'id' is '{rows[0][name]}', as in {path}, "),
        ({nested: None}, f"field '{nested}' must be a list, got "),
    ):
        bad = [*rows[:2], rows[2] | change]
        if form == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(list(map(as_json_text, bad))), path)
        elif form == "list":
            path.write_text(json.dumps(bad, indent=1))
        else:
            write(path, bad)
            if form == "gzip":
                path.write_bytes(gzip.compress(path.read_bytes()))
        with pytest.raises(DataError) as caught:
            import_dataset(dataset, "dev", [good, path])
        assert f"{path}, {location}: {message}" in str(caught.value)
    assert files_in(own_data_folder) == before


def test_an_id_of_another_shard_is_named_with_it(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", [row(0), row(1)]), write(tmp_path / "b", [row(2), row(1)])
    with pytest.raises(DataError, match=r"/b, line 2: field 'id' is 'q1', as in .*/a, line 2"):
        import_dataset("hotpotqa", "dev", [first, second])
    with pytest.raises(SettingError, match="at least one file"):
        import_dataset("hotpotqa", "dev", [])


BAD: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "missing field": (
        "rows, line 2: field 'answer' is missing",
        lambda rows, corpus: write(rows, [row(0), {k: v for k, v in row(1).items() if k != "answer"}]),
    ),
    "wrong type": (
        "rows, line 1: field 'question' must be text, got 5",
        lambda rows, corpus: write(rows, [row(0) | {"question": 5}]),
    ),
    "wrong type in a list": (
        "rows, index 1 of the list: field 'context[0].sentences' must be a list, got 'one text'",
        lambda rows, corpus: rows.write_text(json.dumps([row(0), row(1) | {"context": [["T1", "one text"]]}])),
    ),
    "duplicate id": (
        "rows, line 3: field 'id' is 'q0', as in",
        lambda rows, corpus: write(rows, [row(0), row(1), row(0)]),
    ),
    "truncated gzip": (
        "rows: damaged or truncated gzip",
        lambda rows, corpus: rows.write_bytes(gzip.compress(json.dumps([row(n) for n in range(99)]).encode())[:-200]),
    ),
    "not JSON": ("rows, line 1: not JSON", lambda rows, corpus: rows.write_text("<html>not found</html>")),
    "another dataset": (
        "rows, line 1: field 'context' is missing",
        lambda rows, corpus: write(rows, [{"id": "2hop__1_2", "question": "?", "paragraphs": []}]),
    ),
    "no row": ("rows: no usable hotpotqa question", lambda rows, corpus: rows.write_text("[]")),
    "corpus without text": (
        "corpus, line 2: field 'text' is missing",
        lambda rows, corpus: write(corpus, [{"title": "A", "text": "a"}, {"title": "B"}]),
    ),
    "corpus without title": (
        "corpus, line 1: field 'title' must be text, got None",
        lambda rows, corpus: write(corpus, [{"title": None, "text": "a"}]),
    ),
    "empty corpus": ("corpus: no document", lambda rows, corpus: corpus.write_text("")),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("action", [import_dataset, open_file])
def test_bad_data_are_named_and_change_nothing(
    tmp_path: Path,
    own_data_folder: Path,
    corpus: Path,
    case: str,
    action: Callable[[str, str, Path, Path], object],
) -> None:
    rows = write(tmp_path / "rows", [row(0), row(1)])
    import_dataset("hotpotqa", "dev", rows, corpus)
    before = files_in(own_data_folder)
    message, spoil = BAD[case]
    spoil(rows, corpus)
    with pytest.raises(DataError) as caught:
        action("hotpotqa", "dev", rows, corpus)
    assert f"{tmp_path}/{message}" in str(caught.value)
    assert files_in(own_data_folder) == before


def test_bad_names(tmp_path: Path, own_data_folder: Path) -> None:
    file = write(tmp_path / "rows", [row(0)])
    with pytest.raises(SettingError, match="dataset must be one of hotpotqa, 2wikimultihopqa, musique"):
        import_dataset("squad", "dev", file)
    with pytest.raises(SettingError, match="split must be a name"):
        import_dataset("hotpotqa", "../dev", file)
    with pytest.raises(DatasetNotFound, match="no file"):
        import_dataset("hotpotqa", "dev", tmp_path / "nothing")
    assert files_in(own_data_folder) == {}


def test_nothing_imported_says_the_command_and_the_splits(tmp_path: Path, own_data_folder: Path) -> None:
    with pytest.raises(DatasetNotFound, match=r"atommem data import musique --split dev FILE --corpus FILE"):
        open_dataset("musique", "dev")
    import_dataset("hotpotqa", "train", write(tmp_path / "rows", [row(0)]))
    with pytest.raises(DatasetNotFound, match=r"imported: train.*atommem data import hotpotqa --split dev"):
        open_dataset("hotpotqa", "dev")


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.offsets.npy", "documents.jsonl", "documents.offsets.npy", "identity.npy", "pool.npy"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_verify_sees_damage(tmp_path: Path, own_data_folder: Path, corpus: Path, name: str, damage: str) -> None:
    report = import_dataset("hotpotqa", "dev", write(tmp_path / "rows", [row(0), row(1)]), corpus)
    assert verify_dataset("hotpotqa", "dev") == report
    path = Path(report.folder, name)
    content = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(content[:-1] if damage == "cut" else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(DataError, match=rf"{name}.*import it again: atommem data import hotpotqa --split dev"):
        verify_dataset("hotpotqa", "dev")


def test_file_is_imported_once_and_again_when_it_changes(tmp_path: Path, own_data_folder: Path) -> None:
    file = write(tmp_path / "rows", [row(0)])
    first = open_file("hotpotqa", "dev", file)
    before = {path: path.stat().st_mtime_ns for path in files_in(own_data_folder)}
    assert open_file("hotpotqa", "dev", file).report == first.report
    assert {path: path.stat().st_mtime_ns for path in files_in(own_data_folder)} == before
    write(file, [row(0), row(1)])
    assert len(open_file("hotpotqa", "dev", file).rows) == 2


def test_processes_that_open_a_file_at_once(tmp_path: Path, own_data_folder: Path) -> None:
    file = write(tmp_path / "rows", [row(number) for number in range(300)])
    start = time.time() + 1.5
    program = (
        "import sys, time; from pathlib import Path; from atommem_env.tasks.catalogue import open_file\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "print(len(open_file('hotpotqa', 'dev', Path(sys.argv[1])).rows))"
    )
    command = [sys.executable, "-c", program, str(file), str(start)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0].strip() for process in processes] == ["300"] * 4
    assert len(list((own_data_folder / "cache").iterdir())) == 1


ROWS = {
    ("hotpotqa", "dev"): 1640,
    ("2wikimultihopqa", "dev"): 445,
    ("2wikimultihopqa", "train"): 496,
    ("musique", "dev"): 315,  # fault 9: the public script keeps 200
}


@pytest.mark.parametrize(("dataset", "split"), ROWS)
def test_fault_9_all_rows_of_real_files_are_imported(
    shared_data: Path, own_data_folder: Path, dataset: str, split: str
) -> None:
    report = import_dataset(
        dataset, split, shared_data / f"{dataset}_{split}.jsonl.gz", shared_data / f"{dataset}_corpus.jsonl.gz"
    )
    assert report.rows == ROWS[dataset, split]
    assert report.unanswerable == 0
    repaired = {"dev": [2, 1], "train": [6]} if dataset == "2wikimultihopqa" else {}
    assert sorted(report.repairs.values(), reverse=True) == repaired.get(split, [])
    # Every document of a question of these files is in the corpus too.
    corpus = {"hotpotqa": 31_313, "2wikimultihopqa": 12_014, "musique": 14_831}[dataset]
    assert report.corpus_documents == corpus
    questions = open_dataset(dataset, split)
    assert len(set(questions.identity.tolist())) == corpus
    for index in range(len(questions.rows)):
        row = questions.rows[index]
        supporting = [questions.documents[number] for number in row["supporting"]]
        assert all(any(title == t and text in whole for t, whole in supporting) for title, text in row["evidence"])
        assert {title for title, _ in row["evidence"]} == {title for title, _ in supporting}
    assert verify_dataset(dataset, split) == report


def test_commands(
    tmp_path: Path, own_data_folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for command in (verify_command, list_command):
        with pytest.raises(DatasetNotFound, match="atommem data import hotpotqa"):
            command()
    bad = row(1) | {"_id": None, "supporting_facts": [["T1", 9]]}
    import_command("2wikimultihopqa", (write(tmp_path / "rows", [row(0), bad]),), split="mine", corpus=corpus)
    shown = capsys.readouterr().out
    assert "1 questions repaired: no id" in shown
    assert "1 questions repaired: a supporting sentence does not exist" in shown
    assert "2 corpus rows left out" in shown
    assert 'gymnasium.make("AtomMem-2WikiMultiHopQA", split="mine")' in shown.replace("\n", "")
    verify_command("2wikimultihopqa")
    assert "mine" in capsys.readouterr().out
    list_command()
    assert "2wikimultihopqa" in capsys.readouterr().out


def test_commands_parse_as_documented(tmp_path: Path, own_data_folder: Path, corpus: Path) -> None:
    tyro = pytest.importorskip("tyro")
    file = write(tmp_path / "rows", [row(0)])
    more = write(tmp_path / "more", [row(1)])
    tyro.cli(import_command, args=["hotpotqa", "--split", "test", str(file), str(more), "--corpus", str(corpus)])
    tyro.cli(verify_command, args=[])
    report = open_dataset("hotpotqa", "test").report
    assert isinstance(report, ImportReport)
    assert (report.rows, report.corpus_documents) == (2, 7)


# --------------------------------------------------------------------------------------------------- folders and splits


def test_a_folder_of_shards_is_one_import(tmp_path: Path, own_data_folder: Path) -> None:
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    write(folder / "part-2.jsonl", [row(2)])
    (folder / "part-10.json.gz").write_bytes(gzip.compress(json.dumps([row(10), row(11)]).encode()))
    (folder / "more" / "part-1.json").write_text(json.dumps([row(20)]))
    for name in ("README.md", ".part-3.jsonl"):
        (folder / name).write_text("no record")
    assert import_dataset("hotpotqa", "dev", folder).rows == 4
    rows = open_dataset("hotpotqa", "dev").rows
    assert [rows[number]["id"] for number in range(4)] == ["q20", "q2", "q10", "q11"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"no file in this folder that ends in \.json, "),
        (("train-00000.jsonl", "validation-00000.jsonl"), r"files of several splits .dev, train.: train-00000\.js"),
        (("train/0.jsonl", "test/0.jsonl"), r"files of several splits .test, train."),
    ],
)
def test_a_folder_that_is_no_split_is_rejected(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    (tmp_path / "shards").mkdir()
    for name in names:
        (tmp_path / "shards" / name).parent.mkdir(exist_ok=True)
        write(tmp_path / "shards" / name, [row(0)])
    with pytest.raises(DataError, match=message):
        import_dataset("hotpotqa", "dev", tmp_path / "shards")


def test_questions_imported_under_two_splits_are_counted(
    tmp_path: Path, own_data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [row(number) for number in range(6)]
    same_id, same_text = row(4) | {"question": "Another?"}, row(99) | {"question": " what is  5? "}
    import_command("hotpotqa", (write(tmp_path / "train", train),), split="train")
    assert "another split" not in capsys.readouterr().out
    import_command("hotpotqa", (write(tmp_path / "dev", [same_id, same_text, row(7)]),))
    said = "Questions that were imported before, under another split: 2 of 3 in 'train'.\n"
    assert said in capsys.readouterr().out
    import_command("hotpotqa", (write(tmp_path / "other", [row(8)]),), split="other")
    assert "another split" not in capsys.readouterr().out


def test_names_of_files_cannot_control_the_terminal(
    tmp_path: Path, own_data_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOMMEM_DATA", str(tmp_path / "data\x1b[31m[bold]"))
    import_command("hotpotqa", (write(tmp_path / "dev\x1b]0;title\x07[red]", [row(0)]),))
    list_command()
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "data\\x1b[31m[bold]/data/hotpotqa/dev-" in said
