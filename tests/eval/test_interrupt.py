"""One Ctrl-C ends a run in seconds, with one line, whatever its policy waits for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import wait_until

from atommem_env.store.memory_store import MemoryStore

CODE = "import sys; from atommem_env.cli import main; sys.argv[0] = 'atommem'; main()"
POLICIES = """
import asyncio, pathlib, time

def begun(observation):
    with open("begun", "a") as file:
        file.write(".")

def blocking(observation):
    if observation["step"] == 1:
        begun(observation)
        time.sleep(600)
    return "<create_memory>Ada lives in Rome.</create_memory>"

async def waiting(observation):
    if observation["step"] == 1:
        begun(observation)
        await asyncio.sleep(600)
    return "<create_memory>Ada lives in Rome.</create_memory>"

async def stubborn(observation):
    begun(observation)
    while True:
        try:
            await asyncio.to_thread(time.sleep, 600)
        except asyncio.CancelledError:
            pass
"""


@pytest.mark.parametrize(
    ("policy", "in_flight", "seconds"),
    [
        ("blocking", 1, 2.5),
        ("waiting", 64, 2.5),
        ("stubborn", 2, 7.0),  # its thread is given some time
    ],
)
def test_one_interrupt_ends_a_run_in_seconds_with_one_line(
    policy: str, in_flight: int, seconds: float, tmp_path: Path
) -> None:
    (tmp_path / "policies.py").write_text(POLICIES, encoding="utf-8")
    words = ["eval", "AtomMem-Synthetic", "--policy", f"policies:{policy}", "--durability", "step", "--out", "run"]
    words += ["--num-docs", "20", "--episodes", "64"]
    process = subprocess.Popen([sys.executable, "-c", CODE, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    begun = tmp_path / "begun"
    wait_until(lambda: begun.is_file() and begun.stat().st_size >= in_flight)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - started < seconds
    *bar, last = error.splitlines()
    assert (process.returncode, last) == (130, "atommem eval: interrupted")
    assert [line.split()[0] for line in bar] in ([], [f"policies:{policy}"]), error  # the progress bar as it stood
    assert json.loads((tmp_path / "run" / "config.json").read_text())["episodes"] == 64
    MemoryStore(tmp_path / "run" / "memory").close()  # unharmed, and locked by nobody
