"""Nothing that is started here reports its usage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atommem_env.usage_reports import USAGE_REPORTS_OFF

SHOW = "import atommem_env, json, os; print(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize("own", [{}, {"VLLM_NO_USAGE_STATS": "0", "RAY_USAGE_STATS_ENABLED": "1"}])
def test_importing_the_package_switches_reports_off_unless_you_have_decided(own: dict[str, str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in USAGE_REPORTS_OFF}
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], env=inherited | own, capture_output=True, text=True, check=True
    )
    variables = json.loads(shown.stdout)
    assert {name: variables[name] for name in USAGE_REPORTS_OFF} == USAGE_REPORTS_OFF | own


def test_hugging_faces_packages_see_it() -> None:
    assert pytest.importorskip("huggingface_hub.constants").HF_HUB_DISABLE_TELEMETRY


def test_ray_sees_it() -> None:
    usage = pytest.importorskip("ray._private.usage.usage_lib")
    assert not usage.usage_stats_enabled()


def test_vllm_sees_it() -> None:
    usage = pytest.importorskip("vllm.usage.usage_lib")
    assert not usage.is_usage_stats_enabled()


def test_a_slurm_jobs_ray_reports_nothing() -> None:
    from train.cluster.jobs import SLURM

    starts = [
        line for line in SLURM.read_text(encoding="utf-8").replace("\\\n", "").splitlines() if "ray start" in line
    ]
    assert starts
    assert all("--disable-usage-stats" in line for line in starts)


def test_what_a_job_starts_inherits_it(tmp_path: Path) -> None:
    from train.cluster.jobs import LocalJob

    job = LocalJob([sys.executable, "-c", SHOW.replace("atommem_env, ", "")], {}, tmp_path / "log")
    job.process.wait(30)
    assert json.loads(job.output()).items() >= USAGE_REPORTS_OFF.items()
