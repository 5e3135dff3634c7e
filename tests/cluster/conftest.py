"""The cluster stack on a machine without a GPU: a Ray with pretended ones, and shims in every process of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import shadow_packages, started_ray

from agents.models.find import find_model
from eval.run_folder import read_jsonl
from train.cluster.recipe import ClusterGRPOConfig, read_recipe

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "PYTHONPATH": str(HERE / "shims"),
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
os.environ.update(ENVIRONMENT)  # of every process that a test starts
sys.path.insert(0, ENVIRONMENT["PYTHONPATH"])  # and for imports of this one


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a Ray with pretended GPUs, started in a folder with packages of our names; it ends with the module's last test."""
    folder = tmp_path_factory.mktemp("ray")
    shadow_packages(folder)
    with started_ray(gpus=4, folder=folder) as address:
        yield address


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The model that comes with the project."""
    return find_model("tiny")


@pytest.fixture
def start(dashboard: str, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `atommem train cluster` with some words, as a user types it; its folder is `run`."""
    jobs = []

    def started(*words: str) -> subprocess.Popen[str]:
        command = [str(Path(sys.executable).with_name("atommem")), "train", "cluster", str(HERE / "tiny.toml")]
        where = ["--out", str(tmp_path / "run"), "--ray-address", dashboard]
        jobs.append(
            subprocess.Popen([*command, *where, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return jobs[-1]

    yield started
    for job in jobs:
        if job.poll() is None:
            job.terminate()
            job.communicate(timeout=60)


@pytest.fixture
def finish(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    """Launches to the end: the run's folder and the lines of its metrics."""

    def run(*words: str) -> tuple[Path, list[dict[str, Any]]]:
        out = tmp_path / "run"
        job = start(*words)
        text, _ = job.communicate(timeout=900)
        log = out / "job.log"
        assert job.returncode == 0, text + (log.read_text()[-8000:] if log.exists() else "")
        return out, read_jsonl(out / "metrics.jsonl")

    return run


@pytest.fixture
def recipe() -> ClusterGRPOConfig:
    """The run of `tiny.toml`."""
    return read_recipe(str(HERE / "tiny.toml"))
