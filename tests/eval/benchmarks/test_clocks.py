"""`eval.benchmarks.clocks` with one trial."""

from __future__ import annotations

import shutil

import pytest
from rich.console import Console

pytest.importorskip("lancedb")

from eval.benchmarks import clocks


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs the program faketime, which shifts a clock")
def test_a_clock_that_is_8_days_ahead_loses_nothing() -> None:
    result = clocks.measure(8, 1, 8, Console(quiet=True))
    assert result.acknowledged_replies == 2 * 8 * 8
    assert (result.failed, result.unreadable, result.lost, result.inconsistent) == (0, 0, 0, 0)
