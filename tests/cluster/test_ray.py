"""The launcher's jobs in a real Ray."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import pytest
from processes import alive, answers, session, started_ray, wait_until
from rich.console import Console

from atommem_env.errors import JobFailed, SettingError
from train.cluster import jobs
from train.cluster import launch as launcher
from train.cluster.jobs import LocalJob, RayJob
from train.cluster.launch import follow, job_environment
from train.cluster.machines import Machines
from train.cluster.recipe import ClusterGRPOConfig


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_POLL", 0.1)


@pytest.fixture
def run(recipe: ClusterGRPOConfig, tmp_path: Path) -> ClusterGRPOConfig:
    return dataclasses.replace(recipe, out=tmp_path / "run")


def ray_job(dashboard: str, tmp_path: Path, code: str, **environment: str) -> RayJob:
    return RayJob(dashboard, ["python", "-u", "-c", textwrap.dedent(code)], environment, tmp_path / "job.log")


def test_a_job_of_ray_has_its_variables_and_ends_well(
    dashboard: str, tmp_path: Path, run: ClusterGRPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # to Ray's own client this would count more
    job = ray_job(dashboard, tmp_path, "import os; print('A is', os.environ['A'])", A="a 'b' \"c\"")
    follow(run, job, None, Console(file=io.StringIO()))
    assert "A is a 'b' \"c\"" in (tmp_path / "job.log").read_text()
    job.stop()
    assert (tmp_path / "job.log").read_text().count("A is a") == 1


def test_a_job_of_ray_that_fails_is_one_error_with_the_exception_of_the_actor(
    dashboard: str, tmp_path: Path, run: ClusterGRPOConfig
) -> None:
    code = """
        import ray
        ray.init()
        @ray.remote
        class Inner:
            def work(self):
                raise ValueError("the root of it")
        @ray.remote
        class Outer:
            def __init__(self):
                self.inner = Inner.remote()
            def work(self):
                return ray.get(self.inner.work.remote())
        ray.get(Outer.remote().work.remote())
    """
    job = ray_job(dashboard, tmp_path, code)
    with pytest.raises(JobFailed, match=r"ended as FAILED, exit code 1: ValueError: the root of it\n.*job\.log"):
        follow(run, job, None, Console(file=io.StringIO()))


def test_a_job_of_ray_is_stopped_with_all_that_it_started(dashboard: str, tmp_path: Path) -> None:
    code = """
        import os, ray, time
        ray.init(log_to_driver=False)
        @ray.remote
        class Actor:
            def pid(self):
                return os.getpid()
        actor = Actor.remote()
        print("pids", os.getpid(), ray.get(actor.pid.remote()))
        time.sleep(99)
    """
    job = ray_job(dashboard, tmp_path, code)
    matches: list[str] = []
    wait_until(
        lambda: matches.extend(re.findall(r"^pids (\d+) (\d+)$", job._client.get_job_logs(job.id), re.M)) or matches
    )
    pids = [int(word) for word in matches[0]]
    assert all(map(alive, pids))
    job.stop()
    assert job.poll() == "ended as STOPPED, exit code None"
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("killed", [False, True])
def test_a_job_of_this_machine_has_a_ray_of_its_own_that_ends_with_it(
    killed: bool, dashboard: str, tmp_path: Path
) -> None:
    code = """
        import os, ray, time
        ray.init(num_gpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
        @ray.remote(num_gpus=1)
        class Actor:
            def pid(self):
                return os.getpid()
        actor = Actor.remote()
        print("gpus", int(ray.cluster_resources()["GPU"]), "actor", ray.get(actor.pid.remote()), flush=True)
        time.sleep(99)
    """
    job = LocalJob([sys.executable, "-c", textwrap.dedent(code)], {"RAY_ADDRESS": "local"}, tmp_path / "job.log")
    try:
        wait_until(lambda: job.poll() is not None or re.search(r"actor \d+\n", job.output()))
        match = re.search(r"gpus (\d) actor (\d+)", job.output())
        assert match, job.output()
        assert match[1] == "2"
        actor, driver = int(match[2]), job.process.pid
        processes = {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if session(pid) == driver}
        assert {actor, driver} <= processes
        assert len(processes) > 3  # and what Ray is made of
        if killed:
            job.process.kill()
            job.process.wait()
    finally:
        job.stop()
    wait_until(lambda: not any(map(alive, processes)), 30)
    assert answers(f"{dashboard}/api/version")  # another Ray of this machine is left alone


def test_machines_of_ray_are_counted(dashboard: str) -> None:
    (node,) = Machines.at(dashboard).nodes
    assert node.gpus == 4


def test_a_worker_finds_modules_of_the_launcher_s_folder(
    dashboard: str, run: ClusterGRPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "working").mkdir()
    (tmp_path / "working" / "my_parts.py").write_text("NAME = 'mine'\n")
    monkeypatch.chdir(tmp_path / "working")
    code = """
        import json, ray
        from atommem_env.plugins import load_attribute
        ray.init(log_to_driver=False)
        worker = ray.remote(lambda: load_attribute("my_parts:NAME"))
        print(json.dumps([load_attribute("my_parts:NAME"), ray.get(worker.remote())]))
    """
    job = ray_job(dashboard, tmp_path, code, **job_environment(run))
    wait_until(lambda: job.poll() is not None)
    assert json.loads(job.output().splitlines()[-1]) == ["mine", "mine"]


def test_a_head_that_dies_ends_the_run(tmp_path: Path, run: ClusterGRPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_SILENCE", 2.0)
    with started_ray() as address:
        job = ray_job(address, tmp_path, "import time; time.sleep(99)")
        assert job.poll() is None
    began = time.monotonic()
    with pytest.raises(JobFailed, match=r"Ray's head at http://.* is gone"):
        follow(run, job, None, Console(file=io.StringIO()))
    assert time.monotonic() - began < 20
    job.stop()


def test_an_address_where_no_ray_is_says_what_to_do(tmp_path: Path) -> None:
    for address in ("http://127.0.0.1:9", "nonsense"):
        with pytest.raises(SettingError, match="--ray-address must be the dashboard"):
            ray_job(address, tmp_path, "")
