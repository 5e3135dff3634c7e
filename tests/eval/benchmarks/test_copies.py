"""`eval.benchmarks.copies` with a few copies."""

from __future__ import annotations

import shutil

import pytest
from rich.console import Console

pytest.importorskip("lancedb")

from eval.benchmarks import copies


@pytest.mark.skipif(shutil.which("cp") is None, reason="needs the program cp")
def test_copies_of_a_store_in_use_are_complete_or_rejected() -> None:
    result = copies.measure("episode", 3, Console(quiet=True))
    assert (result.complete + result.rejected, result.unnoticed) == (3, 0)
