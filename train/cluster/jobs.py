"""Processes and jobs: a process of this machine, a job of a Ray that runs, the embedding service; and why one ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol
from urllib.parse import urlsplit

from rich.console import Console

from atommem_env.errors import JobFailed, MissingDependency, SettingError
from train.cluster.recipe import ClusterGRPOConfig

SLURM = Path(__file__).with_name("slurm.sh")
_POLL = 1.0  # seconds between looks at the embedding service
_SILENCE = 20.0  # seconds without an answer of Ray's head, after which it counts as gone
_COPY_LOG = 60.0  # seconds between copies of the log of a job of Ray
_GRACE = 30.0  # seconds that a process has to end when it is asked to


class Job(Protocol):
    """Something that runs and writes a log."""

    log: Path

    def poll(self) -> str | None:
        """None while it runs, "" once it has ended well, else how it ended."""
        ...

    def stop(self) -> None:
        """Ends it and all that it started; nothing happens where it has ended."""
        ...

    def output(self) -> str:
        """What it printed since it was started."""
        ...


class LocalJob:
    """A process of this machine, in a session of its own: a Ctrl-C is for its parent, which stops it in order.

    Args:
        command: of the process.
        environment: added to this process's.
        log: what it prints is added to this file.
        folder: its working folder; None: this process's.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], log: Path, folder: Path | None = None
    ) -> None:
        self.log = log
        with log.open("ab") as file:
            self._begin = file.tell()
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
            )

    def poll(self) -> str | None:
        code = self.process.poll()
        if code is None or code == 0:
            return None if code is None else ""
        return f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"

    def stop(self) -> None:
        try:
            self.process.terminate()  # it alone: it ends in order what it started
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # raised where none is left
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def output(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode("utf-8", "replace")


class RayJob:
    """A job of a Ray that runs already, through the dashboard of its head.

    Args:
        address: of the dashboard.
        command: the entry point; it runs on the head.
        environment: of every process of the job.
        log: what it prints is added to this file, now and then and in the end.

    Raises:
        SettingError: no Ray answers at the address.
        JobFailed: it did not take the job.
    """

    def __init__(self, address: str, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._address, self._client = address, ray_client(address)
        self._text = ""
        try:
            self.id: str = self._client.submit_job(
                entrypoint=shlex.join(command), runtime_env={"env_vars": environment}
            )
        except RuntimeError as error:
            raise JobFailed(f"Ray's head at {address} did not take the job: {error}") from error
        self._answered = self._copied = time.monotonic()

    def poll(self) -> str | None:
        try:
            _reach(self._address)
            info = self._client.get_job_info(self.id)
            ended = info.status.is_terminal()
            if ended or time.monotonic() - self._copied > _COPY_LOG:
                self._copy_log()
        except (OSError, RuntimeError) as error:  # what the client raises where no proper answer comes
            silent = time.monotonic() - self._answered
            return f"is lost: Ray's head at {self._address} is gone ({error})" if silent > _SILENCE else None
        self._answered = time.monotonic()
        if not ended:
            return None
        if info.status == "SUCCEEDED":
            return ""
        return f"ended as {info.status.value}, exit code {info.driver_exit_code}"

    def stop(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # a Ray that is gone runs no job
            _reach(self._address)
            self._client.stop_job(self.id)
            until = time.monotonic() + _GRACE
            while not self._client.get_job_status(self.id).is_terminal() and time.monotonic() < until:
                time.sleep(0.2)
            self._copy_log()

    def output(self) -> str:
        return self._text

    def _copy_log(self) -> None:
        text = self._client.get_job_logs(self.id)
        with self.log.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text[len(self._text) :])
        self._text, self._copied = text, time.monotonic()


class EmbeddingService(LocalJob):
    """`vllm serve` of the run's embedding model; its URL is the job's OPENAI_EMBEDDING_BASE_URL."""

    def __init__(self, run: ClusterGRPOConfig, host: str) -> None:
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://{host}:{port}/v1"
        super().__init__(embedding_command(run, host, port), {}, run.out / "embedding.log")

    def answers(self) -> bool:
        """Whether it is ready."""
        try:
            with urllib.request.urlopen(f"{self.url}/models", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # refused, or a timeout: not yet
            return False


def embedding_command(run: ClusterGRPOConfig, host: str, port: int) -> list[str]:
    """What serves the run's `embedding_model` at that address."""
    assert run.embedding_model is not None
    options = ["--host", host, "--port", str(port), "--gpu-memory-utilization", str(run.embedding_gpu_memory)]
    return ["vllm", "serve", run.embedding_model, "--runner", "pooling", *options]


def ray_client(address: str) -> Any:
    """Ray's `JobSubmissionClient` of a dashboard.

    Raises:
        SettingError: nothing answers there.
        MissingDependency: Ray is not installed.
    """
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise MissingDependency(f"Joining Ray needs {error.name!r}: pip install 'atommem[cluster]'.") from error
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray prefers them to the address that it is given
    try:
        _reach(address)
        return JobSubmissionClient(address)
    except (OSError, RuntimeError) as error:
        raise SettingError(
            f"--ray-address must be the dashboard of a running Ray, for example http://head:8265; {address} does not answer as "
            f"one ({error}). Start Ray there with `ray start --head --dashboard-host=HEAD`, or use {SLURM}."
        ) from error


def _reach(address: str) -> None:
    """Raises OSError where nobody listens. Ray's client has no timeout of its own: a head without power would hang it."""
    parts = urlsplit(address)
    if parts.hostname is None:
        raise OSError("it is not a URL")
    socket.create_connection((parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)), timeout=5).close()


def own_address(ray_address: str | None) -> str:
    """This machine's IP address, as the head of Ray sees it; without Ray the machine is alone."""
    if ray_address is None:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((urlsplit(ray_address).hostname, 9))  # sends nothing
        return str(probe.getsockname()[0])


# -------------------------------------------------------------------------------------------------------- the end of a job


def wait_for(service: EmbeddingService, console: Console) -> None:
    """Waits until the service answers.

    Raises:
        JobFailed: it ended instead.
    """
    with console.status(f"Starting the embedding service (log: {service.log}) …"):
        while not service.answers():
            check_running("The embedding service", service)
            time.sleep(_POLL)


def check_running(name: str, job: Job) -> bool:
    """Whether it still runs; False once it has ended well.

    Raises:
        JobFailed: it ended otherwise.
    """
    ended = job.poll()
    if ended:
        cause = root_cause(job.output())
        raise JobFailed(f"{name} {ended}{f': {cause}' if cause else ''}\nIts log is {job.log}.")
    return ended is None


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end this process as Ctrl-C does: what was started is stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # One that is ignored stays so: nohup, for a terminal that is closed.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What lines of a log begin with: the process, by Ray or vLLM, and within it what vLLM's own logger or torch writes.
_PROCESS = re.compile(r"^\([^()]*\bpid=[^()]*\) ?")
_LEVEL = re.compile(r"^(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\]|\[rank\d+\]:) ?")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
# An exception, but for those that only carry another.
_RAISED = re.compile(r"^(?!ray\.exceptions\.RayTaskError|.*See root cause above)[A-Za-z_][\w.]*(?:: .*)?$")


def root_cause(log: str) -> str:
    """The exception that a program ended by: the last line of its last traceback, and what is indented below it; "" for none.

    A traceback of Ray has others nested in it: `RayTaskError(…)` only carries what was raised in another process. Workers
    (`(Actor pid=12) …`) often fail because another did: what they print counts only where the program itself printed none.

    >>> root_cause('Traceback (most recent call last):\\n  File "a", line 1\\n    f()\\nValueError: 3\\n[bye]')
    'ValueError: 3'
    """
    own: list[str] = []
    workers: list[str] = []
    for line in _COLOUR.sub("", log).split("\n"):
        text = _PROCESS.sub("", line)
        (own if text == line else workers).append(_LEVEL.sub("", text).rstrip())
    return _last_raised(own) or _last_raised(workers)


def _last_raised(lines: Sequence[str]) -> str:
    raised = ""
    inside = aside = False  # in the indented lines of a traceback; of one that did not end the program
    for number, line in enumerate(lines):
        if line.startswith('  File "'):
            inside = True
        elif line.startswith(("Exception in thread ", "Exception ignored in")):
            aside = True
        elif inside and line and not line.startswith(" "):
            if not aside and _RAISED.match(line):
                below = itertools.takewhile(lambda text: text.startswith(("\t", "  ")), lines[number + 1 :])
                raised = " ".join([line, *(text.strip() for text in below)])
            inside = aside = False
    return raised
