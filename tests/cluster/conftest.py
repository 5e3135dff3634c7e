"""The cluster stack on a machine without a GPU: a Ray with pretended ones, and shims in every process of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs the cluster's packages: make test-cluster")
pytest.importorskip("openrlhf")

from agents.models.download import find_model  # noqa: E402
from eval.run import read_episodes  # noqa: E402
from train.cluster.recipe import ClusterRun, read_recipe  # noqa: E402

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


@pytest.fixture(scope="session")
def shims() -> Iterator[None]:
    """Every process that is started from here on runs without CUDA."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def ray_address(shims: None) -> Iterator[str]:
    """The dashboard of a Ray of this process, with eight pretended GPUs; it ends with the test."""
    context = ray.init(
        num_gpus=8,
        num_cpus=16,
        include_dashboard=True,
        dashboard_port=0,
        _node_ip_address="127.0.0.1",
        object_store_memory=1_000_000_000,
        log_to_driver=False,
    )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The model that comes with the project."""
    return find_model("tiny")


def launch(recipe: str | Path, ray_address: str, out: Path, *words: str) -> subprocess.Popen[str]:
    """`atommem train cluster`, as a user types it."""
    command = [str(Path(sys.executable).with_name("atommem")), "train", "cluster", str(recipe), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--ray-address", ray_address, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def finish(ray_address: str, tmp_path: Path) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    """Launches to the end: the run's folder and the lines of its metrics."""

    def run(*words: str, recipe: Path = HERE / "tiny.toml", code: int = 0) -> tuple[Path, list[dict[str, Any]]]:
        out = tmp_path / "run"
        job = launch(recipe, ray_address, out, *words)
        said, _ = job.communicate(timeout=900)
        log = out / "job.log"
        assert job.returncode == code, said + (log.read_text()[-8000:] if log.exists() else "")
        return out, read_episodes(out / "metrics.jsonl")

    return run


@pytest.fixture
def recipe() -> ClusterRun:
    """The run of `tiny.toml`."""
    return read_recipe(str(HERE / "tiny.toml"))
