"""Defaults from another run and from a model's folder: what comes first, and what is said of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import atommem_env
from agents.models.find import TINY
from atommem_env import cli
from eval.command_line import parse_eval
from eval.options import EvalConfig
from eval.played_as import record_of, write_card
from eval.run import evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as if it had been trained on small tasks, in the layout `terse`."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(TINY, folder)
    trained = EvalConfig(
        env_id="AtomMem-Synthetic",
        num_docs=5,
        layout="terse",
        set=("hops=[1]", "chunk_tokens=64", "dialect=public_code"),
        durability="off",
    )
    write_card(folder, record_of(trained), 16, command="atommem sft", run=folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `random`."""
    out = tmp_path_factory.mktemp("runs") / "random"
    evaluate(
        EvalConfig(
            env_id="AtomMem-Synthetic", policy="random", label="mine", episodes=2, seed=4, num_docs=7, temperature=0.5,
            set=("top_k=2", "hops=[2]"), durability="off", out=out,
        )
    )  # fmt: skip
    return out


def parsed(*words: object) -> tuple[EvalConfig, list[str]]:
    return parse_eval("atommem eval", "", list(map(str, words)))


def test_a_trained_model_is_played_as_it_was_trained(model: Path) -> None:
    config, (note,) = parsed("--policy", model)
    assert (config.env_id, config.layout, config.max_new_tokens) == ("AtomMem-Synthetic", "terse", 16)
    options = config.env_options()
    assert (options["num_docs"], options["hops"], options["dialect"]) == (5, [1], "public_code")
    assert note.startswith(
        f"{model} plays as it was trained: AtomMem-Synthetic, layout terse, at most 16 tokens a reply, "
    )
    assert note.endswith(f"; from {model / 'atommem.json'}.")
    assert "hops=[1], " in note
    assert "; but " not in note


def test_the_command_line_comes_first(model: Path) -> None:
    words = ("--policy", model, "--num-docs", 8, "--set", "hops=[2]", "retrieval=bm25", "--layout", "shared_prefix")
    config, (note,) = parsed("AtomMem-Synthetic", *words)
    options = config.env_options()
    assert (options["num_docs"], options["hops"], options["retrieval"], options["chunk_tokens"]) == (8, [2], "bm25", 64)
    assert config.layout == "shared_prefix"
    kept, _, changed = note.partition("; but ")
    assert "chunk_tokens=64" in kept
    for text in ("layout shared_prefix", "num_docs=8", "hops=[2]", "retrieval=bm25"):
        assert text in changed
        assert text not in kept


def test_in_another_environment_the_model_keeps_its_layout_dialect_and_length(model: Path) -> None:
    config, (note,) = parsed("AtomMem-HotpotQA", f"--policy={model}")
    assert config.env_options() == {"dialect": "public_code"}
    assert (config.env_id, config.layout, config.max_new_tokens) == ("AtomMem-HotpotQA", "terse", 16)
    assert (
        "layout terse, at most 16 tokens a reply, dialect=public_code; the options of AtomMem-Synthetic are left out"
        in note
    )


def test_another_runs_settings_are_taken_but_not_its_policy(run: Path) -> None:
    config, (note,) = parsed("--like", run, "--episodes", 3)
    assert (config.env_id, config.seed, config.episodes, config.temperature) == ("AtomMem-Synthetic", 4, 3, 0.5)
    assert (config.policy, config.label, config.out) == ("oracle", None, Path("runs/eval"))
    options = config.env_options()
    assert (options["num_docs"], options["top_k"], options["hops"]) == (7, 2, [2])
    assert note.startswith(f"As in {run}: AtomMem-Synthetic, ")
    assert note.endswith(", seed 4; but 3 episodes.")
    config, (note,) = parsed("AtomMem-HotpotQA", "--like", run)
    assert config.env_options() == {}
    assert (config.seed, config.episodes, config.temperature) == (4, 2, 0.5)
    assert "seed 4, 2 episodes; the options of AtomMem-Synthetic are left out" in note


def test_a_trained_model_in_another_runs_environment_is_shown_it_as_it_was_trained(model: Path, run: Path) -> None:
    config, notes = parsed("--like", run, "--policy", model)
    options = config.env_options()
    assert (options["num_docs"], options["top_k"], options["hops"], options["dialect"]) == (7, 2, [2], "public_code")
    assert (config.layout, config.max_new_tokens, config.seed, config.temperature) == ("terse", 16, 4, 0.5)
    assert "layout" not in notes[0]
    assert notes[1].startswith(
        f"{model} plays as it was trained: layout terse, at most 16 tokens a reply, dialect=public_code;"
    )


def test_without_either_the_environment_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("AtomMem-Synthetic", "--policy", "random")[1] == []
    with pytest.raises(SystemExit):
        parsed("--policy", "random")
    assert "ENV_ID" in capsys.readouterr().err.upper().replace("-", "_")


def test_help_shows_what_holds_and_names_both(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown in (((), "(required)"), (("--policy", model), "(default: AtomMem-Synthetic)")):
        with pytest.raises(SystemExit, match="0"):
            parsed(*words, "--help")
        text = " ".join(capsys.readouterr().out.split())
        assert shown in text
        assert "--like RUN" in text
        assert "atommem.json" in text


def test_the_real_command_plays_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    words: tuple[Any, ...] = ("eval", "--policy", model, "--episodes", 1, "--durability", "off", "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["atommem", *map(str, words)])
    cli.main()
    assert f"{model} plays as it was trained: AtomMem-Synthetic" in capsys.readouterr().err
    played = json.loads((tmp_path / "config.json").read_text())
    assert (played["layout"], played["settings"]["dialect"]) == ("terse", "public_code")
    assert (played["options"]["hops"], played["sampling"]["max_new_tokens"]) == ([1], 16)


def test_python_plays_a_trained_model_as_the_command_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["atommem", "eval", "--policy", str(model), "--episodes", "2", "--out", str(tmp_path / "command")]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    result = atommem_env.evaluate(str(model), episodes=2, out=tmp_path / "python", progress=False)
    for name in ("config.json", "episodes.jsonl"):
        assert (tmp_path / "command" / name).read_bytes() == (result.folder / name).read_bytes()
    other = atommem_env.evaluate(str(model), episodes=1, chunk_tokens=96, max_new_tokens=4, progress=False)
    assert (other.summary["settings"]["chunk_tokens"], other.summary["settings"]["hops"]) == (96, [1])
    assert other.summary["settings"]["sampling"]["max_new_tokens"] == 4
