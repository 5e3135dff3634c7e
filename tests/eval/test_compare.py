import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atommem_env.cli import main as atommem
from atommem_env.errors import SettingError
from eval.compare import compare, read_run, sign_flip_p
from eval.options import EvalConfig
from eval.run import evaluate
from eval.run_folder import read_jsonl, to_jsonl


def run(folder: Path, policy: str, **changes: Any) -> Path:
    options = {
        "env_id": "AtomMem-Synthetic",
        "episodes": 8,
        "questions": 3,
        "num_docs": 16,
        "durability": "off",
        **changes,
    }
    evaluate(EvalConfig(out=folder, policy=policy, **options))
    return folder


def outcomes(folder: Path, right: list[list[int]]) -> None:
    """Rewrites which questions of a run were answered correctly, episode by episode."""
    records = read_jsonl(folder / "episodes.jsonl")
    for record, ems in zip(records, right, strict=True):
        for question, em in zip(record["questions"], ems, strict=True):
            question["em"] = float(em)
    (folder / "episodes.jsonl").write_text("".join(map(to_jsonl, records)), encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return run(folder / "a", "constant=yes"), run(folder / "b", "oracle")


def test_who_won_which_questions(tmp_path: Path) -> None:
    a, b = (run(tmp_path / name, "silent", episodes=3) for name in "ab")
    outcomes(a, [[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    outcomes(b, [[1, 0, 1], [1, 1, 0], [1, 0, 0]])
    result = compare(read_run(a), read_run(b))
    everything = result["all"]
    assert everything["em"] == [round(3 / 9, 4), round(5 / 9, 4)]
    assert everything["difference"] == round(2 / 9, 4)
    assert [everything[name] for name in ("won", "lost", "both", "neither")] == [3, 1, 2, 3]
    # The tasks' differences are 0, 2 and 0: resampled whole, their mean lies between 0 and 2/3.
    assert everything["ci95"] == [0.0, round(2 / 3, 4)]
    assert everything["p_value"] == 1.0, "either sign of the one task that differs is as extreme"
    for groups in (result["by_kind"], result["by_hops"]):
        for name in ("questions", "won", "lost", "both", "neither"):
            assert sum(group[name] for group in groups.values()) == everything[name]


def test_a_run_differs_from_itself_in_nothing_and_the_other_way_round_has_the_other_sign(
    runs: tuple[Path, Path],
) -> None:
    a, b = map(read_run, runs)
    same = compare(a, a)
    assert (same["all"]["difference"], same["all"]["ci95"], same["all"]["p_value"]) == (0, [-0.3694, 0.3694], 1)
    assert same["settings_that_differ"] == {}
    there, back = compare(a, b)["all"], compare(b, a)["all"]
    assert there["difference"] == -back["difference"] == 1.0
    assert there["p_value"] == back["p_value"] < 0.02
    assert (there["won"], there["lost"]) == (back["lost"], back["won"]) == (24, 0)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_p_value_is_that_of_all_choices_of_signs(values: list[int]) -> None:
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    exact = sum(total >= abs(sum(values)) for total in sums) / len(sums)
    assert sign_flip_p(values) == pytest.approx(exact, abs=0.025)  # five standard errors of 10,000 draws


def test_questions_of_one_task_are_no_independent_evidence() -> None:
    """Twenty questions won in two tasks: McNemar's test would say p = 2e-6."""
    assert sign_flip_p([10, 10]) == pytest.approx(0.5, abs=0.025)


def test_episodes_of_one_task_are_one_unit(tmp_path: Path) -> None:
    """Eight episodes of two tasks, one of which B wins whole: a resample holds both, or one of them twice."""
    a, b = (run(tmp_path / name, "silent") for name in "ab")
    outcomes(a, [[0, 0, 0]] * 8)
    outcomes(b, [[1, 1, 1]] * 4 + [[0, 0, 0]] * 4)
    for folder in (a, b):
        records = read_jsonl(folder / "episodes.jsonl")
        records = [{**record, "task_id": "first" if record["episode"] < 4 else "second"} for record in records]
        (folder / "episodes.jsonl").write_text("".join(map(to_jsonl, records)), encoding="utf-8")
    result = compare(read_run(a), read_run(b))
    assert (result["episodes"], result["tasks"]) == (8, 2)
    assert result["all"]["ci95"] == [0.0, 1.0]
    assert result["all"]["p_value"] == 1.0


def test_what_the_runs_differ_in_is_said(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = run(tmp_path / "other", "oracle", set=("top_k=2", "ablation=no_update"), num_docs=17, embedder="hashing")
    differ = compare(read_run(runs[1]), read_run(other))["settings_that_differ"]
    assert differ == {
        "num_docs": [16, 17],
        "top_k": [6, 2],
        "ablation": ["not given", "no_update"],
        "operations": [["create", "read", "update", "delete"], ["create", "read", "delete"]],
    }


@pytest.mark.parametrize("change", [{"seed": 1}, {"questions": 2}, {"split": "train"}])
def test_other_tasks_or_questions_are_refused(change: dict[str, Any], runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = run(tmp_path / "other", "oracle", **change)
    with pytest.raises(SettingError, match=r"same episodes.*number 0 is") as raised:
        compare(read_run(runs[0]), read_run(other))
    assert ("seed" if "seed" in change else next(iter(change))) in str(raised.value)


def test_an_unfinished_run_is_compared_as_far_as_it_is(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run(tmp_path / "unfinished", "oracle")
    lines = (other / "episodes.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (other / "episodes.jsonl").write_text("".join(lines[5:2:-1]) + lines[6][:40], encoding="utf-8")  # as they ended
    (other / "summary.json").unlink()
    out = tmp_path / "new" / "comparison.json"
    monkeypatch.setattr(sys, "argv", ["atommem", "compare", str(runs[0]), str(other), "--out", str(out)])
    atommem()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result == compare(read_run(runs[0]), read_run(other))
    assert (result["episodes"], result["left_out"], result["all"]["won"]) == (3, [5, 0], 9)
    printed = capsys.readouterr().out
    assert "5 episodes that only A" in printed
    assert "+100.0" in printed
    assert max(map(len, printed.splitlines())) <= 80 + len(str(out))


def test_what_is_no_run_is_said(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"config\.json"):
        read_run(tmp_path)
    old = tmp_path / "old"
    run(old, "silent", episodes=1)
    config = json.loads((old / "config.json").read_text(encoding="utf-8"))
    (old / "config.json").write_text(json.dumps({**config, "schema_version": 1}), encoding="utf-8")
    with pytest.raises(SettingError, match="schema 1"):
        read_run(old)
    (old / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (old / "episodes.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(SettingError, match="finished"):
        read_run(old)
