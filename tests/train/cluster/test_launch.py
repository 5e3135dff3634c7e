"""The launcher: real processes, a real Ray where there is one, and stand-ins only for programs that need a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from processes import alive, shadow_packages, wait_until, write_program
from rich.console import Console

from atommem_env import cli
from atommem_env.errors import JobFailed, SettingError
from atommem_env.plugins import MODULES
from atommem_env.usage_reports import USAGE_REPORTS_OFF
from eval.command_line import parse_eval
from eval.run_folder import to_jsonl
from train import shapes
from train.cluster import jobs, preflight
from train.cluster import launch as launcher
from train.cluster.jobs import SLURM, EmbeddingService, LocalJob, wait_for
from train.cluster.launch import LaunchConfig, call, commands, follow, job_environment, launch, write_folder
from train.cluster.preflight import make_plan
from train.cluster.recipe import (
    RUN_VARIABLE,
    ClusterGRPOConfig,
    Prompt,
    add_card,
    openrlhf_flags,
    read_run,
    recipe_names,
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
    for module in (launcher, jobs):
        monkeypatch.setattr(module, "_POLL", 0.1)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "mine.toml").write_text(RECIPE, encoding="utf-8")
    return str(tmp_path / "mine.toml")


@pytest.fixture
def run(recipe: str, tmp_path: Path) -> ClusterGRPOConfig:
    """The run of `RECIPE`, in a folder that does not exist yet."""
    return parsed(f"{recipe} --out {tmp_path / 'run'}").run


def parsed(words: str) -> LaunchConfig:
    got: list[LaunchConfig] = []
    call("train cluster", got.append, shlex.split(words))
    return got[0]


# ------------------------------------------------------------------------------------------------------- what is asked for


def test_the_command_line_overrides_the_recipe_and_adds_to_its_lists(recipe: str) -> None:
    launched = parsed(
        f"{recipe} AtomMem-MuSiQue --steps 7 --set capacity=8 --ray-address http://h:1 --dry-run -- --ds.zpg 8"
    )
    assert (launched.ray_address, launched.dry_run, launched.prepare) == ("http://h:1", True, False)
    assert (launched.run.env_id, launched.run.steps, launched.run.groups, launched.run.model) == (
        "AtomMem-MuSiQue",
        7,
        4,
        "tiny",
    )
    assert launched.run.env_options()["capacity"] == 8
    assert launched.run.env_options()["chunk_tokens"] == 48
    assert launched.run.openrlhf == ("--vllm.enforce_eager", "--ds.zpg", "8")
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
        text = capsys.readouterr().out
        assert all(option in text for option in ("--ray-address", "--dry-run", "--gpus-per-node", "--prepare"))


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
    assert "train.cluster.job" in capsys.readouterr().out
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
    secrets = {
        "WANDB_API_KEY": "se'cret",
        "OPENAI_API_KEY": "hush",
        "OPENAI_BASE_URL": "https://me:open-sesame@host/v1?key=other",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {
        "embedding_model": "some/model",
        "embedder": "openai:some/model",
        "wandb_project": "a project",
    }
    plan = make_plan(dataclasses.replace(run, **changes))
    for address, program in ((None, "python"), ("http://head:8265", "ray")):
        shell = "\n".join(commands(plan, address))
        assert not any(secret in shell for secret in secrets.values())
        words = words_of(shell, program, secrets)
        model = Path(words[words.index("--actor.model_name_or_path") + 1])
        assert (model / "config.json").is_file()
        entry = ["-P", "-m", "train.cluster.job", *openrlhf_flags(plan.run, model)]
        assert words[-len(entry) :] == entry
        if program == "python":
            variables = dict(word.split("=", 1) for word in words[: words.index("--")])
            assert variables["RAY_ADDRESS"] == "local"
        else:
            assert words[words.index("--address") + 1] == address
            variables = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
        assert variables["ATOMMEM_RUN"] == str(run.out)
        assert variables["ATOMMEM_MODULES"] == str(tmp_path)
        assert variables["OPENAI_EMBEDDING_BASE_URL"].endswith(":8100/v1")
        assert {name: variables[name] for name in secrets} == secrets
        assert variables.items() >= USAGE_REPORTS_OFF.items()


def test_a_dry_run_writes_nothing_and_preflight_speaks_first(recipe: str, tmp_path: Path) -> None:
    assert "--vllm.num_engines 2" in dry(parsed(f"{recipe} --out {tmp_path / 'run'}"))
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
    assert read_run() == run
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
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 1 of 3: reward 0.500, best held-out EM 0.250" in text
    assert "step 3 of 3: reward 0.750, best held-out EM 0.250" in text
    assert "step 0" not in text
    assert job.poll() == ""


# ------------------------------------------------------------------------------------- the whole, with stand-ins for programs

VLLM = """
    import http.server, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.end_headers()
    print("vllm", *sys.argv[1:], flush=True)
    options = dict(zip(sys.argv, sys.argv[1:]))
    http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


def test_the_embedding_service_is_awaited_and_its_death_ends_the_run(
    run: ClusterGRPOConfig, programs: Path, start: Callable[..., LocalJob]
) -> None:
    write_program(programs, "vllm", VLLM)
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
    write_program(programs, "vllm", "raise OSError('no such model')")
    service = EmbeddingService(run, "127.0.0.1")
    with pytest.raises(JobFailed, match=r"ended with exit code 1: OSError: no such model"):
        wait_for(service, Console(file=io.StringIO()))


CARRIED_OUT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind nohup
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from rich.console import Console
from train.cluster.launch import carry_out
from train.cluster.preflight import make_plan
from train.cluster.recipe import read_run
carry_out(make_plan(read_run()), None, Console(stderr=True))
"""


def carried_out(run: ClusterGRPOConfig) -> subprocess.Popen[str]:
    """What comes after preflight, in a process of its own, as the command's; its folder is written."""
    write_folder(run)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", CARRIED_OUT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | job_environment(run),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_launch_leaves_no_process(
    number: signal.Signals, run: ClusterGRPOConfig, programs: Path
) -> None:
    write_program(programs, "vllm", "import os, time; print(os.getpid(), flush=True); time.sleep(99)")
    process = carried_out(dataclasses.replace(run, embedding_model="some/model", embedder="openai:some/model"))
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
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "JobFailed: The job ended with exit code 1: ModuleNotFoundError: No module named 'openrlhf'" in text
    assert f"Its log is {run.out / 'job.log'}" in text


@pytest.mark.skipif(importlib.util.find_spec("openrlhf") is not None, reason="the job would start in earnest")
def test_the_job_imports_our_packages_whatever_the_working_folder_holds(
    run: ClusterGRPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow_packages(tmp_path / "working")
    monkeypatch.chdir(tmp_path / "working")
    process = carried_out(run)
    process.communicate(timeout=60)
    log = (run.out / "job.log").read_text(encoding="utf-8")
    assert "No module named 'openrlhf'" in log, log  # what our own modules import first of all that is not here


@pytest.mark.parametrize("variable", [None, "of_the_variable"])
def test_the_job_finds_modules_of_the_launcher_s_folder(
    variable: str | None, run: ClusterGRPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("working", "of_the_variable", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_parts.py").write_text(f"NAME = {folder!r}\n", encoding="utf-8")
    (tmp_path / "elsewhere" / "my_parts.py").unlink()
    monkeypatch.chdir(tmp_path / "working")
    if variable:
        monkeypatch.setenv(MODULES, f"../{variable}")
    environment = job_environment(run)
    code = "from atommem_env.plugins import load_attribute; print(load_attribute('my_parts:NAME'))"
    job = LocalJob([sys.executable, "-P", "-c", code], environment, tmp_path / "job.log", tmp_path / "elsewhere")
    job.process.wait()
    assert job.output() == f"{variable or 'working'}\n"


def test_paths_mean_the_same_in_the_job_s_folder(
    run: ClusterGRPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    names = {"model": "here", "layout": "public_code:here", "embedder": "st:here"}
    paths: dict[str, Any] = {
        "out": Path("out"),
        "data": Path("data"),
        "corpus": Path("corpus"),
        "files": (Path("a.md"),),
    }
    absolute = launcher.with_absolute_paths(dataclasses.replace(run, **names, **paths, eval_every=0))
    assert (absolute.out, absolute.data, absolute.corpus) == tuple(
        tmp_path / name for name in ("out", "data", "corpus")
    )
    assert absolute.files == (tmp_path / "a.md",)
    assert (absolute.model, absolute.layout, absolute.embedder) == tuple(
        name.replace("here", str(tmp_path / "here")) for name in names.values()
    )
    assert launcher.with_absolute_paths(absolute) == absolute
    names = {"model": "tiny", "layout": "terse", "embedder": "st:all-MiniLM-L6-v2"}  # no folders of these names
    assert dataclasses.replace(absolute, **names) == launcher.with_absolute_paths(
        dataclasses.replace(absolute, **names)
    )


def test_a_launch_derives_what_will_run_once(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    derived = {"environment_of": shapes, "get_layout": shapes, "model_size": preflight, "find_model": preflight}
    spies = {name: Mock(wraps=getattr(module, name)) for name, module in derived.items()}
    for name, spy in spies.items():
        monkeypatch.setattr(derived[name], name, spy)
    dry(parsed(recipe))
    assert {name: spy.call_count for name, spy in spies.items()} == dict.fromkeys(derived, 1)


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
        write_program(programs, name, code)
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
