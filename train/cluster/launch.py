"""`atommem train cluster RECIPE`: a training run on a cluster, from its checks to its model.

    atommem train cluster qwen3-8b-hotpotqa --dry-run              # the checks, then every command; starts nothing
    atommem train cluster qwen3-8b-hotpotqa --out runs/qwen3       # this machine's GPUs, a Ray of the run's own
    atommem train cluster qwen3-8b-2-nodes --out /shared/runs/qwen3 --ray-address http://HEAD:8265  # those of a Ray that runs

A recipe is one of `configs/cluster/`, or a TOML file; any of its settings can be given on the command line as well, and flags
of OpenRLHF after a `--`. In order: preflight; the folder `--out`, which all machines must see under the same path, with
`config.json` and the prompts; the embedding service, where the recipe has one; the job, followed to its end; the curve.
However that ends, service and job are stopped. The folder then holds what `atommem grpo` leaves, and `job.log`, `embedding.log`.

Two other ways to start the same job. By hand: `--prepare` writes the folder and prints the commands that it did not run. On
Slurm: `sbatch --nodes=2 --gpus-per-node=8 train/cluster/slurm.sh RECIPE …`, with the same words (`--dry-run` prints it in full).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol
from urllib.parse import urlsplit

import tyro
from rich.console import Console

from agents.models.find import find_model
from agents.rollout import Driver
from atommem_env.errors import DataError, JobFailed, MissingDependency, ModelNotFound, SettingError
from atommem_env.packages import check_packages
from eval.progress import step_progress
from eval.run_folder import read_jsonl, write_atomic
from train.cluster.preflight import (
    Machines,
    Node,
    check_embedder,
    check_machines,
    check_recipe,
    check_services,
    estimate_table,
)
from train.cluster.recipe import (
    RUN_VARIABLE,
    ClusterGRPOConfig,
    openrlhf_flags,
    read_recipe,
    recipe_names,
    write_prompts,
)
from train.curve import draw_curve
from train.grpo import METRICS, tell_end
from train.settings import make_env, open_run

SLURM = Path(__file__).with_name("slurm.sh")
_POLL = 2.0  # seconds between looks at the job
_SILENCE = 20.0  # seconds without an answer of Ray's head, after which it counts as gone
_COPY_LOG = 60.0  # seconds between copies of the log of a job of Ray
_GRACE = 30.0  # seconds that a process has to end when it is asked to
_SECRETS = ("OPENAI_API_KEY", "WANDB_API_KEY")
# what the job is told of this process's environment
_PASSED_ON = ("OPENAI_BASE_URL", "OPENAI_EMBEDDING_BASE_URL", "ATOMMEM_DATA", *_SECRETS)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """A run, and how it is started."""

    run: ClusterGRPOConfig
    ray_address: str | None = None
    """Dashboard of the Ray to join, for example http://head:8265; else one is started on this machine, for this run alone."""
    dry_run: bool = False
    """Check the recipe and print every command; nothing is started, nothing is written."""
    prepare: bool = False
    """Write the run's folder and print the commands to type; nothing is started."""


def call(command: str, function: Any, words: Sequence[str]) -> None:
    """Parses `RECIPE [options] [-- flags of OpenRLHF]` and hands the `LaunchConfig` to `function`.

    Raises:
        SettingError: as in `read_recipe`.
    """
    told = f"RECIPE is one of: {', '.join(recipe_names())}; or a TOML file of yours.\n" if recipe_names() else ""
    told += "What --set and --openrlhf name is added to the recipe's; flags of OpenRLHF can also follow a --."
    words, flags = _split(words)
    name = words[0] if words and not words[0].startswith("-") else None
    if name is None and not {"-h", "--help"} & set(words):
        raise SettingError(f"RECIPE comes first: atommem {command} RECIPE [options]. {told}")
    recipe = ClusterGRPOConfig(env_id="ENV_ID") if name is None else read_recipe(name)
    launched: LaunchConfig = tyro.cli(
        LaunchConfig,
        default=LaunchConfig(run=recipe),
        prog=f"atommem {command} {name or 'RECIPE'}",
        description=f"{inspect.getdoc(function)}\n\n{told}",
        args=words[1:] if name else words,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    run = dataclasses.replace(
        launched.run,
        set=_added(recipe.set, launched.run.set),
        openrlhf=_added(recipe.openrlhf, launched.run.openrlhf) + flags,
    )
    function(dataclasses.replace(launched, run=run))


def _added(before: tuple[str, ...], given: tuple[str, ...]) -> tuple[str, ...]:
    return before if given == before else before + given  # of two values the later one counts


def _split(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """
    >>> _split(["tiny", "--steps", "3", "--", "--ds.zpg", "8"])
    (['tiny', '--steps', '3'], ('--ds.zpg', '8'))
    """
    end = words.index("--") if "--" in words else len(words)
    return list(words[:end]), tuple(words[end + 1 :])


def main(launched: LaunchConfig) -> None:
    """Train a model on a cluster: checks, Ray, the embedding service, the job, its progress and its end."""
    if not launched.dry_run:
        check_packages("train", Path.cwd())  # where the job will look before all else
    launch(launched, Console(), Console(stderr=True))


def launch(launched: LaunchConfig, out: Console, err: Console) -> None:
    """Carries out a launch.

    Args:
        out: where results are told, and commands.
        err: where progress is shown.

    Raises:
        SettingError: preflight refused the run, or its folder is not as it must be.
        JobFailed: the job ended before it was done.
    """
    run, address = _anywhere(launched.run), launched.ray_address
    check_recipe(run)
    if run.nodes > 1 and not (address or launched.dry_run or launched.prepare):
        raise SettingError(
            f"This run takes {run.nodes} machines: start Ray on them and give --ray-address http://HEAD:8265, or use {SLURM}."
        )
    if launched.dry_run or launched.prepare:
        out.print(estimate_table(run))
        if launched.prepare:
            write_folder(run)
        for line in commands(run, address):
            out.print(line, soft_wrap=True, markup=False, highlight=False)
        return
    found = machines(address)
    check_machines(run, found)
    check_services(run)
    out.print(estimate_table(run, machines=found))
    write_folder(run)
    carry_out(run, address, err)
    draw_curve(run.out / METRICS, run.out / "curve.png")
    tell_end(run, out)
    serve = shlex.join(["vllm", "serve", str(run.out / "model"), "--max-model-len", str(run.max_tokens)])
    out.print(f"Serve it:\n  {serve}", soft_wrap=True, markup=False, highlight=False)


def carry_out(run: ClusterGRPOConfig, address: str | None, console: Console) -> None:
    """Starts what a run in a written folder needs, follows its job, and stops all of it, whatever happens.

    Raises:
        JobFailed: the job, or the embedding service, ended before it was done.
    """
    words = ["-m", "train.cluster.job", *openrlhf_flags(run, find_model(run.model).resolve())]
    with contextlib.ExitStack() as stack, ended_by_signals():
        service = None
        if run.embedding_model:
            service = EmbeddingService(run, _own_address(address))
            stack.callback(service.stop)
            wait_for(service, console)
            os.environ["OPENAI_EMBEDDING_BASE_URL"] = service.url  # of this process, which checks it, and so of the job
            check_embedder(run)
        job: Job
        if address is None:
            own_ray = {"RAY_ADDRESS": "local"}  # else it would join one that runs on this machine already
            job = LocalJob([sys.executable, *words], job_environment(run) | own_ray, run.out / "job.log")
        else:
            job = RayJob(address, ["python", *words], job_environment(run), run.out / "job.log")
        stack.callback(job.stop)
        follow(run, job, service, console)


def _anywhere(run: ClusterGRPOConfig) -> ClusterGRPOConfig:
    """The run with paths that mean the same in any folder: its job does not run in this one."""
    paths = {name: path.resolve() for name in ("out", "data", "corpus") if (path := getattr(run, name)) is not None}
    folder = Path(run.model)
    return dataclasses.replace(run, **paths, model=str(folder.resolve()) if folder.is_dir() else run.model)


def write_folder(run: ClusterGRPOConfig) -> None:
    """Writes all that the job reads: `config.json` and the prompts.

    Raises:
        SettingError: as in `open_run`.
        DataError: a split has no tasks.
    """
    config = open_run(run)
    counts = [_count_tasks(run, split) for split in (run.split, run.eval_split)[: 2 if run.eval_every else 1]]
    write_prompts(run, counts[0], counts[-1])
    write_atomic(run.out / "config.json", config)


def _count_tasks(run: ClusterGRPOConfig, split: str | None) -> int:
    # Counting needs no embedder, and the run's own may be a service that is yet to be started.
    env = make_env(dataclasses.replace(run, embedder="hashing", durability="off"), split)
    source = Driver.of(env).source
    env.close()
    if not len(source):
        raise DataError(f"The {source.dataset} source has no tasks in {split!r}; choose another split.")
    return len(source)


def job_environment(run: ClusterGRPOConfig) -> dict[str, str]:
    """The variables that every process of the job must have."""
    return {RUN_VARIABLE: str(run.out)} | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


# ------------------------------------------------------------------------------------------------------------ what is typed


def commands(run: ClusterGRPOConfig, address: str | None) -> Iterator[str]:
    """What a launch would run, as lines for a shell; secrets are named, not shown.

    A run of several machines without an address is shown with the placeholder HEAD.
    """
    try:
        model = find_model(run.model).resolve()
    except (ModelNotFound, MissingDependency) as error:
        yield f"# {error}"
        model = Path(run.model)
    if address is None and run.nodes > 1:
        address = "http://HEAD:8265"
    environment = job_environment(run)
    if run.embedding_model:
        host = "127.0.0.1" if address is None else socket.gethostname()
        environment["OPENAI_EMBEDDING_BASE_URL"] = f"http://{host}:8100/v1"
        yield "# the embedding service; the launcher takes a free port, and waits until it answers"
        service = shlex.join(_embedding_command(run, host, 8100))
        yield f"{service} &> {shlex.quote(str(run.out / 'embedding.log'))} &"
    words = ["python", "-m", "train.cluster.job", *openrlhf_flags(run, model)]
    yield "# the job; --prepare writes the folder that it reads"
    if address is None:
        environment["RAY_ADDRESS"] = "local"
        given = " ".join(f"{name}={_shown(name, value)}" for name, value in environment.items())
        yield f"{given} \\\n{_lines(words)}"
    else:
        shown = {name: f"${name}" if name in _SECRETS else value for name, value in environment.items()}
        text = shlex.quote(json.dumps({"env_vars": shown}))
        for name in _SECRETS:  # ends the single quotes before it, so that the shell puts in the value
            text = text.replace(f'"${name}"', f'"\'"${name}"\'"')
        yield f"ray job submit --address {address} --runtime-env-json {text} -- \\\n{_lines(words)}"
    yield "# or all of this by Slurm, with the words of this command"
    yield f"sbatch --nodes={run.nodes} --gpus-per-node={run.gpus_per_node} {shlex.quote(str(SLURM))} RECIPE …"


def _shown(name: str, value: str) -> str:
    return f'"${name}"' if name in _SECRETS else shlex.quote(value)


def _lines(words: Sequence[str]) -> str:
    r"""A command with every option on a line of its own.

    >>> print(_lines(["python", "-m", "job", "--a", "1 2", "--b"]))
    python -m job \
      --a '1 2' \
      --b
    """
    return re.sub(r" (--[a-z])", r" \\\n  \1", shlex.join(words))


# ------------------------------------------------------------------------------------------------------- processes and jobs


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
    """A process of this machine, in a session of its own: a Ctrl-C is for its parent, who stops it in order.

    Args:
        command: of the process.
        environment: added to this process's.
        log: what it prints is added to this file.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self._begin = file.tell()
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
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
            with contextlib.suppress(ProcessLookupError):  # raised where nobody is left
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
        super().__init__(_embedding_command(run, host, port), {}, run.out / "embedding.log")

    def answers(self) -> bool:
        """Whether it is ready."""
        try:
            with urllib.request.urlopen(f"{self.url}/models", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # refused, or a timeout: not yet
            return False


def _embedding_command(run: ClusterGRPOConfig, host: str, port: int) -> list[str]:
    assert run.embedding_model is not None
    share = str(run.embedding_gpu_memory)
    where = ["--host", host, "--port", str(port)]
    return ["vllm", "serve", run.embedding_model, "--runner", "pooling", *where, "--gpu-memory-utilization", share]


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
        os.environ.pop(name, None)  # to Ray they would count more than the address that is asked for
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


def _own_address(ray_address: str | None) -> str:
    """This machine's IP address, as the head of Ray sees it; without Ray the machine is alone."""
    if ray_address is None:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((urlsplit(ray_address).hostname, 9))  # sends nothing
        return str(probe.getsockname()[0])


_LOOK = """\
import json, ray
from train.cluster.preflight import Machines
ray.init(log_to_driver=False)
print(json.dumps(Machines.on_ray().nodes))"""


def machines(address: str | None) -> Machines:
    """What there is: this machine, or the machines of a Ray, at which a job of it looks.

    Raises:
        JobFailed: that job failed; most likely the shell that Ray was started in has another `python`, without atommem.
    """
    if address is None:
        return Machines.here()
    handle, log = tempfile.mkstemp(prefix="atommem-look-", suffix=".log")
    os.close(handle)
    job = RayJob(address, ["python", "-c", _LOOK], {}, Path(log))
    try:
        while check_running("A look at Ray's machines", job):
            time.sleep(_POLL / 4)
    finally:
        job.stop()
    Path(log).unlink()  # else the error has named it
    return Machines(tuple(Node(*fields) for fields in json.loads(job.output().splitlines()[-1])))


# ---------------------------------------------------------------------------------------------------------- the way to the end


def wait_for(service: EmbeddingService, console: Console) -> None:
    """Waits until the service answers.

    Raises:
        JobFailed: it ended instead.
    """
    with console.status(f"Starting the embedding service (log: {service.log}) …"):
        while not service.answers():
            check_running("The embedding service", service)
            time.sleep(_POLL / 2)


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
    """Makes the signals that end a process from outside end it as Ctrl-C does: what was started is stopped."""

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


def follow(run: ClusterGRPOConfig, job: Job, service: EmbeddingService | None, console: Console) -> None:
    """Shows the job's progress until it has ended.

    Raises:
        JobFailed: the job failed, or the embedding service ended under it.
    """
    told = 0
    with step_progress(console) as progress:
        bar = progress.add_task("GRPO", total=run.steps, status="starting")
        running = True
        while running:
            running = check_running("The job", job)
            if running and service and not check_running("The embedding service", service):
                raise JobFailed(f"The embedding service ended. Its log is {service.log}.")
            step, text = _progress(run)
            progress.update(bar, completed=step, status=text)
            if step != told and not console.is_terminal:  # in a file there is no bar
                told = step
                console.print(f"step {step} of {run.steps}: {text}", highlight=False)
            if running:
                time.sleep(_POLL)


def _progress(run: ClusterGRPOConfig) -> tuple[int, str]:
    """The last step that was logged, and what to tell of it."""
    lines = read_jsonl(run.out / METRICS)
    steps = [line for line in lines if "reward" in line]
    if not steps:
        return 0, "starting"
    best = max((line["eval_em"] for line in lines if "eval_em" in line), default=None)
    return steps[-1]["step"], f"reward {steps[-1]['reward']:.3f}" + (
        "" if best is None else f", best held-out EM {best:.3f}"
    )


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
    found = ""
    inside = aside = False  # in the indented lines of a traceback; of one that did not end the program
    for place, line in enumerate(lines):
        if line.startswith('  File "'):
            inside = True
        elif line.startswith(("Exception in thread ", "Exception ignored in")):
            aside = True
        elif inside and line and not line.startswith(" "):
            if not aside and _RAISED.match(line):
                below = itertools.takewhile(lambda text: text.startswith(("\t", "  ")), lines[place + 1 :])
                found = " ".join([line, *(text.strip() for text in below)])
            inside = aside = False
    return found
