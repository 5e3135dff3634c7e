"""`train.benchmarks.kills` with one run of `collect`, and that it notices what it is for."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

pytest.importorskip("trl")

from rich.console import Console

from train.benchmarks import kills


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    kills.prepare(folder)
    return folder


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_run_killed_and_resumed_is_never_killed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "_KILLS", 1)
    result = kills.measure("collect", work, 1, 0, Console(quiet=True))
    assert (result.kills, result.different) == (1, 0)


def test_another_end_is_noticed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kills.run

    def run(command: str, work: Path, out: Path) -> None:
        real(command, work, out)
        if out.parent.name == "trial-1":
            (out / "rewards.jsonl").write_text("")

    monkeypatch.setattr(kills, "run", run)
    monkeypatch.setattr(kills, "killed", lambda *arguments: False)
    result = kills.measure("collect", work / "other", 2, 0, Console(quiet=True))
    assert (result.kills, result.different) == (0, 1)
