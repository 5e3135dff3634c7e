"""Held-out questions that are trained on are counted, whatever the source, and without drawing contexts."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atommem_env.tasks import make_source
from atommem_env.tasks.catalogue import import_dataset
from atommem_env.types import Task
from train.overlap import overlap_warning


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {
            "_id": f"q{number}",
            "question": f"Who lives in house {number}?",
            "answer": f"Ada {number}",
            "type": "bridge",
            "level": "easy",
            "supporting_facts": [[f"House {number}", 0]],
            "context": [[f"House {number}", [f"Ada {number} lives in house {number}."]]],
        }
        for number in range(first, last)
    ]


def imported(folder: Path, split: str, questions: list[dict[str, Any]]) -> Any:
    (folder / f"{split}.json").write_text(json.dumps(questions))
    import_dataset("hotpotqa", split, folder / f"{split}.json")
    return make_source("hotpotqa", split=split, num_docs=2)


def test_questions_imported_as_two_splits_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = imported(tmp_path, "train", rows(0, 20))
    others = rows(15, 30)
    others[0] |= {"_id": "another", "question": " who lives  in House 15? "}
    dev = imported(tmp_path, "dev", others)
    monkeypatch.setattr(type(dev), "task", lambda *arguments: pytest.fail("a context was drawn"))
    warning = overlap_warning(train, dev)
    assert warning is not None
    assert warning.startswith("Warning: 5 of the 15 held-out questions are among those that are trained on")
    assert "\n" not in warning
    assert overlap_warning(train, imported(tmp_path, "test", rows(20, 25))) is None


def test_tasks_of_ones_own_are_compared_too_and_endless_sources_are_not(task: Task) -> None:
    other = replace(task, questions=(replace(task.questions[0], id="x", text="What else?"), task.questions[1]))
    train, held_out = (make_source(tasks) for tasks in ([task], [other]))
    warning = overlap_warning(train, held_out)
    assert warning is not None
    assert "1 of the 2 held-out questions" in warning
    endless = make_source("synthetic")
    assert len(endless) > 10**5
    assert overlap_warning(endless, endless) is None


def test_grpo_warns_in_one_line(undecided: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from train.grpo import Trainer
    from train.settings import LocalGRPOConfig

    for split in ("train", "dev"):
        imported(tmp_path, split, rows(0, 8))
    run = LocalGRPOConfig(env_id="AtomMem-HotpotQA", num_docs=2, model=str(undecided), out=tmp_path / "run")
    shown = io.StringIO()
    Trainer(run, Console(file=shown, width=40))
    assert shown.getvalue().count("\n") == 1
    assert shown.getvalue().startswith("Warning: 8 of the 8 held-out questions")
