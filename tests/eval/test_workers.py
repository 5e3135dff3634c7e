import asyncio
import os
import sys
from pathlib import Path

import pytest

from atommem_env.errors import MissingDependency, SettingError
from eval.options import EvalConfig
from eval.run import evaluate
from eval.workers import Worker, Workers


def test_without_ray_the_package_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = EvalConfig(env_id="AtomMem-Synthetic", out=tmp_path / "run", workers=2)
    with pytest.raises(MissingDependency, match=r"pip install 'ray\[default\]', or 'atommem\[cluster\]'"):
        evaluate(config)
    assert not config.out.exists()
    with pytest.raises(SettingError, match="workers must be at least 1, got -1"):
        Workers(-1)


def test_a_machine_without_the_working_folder_is_named(tmp_path: Path) -> None:
    worker = Worker(str(tmp_path / "elsewhere"), [], {})
    with pytest.raises(FileNotFoundError) as raised:
        asyncio.run(worker.call(os.getcwd))
    assert f"{tmp_path / 'elsewhere'}, which all machines must have" in raised.value.__notes__[0]
