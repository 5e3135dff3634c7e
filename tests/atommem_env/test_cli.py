import errno
import importlib.metadata
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agents.registry import MODELS, POLICIES
from atommem_env.cli import COMMANDS, load, main

CODE = "import sys; from atommem_env.cli import main; sys.argv[0] = 'atommem'; main()"


def atommem(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command says that fails, in an empty folder, for a cause outside this program: one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("a_script", "broken", "helper", "leaves", "unfinished"):  # of another test's folder
        monkeypatch.delitem(sys.modules, name, raising=False)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["atommem", *words])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert end.value.code == 1
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        return said.err

    return run


def test_help_names_every_command() -> None:
    for words in ((), ("--help",), ("-h",)):
        helped = atommem(*words)
        assert helped.returncode == 0
        assert all(command in helped.stdout for command in COMMANDS)


@pytest.mark.parametrize("group", ["data", "memory", "train", "models"])
def test_a_group_lists_its_commands_with_their_purposes(group: str) -> None:
    for words in ((group,), (group, "--help"), (group, "-h")):
        listed = atommem(*words)
        assert listed.returncode == 0
        assert listed.stderr == ""
        for name, command in COMMANDS.items():
            assert (command.purpose in listed.stdout) == name.startswith(f"{group} ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evla", "--help"), "atommem: no command 'evla'; did you mean 'eval'?\n"),
        (("import",), "atommem: no command 'import'; did you mean 'data import'?\n"),
        (("xyzzy",), "atommem: no command 'xyzzy'.\n"),
        (("--vresion",), "atommem: no command '--vresion'.\n"),
        (("data", "imp0rt"), "atommem data: no command 'imp0rt'; did you mean 'import'?\n"),
        (("train", "xyzzy"), "atommem train: no command 'xyzzy'.\n"),
    ],
)
def test_an_unknown_command_is_rejected_with_those_that_there_are(words: tuple[str, ...], said: str) -> None:
    wrong = atommem(*words)
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.startswith(said)
    listed = [name for name in COMMANDS if words[0] not in ("data", "train") or name.startswith(words[0])]
    assert all(COMMANDS[name].purpose in wrong.stderr for name in listed)


def test_the_version() -> None:
    for option in ("--version", "-V"):
        assert atommem(option).stdout == f"atommem {importlib.metadata.version('atommem')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_by_an_example(command: str) -> None:
    helped = atommem(*command.split(), "--help")
    assert helped.returncode == 0, helped.stderr
    assert f"atommem {command}" in helped.stdout
    text, _, example = helped.stdout.partition("\nexample:\n")
    assert example == f"  atommem {command} {COMMANDS[command].example}".rstrip() + "\n"
    options = [word for word in shlex.split(example) if word.startswith("--")]
    assert all(option in text for option in options)


@pytest.mark.parametrize(
    "words", [("--help",), ("data",), ("policies",), ("settings",), ("grpo", "--help"), ("--version",)]
)
def test_a_reader_that_has_seen_enough_is_no_error(words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([sys.executable, "-c", CODE, *words], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert ran.stderr == ""
    assert ran.returncode == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("AtomMem-Sinthetic",), "There is no environment 'AtomMem-Sinthetic'; did you mean 'AtomMem-Synthetic'? "),
        (("AtomMem/Synthetic-v3",), "did you mean 'AtomMem/Synthetic-v0'? "),
        (("Nowhere/Foo-v0",), "There is no environment 'Nowhere/Foo-v0'. There are AtomMem-2WikiMultiHopQA, "),
        (("not an id!",), "There is no environment 'not an id!'. There are "),
        (("no_such_module:Foo-v0",), "There is no module 'no_such_module' in the working folder, "),
        (("AtomMem-Synthetic", "--out", "a-file"), "File exists: a-file"),
        (("AtomMem-Synthetic", "--out", "a-file/run"), "Not a directory: a-file/run"),
        (("AtomMem-Synthetic", "--set", "topk=3"), "No setting is called topk; did you mean 'top_k'? There are: "),
        (("AtomMem-Synthetic", "--set", "ablation=no_updat"), "got 'no_updat'; did you mean 'no_update'?"),
        (("AtomMem-Synthetic", "--set", "top_k"), "--set takes NAME=VALUE, got 'top_k'."),
        (("AtomMem-Synthetic", "--set", "operations=5"), "operations must be a list"),
        (("AtomMem-Synthetic", "--set", "reward_terms=[1]"), "reward_terms must be finite weights"),
        (("AtomMem-Synthetic", "--set", "scratchpad=5"), "scratchpad must be True or False, got 5."),
        (("AtomMem-Synthetic", "--set", "embedder=5"), "embedder must be"),
        (("AtomMem-Synthetic", "--policy", "oracel"), "No policy is called 'oracel'; did you mean 'oracle'? "),
        (("AtomMem-Synthetic", "--policy", "rga@tiny"), "No policy is called 'rga@tiny'; did you mean 'rag'? "),
        (("AtomMem-Synthetic", "--policy", "rag@smolm2"), "got 'smolm2'; did you mean 'smollm2'?"),
        (("AtomMem-Synthetic", "--policy", "broken:policy"), "cannot be imported: KeyError: 'x' (HERE/helper.py, line 3)."),
        (("AtomMem-Synthetic", "--policy", "unfinished:policy"), "'(' was never closed (HERE/unfinished.py, line 1)."),
        (("AtomMem-Synthetic", "--policy", "a_script:policy"), "SystemExit: 2 (HERE/a_script.py, line 2)."),
        (("AtomMem-Synthetic", "--policy", "leaves:policy"), "SystemExit: 0 (HERE/leaves.py, line 2)."),
        (("leaves:Foo-v0",), "SystemExit: 0 (HERE/leaves.py, line 2)."),
        (("AtomMem-Synthetic", "--policy", "\x1b[31mred\u202e"), "No policy is called '\\x1b[31mred\\u202e'"),
        (("AtomMem-Files", "--files", "no\x1b[31m\x9b\u202efile", "--set", "question=?"), "/no\\x1b[31m\\x9b\\u202efile, "),
        (("AtomMem-Synthetic", "--policy", "helper:plicy"), "did you mean 'policy'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_evaluation_is_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, failed: Callable[..., str]
) -> None:
    (tmp_path / "a-file").write_text("")
    (tmp_path / "broken.py").write_text("import helper\nhelper.fail()\n")
    (tmp_path / "helper.py").write_text("policy = None\ndef fail():\n    {}['x']\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "unfinished.py").write_text("policy = (\n")
    (tmp_path / "a_script.py").write_text("import sys\nsys.exit(2)\n")
    line = failed("eval", *words, "--episodes", "1")
    assert line.startswith("atommem eval: ")
    assert said.replace("HERE", str(tmp_path.resolve())) in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data", "import", "hotpotq", "x.json"), "got 'hotpotq'; did you mean 'hotpotqa'?"),
        (("data", "get", "musiqe"), "got 'musiqe'; did you mean 'musique'?"),
        (("data", "verify", "2wikimultihop"), "got '2wikimultihop'; did you mean '2wikimultihopqa'?"),
        (("play", "Synthetic"), "There is no environment 'Synthetic'; did you mean 'AtomMem-Synthetic'?"),
        (("play", "CartPole-v1"), "CartPole-v1 must be an environment of AtomMem, got CartPoleEnv."),
        (("settings", "AtomMem-HotpotQ"), "did you mean 'AtomMem-HotpotQA'?"),
        (("settings", "CartPole-v1"), "CartPole-v1 must be an environment of AtomMem, got CartPoleEnv."),
        (("collect", "AtomMem-Sinthetic", "--out", "samples"), "did you mean 'AtomMem-Synthetic'?"),
        (("grpo", "AtomMem-Sinthetic", "--model", "tiny", "--out", "run"), "did you mean 'AtomMem-Synthetic'?"),
    ],
)
def test_what_is_wrong_with_other_commands_is_one_line(
    words: tuple[str, ...], said: str, failed: Callable[..., str]
) -> None:
    assert said in failed(*words)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "Permission denied: runs/x"),
        (OSError("lance error:\n  no such table"), "lance error: no such table"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_an_error_of_the_system_is_one_line(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(error, monkeypatch) == 1
    assert capsys.readouterr().err == f"atommem policies: {said}\n"


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ends: list[tuple[float, int]] = []
    monkeypatch.setattr(
        "atommem_env.cli._exit_within", lambda *end: ends.append(end)
    )  # it would end this process as well
    assert called(KeyboardInterrupt(), monkeypatch) == 130
    assert ends == [(3.0, 130)]
    assert capsys.readouterr().err == "atommem policies: interrupted\n"


@pytest.mark.parametrize("code", [0, None])
def test_a_part_that_ends_the_command_as_if_all_were_well_is_an_error(
    code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(SystemExit(code), monkeypatch) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"atommem policies: ended early, by sys.exit({code}) ({__file__}, line ")
    assert said.count("\n") == 1


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        called(ZeroDivisionError(), monkeypatch)


def called(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command whose function raises `error`."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("agents.play.list_policies", fail)
    monkeypatch.setattr(sys, "argv", ["atommem", "policies"])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_help_is_quick() -> None:
    # 0.25 s on an idle core; what would make it slow is not imported
    code = "import sys; sys.argv = ['atommem', '--help']; from atommem_env.cli import main; main(); print(); print(*sys.modules)"
    loaded = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()[-1].split()
    )
    assert "gymnasium" in loaded
    assert not {"torch", "transformers", "lancedb", "pyarrow", "tyro", "rich.console", "agents", "eval", "train"} & set(
        loaded
    )


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


def test_every_target_exists() -> None:
    for command in COMMANDS.values():
        assert callable(load(command.target))
