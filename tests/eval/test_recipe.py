"""Recipes: what they mean, that nothing is played twice or lost, and that one run's failure is its own."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agents.registry import load_policy
from atommem_env import cli
from atommem_env.errors import SettingError
from eval.played_as import record_of, write_card
from eval.recipe import FOLDER, PlannedRun, _folder_name, check, plan, play_recipe, read_recipe, tables, workloads
from eval.run_folder import read_jsonl
from eval.workload import Workload

SMALL = """
episodes = 3
seeds = [0, 1]

[env]
durability = "off"
questions = 1
set = ["chunk_tokens=256", "top_k=3"]

[[environments]]
env_id = "AtomMem-Synthetic"
num_docs = [20, 40]

[[policies]]
policy = "oracle"

[[policies]]
label = "no scratchpad!"
policy = "random"
layout = "terse"
set = ["ablation=no_scratchpad", "top_k=5"]
"""
QUIET = Console(file=io.StringIO())


def recipe(folder: Path, text: str = SMALL) -> list[PlannedRun]:
    (folder / "recipe.toml").write_text(text)
    return read_recipe(folder / "recipe.toml", folder / "out")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def atommem(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of the real command."""
    monkeypatch.setattr(sys, "argv", ["atommem", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# ------------------------------------------------------------------------------------------------------------ what it means


def test_a_recipe_is_environments_by_policies_by_seeds(tmp_path: Path) -> None:
    runs = recipe(tmp_path)
    assert [str(run.config.out.relative_to(tmp_path / "out")) for run in runs] == [
        f"Synthetic-{docs}/{policy}/seed-{seed}"
        for docs in (20, 40)
        for policy in ("oracle", "no-scratchpad")
        for seed in (0, 1)
    ]
    first, last = runs[0].config, runs[-1].config
    assert (first.env_id, first.policy, first.label, first.num_docs) == ("AtomMem-Synthetic", "oracle", "oracle", 20)
    assert (last.label, last.num_docs, last.seed, last.episodes) == ("no scratchpad!", 40, 1, 3)
    assert (first.layout, last.layout) == ("shared_prefix", "terse")
    assert {run.config.questions for run in runs} == {1}


def test_what_is_set_is_joined_and_the_last_counts(tmp_path: Path) -> None:
    runs = recipe(tmp_path, SMALL.replace("num_docs = [20, 40]", 'num_docs = 20\nset = ["top_k=4", "capacity=9"]'))
    options = runs[-1].config.env_options()
    assert (options["chunk_tokens"], options["top_k"], options["capacity"]) == (256, 5, 9)
    assert runs[0].config.env_options()["top_k"] == 4
    assert runs[0].environment == "Synthetic"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("episodes = 3", "episode = 3"),
            r"\[the recipe\] has no 'episode'; did you mean 'episodes'\? It has: episodes, seeds, env, environments",
        ),
        (("seeds = [0, 1]", "seeds = 0"), "seeds must be a list of whole numbers, got 0"),
        (("seeds = [0, 1]", "seeds = []"), "has no run"),
        (("seeds = [0, 1]", "seeds = [0, 0]"), "would share the folder"),
        (("questions = 1", "question = 1"), r"\[env\] has no 'question'"),
        (
            ("num_docs = [20, 40]", 'num_docs = "20"'),
            r"\[\[environments\]\] num_docs must be a whole number or a list of",
        ),
        (('env_id = "AtomMem-Synthetic"', ""), "must have env_id"),
        (("[[environments]]", "[environments]"), r"must be written as \[\[environments\]\]"),
        (("[env]", "[[env]]\nquestions = 2\n[[env]]"), r"must be written as \[env\]"),
        (('policy = "oracle"', 'label = "oracle"'), "must have policy"),
        (('layout = "terse"', "num_docs = 30"), r"\[\[policies\]\] has no 'num_docs'"),
        (('label = "no scratchpad!"', 'label = "Oracle"'), "Give one of them another label"),
        (("episodes = 3", "episodes = "), "is not TOML"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    assert change[0] in SMALL
    with pytest.raises(SettingError, match=message):
        recipe(tmp_path, SMALL.replace(*change, 1))


def test_a_recipe_based_on_another_replaces_its_rows_and_adds_to_what_is_set(tmp_path: Path) -> None:
    recipe(tmp_path)
    (tmp_path / "mine.toml").write_text(
        'base = "recipe.toml"\nseeds = [5]\n[env]\nset = ["top_k=9"]\n[[policies]]\npolicy = "silent"\n'
    )
    runs = read_recipe(tmp_path / "mine.toml", tmp_path / "out")
    assert [(run.environment, run.policy, run.config.seed) for run in runs] == [
        ("Synthetic 20", "silent", 5),
        ("Synthetic 40", "silent", 5),
    ]
    assert runs[0].config.set == ("chunk_tokens=256", "top_k=3", "top_k=9")
    assert (runs[0].config.episodes, runs[0].config.durability) == (3, "off")


def test_a_trained_model_keeps_layout_dialect_and_length_unless_its_row_says_otherwise(tmp_path: Path) -> None:
    trained = recipe(tmp_path)[0].config
    trained = dataclasses.replace(trained, layout="terse", set=("dialect=public_code", "top_k=1"))
    write_card(tmp_path, record_of(trained), 16, command="atommem sft", run=tmp_path)
    rows = f"""
[[policies]]
label = "as trained"
policy = "{tmp_path}"

[[policies]]
label = "otherwise"
policy = "{tmp_path}"
layout = "shared_prefix"
max_new_tokens = 32
set = ["dialect=tool_calls"]
"""
    text = SMALL.replace("[env]", "[env]\nmax_new_tokens = 64") + rows
    by_policy = {run.policy: run.config for run in recipe(tmp_path, text)}
    played = by_policy["as trained"]
    assert (played.layout, played.max_new_tokens) == ("terse", 16)
    assert played.env_options()["dialect"] == "public_code"
    assert played.env_options()["top_k"] == 3  # the environment is the recipe's
    played = by_policy["otherwise"]
    assert (played.layout, played.max_new_tokens) == ("shared_prefix", 32)
    assert played.env_options()["dialect"] == "tool_calls"
    assert by_policy["oracle"].max_new_tokens == 64


def test_a_recipe_that_is_not_there_names_those_that_ship(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"baselines.toml, paper.toml, quick.toml, or the path .* got '.*mine.toml'"):
        read_recipe(tmp_path / "mine.toml", tmp_path)


@given(st.text())
def test_any_label_stays_in_its_folder(label: str) -> None:
    name = _folder_name(label)
    assert name not in ("", ".", "..")
    assert not set(name) & set('/\\:*?"<>|\x00')


# --------------------------------------------------------------------------------------------------- before anything is played


def test_everything_is_checked_before_anything_is_played(tmp_path: Path) -> None:
    text = SMALL.replace('policy = "random"', 'policy = "rnadom"')
    text += '\n[[environments]]\nenv_id = "AtomMem-HotpotQA"\n\n[[environments]]\nenv_id = "AtomMem-MuSiQue"\nnum_docs = 0\n'
    with pytest.raises(SettingError) as rejected:
        play_recipe(recipe(tmp_path, text), QUIET)
    message = str(rejected.value)
    assert "No policy is called 'rnadom'" in message  # all at once, each once
    assert message.count("atommem data import hotpotqa") == 1
    assert "num_docs must be a whole number" in message
    assert not (tmp_path / "out").exists()


def test_a_task_that_cannot_be_made_is_found_out_before(tmp_path: Path) -> None:
    rows = [
        {
            "_id": str(number),
            "question": "?",
            "answer": "yes",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": [["a", 0]],
            "context": [["a", [f"text {number}"]]],
        }
        for number in range(3)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    environment = f'env_id = "AtomMem-HotpotQA"\ndata = "{tmp_path / "rows.json"}"\nnum_docs = 200'
    text = SMALL.replace('env_id = "AtomMem-Synthetic"\nnum_docs = [20, 40]', environment)
    with pytest.raises(SettingError, match="documents"):
        check(recipe(tmp_path, text))


# ------------------------------------------------------------------------------------------------------------------- playing


def test_the_same_command_again_plays_only_what_is_missing(tmp_path: Path) -> None:
    runs = recipe(tmp_path)
    assert play_recipe(runs, QUIET) == {}
    before = contents(tmp_path / "out")
    assert play_recipe(runs, QUIET) == {}
    assert contents(tmp_path / "out") == before  # not even written again
    whole, cut = runs[0].config.out, runs[3].config.out
    expected = (cut / "episodes.jsonl").read_bytes()
    (cut / "summary.json").unlink()  # killed after its first episode
    for name in ("episodes.jsonl", "costs.jsonl"):
        (cut / name).write_text((cut / name).read_text().splitlines(keepends=True)[0])
    assert play_recipe(runs, QUIET) == {}
    assert (cut / "episodes.jsonl").read_bytes() == expected
    after = contents(tmp_path / "out")
    assert {name for name in after if after[name] != before[name]} <= {
        name for name in after if "no-scratchpad" in name
    }
    assert (whole / "summary.json").is_file()


def test_a_recipe_that_changed_is_rejected_for_the_runs_that_it_changes(tmp_path: Path) -> None:
    play_recipe(recipe(tmp_path), QUIET)
    before = contents(tmp_path / "out")
    more = '\n[[policies]]\npolicy = "constant=yes"\n'
    runs = recipe(tmp_path, SMALL.replace('"top_k=5"', '"top_k=2"') + more)
    failures = play_recipe(runs, QUIET)
    assert {run.policy for run in failures} == {"no scratchpad!"}
    assert len(failures) == 4
    assert all("top_k was 5, is 2" in cause and "another --out" in cause for cause in failures.values())
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert sum("constant=yes" in name and "summary" in name for name in after) == 4


def test_a_run_that_fails_is_reported_and_played_again_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_policies.py").write_text(
        "from pathlib import Path\n"
        "from atommem_env.errors import ModelError\n"
        "def served(observation):\n"
        "    if not Path(__file__).with_name('server').exists() and observation['phase'] == 'answer':\n"
        "        raise ModelError('The service at [here] is gone.')\n"
        "    return '<final_answer>yes</final_answer>'\n"
        "def broken(observation):\n"
        "    return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = SMALL.replace('policy = "random"', 'policy = "my_policies:served"').replace("[0, 1]", "[0]")
    (tmp_path / "recipe.toml").write_text(text.replace("[20, 40]", "[20]"))
    words = ("eval", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out"))
    assert atommem(monkeypatch, *words) == 1
    captured = capsys.readouterr()
    out = " ".join(captured.out.split())
    assert "oracle* 100.0" in out  # the others were played
    assert "no scratchpad! failed" in out
    assert "no scratchpad! on Synthetic 20, seed 0: The service at [here] is gone." in out
    assert "1 of 2 runs failed. The same command again plays only these." in out
    assert not (tmp_path / "out" / "Synthetic-20" / "no-scratchpad" / "seed-0" / "summary.json").exists()
    (tmp_path / "server").touch()
    assert atommem(monkeypatch, *words) == 0
    assert "failed" not in capsys.readouterr().out
    (tmp_path / "recipe.toml").write_text((tmp_path / "recipe.toml").read_text().replace("served", "broken"))
    assert atommem(monkeypatch, *words[:3], str(tmp_path / "other")) == 1
    captured = capsys.readouterr()
    assert "ZeroDivisionError" in captured.out
    assert "return 1 / 0" in captured.err  # where in the user's own file


def test_a_run_that_never_finished_an_episode_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone.py").write_text(
        "from atommem_env.errors import ModelError\ndef policy(observation):\n    raise ModelError('gone')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = SMALL.replace('policy = "random"', 'policy = "gone:policy"')
    assert len(play_recipe(recipe(tmp_path, text), QUIET)) == 4
    assert play_recipe(recipe(tmp_path, text.replace("gone:policy", "silent")), QUIET) == {}


def test_an_embedding_service_that_is_gone_fails_its_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    from atommem_env.embedders import openai_api

    monkeypatch.setattr(openai_api, "_PATIENCE", 0.2)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    runs = recipe(tmp_path, SMALL.replace('layout = "terse"', 'embedder = "openai:gone"'))
    failures = play_recipe(runs, QUIET)
    assert {run.policy for run in failures} == {"no scratchpad!"}
    assert all("embedding service" in cause for cause in failures.values())
    assert sum(run.done for run in runs) == 4


# ------------------------------------------------------------------------------------------------------------------- telling


NO_MODELS = """
episodes = 4

[[environments]]
env_id = "AtomMem-Synthetic"
num_docs = [20, 40]
embedder = "openai:nowhere"

[[policies]]
policy = "openai:nobody"

[[policies]]
policy = "rag@vllm:no/model"

[[policies]]
policy = "no_such_module:policy"

[[policies]]
policy = "smollm2"
layout = "terse"
"""


def test_a_dry_run_lists_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = recipe(tmp_path)
    words = ("eval", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out"), "--dry-run")
    assert atommem(monkeypatch, *words) == 0
    assert capsys.readouterr().out.count("0 of 3") == len(runs)
    assert not (tmp_path / "out").exists()
    play_recipe(runs[:1], QUIET)
    assert atommem(monkeypatch, "eval", "--dry-run", *words[1:4]) == 0
    printed = capsys.readouterr().out
    assert (printed.count("3 of 3"), printed.count("0 of 3")) == (1, len(runs) - 1)


def test_a_dry_run_needs_no_folder_and_calls_and_loads_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_EMBEDDING_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("agents.registry.load_model", lambda name: pytest.fail(f"{name} was loaded"))
    monkeypatch.setattr("agents.registry.load_attribute", lambda name: pytest.fail(f"{name} was imported"))
    monkeypatch.chdir(tmp_path)
    runs = recipe(tmp_path, NO_MODELS)
    assert atommem(monkeypatch, "eval", "recipe.toml", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert all(printed.count(name) == 2 for name in ("openai:nobody", "no_such_module:policy", "smollm2"))
    found = workloads(runs)
    for run, work in found.items():
        replies, tokens = f"{4 * work.replies:,}", f"{4 * work.tokens:,}"
        assert sum(replies in line and tokens in line for line in printed.splitlines()) >= 1, run.name
    assert f"{sum(4 * work.tokens for work in found.values()):,}" in printed
    assert not (tmp_path / "runs").exists()


def test_a_single_run_can_be_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("eval", "AtomMem-Synthetic", "--policy", "rag@openai:nobody", "--episodes", "7", "--dry-run")
    assert atommem(monkeypatch, *words) == 0
    assert capsys.readouterr().out.startswith("7 episodes of AtomMem-Synthetic: ")
    for wrong, message in (
        (("--policy", "rag"), "rag needs a model"),
        (("--policy", "rag@smolm2"), "did you mean 'smollm2'"),
        (("--embedder", "minlm"), "did you mean 'minilm'"),
        (("--layout", "brief"), "layout must be one of"),
        (("--set", "top_q=3"), "No setting is called top_q; did you mean 'top_k'"),
        (("--episodes", "0"), "episodes must be at least 1"),
    ):
        assert atommem(monkeypatch, *words, *wrong) != 0
        assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_in_a_recipe_comes_before_models_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.registry.load_model", lambda name: pytest.fail(f"{name} was loaded"))
    with pytest.raises(SettingError, match="No policy is called 'rnadom'"):
        play_recipe(recipe(tmp_path, NO_MODELS + '[[policies]]\npolicy = "rnadom"\n'), QUIET)


def test_the_workload_is_that_of_the_episodes_that_are_played(tmp_path: Path) -> None:
    run = recipe(tmp_path, SMALL.replace('policy = "oracle"', 'policy = "constant=yes"'))[0]
    work = workloads([run])[run]
    play_recipe([run], QUIET)
    steps = [record["steps"] for record in read_jsonl(run.config.out / "episodes.jsonl")]
    assert work.replies == steps[0]
    assert 0.8 < sum(steps) / (3 * work.replies) < 1.25
    assert work.tokens > 20 * 15  # of 20 documents


def test_seeds_are_pooled_in_a_table_an_environment(tmp_path: Path) -> None:
    runs = recipe(tmp_path)
    failures: dict[PlannedRun, str] = {runs[1]: "gone", runs[2]: "gone", runs[3]: "gone"}
    play_recipe(runs, QUIET)
    console = Console(width=80, record=True, file=io.StringIO())
    first, second = tables(runs, failures)
    console.print(first, second)
    printed = console.export_text()
    assert "oracle (1 of 2" in printed
    assert [line.split()[-1] for line in printed.splitlines() if "no scratchpad!" in line][0] == "failed"  # noqa: RUF015
    assert "Synthetic 40, 6 episodes" in printed
    assert max(map(len, printed.splitlines())) <= 80
    console.print(plan(runs, dict.fromkeys(runs, Workload(2, 30))))
    assert console.export_text().count("3 of 3") == len(runs)


def test_a_single_run_is_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    words = ("AtomMem-Synthetic", "--episodes", "1", "--durability", "off", "--label", "mine", "--thinking")
    assert atommem(monkeypatch, "eval", *words, "--out", out) == 0
    assert "mine*" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sampling"]["thinking"] is True
    assert len(read_jsonl(tmp_path / "run" / "episodes.jsonl")) == 1


# ------------------------------------------------------------------------------------------------------------------ those shipped


def test_the_quick_recipe_runs_without_any_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert atommem(monkeypatch, "eval", "quick.toml", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert printed.count("oracle*") == 2
    assert max(map(len, printed.splitlines())) <= 80
    summaries = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    assert len(summaries) == len(read_recipe(Path("quick.toml"), tmp_path))
    assert {summary["em"] for summary in summaries if summary["label"] == "oracle"} == {1.0}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_played_where_its_models_and_data_are(path: Path, tmp_path: Path) -> None:
    from agents.registry import METHODS
    from atommem_env.env import split_options

    for run in read_recipe(path, tmp_path):
        config = run.config
        dataset = {"HotpotQA": "hotpotqa", "2WikiMultiHopQA": "2wikimultihopqa", "MuSiQue": "musique"}
        options = {
            name: value for name, value in config.env_options().items() if name not in ("embedder", "durability")
        }
        settings, _ = split_options(dataset.get(config.env_id.removeprefix("AtomMem-"), "synthetic"), options)
        method, at, _ = config.policy.partition("@")
        if at:  # on a model that is here; the method says if the settings are not for it
            assert method in METHODS
            load_policy(f"{method}@tiny", settings).begin(0, None)
        elif not config.policy.startswith(("openai:", "smollm2")):
            load_policy(config.policy, settings)
    assert f"atommem eval {path.name} --out" in path.read_text(encoding="utf-8")  # how it is run


def rows(path: Path) -> set[str]:
    return {run.policy for run in read_recipe(path, Path("out"))}


def test_the_papers_table_is_whole(tmp_path: Path) -> None:
    runs = read_recipe(Path("paper.toml"), tmp_path)
    assert {(run.config.env_id, run.config.num_docs) for run in runs} == {
        (f"AtomMem-{name}", count) for name in ("HotpotQA", "2WikiMultiHopQA", "MuSiQue") for count in (200, 400, 800)
    }
    assert {run.config.temperature for run in runs} == {0.7}
    ablated: list[Any] = [pair for run in runs for pair in run.config.set if pair.startswith("ablation=")]
    from atommem_env.types import ABLATIONS

    assert {pair.removeprefix("ablation=") for pair in ablated} == set(ABLATIONS)
    assert rows(Path("baselines.toml")) | rows(Path("ablations.toml")) >= rows(Path("paper.toml"))
