"""The launcher: real processes, a real Ray where there is one, and stand-ins only for programs that need a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import alive, wait_until
from rich.console import Console

from atommem_env import cli
from atommem_env.errors import JobFailed, SettingError
from eval.command_line import parse_eval
from eval.run_folder import to_jsonl
from train.cluster import launch as launcher
from train.cluster.launch import (
    SLURM,
    EmbeddingService,
    LaunchConfig,
    LocalJob,
    call,
    commands,
    follow,
    job_environment,
    launch,
    root_cause,
    wait_for,
    write_folder,
)
from train.cluster.recipe import (
    RUN_VARIABLE,
    ClusterGRPOConfig,
    Prompt,
    add_card,
    openrlhf_flags,
    recipe_names,
    running,
    write_run_card,
)
from train.grpo import METRICS, report_end

RECIPE = """
[env]
env_id = "AtomMem-Synthetic"
layout = "terse"
set = ["chunk_tokens=48", "top_k=2"]
[cluster]
model = "tiny"
gpus_per_node = 2
engines = 2
groups = 4
group_size = 4
steps = 3
max_tokens = 1024
max_new_tokens = 64
micro_batch_tokens = 1024
eval_episodes = 5
openrlhf = ["--vllm.enforce_eager"]
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_POLL", 0.1)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "mine.toml").write_text(RECIPE, encoding="utf-8")
    return str(tmp_path / "mine.toml")


@pytest.fixture
def run(recipe: str, tmp_path: Path) -> ClusterGRPOConfig:
    """The run of `RECIPE`, in a folder that is yet to be made."""
    return parsed(f"{recipe} --out {tmp_path / 'run'}").run


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


def parsed(words: str) -> LaunchConfig:
    got: list[LaunchConfig] = []
    call("train cluster", got.append, shlex.split(words))
    return got[0]


def program(folder: Path, name: str, code: str) -> None:
    """Puts a program on the search path that stands for one of that name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}", encoding="utf-8")
    (folder / name).chmod(0o755)


# ------------------------------------------------------------------------------------------------------- what is asked for


def test_the_command_line_overrides_the_recipe_and_adds_to_its_lists(recipe: str) -> None:
    told = parsed(
        f"{recipe} AtomMem-MuSiQue --steps 7 --set capacity=8 --ray-address http://h:1 --dry-run -- --ds.zpg 8"
    )
    assert (told.ray_address, told.dry_run, told.prepare) == ("http://h:1", True, False)
    assert (told.run.env_id, told.run.steps, told.run.groups, told.run.model) == ("AtomMem-MuSiQue", 7, 4, "tiny")
    assert told.run.env_options()["capacity"] == 8
    assert told.run.env_options()["chunk_tokens"] == 48
    assert told.run.openrlhf == ("--vllm.enforce_eager", "--ds.zpg", "8")
    assert parsed(f"{recipe} --openrlhf=--a.b=c").run.openrlhf == ("--vllm.enforce_eager", "--a.b=c")
    assert parsed(recipe).run.set == ("chunk_tokens=48", "top_k=2")


def test_a_recipe_must_be_named_first() -> None:
    with pytest.raises(SettingError, match="RECIPE comes first"):
        parsed("--steps 3")
    with pytest.raises(SettingError, match="nonsense"):
        parsed("nonsense")


def test_help_is_given_with_and_without_a_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("--help", f"{recipe} --help"):
        with pytest.raises(SystemExit, match="0"):
            parsed(words)
        told = capsys.readouterr().out
        assert all(option in told for option in ("--ray-address", "--dry-run", "--gpus-per-node", "--prepare"))


# --------------------------------------------------------------------------------------------------------------- dry run


def dry(launched: LaunchConfig) -> str:
    out = Console(file=io.StringIO(), width=80)
    launch(dataclasses.replace(launched, dry_run=True), out, Console(file=io.StringIO()))
    return out.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_shown_on_a_machine_that_has_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["atommem", "train", "cluster", name, "--dry-run"])
    cli.main()
    told = capsys.readouterr().out
    assert "train.cluster.job" in told
    assert not list(tmp_path.iterdir())


def words_of(shell: str, program: str, environment: dict[str, str]) -> list[str]:
    """The words that `shell` calls `program` with, as bash has them, and the variables that it sees."""
    code = f"{program}() {{ env -0; printf '%s\\0' -- \"$@\"; }}; vllm() {{ :; }}; sbatch() {{ :; }}\n{shell}"
    ran = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, env=os.environ | environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split("\0")[:-1]


def test_what_is_shown_is_what_would_run(
    run: ClusterGRPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()  # where the shell redirects to
    secrets = {"WANDB_API_KEY": "se'cret", "OPENAI_API_KEY": "hush"}
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run = dataclasses.replace(run, embedding_model="some/model", wandb_project="a project")
    for address, program in ((None, "python"), ("http://head:8265", "ray")):
        shell = "\n".join(commands(run, address))
        assert not any(secret in shell for secret in secrets.values())
        words = words_of(shell, program, secrets)
        model = Path(words[words.index("--actor.model_name_or_path") + 1])
        assert (model / "config.json").is_file()
        entry = ["-m", "train.cluster.job", *openrlhf_flags(run, model)]
        assert words[-len(entry) :] == entry
        if program == "python":
            told = dict(word.split("=", 1) for word in words[: words.index("--")])
            assert told["RAY_ADDRESS"] == "local"
        else:
            assert words[words.index("--address") + 1] == address
            told = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
        assert told["ATOMMEM_RUN"] == str(run.out)
        assert told["OPENAI_EMBEDDING_BASE_URL"].endswith(":8100/v1")
        assert {name: told[name] for name in secrets} == secrets


def test_a_dry_run_writes_nothing_and_preflight_speaks_first(recipe: str, tmp_path: Path) -> None:
    told = dry(parsed(f"{recipe} --out {tmp_path / 'run'}"))
    assert "--vllm.num_engines 2" in told
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingError):
        dry(parsed(f"{recipe} --engines 3"))  # of the two GPUs


def test_several_machines_need_a_ray_to_join(recipe: str) -> None:
    words = f"{recipe} --nodes 2 --engines 4"
    assert "ray job submit --address http://HEAD:8265" in dry(parsed(words))
    with pytest.raises(SettingError, match=r"2 machines.*--ray-address"):
        launch(parsed(words), Console(file=io.StringIO()), Console(file=io.StringIO()))


# ---------------------------------------------------------------------------------------------------------------- the folder


def test_the_folder_is_all_that_the_job_needs(run: ClusterGRPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    write_folder(run)
    monkeypatch.setenv(RUN_VARIABLE, job_environment(run)[RUN_VARIABLE])
    assert running() == run
    assert not any("secret" in path.read_text(encoding="utf-8") for path in run.out.iterdir())
    prompts = (run.out / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == run.steps * run.groups
    assert Prompt.of(json.loads(prompts[0])["prompt"]).split == "train"
    assert len((run.out / "held_out.jsonl").read_text(encoding="utf-8").splitlines()) == run.eval_episodes


def test_a_folder_is_taken_again_only_to_resume_the_same_run(run: ClusterGRPOConfig) -> None:
    write_folder(run)
    with pytest.raises(SettingError, match="--resume"):
        write_folder(run)
    with pytest.raises(SettingError, match="groups was 4, is 2"):
        write_folder(dataclasses.replace(run, groups=2, resume=True))
    before = (run.out / "prompts.jsonl").read_bytes()
    write_folder(dataclasses.replace(run, resume=True))
    assert (run.out / "prompts.jsonl").read_bytes() == before


def test_prepare_writes_the_folder_from_anywhere_and_starts_nothing(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launch(parsed(f"{recipe} --out here --prepare"), Console(file=io.StringIO()), Console(file=io.StringIO()))
    assert (tmp_path / "here" / "config.json").is_file()
    assert not (tmp_path / "here" / "job.log").exists()


# ------------------------------------------------------------------------------------------------------------- a job's life


def test_a_job_that_ends_well(run: ClusterGRPOConfig, start: Callable[..., LocalJob]) -> None:
    run.out.mkdir()
    console = Console(file=io.StringIO(), width=200)
    job = start(f"""
        import json, time
        for line in ({{"step": 0, "eval_em": 0.25}}, {{"step": 1, "reward": 0.5}}, {{"step": 1, "eval_em": 0.125}},
                     {{"step": 3, "reward": 0.75}}):
            with open({str(run.out / METRICS)!r}, "a") as file:
                print(json.dumps(line), file=file)
            time.sleep(0.3)
    """)
    follow(run, job, None, console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 1 of 3: reward 0.500, best held-out EM 0.250" in told
    assert "step 3 of 3: reward 0.750, best held-out EM 0.250" in told
    assert "step 0" not in told
    assert job.poll() == ""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ValueError('what was wrong')", r"ended with exit code 1: ValueError: what was wrong\n.*job\.log"),
        ("import os; print('no traceback'); os.kill(os.getpid(), 9)", r"was ended by SIGKILL\n"),
        ("raise SystemExit(3)", r"ended with exit code 3\n"),
    ],
)
def test_the_end_of_a_job_is_told_with_its_cause(
    code: str, told: str, run: ClusterGRPOConfig, start: Callable[..., LocalJob], tmp_path: Path
) -> None:
    # of a run before this one; it is kept
    (tmp_path / "job.log").write_text("Traceback\n  File 'x'\nOldError: of yesterday\n")
    with pytest.raises(JobFailed, match=told) as caught:
        follow(run, start(code), None, Console(file=io.StringIO()))
    assert "OldError" not in str(caught.value)
    assert "OldError" in (tmp_path / "job.log").read_text()


STUBBORN = """
    import signal, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"])
    print(child.pid)
    time.sleep(99)
"""


def test_stopping_leaves_nobody_behind(
    start: Callable[..., LocalJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start(STUBBORN)
    wait_until(lambda: job.output().strip())
    child = int(job.output())
    assert alive(child)
    job.stop()
    assert not alive(job.process.pid)
    wait_until(lambda: not alive(child))
    job.stop()  # again: nothing happens
    monkeypatch.setattr(launcher, "_GRACE", 0.2)
    deaf = start("import signal, time; signal.signal(15, signal.SIG_IGN); print('ready'); time.sleep(99)")
    wait_until(lambda: "ready" in deaf.output())
    deaf.stop()
    assert deaf.poll() == "was ended by SIGKILL"


# ----------------------------------------------------------------------------------------------------------- what went wrong


QUIET = """\
all is well
    indented: this is no traceback
Note: nor is this
"""
PLAIN = """\
Traceback (most recent call last):
  File "a", line 1, in f
    g()
    ~^^
KeyError: 'b'
"""
CHAIN = """\
Traceback (most recent call last):
  File "a", line 1
OSError: refused

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b", line 2
atommem_env.errors.EmbeddingError: no answer
"""
NESTED = """\
Traceback (most recent call last):
  File "/a.py", line 3, in <module>
    ray.get(ref)
ray.exceptions.RayTaskError(EngineDied): \x1b[36mray::Trainer.fit()\x1b[39m (pid=7, ip=10.0.0.1)
  File "/b.py", line 4, in fit
    step()
ray.exceptions.RayTaskError(EngineDied): \x1b[36mray::Engine.play()\x1b[39m (pid=8, ip=10.0.0.2)
  File "/c.py", line 5, in play
atommem_env.errors.EngineDied: the engine is gone
\x1b[36m(Policy pid=9)\x1b[0m Traceback (most recent call last):
\x1b[36m(Policy pid=9)\x1b[0m   File "/d.py", line 6, in g
\x1b[36m(Policy pid=9)\x1b[0m RuntimeError: Connection closed by peer
"""
ASIDE = f"""\
{PLAIN}Exception in thread printer:
Traceback (most recent call last):
  File "/a.py", line 3, in run
RuntimeError: can't register atexit after shutdown
Exception ignored in: <function f at 0x7f>
Traceback (most recent call last):
  File "/a.py", line 3, in f
TypeError: 'NoneType' object is not callable
"""
DIED = """\
Traceback (most recent call last):
  File "/a.py", line 3, in <module>
    ray.get(ref)
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: LLMRayActor
\tactor_id: 12
The actor is dead
"""
VLLM_FAILED = """\
(EngineCore pid=5) ERROR 11-21 12:00:01 [core.py:1] Traceback (most recent call last):
(EngineCore pid=5) ERROR 11-21 12:00:01 [core.py:1]   File "/v.py", line 1, in g
(EngineCore pid=5) ERROR 11-21 12:00:01 [core.py:1] ValueError: no memory for the cache
(APIServer pid=4) Traceback (most recent call last):
(APIServer pid=4)   File "/w.py", line 1, in f
(APIServer pid=4) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (QUIET, ""),
        (PLAIN, "KeyError: 'b'"),
        (CHAIN, "atommem_env.errors.EmbeddingError: no answer"),
        (NESTED, "atommem_env.errors.EngineDied: the engine is gone"),
        (ASIDE, "KeyError: 'b'"),
        (DIED, r"ray\.exceptions\.ActorDiedError: The actor died .* task\. class_name: LLMRayActor actor_id: 12"),
        (VLLM_FAILED, "ValueError: no memory for the cache"),
    ],
)
def test_the_cause_is_found_in_a_log(log: str, cause: str) -> None:
    assert re.fullmatch(cause, root_cause(log))


# ------------------------------------------------------------------------------------- the whole, with stand-ins for programs

VLLM = """
    import http.server, sys
    place = sys.argv.index("--port")
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.end_headers()
    print("vllm was told", *sys.argv[1:], flush=True)
    http.server.HTTPServer((sys.argv[sys.argv.index("--host") + 1], int(sys.argv[place + 1])), Handler).serve_forever()
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before all others on the search path, with two GPUs of 80 GB to look at."""
    folder = tmp_path / "bin"
    program(folder, "nvidia-smi", "print('81559\\n81559')")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def test_the_embedding_service_is_awaited_and_its_death_ends_the_run(
    run: ClusterGRPOConfig, programs: Path, start: Callable[..., LocalJob]
) -> None:
    program(programs, "vllm", VLLM)
    run = dataclasses.replace(run, embedding_model="some/model", embedding_gpu_memory=0.2)
    run.out.mkdir()
    service = EmbeddingService(run, "127.0.0.1")
    try:
        wait_for(service, Console(file=io.StringIO()))
        assert "serve some/model --runner pooling" in service.output()
        assert "--gpu-memory-utilization 0.2" in service.output()
        threading.Timer(0.5, service.process.kill).start()
        with pytest.raises(JobFailed, match=r"embedding service was ended by SIGKILL\n.*embedding\.log"):
            follow(run, start("import time; time.sleep(99)"), service, Console(file=io.StringIO()))
    finally:
        service.stop()
    program(programs, "vllm", "raise OSError('no such model')")
    service = EmbeddingService(run, "127.0.0.1")
    with pytest.raises(JobFailed, match=r"ended with exit code 1: OSError: no such model"):
        wait_for(service, Console(file=io.StringIO()))


CARRIED_OUT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind nohup
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from rich.console import Console
from train.cluster.launch import carry_out
from train.cluster.recipe import running
carry_out(running(), None, Console(stderr=True))
"""


def carried_out(run: ClusterGRPOConfig) -> subprocess.Popen[str]:
    """What comes after preflight, in a process of its own; its folder is written."""
    write_folder(run)
    return subprocess.Popen(
        [sys.executable, "-c", CARRIED_OUT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | job_environment(run),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_launch_leaves_no_process(
    number: signal.Signals, run: ClusterGRPOConfig, programs: Path
) -> None:
    program(programs, "vllm", "import os, time; print(os.getpid(), flush=True); time.sleep(99)")
    process = carried_out(dataclasses.replace(run, embedding_model="some/model"))
    log = run.out / "embedding.log"
    wait_until(lambda: process.poll() is not None or (log.exists() and log.read_text().endswith("\n")))
    assert process.poll() is None, process.communicate()
    service = int(log.read_text())
    assert alive(service)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not alive(service)


@pytest.mark.skipif(importlib.util.find_spec("openrlhf") is not None, reason="the job would start in earnest")
def test_a_job_that_cannot_start_is_one_error_with_the_cause(run: ClusterGRPOConfig) -> None:
    process = carried_out(run)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "JobFailed: The job ended with exit code 1: ModuleNotFoundError: No module named 'openrlhf'" in told
    assert f"Its log is {run.out / 'job.log'}" in told


def test_preflight_comes_before_the_folder(recipe: str, programs: Path, tmp_path: Path) -> None:
    words = f"{recipe} --out {tmp_path / 'run'} --gpus-per-node 4 --engines 4"  # two are there
    with pytest.raises(SettingError, match="4 GPUs"):
        launch(parsed(words), Console(file=io.StringIO()), Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_the_end_tells_what_to_do_next(run: ClusterGRPOConfig) -> None:
    run.out.mkdir()
    lines = [{"step": 0, "eval_em": 0.1}, {"step": 2, "eval_em": 0.5}, {"step": 3, "eval_em": 0.5}]
    (run.out / METRICS).write_text("".join(map(to_jsonl, lines)), encoding="utf-8")
    console = Console(file=io.StringIO(), width=60)
    report_end(run, console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Best held-out exact match 50.0 % after 2 of 3 steps." in told
    words = shlex.split(told.splitlines()[-1])
    assert words == ["atommem", "eval", "ENV_ID", "--policy", str(run.out / "model")]
    (run.out / "model").mkdir()
    write_run_card(run)
    add_card(run)
    report_end(run, console)
    words = shlex.split(console.file.getvalue().splitlines()[-1])  # type: ignore[attr-defined]
    assert words == ["atommem", "eval", "--policy", str(run.out / "model")]
    config, _ = parse_eval("atommem eval", "", words[2:])
    assert (config.env_id, config.layout, config.max_new_tokens) == (run.env_id, run.layout, 64)
    assert set(run.set) <= set(config.set)


# ---------------------------------------------------------------------------------------------------------------------- Slurm


def test_the_slurm_template_is_a_script_that_hands_its_words_on(tmp_path: Path, programs: Path) -> None:
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    for name, code in {
        "scontrol": "print('one'), print('two')",
        "srun": "import os, sys; at = next(i for i, w in enumerate(sys.argv) if w.startswith('--nodelist'));"
        " os.execvp(sys.argv[at + 1], sys.argv[at + 1:])",
        "ray": "import sys, time\nif sys.argv[1] == 'start': time.sleep(99)\nprint('\"node_id\"\\n' * 2)",
        "atommem": "import sys; print(sys.argv[1:]); sys.exit(7)",
    }.items():
        program(programs, name, code)
    environment = os.environ | {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "some", "HEAD_IP": "10.0.0.9"}
    ran = subprocess.run(
        ["bash", SLURM, "mine", "--steps", "3", "--", "--ds.zpg", "8"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 7, ran.stderr
    expected = [
        "train",
        "cluster",
        "mine",
        "--ray-address",
        "http://10.0.0.9:8265",
        "--steps",
        "3",
        "--",
        "--ds.zpg",
        "8",
    ]
    assert str(expected) in ran.stdout
