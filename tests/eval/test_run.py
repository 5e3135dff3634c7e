import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from atommem_env.errors import SettingError
from eval.metrics import bootstrap_ci95, summarise
from eval.run import EvalConfig, episode_specs, evaluate, read_episodes

FIELDS = [
    "env_id",
    "policy",
    "privileged",
    "episodes",
    "questions",
    "em",
    "em_ci95",
    "f1",
    "reward",
    "evidence_recall",
    "operations",
    "faults",
    "stop_reasons",
    "tokens",
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
    assert (summary["em"], summary["em_ci95"], summary["privileged"]) == (1.0, [1.0, 1.0], True)
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
        del summary["steps_per_second"]  # the only number that the clock decides
    assert summaries[0] == summaries[1]


def test_resume_plays_only_what_is_missing_and_ends_with_the_same_file(tmp_path: Path) -> None:
    evaluate(config(tmp_path / "whole", durability="off"))
    evaluate(config(tmp_path / "cut", durability="off"))
    lines = (tmp_path / "cut" / "episodes.jsonl").read_text().splitlines(keepends=True)
    marked = lines[3].replace('"f1": 1.0', '"f1": 0.5')
    (tmp_path / "cut" / "episodes.jsonl").write_text("".join([*lines[:3], marked, *lines[8:], lines[5][:40]]))
    evaluate(config(tmp_path / "cut", durability="off", resume=True))
    resumed = (tmp_path / "cut" / "episodes.jsonl").read_text()
    assert marked in resumed  # was not played again
    assert resumed.replace(marked, lines[3]) == (tmp_path / "whole" / "episodes.jsonl").read_text()


def test_whatever_was_answered_is_read_back(tmp_path: Path) -> None:
    odd = config(tmp_path, policy="constant=a\u2028b\x85c\x0bd", durability="off", episodes=3)
    evaluate(odd)
    before = (tmp_path / "episodes.jsonl").read_bytes()
    assert read_episodes(tmp_path / "episodes.jsonl")[0]["questions"][0]["prediction"] == "a\u2028b\x85c\x0bd"
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


def test_the_interval_covers_the_mean_and_narrows() -> None:
    few, many = ([float(i % 2) for i in range(count)] for count in (20, 500))
    low, high = bootstrap_ci95(few, [1] * 20)
    assert low < 0.5 < high
    narrow = bootstrap_ci95(many, [1] * 500)
    # The normal approximation, worked out by hand: 0.5 ± 1.96 · 0.5 / sqrt(500).
    assert narrow == pytest.approx((0.456, 0.544), abs=0.004)


def test_tasks_weigh_as_many_questions_as_they_have() -> None:
    def record(*ems: float) -> dict[str, Any]:
        questions = [
            {"id": "q", "prediction": "", "em": em, "f1": em, "evidence": 1, "stored": 1, "retrieved": 0} for em in ems
        ]
        return {
            "task_id": str(ems),
            "questions": questions,
            "reward": sum(ems) / len(ems),
            "steps": 3,
            "stop_reason": "answered",
            "replies_cut": 0,
            "operations": {"create": len(ems)},
            "faults": {},
            "tokens": {"prompt": 1, "completion": 1},
        }

    summary = summarise([record(1, 1, 1), record(0)])
    assert (summary["em"], summary["reward"]) == (0.75, 0.5)
    assert summary["evidence_recall"] == {"stored": 1.0, "retrieved": 0.0, "answered": 0.75}
    assert summary["operations"] == {"create": 2.0}
