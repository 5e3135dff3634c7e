"""Jobs that are Python code, and stand-ins for programs that need a GPU."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import write_program

from train.cluster.jobs import LocalJob


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., LocalJob]]:
    """Starts Python code as a job; stops it in the end."""
    jobs = []

    def started(code: str) -> LocalJob:
        jobs.append(LocalJob([sys.executable, "-u", "-c", textwrap.dedent(code)], {}, tmp_path / "job.log"))
        return jobs[-1]

    yield started
    for job in jobs:
        job.stop()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before all others on the search path, with two GPUs of 80 GB to look at."""
    folder = tmp_path / "bin"
    write_program(folder, "nvidia-smi", "print('81559\\n81559')")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder
