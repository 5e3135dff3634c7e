"""Both trainers are one: the same rollouts give the same update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_the_same_rollouts_give_the_same_gradient_and_the_same_weights(zero_stage: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("one_step.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(zero_stage)],
        env=os.environ | {"ATOMMEM_FLOAT32": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["samples"] == result["trained"] > 16
    local, cluster = result["grad_norms"]
    assert local > 0.01
    assert cluster == pytest.approx(local, rel=1e-2)
    assert abs(result["sampler_kl"]) < 1e-5
    # In the mean over the weights: Adam's first step has the size of the learning rate, also where a gradient is all rounding.
    assert result["moved"] > 1e-4
    assert result["apart"] < 1e-4 * result["moved"]
