"""What a person is shown of a task."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from agents import play
from atommem_env.make import make_env


@pytest.mark.parametrize(("answers", "shown"), [([], "exact match: –"), (["[/b]\x1b[31m"], "exact match: 0.00")])
def test_what_a_task_says_cannot_control_the_terminal(
    answers: list[str],
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.txt").write_text("Ada\x1b[2J lives [bold]here[/] \u202ein Rome.")
    options = {"files": tmp_path / "a.txt", "question": "Who\x1b]0;x\x07 is [/b]?", "answers": answers}
    monkeypatch.setattr(play, "make_env", lambda env_id: make_env(env_id, durability="off", **options))
    monkeypatch.setattr("sys.stdin", io.StringIO("c x\n\n" + "a [/i]\n\n" * 3))
    play.main("AtomMem-Files")
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert r"Ada\x1b[2J lives [bold]here[/] \u202ein Rome." in said
    gold = r"[/b]\x1b[31m" if answers else "none"
    assert rf"Who\x1b]0;x\x07 is [/b]?  gold: {gold}  yours: [/i]" in said
    assert shown in said
