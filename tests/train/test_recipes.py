"""Recipes: every one is whole, the command line comes first, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atommem_env import cli
from atommem_env.env import split_options
from atommem_env.errors import SettingError
from train import collect, grpo, recipes, sft
from train.collect import CollectConfig
from train.recipes import FOLDER, NAMES, load_recipe, read_recipe
from train.settings import LocalGRPOConfig, SFTConfig


def run(monkeypatch: pytest.MonkeyPatch, words: str) -> list[Any]:
    """The configurations that the real command hands to the function behind it."""
    got: list[Any] = []
    for module in (collect, sft, grpo):
        monkeypatch.setattr(module, "main", got.append)
    monkeypatch.setattr(sys, "argv", ["atommem", *words.split()])
    cli.main()
    return got


def test_every_file_is_a_name_and_every_name_a_file() -> None:
    assert sorted(NAMES) == sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_whole_and_its_commands_follow_one_another(name: str) -> None:
    collecting, tuning, training = (load_recipe(name, made) for made in (CollectConfig, SFTConfig, LocalGRPOConfig))
    assert collecting.out == tuning.samples
    assert training.model in (str(tuning.out / "model"), tuning.model)
    assert len({collecting.out, tuning.out, training.out}) == 3
    assert collecting.env_id == training.env_id
    assert collecting.layout == training.layout
    options = training.env_options()
    assert options == {**collecting.env_options(), "durability": "off", "split": "train"}
    dynamics = {key: value for key, value in options.items() if key not in ("embedder", "durability")}
    split_options(
        "synthetic" if "Synthetic" in training.env_id else "hotpotqa", dynamics
    )  # raises where one is unknown
    assert re.match(r"# \w", (FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "given",
    ["--recipe tiny", "--recipe=tiny", f"--recipe {FOLDER / 'tiny.toml'}", "--preset tiny"],  # --preset: its old name
)
def test_the_command_line_overrides_the_recipe(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"grpo AtomMem-HotpotQA --steps 7 {given} --out elsewhere --set capacity=8"
    (config,) = run(monkeypatch, words)
    recipe = load_recipe("tiny", LocalGRPOConfig)
    assert (config.env_id, config.steps, config.out) == ("AtomMem-HotpotQA", 7, Path("elsewhere"))
    assert (config.group_size, config.learning_rate) == (recipe.group_size, recipe.learning_rate)
    assert config.env_options() == {**recipe.env_options(), "capacity": 8}  # the recipe's other options stay


def test_a_recipe_based_on_another_says_only_what_differs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "tiny"\n[env]\nset = ["capacity=3"]\n[grpo]\nsteps = 7')
    (config,) = run(monkeypatch, f"grpo --recipe {mine} --set top_k=9")
    tiny = load_recipe("tiny", LocalGRPOConfig)
    assert config == dataclasses.replace(tiny, steps=7, set=(*tiny.set, "capacity=3", "top_k=9"))
    assert load_recipe(str(mine), CollectConfig).set == (*tiny.set, "capacity=3")
    mine.write_text('base = "tiny"\n[grpo]\nstep = 7\n')
    with pytest.raises(SettingError, match=r"mine.toml \(base: .*tiny.toml\): \[grpo\] has no 'step'"):
        read_recipe(str(mine))


def test_required_arguments_come_from_the_recipe_or_are_still_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "sft --recipe tiny") == [load_recipe("tiny", SFTConfig)]
    assert run(monkeypatch, "collect --recipe tiny") == [load_recipe("tiny", CollectConfig)]
    (tmp_path / "mine.toml").write_text("[sft]\nepochs = 2\n")
    with pytest.raises(SystemExit):
        run(monkeypatch, f"sft --recipe {tmp_path / 'mine.toml'}")
    assert "SAMPLES" in capsys.readouterr().err
    (config,) = run(monkeypatch, f"sft there --recipe {tmp_path / 'mine.toml'}")
    assert (config.samples, config.epochs) == (Path("there"), 2.0)
    assert type(config.epochs) is float


@pytest.mark.parametrize("command", ["collect", "sft", "grpo"])
def test_help_names_the_recipes_and_shows_the_values_of_the_one_chosen(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, shown in ((f"{command} --help", "runs/"), (f"{command} --recipe tiny --help", "runs/tiny/")):
        with pytest.raises(SystemExit, match="0"):
            run(monkeypatch, words)
        printed = capsys.readouterr().out
        assert "--recipe NAME" in printed
        assert all(name in printed for name in NAMES)
        assert shown in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grpoo]", r"no table \[grpoo\].*env, collect, sft, grpo, model"),
        ("steps = 3", r"no table \[steps\]"),
        ("[grpo]\nstep = 3", r"\[grpo\] has no 'step'.*steps"),
        ("[env]\nsteps = 3", r"\[env\] has no 'steps'.*num_docs"),
        ("[grpo]\nsteps = '3'", r"\[grpo\] steps must be a whole number, got '3'"),
        ("[grpo]\nsteps = true", r"\[grpo\] steps must be a whole number, got True"),
        ("[grpo]\nresume = 1", r"\[grpo\] resume must be true or false, got 1"),
        ("[sft]\nout = 3", r"\[sft\] out must be a string, got 3"),
        ("[sft]\ndtype = 'float16'", r"\[sft\] dtype must be 'bfloat16' or 'float32', got 'float16'"),
        ("[env]\nset = 'a=1'", r"\[env\] set must be a list of strings, got 'a=1'"),
        ("[env]\nset = [1]", r"\[env\] set must be a list of strings"),
        ("[env]\nnum_docs = 1.5", r"\[env\] num_docs must be a whole number, got 1.5"),
        ("[model]\nhidden_size = 8", r"\[model\] must have all of model_type"),
        ("[grpo]\nsteps = 0", r"steps must be at least 1"),
        ("[grpo", r"is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(SettingError, match=message):
        read_recipe(str(tmp_path / "mine.toml"))


def test_an_unknown_recipe_lists_those_that_exist() -> None:
    with pytest.raises(SettingError, match=r"qwen3-0\.6b, qwen3-8b-lora, smollm2, tiny, .*'nonsense'"):
        read_recipe("nonsense")


def atommem(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from atommem_env.cli import main; sys.argv[0] = 'atommem'; main()"
    empty = {**os.environ, "HF_HOME": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd, env=empty)


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_an_impossible_recipe_is_rejected_at_once_before_its_model_is_asked_for(command: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("psutil")
    resource = pytest.importorskip("resource")
    text = (FOLDER / "qwen3-8b-lora.toml").read_text(encoding="utf-8")
    (tmp_path / "huge.toml").write_text(text.replace("hidden_size = 4096", "hidden_size = 1048576"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    rejected = atommem(command, "--recipe", "huge.toml", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert rejected.returncode == 1, rejected.stderr
    assert "Qwen/Qwen3-8B needs about" in rejected.stderr
    assert "× 2 bytes" in rejected.stderr
    assert "hf download" not in rejected.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20  # of the processor, imports and all
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_fits_asks_for_its_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("tensorboard")
    text = (FOLDER / "qwen3-0.6b.toml").read_text(encoding="utf-8")
    (tmp_path / "small.toml").write_text(text.replace("num_hidden_layers = 28", "num_hidden_layers = 1"))
    asked = atommem("grpo", "--recipe", "small.toml", "--in-flight=1", "--micro-batch-tokens=2048", cwd=tmp_path)
    assert asked.returncode == 1
    assert "hf download Qwen/Qwen3-0.6B" in asked.stderr
    assert not (tmp_path / "runs").exists()


def test_a_model_of_the_command_line_is_not_judged_by_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "check_memory", lambda *given: pytest.fail("judged"))
    (config,) = run(monkeypatch, "grpo --recipe qwen3-8b-lora --model another")
    assert config.model == "another"
