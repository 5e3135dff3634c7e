"""What is found out about machines, with a stand-in for the GPUs' driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from atommem_env.errors import SettingError
from train.cluster.machines import Machines


def test_this_machine_has_what_its_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [node.gpus for node in Machines.here().nodes] == [0]
    driver.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    driver.chmod(0o755)
    (node,) = Machines.here().nodes
    assert (node.gpus, node.gpu_memory) == (2, 40960 * 2**20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert Machines.here().nodes[0].gpus == 1
    driver.write_text("#!/bin/sh\necho 'no devices were found'; exit 6\n")
    with pytest.raises(SettingError, match=r"nvidia-smi .* failed on .*: no devices were found"):
        Machines.here()
