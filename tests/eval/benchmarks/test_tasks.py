"""`eval.benchmarks.tasks` in small: both sides find the same questions and make the same chunks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from eval.benchmarks import tasks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count of a process's memory")
def test_everything_is_measured_on_the_same_work(tmp_path: Path) -> None:
    result = tasks.measure(tmp_path, questions=210, sizes=(10, 60), repeats=1)
    assert (result.questions, result.documents) == (210, 2100)
    assert [item.way for item in result.openings] == ["opened", "whole file read"]
    assert all(item.peak_bytes > 10**6 and item.open_s <= item.process_s for item in result.openings)
    small, large = result.resets
    assert (small.num_docs, large.num_docs) == (10, 60)
    assert 5 * small.tokens < large.tokens < 7 * small.tokens
    assert json.loads(json.dumps(asdict(result)))["resets"][0]["num_docs"] == 10


def test_repeated_rows_are_others(tmp_path: Path) -> None:
    rows = list(tasks.generate_rows())[:2]
    tasks.write_rows(tmp_path / "rows.json", rows, 5)
    written = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert written[:2] == rows
    assert len({row["_id"] for row in written}) == 5
    assert len({title for row in written for title, _ in row["context"]}) == 50


def test_ways_that_differ_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.MatchingTokenizer, "count", lambda self, text: len(text))
    monkeypatch.setenv("ATOMMEM_DATA", str(tmp_path))
    with pytest.raises(AssertionError, match="the same chunks"):
        tasks.measure(tmp_path, questions=20, sizes=(60,), repeats=1)
