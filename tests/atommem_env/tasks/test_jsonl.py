"""Files of records in all their forms, and lines in any order."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atommem_env.errors import DataError, DatasetNotFound
from atommem_env.tasks.jsonl import JsonLines, JsonLinesWriter, read_records

linux_memory = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's own count of a process's memory"
)
RECORDS = [{"n": number, "text": 'x]}"\\, é\u2028 ' * (number % 7)} for number in range(50)]


def values(path: Path) -> list[dict[str, Any]]:
    return [value for _, value in read_records(path)]


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, ensure_ascii=False, indent=2),
        "\ufeff \n" + json.dumps(RECORDS),
        "\n".join(map(json.dumps, RECORDS)),
        "\r\n\r\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n",
    ],
    ids=["list", "indented list", "list with byte order mark", "lines", "lines with blank ones"],
)
def test_every_form_gives_the_same_records(tmp_path: Path, text: str, gzipped: bool) -> None:
    path = tmp_path / "named.by.nothing"
    path.write_bytes(gzip.compress(text.encode()) if gzipped else text.encode())
    assert values(path) == RECORDS


def test_parquet_gives_the_same_records(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "file")
    assert values(tmp_path / "file") == RECORDS


def test_list_longer_than_a_piece_and_records_longer_than_a_piece(tmp_path: Path) -> None:
    records = [{"n": number, "text": "ü\\" * (1_700_000 if number == 3 else 40_000)} for number in range(40)]
    path = tmp_path / "long.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert values(path) == records


def test_places_and_progress(tmp_path: Path) -> None:
    lines, listed = tmp_path / "lines", tmp_path / "list"
    lines.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    listed.write_text('[{"a": 1}, {"a": 2}]')
    assert [location for location, _ in read_records(lines)] == [f"{lines}, line 2", f"{lines}, line 4"]
    assert [location for location, _ in read_records(listed)] == [f"{listed}, index {n} of the list" for n in (0, 1)]
    seen: list[int] = []
    list(read_records(lines, seen.append))
    assert seen == sorted(seen)
    assert seen[-1] == lines.stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2\n', "line 2: not JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: expected a JSON object, got list"),
        (b"question,answer\n", "line 1: not JSON"),
        (b'[{"a": 1}, {"a": ', "index 1 of the list: not JSON, or cut off"),
        (b'[{"a": 1}', "after index 0 of the list: expected ',' or ']', got 'the end'"),
        (b'[{"a": 1} {"a": 2}]', "after index 0 of the list: expected ',' or ']', got '{'"),
        (b'[{"a": 1}, 2]', "index 1 of the list: expected a JSON object, got int"),
        (b'[{"a": 1}]\n[{"a": 2}]', "after the list: expected the end"),
        (b"[" * 100_000, "index 0 of the list: not JSON"),
        (b'{"a": "\xff\xfe"}', "not UTF-8 text after its beginning"),
        (gzip.compress(json.dumps(RECORDS).encode(), mtime=0)[:-40], "damaged or truncated gzip"),
        (gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-6] + b"123456", "damaged or truncated gzip"),
        (b"PAR1 and no more", "damaged parquet"),
        (b"PK\x03\x04 and more", "a zip archive; unpack it"),
    ],
)
def test_damage_is_named_with_file_and_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "damaged.file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged\.file") as caught:
        values(path)
    assert message in str(caught.value)


@linux_memory
@pytest.mark.parametrize("form", ["lines", "list", "lines in gzip", "list in gzip"])
@pytest.mark.parametrize("closed", [True, False])
def test_a_record_of_100_mb_is_refused_in_little_memory(tmp_path: Path, form: str, closed: bool) -> None:
    """A record that ends and one that does not; in a separate process, to measure its memory."""
    path = tmp_path / "long.file"
    opener = gzip.open if "gzip" in form else open
    with opener(path, "wb", **({"compresslevel": 1} if "gzip" in form else {})) as file:  # type: ignore[operator]
        file.write(b'[{"a": 1}, {"a": "' if "list" in form else b'{"a": 1}\n{"a": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        if closed:
            file.write(b'"}]' if "list" in form else b'"}\n{"a": 2}\n')
    code = (
        "import sys; from pathlib import Path; from atommem_env.tasks.jsonl import read_records\n"
        "try: list(read_records(Path(sys.argv[1])))\n"
        "except ValueError as error: print(error)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    message, kilobytes = ran.stdout.splitlines()
    location = "index 1 of the list" if "list" in form else "line 2"
    assert f"{path}, {location}: longer than 16,777,216 characters" in message
    assert int(kilobytes) < 300_000


@pytest.mark.parametrize("start", ["", "[", '{"a": 1}\n', '[{"a": 1},', '[{"a": 1}]'])
@pytest.mark.parametrize("blank", ["\n", " "])
def test_a_gzip_of_blanks_ends(tmp_path: Path, start: str, blank: str) -> None:
    path = tmp_path / "blank.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write(start + blank * (1 << 20) + blank * 3)
    with pytest.raises(DataError, match=r"blank\.gz, .*: more than 1,048,576 blank characters in a row"):
        values(path)
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write('{"a": 1}\n' + blank * ((1 << 20) - 1) + '\n{"a": 2}')
    assert values(path) == [{"a": 1}, {"a": 2}]


@linux_memory
def test_a_text_that_parquet_has_once_for_all_rows_is_not_repeated_in_memory(tmp_path: Path) -> None:
    """1,500 rows of a megabyte each and 4 GB in a row, in files of a few kilobytes."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def shared(text: str, count: int) -> Any:
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([text]))

    parquet.write_table(pyarrow.table({"text": shared("x" * 1_000_000, 1500)}), tmp_path / "rows", store_schema=False)
    lists = pyarrow.ListArray.from_arrays(
        pyarrow.array([0, 1, 4_000_000], pyarrow.int32()), shared("y" * 1000, 4_000_000)
    )
    parquet.write_table(pyarrow.table({"list": lists}), tmp_path / "row", store_schema=False)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_100_000
    code = (
        "import sys; from pathlib import Path; from atommem_env.tasks.jsonl import read_records\n"
        "print(sum(len(row['text']) for _, row in read_records(Path(sys.argv[1], 'rows'))))\n"
        "try: list(read_records(Path(sys.argv[1], 'row')))\n"
        "except ValueError as error: print(error)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, message, kilobytes = ran.stdout.splitlines()
    assert int(count) == 1_500_000_000
    assert f"{tmp_path}/row, row 1: longer than 16,777,216 characters" in message
    assert int(kilobytes) < 400_000


def test_parquet_whose_columns_are_no_records_is_rejected(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    numbers = pyarrow.ListArray.from_arrays(
        pyarrow.array([0, (1 << 24) + 1], pyarrow.int32()), pyarrow.nulls((1 << 24) + 1, pyarrow.int8())
    )
    parquet.write_table(pyarrow.table({"numbers": numbers}), tmp_path / "file")
    with pytest.raises(DataError, match=r"row 0: the column 'numbers.list.element' has 16,777,217 values"):
        values(tmp_path / "file")


def test_utf_16_is_read(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        mark = "" if encoding == "utf-16" else "\ufeff"
        for text in (json.dumps(RECORDS, ensure_ascii=False), "\n".join(map(json.dumps, RECORDS))):
            (tmp_path / "file").write_bytes((mark + text).encode(encoding))
            assert values(tmp_path / "file") == RECORDS


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound, match="no file"):
        values(tmp_path / "nothing")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))))
def test_lines_come_back_in_any_order(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]]) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    with JsonLinesWriter(path) as writer:
        assert [writer.append(record) for record in [*records, {}]] == list(range(len(records) + 1))
    lines = JsonLines(path)
    assert len(lines) == len(records) + 1
    assert [lines[index] for index in reversed(range(len(records)))] == records[::-1]
