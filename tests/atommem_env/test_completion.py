"""What a shell is offered, and that bash takes it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from agents.registry import METHODS, POLICIES
from atommem_env import ENVIRONMENTS
from atommem_env.cli import COMMANDS, main
from atommem_env.settings import settings_of

CODE = "import sys; from atommem_env.cli import main; sys.argv[0] = 'atommem'; main()"
IDS = {f"AtomMem-{name}" for name in ENVIRONMENTS}


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """What is offered for the last of some words by a shell that does not cut them."""

    def complete(*words: str) -> set[str]:
        monkeypatch.setattr(sys, "argv", ["atommem", "--complete", "zsh", *words])
        monkeypatch.setenv("COLUMNS", "60")
        main()
        return set(capsys.readouterr().out.split())

    return complete


def test_commands_and_subcommands(offered) -> None:  # type: ignore[no-untyped-def]
    assert offered("") == {name.split()[0] for name in COMMANDS} | {"--help", "--version"}
    assert offered("co") == {"compare", "collect", "completion"}
    assert offered("data", "") == {"get", "import", "list", "verify", "--help"}
    assert offered("train", "cluster-") == {"cluster-sft"}


def test_options_are_those_of_the_help(offered) -> None:  # type: ignore[no-untyped-def]
    options = offered("eval", "AtomMem-Synthetic", "--")
    assert options >= {"--help", "--policy", "--set", "--out", "--resume", "--no-resume", "--num-docs"}
    assert offered("memory", "export", "--v") == {"--vectors"}
    assert offered("grpo", "--rec") == {"--recipe"}
    assert all(offered(*name.split(), "--h") >= {"--help"} for name in COMMANDS)


def test_values(offered) -> None:  # type: ignore[no-untyped-def]
    assert offered("play", "") == offered("settings", "AtomMem-") == IDS
    assert offered("eval", "") == IDS | {"ablations.toml", "baselines.toml", "paper.toml", "quick.toml"}
    policies = offered("eval", "AtomMem-Synthetic", "--policy", "")
    assert policies == {*POLICIES, "tiny", "smollm2", *(f"{m}@{n}" for m in METHODS for n in ("tiny", "smollm2"))}
    assert offered("collect", "--policy=rag") == {"--policy=rag@tiny", "--policy=rag@smollm2"}
    assert offered("sft", "--recipe", "") == {"qwen3-0.6b", "qwen3-8b-lora", "smollm2", "tiny"}
    assert "qwen3-8b-hotpotqa" in offered("train", "cluster", "")
    assert offered("data", "get", "") == {"hotpotqa", "2wikimultihopqa", "musique"}
    assert offered("grpo", "--dtype", "") == {"float32", "bfloat16"}
    assert offered("completion", "") == {"bash", "zsh", "fish"}


def test_settings_are_those_of_the_environment(offered) -> None:  # type: ignore[no-untyped-def]
    for env_id in ("AtomMem-Synthetic", "AtomMem-HotpotQA"):
        names = {f"{setting.name}=" for group in settings_of(env_id).values() for setting in group}
        assert offered("eval", env_id, "--set", "") == names
        assert offered("eval", env_id, "--set", "top_k=3", "") == names, "--set takes several"
    assert offered("eval", "AtomMem-Synthetic", "--set", "hop") == {"hops="}
    assert offered("eval", "AtomMem-HotpotQA", "--set", "hop") == set()


def test_nothing_is_offered_where_a_file_is_wanted(offered) -> None:  # type: ignore[no-untyped-def]
    assert offered("memory", "ls", "") == set()
    assert offered("eval", "AtomMem-Synthetic", "--out", "") == set()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "replies"),
    [
        (["ev"], ["eval"]),
        (["data", "im"], ["import"]),
        (["eval", "AtomMem-Syn"], ["AtomMem-Synthetic"]),
        (["eval", "AtomMem-Synthetic", "--pol"], ["--policy"]),
        (["eval", "AtomMem-Synthetic", "--policy", "orac"], ["oracle"]),
        (["eval", "AtomMem-Synthetic", "--policy", "=", "orac"], ["oracle"]),
        (["eval", "AtomMem-Synthetic", "--policy", "rag", "@", "ti"], ["tiny"]),
        (["eval", "AtomMem-Synthetic", "--policy", "rag", "@"], ["tiny", "smollm2"]),
        (["eval", "AtomMem-Synthetic", "--set", "top_k", "=", "3", "capa"], ["capacity="]),
        (["memory", "ls", ""], []),
    ],
)
def test_bash_completes(words: Sequence[str], replies: Sequence[str], tmp_path: Path) -> None:
    command = tmp_path / "atommem"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{CODE}" "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(atommem completion bash)"; COMP_WORDS=(atommem "$@"); COMP_CWORD=$#; _atommem; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ran = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stderr == ""
    assert ran.stdout.split() == replies


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_read_by_their_shells(shell: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    monkeypatch.setattr(sys, "argv", ["atommem", "completion", shell])
    main()
    checked = subprocess.run([shell, "-n"], input=capsys.readouterr().out, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
