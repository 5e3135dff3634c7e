"""Packages that are called as ours: in a folder that comes first, or written over ours."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atommem_env.errors import ShadowedPackage
from atommem_env.packages import PACKAGES, check_packages

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "import sys; from atommem_env.cli import main; sys.argv[0] = 'atommem'; main()"
Python = Callable[..., subprocess.CompletedProcess[str]]


def run(*words: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python with our packages on its path, as an installation would have them."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder with an `agents`, a `train.py` and a `configs` of its own."""
    for name in ("agents", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = 1\n")
    (tmp_path / "train.py").write_text("mine = 2\n")
    return tmp_path


def test_ours_are_ours() -> None:
    check_packages()
    check_packages(folder=ROOT)


def test_the_environment_works_beside_packages_of_ones_own(crowded: Path) -> None:
    (crowded / "script.py").write_text(
        "import gymnasium as gym\n"
        "import atommem_env\n"
        "import agents, train\n"
        "env = gym.make('AtomMem-Synthetic', durability='off')\n"
        "env.reset(seed=0)\n"
        "for _ in range(3):\n"
        "    env.step('<create_memory>a</create_memory>')\n"
        "print(agents.mine, train.mine)\n"
    )
    ran = run("script.py", cwd=crowded)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "1 2\n"


def test_a_script_beside_packages_of_its_own_is_told_which_hides_ours(crowded: Path) -> None:
    (crowded / "script.py").write_text("import atommem_env\natommem_env.evaluate\n")
    ran = run("script.py", cwd=crowded)
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(f"atommem_env.errors.ShadowedPackage: {crowded / 'agents'} hides the package 'agents'")
    assert f"Rename it, or keep {crowded} off Python's path" in last
    shutil.rmtree(crowded / "agents")
    assert run("script.py", cwd=crowded).returncode == 0, "evaluation does without train"
    (crowded / "script.py").write_text("import eval, atommem_env\natommem_env.collect\n")
    assert f"{crowded / 'train.py'} hides" in run("script.py", cwd=crowded).stderr


def test_the_command_works_beside_packages_of_ones_own(crowded: Path) -> None:
    """Its script is in a folder of programs, so that the working folder is not on Python's path."""
    words = ("eval", "AtomMem-Synthetic", "--policy", "mine:policy", "--episodes", "1", "--out", "run")
    (crowded / "mine.py").write_text("policy = lambda observation: ''\n")
    ran = run("-P", "-c", COMMAND, *words, cwd=crowded)
    assert ran.returncode == 0, ran.stderr
    shadowed = run("-c", COMMAND, *words, cwd=crowded)
    assert shadowed.returncode == 1
    assert shadowed.stderr.startswith(f"atommem eval: {crowded / 'agents'} hides the package 'agents' of atommem")
    assert shadowed.stderr.count("\n") == 1


def test_modules_run_beside_packages_of_ones_own(crowded: Path) -> None:
    ran = run("-m", "eval.benchmarks.operations", "--help", cwd=crowded)
    assert ran.returncode == 1
    assert f"ShadowedPackage: {crowded / 'agents'} hides" in ran.stderr
    assert run("-P", "-m", "eval.benchmarks.operations", "--help", cwd=crowded).returncode == 0


def test_a_folder_without_init_hides_nothing(tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / name).mkdir()
    check_packages(folder=tmp_path)
    assert run("-c", "import agents, eval, train", cwd=tmp_path).returncode == 0


def test_a_job_would_look_into_its_working_folder_first(crowded: Path) -> None:
    with pytest.raises(ShadowedPackage, match="agents' of atommem"):
        check_packages("eval", crowded)
    shutil.rmtree(crowded / "agents")
    check_packages("eval", crowded)
    with pytest.raises(ShadowedPackage, match=r"train\.py hides"):
        check_packages("train", crowded)


def test_workers_are_not_started_beside_packages_of_ones_own(crowded: Path) -> None:
    ran = run("-P", "-c", COMMAND, "eval", "AtomMem-Synthetic", "--workers", "1", "--out", "run", cwd=crowded)
    assert ran.returncode == 1
    assert f"{crowded / 'agents'} hides the package 'agents'" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not (crowded / "run").exists()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Our packages as pip would have unpacked them, and another distribution's `agents` over ours."""
    folder = tmp_path / "site"
    for name in ("atommem_env", *PACKAGES, "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    record = folder / "other_agents-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: other-agents\nVersion: 1.0\n")
    (record / "RECORD").write_text("agents/__init__.py,,\nother-agents-1.0.dist-info/METADATA,,\n")
    (folder / "agents" / "__init__.py").write_text("class Agent: ...\n")
    (folder / "configs" / "__init__.py").write_text("")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("-c", COMMAND, "policies"),
        ("-c", "import atommem_env; atommem_env.evaluate"),
        ("-c", "import eval"),
        ("-c", "import train"),
        ("-c", "import agents.registry"),
        ("-c", "from agents.prompting import render_reply"),
        ("-m", "eval.benchmarks.operations", "--help"),
        ("-m", "train.cluster.job"),
        ("-c", "from atommem_env.packages import check_packages; check_packages('agents')"),
    ],
)
def test_a_package_written_over_ours_is_named_however_we_are_entered(
    words: tuple[str, ...], site: Path, tmp_path: Path
) -> None:
    ran = run(*words, cwd=tmp_path, path=site)
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert (
        f"{site / 'agents' / '__init__.py'} is no longer that of atommem: other-agents has a package 'agents'" in last
    )
    assert "uninstall other-agents, and reinstall this one: pip install" in last


def test_the_environment_works_where_agents_was_written_over(site: Path, tmp_path: Path) -> None:
    code = "import gymnasium, atommem_env; print(gymnasium.make('AtomMem-Synthetic', durability='off').reset(seed=0)[0]['phase'])"
    ran = run("-c", code, cwd=tmp_path, path=site)
    assert ran.stdout == "read\n", ran.stderr


def test_a_package_that_went_with_another_is_named(site: Path, tmp_path: Path) -> None:
    (site / "agents" / "__init__.py").unlink()
    # without other copies of ours, as that of an editable installation
    alone = "sys.path = [one for one in sys.path if not (pathlib.Path(one) / 'agents/__init__.py').exists()]"
    ran = run("-c", f"import pathlib, sys; {alone}; import eval", cwd=tmp_path, path=site)
    assert f"{site / 'agents' / '__init__.py'} is missing" in ran.stderr.splitlines()[-1]


def test_configs_of_others_hide_nothing(site: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "agents" / "__init__.py", site / "agents" / "__init__.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    ran = run("-c", COMMAND, "eval", "quick.toml", "--out", "runs", "--dry-run", cwd=tmp_path, path=site)
    assert ran.returncode == 0, ran.stderr


def test_a_distribution_that_hides_ours_is_named(tmp_path: Path) -> None:
    record = tmp_path / "other-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (record / "RECORD").write_text("train.py,,\n")
    (tmp_path / "train.py").write_text("")
    ran = run("-P", "-c", COMMAND, "sft", "--help", cwd=tmp_path, path=Path(f"{tmp_path}{os.pathsep}{ROOT}"))
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"atommem sft: {tmp_path / 'train.py'} hides the package 'train'")
    assert "other installed it" in ran.stderr


def test_a_module_without_a_spec_is_no_package_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    made = type(sys)("train")
    monkeypatch.setitem(sys.modules, "train", made)
    with pytest.raises(ShadowedPackage, match="'train'"):
        check_packages()
