"""What tests of real processes share."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def write_program(folder: Path, name: str, code: str) -> None:
    """Puts a program of that name, in Python, into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}", encoding="utf-8")
    (folder / name).chmod(0o755)


def shadow_packages(folder: Path) -> None:
    """Puts a `train.py` and an `agents/` into a folder that say so when they are imported instead of ours."""
    complaint = "raise AssertionError(f'{__file__} was imported')\n"
    (folder / "agents").mkdir(parents=True)
    (folder / "agents" / "__init__.py").write_text(complaint, encoding="utf-8")
    (folder / "train.py").write_text(complaint, encoding="utf-8")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def started_ray(gpus: int = 4, folder: Path | None = None) -> Iterator[str]:
    """The dashboard of a Ray that believes in so many GPUs, and that no other Ray of this machine meets; started in `folder`."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {name: free_port() for name in names}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:  # its sockets need a short path
        options = {"num-gpus": gpus, "num-cpus": 4 * gpus, "object-store-memory": 10**9, "temp-dir": temporary, **ports}
        options |= {"dashboard-host": "127.0.0.1", "node-ip-address": "127.0.0.1"}
        words = [f"--{name}={value}" for name, value in options.items()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        process = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--disable-usage-stats", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{ports['dashboard-port']}"
            wait_until(lambda: process.poll() is not None or answers(f"{address}/api/version"), 90)
            # It answers before its parts have found each other; if one of them does not, it ends.
            assert process.poll() is None, process.communicate()
            assert process.stdout is not None
            assert any("runtime started" in line for line in process.stdout), "Ray ended at its start"
            yield address
        finally:
            process.terminate()  # it ends all that it started
            process.communicate(timeout=60)


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except OSError:
        return False
