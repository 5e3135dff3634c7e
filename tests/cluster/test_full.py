"""What takes minutes, and what goes wrong on a cluster: `make test-cluster-full`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from processes import session, shadow_packages, wait_until

from agents.rollout import Driver
from atommem_env.embedders.hashing import HashingEmbedder
from eval.run_folder import read_jsonl
from train.cluster.recipe import ClusterGRPOConfig, Prompt, write_prompts
from train.settings import make_env

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("ATOMMEM_TEST_CLUSTER_FULL"), reason="set ATOMMEM_TEST_CLUSTER_FULL=1"),
]
Finish = Callable[..., tuple[Path, list[dict[str, Any]]]]
ASYNC = ("--asynchronous", "--gpus-per-node", "4", "--engines", "2")
MINUTE = 60.0
HERE = Path(__file__).parent


def trained_positions(lines: list[dict[str, Any]]) -> list[int]:
    return sorted(position for line in lines for position in line.get("positions", ()))


# ------------------------------------------------------------------------------------------------------- ways to train


def test_sampling_beside_training_with_partial_rollouts_and_dynamic_filtering(finish: Finish) -> None:
    out, lines = finish(*ASYNC, "--partial-rollouts", "--dynamic-filtering", "--steps", "4")
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line["groups_zero_variance"] == 0
        assert abs(line["sampler_kl"]) < 0.5  # weights change under the rollouts
        assert 0 < line["grad_norm"] < 100
    assert sum(line["groups_filtered"] for line in steps) == sum(line["groups_replaced"] for line in steps)
    assert trained_positions(lines) == list(range(16))
    assert [line["step"] for line in lines if "eval_em" in line] == [0, 2, 4]
    assert (out / "model" / "model.safetensors").stat().st_size > 10**6


def test_zero_2_and_two_engines(finish: Finish) -> None:
    _, lines = finish("--zero-stage", "2", "--gpus-per-node", "4", "--engines", "2")
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert trained_positions(lines) == list(range(8))
    assert all(abs(line["sampler_kl"]) < 0.05 and line["grad_norm"] > 0 for line in steps)


def test_a_ray_of_the_run_s_own(tmp_path: Path) -> None:
    """No address is given: the launcher looks for this machine's GPUs, which are pretended, and starts Ray by itself."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '81559\\n81559\\n81559\\n'\n")
    program.chmod(0o755)
    out = tmp_path / "run"
    shadow_packages(tmp_path / "working")
    done = subprocess.run(
        [Path(sys.executable).with_name("atommem"), "train", "cluster", HERE / "tiny.toml", "--out", out],
        env={
            **os.environ,
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_OVERRIDE_RESOURCES": '{"GPU": 3, "CPU": 12}',
        },
        cwd=tmp_path / "working",
        capture_output=True,
        text=True,
        timeout=15 * MINUTE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_jsonl(out / "metrics.jsonl")
    assert trained_positions(lines) == list(range(8))
    assert (out / "model" / "model.safetensors").is_file()
    assert f"vllm serve {out / 'model'}" in done.stdout


# ------------------------------------------------------------------------------------------------------- what goes wrong


def processes_of(dashboard: str, title: str) -> list[int]:
    """The processes of that Ray whose title begins so."""
    words = {int(path.parent.name): read(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
    port = f"--dashboard-port={urlsplit(dashboard).port}".encode()
    (head,) = [pid for pid, line in words.items() if b"start\0" in line and port in line]
    return [pid for pid, line in words.items() if line.startswith(title.encode()) and session(pid) == head]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended since
        return b""


def after_step(out: Path, step: int) -> Callable[[], bool]:
    return lambda: any(line["step"] >= step and "reward" in line for line in read_jsonl(out / "metrics.jsonl"))


def ended_within_a_minute(job: subprocess.Popen[str]) -> str:
    """What a launch said that, from now on, must end by itself, and not well."""
    began = time.monotonic()
    said, _ = job.communicate(timeout=5 * MINUTE)
    assert time.monotonic() - began < MINUTE, said
    assert job.returncode != 0
    return said


@pytest.mark.parametrize("how", [(), ASYNC], ids=["in turns", "beside each other"])
def test_a_trainer_that_is_killed_and_resumed_trains_on_each_prompt_once(
    how: tuple[str, ...], start: Callable[..., Any], finish: Finish, tmp_path: Path, dashboard: str
) -> None:
    words = (*how, "--steps", "6", "--eval-every", "0")
    job = start(*words)
    wait_until(lambda: job.poll() is not None or after_step(tmp_path / "run", 3)(), 10 * MINUTE)
    assert job.poll() is None, job.communicate()
    trainers: list[int] = []  # they bear another title while they do something
    wait_until(lambda: trainers.extend(processes_of(dashboard, "ray::PolicyActor")) or trainers)
    os.kill(trainers[0], signal.SIGKILL)
    said = ended_within_a_minute(job)
    assert re.search("JobFailed|Error", said), said
    _, lines = finish(*words, "--resume")
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3, 4, 5, 6]
    assert trained_positions(lines) == list(range(24))


@pytest.mark.parametrize("how", [(), ASYNC], ids=["in turns", "beside each other"])
@pytest.mark.parametrize("title", ["VLLM::EngineCore", "ray::Engine"])
def test_an_engine_that_dies_ends_the_job_within_a_minute_and_is_named(
    title: str, how: tuple[str, ...], start: Callable[..., Any], tmp_path: Path, dashboard: str
) -> None:
    job = start(*how, "--steps", "50", "--eval-every", "0")
    wait_until(lambda: job.poll() is not None or after_step(tmp_path / "run", 1)(), 10 * MINUTE)
    engines = processes_of(dashboard, title)
    assert engines, job.poll()
    os.kill(engines[0], signal.SIGKILL)
    said = ended_within_a_minute(job)
    assert re.search("EngineDied|ActorDiedError|EngineDead", said), said


class Service(ThreadingHTTPServer):
    """An embedding service that embeds by hashing, and rejects the texts that it should."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rejects: Callable[[str], bool] = lambda text: False
        self.rejected = 0
        self.status = 400


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        rejected = any(map(self.server.rejects, texts))
        self.server.rejected += rejected
        rows = HashingEmbedder(64).embed(texts, "document").tolist()
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        answer = {"error": {"message": "rejected"}} if rejected else {"object": "list", "model": "m", "data": data}
        content = json.dumps(answer).encode()
        self.send_response(self.server.status if rejected else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with Service() as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{service.server_address[1]}/v1")
        yield service
        service.shutdown()
        thread.join()


def test_an_episode_that_always_fails_costs_its_group_which_is_replaced_and_counted(
    service: Service, finish: Finish, recipe: ClusterGRPOConfig, tmp_path: Path
) -> None:
    # The service rejects all texts about the person that the first task asks about: that episode cannot be played.
    source = Driver.of(make_env(recipe, "train")).source
    (tmp_path / "plan").mkdir()
    write_prompts(dataclasses.replace(recipe, out=tmp_path / "plan"), len(source), len(source))
    first = Prompt.of(read_jsonl(tmp_path / "plan" / "prompts.jsonl")[0]["prompt"])
    question = source.task(first.spec.index, first.spec.task_seed).questions[0].text
    name = re.findall(r"[A-Z]\w+ [A-Z]\w+", question)[0]
    service.rejects = lambda text: name in text
    _, lines = finish("--embedder", "openai:m", "--eval-every", "0")
    assert service.rejected > 0
    steps = [line for line in lines if "reward" in line]
    assert sum(line["groups_failed"] for line in steps) >= 1
    assert sum(line["groups_replaced"] for line in steps) >= 1
    assert trained_positions(lines) == list(range(8))


def test_an_embedder_that_fails_ends_the_job_within_a_minute_with_the_cause(
    service: Service, start: Callable[..., Any], tmp_path: Path
) -> None:
    service.status = 500
    job = start("--embedder", "openai:m", "--steps", "50", "--eval-every", "0")
    wait_until(lambda: job.poll() is not None or after_step(tmp_path / "run", 1)(), 10 * MINUTE)
    assert job.poll() is None, job.communicate()
    service.rejects = lambda text: True
    said = ended_within_a_minute(job)
    assert re.search("(?s)As many groups of a step as it has.*The embedding service at", said), said
