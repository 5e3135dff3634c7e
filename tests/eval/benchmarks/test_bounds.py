"""`eval.benchmarks.bounds` in small: nothing takes much memory, and what is too much is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lxml", reason="needs the extra 'files'")
pytest.importorskip("docx", reason="needs the extra 'files'")

from eval.benchmarks import bounds


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count of a process's memory")
@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        ("gzip of newlines", "blank characters in a row"),
        ("parquet, rows of one text", "read: 50 records"),
        ("parquet, one row of one text", "longer than 16,777,216 characters"),
        ("Word, packed", "a Word document that unpacks to"),
    ],
)
def test_a_hostile_file_takes_little_memory(tmp_path: Path, case: str, outcome: str) -> None:
    (reading,) = bounds.measure(tmp_path, 1, only=[case])
    assert outcome in reading.outcome
    assert reading.peak_bytes is not None
    assert reading.peak_bytes < 400e6
