"""A number says what it is a number of: what is recorded, what is rejected, what is left out of a mean."""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import atommem_env
from agents.models.find import model_label
from atommem_env.errors import JobFailed, ReplyRefused, SettingError
from eval import provenance
from eval.compare import compare, read_run
from eval.metrics import bootstrap_ci95, summarise
from eval.options import EvalConfig
from eval.report.report import group
from eval.run import evaluate, main
from eval.run_folder import RunFolder
from eval.verify import verify

MODULE = "own_policies"


@pytest.fixture
def own_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with a policy, in the working folder."""
    path = tmp_path / f"{MODULE}.py"
    path.write_text("def policy(observation):\n    return '<final_answer>no</final_answer>'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return path


def config(out: Path, **changes: Any) -> EvalConfig:
    values = {"env_id": "AtomMem-Synthetic", "policy": "oracle", "episodes": 4, "num_docs": 6, "durability": "off"}
    return EvalConfig(out=out, **{**values, **changes})


def questions(folder: Path, answer: str = "north") -> dict[str, Any]:
    """Files of one's own, and a question about them."""
    folder.mkdir(exist_ok=True)
    (folder / "safety.md").write_text("# Fire\nLeave by the north door.\n")
    path = folder.with_suffix(".jsonl")
    path.write_text(json.dumps({"question": "Which door in a fire?", "answer": answer}) + "\n")
    return {"env_id": "AtomMem-Files", "files": (folder,), "data": path, "num_docs": None, "episodes": 1}


# -------------------------------------------------------------------------------------------------------------- identity


def test_a_run_says_what_it_is_a_number_of(tmp_path: Path, own_policy: Path) -> None:
    evaluate(config(tmp_path / "run", policy=f"{MODULE}:policy", **questions(tmp_path / "book")))
    run = read_run(tmp_path / "run")
    assert set(run.config["fingerprints"]) == {"policy"}
    assert run.config["data"]
    assert all(len(digest) == 64 for digest in (*run.config["data"].values(), run.records[0]["task_digest"]))
    (session,) = provenance.read_sessions(tmp_path / "run")
    assert session["versions"]["lancedb"]
    assert session["date"].endswith("+00:00")
    assert not {"date", "machine", "commit"} & set(json.dumps(run.records))


def test_what_was_replaced_is_no_resumed_run(tmp_path: Path, own_policy: Path) -> None:
    policy = f"{MODULE}:policy"
    files = questions(tmp_path / "book")
    evaluate(config(tmp_path / "golds", policy=policy, **files))
    (tmp_path / "golds" / "episodes.jsonl").write_text("")
    questions(tmp_path / "book", answer="south")
    with pytest.raises(SettingError, match="another configuration"):
        evaluate(config(tmp_path / "golds", policy=policy, resume=True, **files))
    evaluate(config(tmp_path / "policy", policy=policy, episodes=2))
    own_policy.write_text(own_policy.read_text().replace("no", "yes"))
    with pytest.raises(SettingError, match="policy was"):
        evaluate(config(tmp_path / "policy", policy=policy, episodes=4, resume=True))


def test_runs_on_other_golds_are_not_compared(tmp_path: Path) -> None:
    for answer in ("north", "south"):
        evaluate(config(tmp_path / answer, **questions(tmp_path / "book", answer)))
    with pytest.raises(SettingError, match="the data were replaced between the runs"):
        compare(read_run(tmp_path / "north"), read_run(tmp_path / "south"))


def test_models_of_one_name_are_two_rows_and_no_resumed_run(tmp_path: Path) -> None:
    import shutil

    from agents.models.find import TINY

    pytest.importorskip("torch")
    models = [tmp_path / name / "model" for name in ("a", "b")]
    for number, folder in enumerate(models):
        shutil.copytree(TINY, folder)
        weights = folder / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= number  # a last bit
        weights.write_bytes(content)
    assert [model_label(str(folder)) for folder in models] == ["a", "b"]
    options = {"layout": "terse", "max_new_tokens": 2, "episodes": 1, "label": "mine"}
    for folder, out in zip(models, ("one", "two"), strict=True):
        evaluate(config(tmp_path / out, policy=str(folder), **options))
    runs = [read_run(tmp_path / out) for out in ("one", "two")]
    (table,) = group(runs)
    assert len(table.rows) == 2
    assert all("fingerprints.model=" in row.name for row in table.rows)
    (tmp_path / "one" / "episodes.jsonl").write_text("")
    with pytest.raises(SettingError, match="model was"):
        evaluate(config(tmp_path / "one", policy=str(models[1]), resume=True, **options))


def test_a_large_file_is_hashed_by_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_WHOLE", 1000)
    monkeypatch.setattr(provenance, "_BLOCK", 10)
    digests = set()
    for name, size, changed in (("a", 5000, 0), ("b", 5000, 4999), ("c", 5001, 0), ("d", 5000, 0)):
        folder = tmp_path / name
        folder.mkdir()
        content = bytearray(size)
        content[changed] = 1
        (folder / "model.safetensors").write_bytes(content)
        digests.add(provenance.hash_folder(folder))
    assert len(digests) == 3  # a and d are alike


def _play(out: str, started: Any, go_on: Any) -> None:
    def policy(observation: Any) -> str:
        started.set()
        go_on.wait(60)
        return "<final_answer>x</final_answer>"

    atommem_env.evaluate(policy, episodes=1, num_docs=6, out=out, progress=False)


def test_two_evaluations_do_not_share_a_folder(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    started, go_on = spawn.Event(), spawn.Event()
    first = spawn.Process(target=_play, args=(str(tmp_path / "run"), started, go_on))
    first.start()
    assert started.wait(120)
    with pytest.raises(SettingError, match="Another process plays in"):
        evaluate(config(tmp_path / "run"))
    go_on.set()
    first.join(120)
    assert first.exitcode == 0
    assert read_run(tmp_path / "run").summary is not None
    assert not (tmp_path / "run" / ".lock").exists()
    with RunFolder.claimed(tmp_path / "other", {"episodes": 1}, resume=False):
        assert (tmp_path / "other" / ".lock").exists()


def test_a_run_is_extended_and_never_shortened(tmp_path: Path) -> None:
    evaluate(config(tmp_path / "grown", episodes=3))
    evaluate(config(tmp_path / "grown", episodes=7, resume=True))
    evaluate(config(tmp_path / "whole", episodes=7))
    for name in ("episodes.jsonl", "config.json"):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(provenance.read_sessions(tmp_path / "grown")) == 2
    with pytest.raises(SettingError, match="episodes was 7, is 5"):
        evaluate(config(tmp_path / "grown", episodes=5, resume=True))


def test_verify_names_what_no_longer_holds(tmp_path: Path, own_policy: Path) -> None:
    files = questions(tmp_path / "book") | {"durability": "episode"}
    evaluate(config(tmp_path / "run", policy=f"{MODULE}:policy", **files))
    assert not [check for check in verify(tmp_path / "run", trust=True) if check.holds is False]
    (tmp_path / "book" / "safety.md").write_text("# Fire\nLeave by the south door.\n")
    own_policy.write_text(own_policy.read_text() + "# changed\n")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"em": 0.5}))
    changed = {check.name for check in verify(tmp_path / "run", trust=True) if check.holds is False}
    assert changed == {"summary", "data", "tasks", "weights and sources"}


# ------------------------------------------------------------------------------------------------------------- the means


def test_questions_without_a_gold_are_in_no_mean_and_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own_policy: Path
) -> None:
    task = replace(
        atommem_env.Task.of(["Leave by the north door."], [("Which door?", "no")]),
        questions=(
            atommem_env.Question("graded", "Which door?", ("no",)),
            atommem_env.Question("ungraded", "Why?", ()),
        ),
        scoring="files",
    )
    result = atommem_env.evaluate(
        lambda observation: "<final_answer>no</final_answer>", task, episodes=1, progress=False
    )
    assert (result.em, result.summary["questions"], result.summary["ungraded"]) == (1.0, 1, 1)
    assert result.episodes[0]["reward"] == 1.0
    files = {**questions(tmp_path / "book"), "data": None, "set": ("question=Which door is it?",)}
    main(config(tmp_path / "run", policy=f"{MODULE}:policy", **files))
    shown = capsys.readouterr().out
    assert "Answers that no gold grades" in shown
    assert "EM" not in shown
    summary = read_run(tmp_path / "run").summary
    assert summary is not None
    assert (summary["em"], summary["em_ci95"], summary["ungraded"]) == (None, None, 1)


def test_intervals_have_a_width_where_all_tasks_agree() -> None:
    assert bootstrap_ci95([0.0] * 10, [1] * 10) == pytest.approx((0, 0.3085), abs=1e-4)  # scipy's binomtest, exact
    assert bootstrap_ci95([1.0] * 2, [1] * 2) == pytest.approx((0.1581, 1), abs=1e-4)
    low, high = bootstrap_ci95([0.0] * 50, [1] * 50, bounds=(-1.0, 1.0))
    assert (low, high) == pytest.approx((-0.0711, 0.0711), abs=1e-4)


def test_tokens_that_nobody_told_are_not_0(tmp_path: Path) -> None:
    from atommem_env.types import Reply, Usage

    def policy(observation: Any) -> Reply:
        return Reply("<final_answer>x</final_answer>", usage=Usage(calls=1, prompt_tokens=None, completion_tokens=3))

    result = atommem_env.evaluate(policy, episodes=2, num_docs=6, progress=False)
    assert result.summary["tokens"]["prompt"] is None
    assert result.summary["tokens"]["completion"] > 0
    assert summarise(result.episodes)["tokens"] == result.summary["tokens"]


def test_an_episode_whose_prompt_a_service_refuses_stays_unscored(
    tmp_path: Path, own_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_policy.write_text(
        "from atommem_env.errors import ReplyRefused\n"
        "seen = []\n"
        "def policy(observation):\n"
        "    if observation['questions'] not in seen:\n"
        "        seen.append(observation['questions'])\n"
        "    if observation['questions'] in seen[1:2]:\n"
        "        raise ReplyRefused('content filter')\n"
        "    return '<final_answer>x</final_answer>' if observation['phase'] == 'answer' else ''\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(config(tmp_path / "run", policy=f"{MODULE}:policy"))
    assert ended.value.code == 3
    run = read_run(tmp_path / "run")
    assert run.summary is not None
    assert run.summary["unscored"] == 4 - len(run.records) == 1
    assert "1 of 4 episodes are unscored" in capsys.readouterr().err

    def refusing(observation: Any) -> str:
        raise ReplyRefused("content filter")

    with pytest.raises(JobFailed, match="No episode could be scored"):
        atommem_env.evaluate(refusing, episodes=2, num_docs=6, progress=False)


# --------------------------------------------------------------------------------------------- what lets nothing out


def test_labels_control_neither_terminal_nor_spreadsheet_nor_tex(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eval.report.report import report

    pytest.importorskip("matplotlib")
    label = "=HYPERLINK(1)\x1b]0;title\x07[bold]\u202e\x00"
    main(config(tmp_path / "run", label=label, episodes=1))
    shown = capsys.readouterr().out
    assert "\x1b]0;" not in shown
    assert "\u202e" not in shown
    assert "[bold]" in shown
    report([tmp_path / "run"], tmp_path / "report")
    table = (tmp_path / "report" / "results.csv").read_text(encoding="utf-8")
    assert "'=HYPERLINK" in table
    for text in (table, (tmp_path / "report" / "results.tex").read_text(encoding="utf-8")):
        assert not {"\x00", "\x1b", "\u202e"} & set(text)


# ------------------------------------------------------------------------------------------ what lets nothing in


def test_what_one_is_handed_runs_no_code_unless_it_is_trusted(tmp_path: Path, own_policy: Path) -> None:
    from eval.command_line import parse_eval
    from eval.judge import JudgeConfig, judge
    from eval.played_as import record_of, write_card
    from eval.viewer.trace import page_parts

    run, model = tmp_path / "run", tmp_path / "model"
    evaluate(config(run, durability="episode", episodes=1))
    hostile = "raise SystemExit('this ran')\n"
    (tmp_path / "theirs.py").write_text(hostile)
    before = json.loads((run / "config.json").read_text())
    for part in (
        {"env_id": "theirs:Env-v0"},
        {"options": {**before["options"], "source": "theirs:source"}},
        {"settings": {**before["settings"], "reward": "theirs:reward"}, "layout": "theirs:layout"},
    ):
        (run / "config.json").write_text(json.dumps(before | part))
        for reader in (
            lambda path: next(page_parts(path)),
            verify,
            lambda path: judge(JudgeConfig(run=path, model="tiny")),
        ):
            with pytest.raises(SettingError, match="names theirs, and importing a module runs its code"):
                reader(run)
        with pytest.raises(SettingError, match="say so by --trust"):
            parse_eval("atommem eval", "", ["--like", str(run)])
    model.mkdir()
    write_card(model, record_of(config(run)), 8, command="atommem sft", run=run)
    card = json.loads((model / "atommem.json").read_text())
    (model / "atommem.json").write_text(json.dumps(card | {"layout": "theirs:layout"}))
    with pytest.raises(SettingError, match="names theirs"):
        parse_eval("atommem eval", "", ["--policy", str(model)])
    with pytest.raises(SettingError, match="names theirs"):
        atommem_env.evaluate(str(model), episodes=1)
    assert "theirs" not in sys.modules
