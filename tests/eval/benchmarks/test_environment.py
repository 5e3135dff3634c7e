"""`eval.benchmarks.environment` in small: both vector environments do the same, and the figures are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.benchmarks import environment


@pytest.mark.parametrize("dialect", ["tags", "public_code", "tool_calls"])
def test_the_figures_are_written(tmp_path: Path, dialect: str) -> None:
    out = tmp_path / "new" / "environment.json"
    small = {
        "layout": "terse",
        "num_docs": 10,
        "dimension": 8,
        "episodes": 2,
        "num_envs": 2,
        "steps": 3,
        "repeats": 1,
    }
    environment.main(environment.Setup(dialect=dialect, **small), out=out)  # type: ignore[arg-type]
    figures = json.loads(out.read_text())
    assert figures["ratio"] == pytest.approx(figures["vector_steps_per_s"] / figures["sync_steps_per_s"])
    assert figures["steps"] >= 4
    assert min(figures[f"{part}_us"] for part in ("reset", "parse", "memory", "render")) > 0


def test_two_that_did_not_do_the_same_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    played = iter([(1.0, ["one"]), (1.0, ["other"])])
    monkeypatch.setattr(environment, "_play", lambda *args: next(played))
    with pytest.raises(AssertionError, match="the same"):
        environment.main(environment.Setup(num_docs=10, dimension=8, episodes=1, num_envs=1, steps=1, repeats=1))
