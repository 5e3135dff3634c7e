"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from atommem_env.embedders import embed, get_embedder
from atommem_env.episode import Episode
from atommem_env.types import Document, Evidence, Question, StepResult, Task


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real questions, which does not ship with the project: `ATOMMEM_TEST_DATA`, or beside the checkout."""
    folder = Path(os.environ.get("ATOMMEM_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (folder / "hotpotqa_dev.jsonl.gz").is_file():
        pytest.skip(f"needs the real question files; none in {folder} (set ATOMMEM_TEST_DATA)")
    return folder


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own data folder."""
    folder = tmp_path_factory.mktemp("atommem_data")
    monkeypatch.setenv("ATOMMEM_DATA", str(folder))
    return folder


@pytest.fixture
def task() -> Task:
    """Three documents, each a chunk of its own at `chunk_tokens=8`, and two questions."""
    facts = {"Ada": "Ada lives in Rome.", "Bo": "Bo cooks for Ada.", "Rome": "Rome has seven hills."}
    return Task(
        id="hand/1",
        dataset="hotpotqa",
        documents=tuple(Document(title, text) for title, text in facts.items()),
        questions=(
            Question("q1", "Where does Ada live?", ("Rome", "Roma"), (Evidence("Ada", facts["Ada"]),), "bridge", 1),
            Question("q2", "Who cooks for Ada?", ("Bo",), (Evidence("Bo", facts["Bo"]),), "bridge", 1),
        ),
    )


@pytest.fixture
def say() -> Callable[[Episode, str], StepResult]:
    """Gives an episode a reply, with vectors from the hashing embedder."""

    def carry_out(episode: Episode, reply: str) -> StepResult:
        return episode.resolve(embed(get_embedder("hashing"), episode.submit(reply)))

    return carry_out
