import os
import subprocess
import sys
from pathlib import Path

import pytest

from agents.registry import MODELS, POLICIES
from atommem_env.cli import COMMANDS, load


def atommem(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from atommem_env.cli import main; sys.argv[0] = 'atommem'; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


def test_help_names_every_command_and_an_unknown_one_is_refused_with_it() -> None:
    helped = atommem("--help")
    assert helped.returncode == 0
    assert all(command in helped.stdout for command in COMMANDS)
    wrong = atommem("evaluate")
    assert wrong.returncode == 2
    assert "no command 'evaluate'" in wrong.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    helped = atommem(*command.split(), "--help")
    assert helped.returncode == 0, helped.stderr
    assert f"atommem {command}" in helped.stdout


def test_an_evaluation_from_the_shell(tmp_path: Path) -> None:
    words = ["eval", "AtomMem-Synthetic", "--policy", "oracle", "--episodes", "3", "--out", str(tmp_path / "run")]
    ran = atommem(*words)
    assert ran.returncode == 0, ran.stderr
    assert "oracle*" in ran.stdout
    again = atommem(*words)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    assert "Traceback" not in again.stderr
    assert atommem(*words, "--resume").returncode == 0


def test_missing_data_say_which_command_brings_them() -> None:
    ran = atommem("eval", "AtomMem-HotpotQA", "--out", "runs/never")
    assert ran.returncode == 1
    assert "atommem data import hotpotqa" in ran.stderr


def test_a_person_plays_an_episode(tmp_path: Path) -> None:
    typed = "c something\nr something\n\n" + "\n" * 20 + "a unknown\n\n" * 5
    played = atommem("play", "AtomMem-Synthetic", "--seed", "3", input=typed)
    assert played.returncode == 0, played.stderr
    assert "m1: something" in played.stdout
    assert "exact match:" in played.stdout
    left = atommem("play", "AtomMem-Synthetic", input="c kept\n\nq\n")
    assert left.returncode == 0, left.stderr
    assert "You left" in left.stdout


def test_policies_are_listed() -> None:
    listed = atommem("policies")
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in (*POLICIES, *MODELS))


def test_a_package_that_hides_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("")
    ran = atommem("policies", env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert ran.returncode == 1
    assert str(tmp_path / "agents") in ran.stderr
    assert "hides ours" in ran.stderr


def test_every_target_exists() -> None:
    for target, _ in COMMANDS.values():
        assert callable(load(target))
