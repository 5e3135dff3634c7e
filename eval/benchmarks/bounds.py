"""What hostile files cost: `python -m eval.benchmarks.bounds [--out FILE]`, two minutes.

Each case is a small file that a naive reader would unpack without end, or a very large one. It is read in a fresh process, as
`atommem data import` reads questions or as AtomMem-Files reads documents, until it is rejected or read. Measured are the
process's peak memory, of which about 70 MB are the interpreter and its packages, and the time.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.benchmarks import write_figures

_READ = """
import json, sys, time
from pathlib import Path
from atommem_env.errors import DataError
from atommem_env.tasks.jsonl import read_records
from atommem_env.tasks.readers import read_documents
reader, path = sys.argv[1], Path(sys.argv[2])
begun = time.perf_counter()
try:
    count = sum(1 for _ in (read_records(path) if reader == "records" else read_documents(path.name, path)))
    outcome = f"read: {count} {reader}"
except DataError as error:
    outcome = str(error).replace(str(path), path.name)
seconds = time.perf_counter() - begun
memory = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([outcome, seconds, memory]))
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """One file, read in a fresh process."""

    case: str
    file_bytes: int
    outcome: str  # what was read, or the error; "still reading" at the limit of time
    seconds: float
    peak_bytes: int | None  # of the process's memory; None: it did not end


def _gzip_of(path: Path, start: bytes, blank: bytes, megabytes: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(megabytes):
            file.write(blank * (1 << 20))


def _parquet(path: Path, rows: int, per_row: int, length: int) -> None:
    """A table of `rows` lists, each of `per_row` texts, which are one text that the file has once."""
    import pyarrow
    from pyarrow import parquet

    count = rows * per_row
    texts = pyarrow.DictionaryArray.from_arrays(
        pyarrow.nulls(count, pyarrow.int32()).fill_null(0), pyarrow.array(["x" * length])
    )
    lists = pyarrow.ListArray.from_arrays(pyarrow.array(range(0, count + 1, per_row), pyarrow.int32()), texts)
    parquet.write_table(pyarrow.table({"context": lists}), path, store_schema=False, compression="none")


def _word(path: Path, megabytes: int) -> None:
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("word/document.xml", "w") as member:
        for _ in range(megabytes):
            member.write(b"<w:p/>" * (1 << 17) + b" " * (1 << 18))


def _pdf(path: Path, pages: int) -> None:
    """Pages that are all the same one of 1 MiB of spaces, packed."""
    import pypdf

    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(100, 100)
    stream = pypdf.generic.StreamObject()
    stream.set_data(b" " * (1 << 20))
    page[pypdf.generic.NameObject("/Contents")] = writer._add_object(stream.flate_encode())
    for _ in range(pages - 1):
        writer.add_page(page)
    writer.write(path)


def _sparse(path: Path, start: bytes, megabytes: int) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(megabytes << 20)


def cases(scale: int) -> dict[str, tuple[str, str, Callable[[Path], None]]]:
    """case -> what reads it, the file's name, and what writes it; sizes grow with `scale`, 1 to 100."""
    return {
        "gzip of newlines": ("records", "a.jsonl.gz", lambda path: _gzip_of(path, b"", b"\n", 15 * scale)),
        "gzip of spaces in a list": ("records", "a.json.gz", lambda path: _gzip_of(path, b"[", b" ", 15 * scale)),
        "parquet, rows of one text": ("records", "a.parquet", lambda path: _parquet(path, 50 * scale, 1, 1_000_000)),
        "parquet, one row of one text": ("records", "b.parquet", lambda path: _parquet(path, 1, 48_000 * scale, 1000)),
        "Word, packed": ("documents", "a.docx", lambda path: _word(path, 33 + 4 * scale)),
        "PDF, one page many times": ("documents", "a.pdf", lambda path: _pdf(path, 65 + 10 * scale)),
        "HTML of tags": ("documents", "a.html", lambda path: path.write_bytes(b"<b>x</b>" * 80_000 * scale) and None),
        "HTML, large": ("documents", "b.html", lambda path: _sparse(path, b"<html>", 65 + 10 * scale)),
    }


def measure(folder: Path, scale: int, limit_s: float = 120, only: Sequence[str] = ()) -> list[Reading]:
    """Writes the files into `folder` and reads each in a fresh process, which is ended after `limit_s` seconds."""
    readings = []
    for case, (reader, name, write) in cases(scale).items():
        if only and case not in only:
            continue
        path = folder / name
        write(path)
        begun = time.perf_counter()
        try:
            ran = subprocess.run(
                [sys.executable, "-c", _READ, reader, str(path)],
                capture_output=True,
                text=True,
                check=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            readings.append(Reading(case, path.stat().st_size, "still reading", time.perf_counter() - begun, None))
            continue
        outcome, seconds, memory = json.loads(ran.stdout)
        readings.append(Reading(case, path.stat().st_size, outcome, seconds, memory))
        path.unlink()
    return readings


def main(*, out: Path | None = None, scale: int = 100, limit_s: float = 120) -> None:
    """Measure all cases, and print a table.

    Args:
        out: JSON file for the numbers.
        scale: Size of the cases, 1 to 100.
        limit_s: Seconds after which a process that still reads is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        readings = measure(Path(folder), scale, limit_s)
    table = Table(title="Hostile files, each in a fresh process")
    for column in ("case", "file kB", "peak MB", "s", "outcome"):
        table.add_column(column, justify="left" if column in ("case", "outcome") else "right")
    for reading in readings:
        peak = "–" if reading.peak_bytes is None else f"{reading.peak_bytes / 1e6:,.0f}"
        size = f"{reading.file_bytes / 1e3:,.0f}"
        table.add_row(reading.case, size, peak, f"{reading.seconds:.1f}", escape(reading.outcome))
    Console().print(table)
    write_figures(out, [asdict(reading) for reading in readings])


if __name__ == "__main__":
    tyro.cli(main)
