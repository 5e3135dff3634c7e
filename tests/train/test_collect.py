"""Samples are the turns of the episodes that were good enough, all of them and no other."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import gymnasium as gym
import pyarrow.parquet as pq
import pytest

from agents import rollout
from agents.rollout import episode_specs, play_episode
from atommem_env.errors import SettingError
from atommem_env.types import Rollout
from eval.options import EvalConfig
from eval.run import evaluate
from eval.run_folder import read_jsonl, to_jsonl
from train.collect import SCHEMA, CollectConfig, collect

POLICIES = '''
class Half:
    """Right where the seed is even; half of these episodes have a fault in every reading turn."""

    name = "half"
    privileged = True

    def begin(self, seed, task):
        def act(observation):
            if observation["phase"] == "answer":
                return f"<final_answer>{'wrong' if seed % 2 else task.questions[0].answers[0]}</final_answer>"
            return "<create_memory>\\ud800</create_memory>" if seed % 4 == 2 else ""

        return act


def always_faulty(observation):
    return "<create_memory>"


def careful(observation):
    return "<final_answer>no</final_answer>" if observation["phase"] == "answer" else ""


def careless(observation):
    reply = careful(observation)
    observation.update(chunk="nothing", entries="nothing", phase="over")
    return reply


def nan(summary):
    return float("nan")


def inf(summary):
    return float("inf")


half = Half()
'''
FILES = ("samples.parquet", "samples.jsonl", "rewards.jsonl", "config.json", "summary.json")


@pytest.fixture(autouse=True)
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a module `collect_policies` of `POLICIES`."""
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "collect_policies.py").write_text(POLICIES)
    monkeypatch.syspath_prepend(str(folder))


def config(out: Path, **changes: Any) -> CollectConfig:
    options = {"env_id": "AtomMem-Synthetic", "policy": "collect_policies:half", "episodes": 24, "layout": "terse"}
    return CollectConfig(out=out, **{**options, **changes})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_rows_are_the_turns_of_the_episodes_that_an_evaluation_finds_good_enough(tmp_path: Path) -> None:
    summary = collect(config(tmp_path / "samples"))
    asked = EvalConfig(
        env_id="AtomMem-Synthetic",
        policy="collect_policies:half",
        episodes=24,
        split="train",
        out=tmp_path / "eval",
        durability="off",
    )
    evaluate(asked)
    records = read_jsonl(tmp_path / "eval" / "episodes.jsonl")
    good = [record for record in records if record["reward"] >= 0.5]
    assert 6 < len(good) < 18
    rows = lines(tmp_path / "samples")
    assert [(row["episode"], row["turn"], row["task_id"], row["reward"], row["env_id"]) for row in rows] == [
        (record["episode"], turn, record["task_id"], 1.0, "AtomMem-Synthetic")
        for record in good
        for turn in range(record["steps"])
    ]
    faults = sum(sum(record["faults"].values()) for record in good)  # at most one a turn, as the policy is written
    assert 0 < faults < len(rows)
    assert summary == {
        "env_id": "AtomMem-Synthetic",
        "policy": "half",
        "privileged": True,
        "episodes": 24,
        "kept": len(good),
        "turns": len(rows),
        "turns_with_faults": faults,
        "samples": len(rows),
        "reward": round(len(good) / 24, 4),
        "schema_version": 3,
    }
    assert json.loads((tmp_path / "samples" / "summary.json").read_text()) == summary
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {*FILES, "provenance.json"}

    dropped = collect(config(tmp_path / "dropped", drop_faults=True))
    faulty = "<create_memory>\ufffd</create_memory>"  # as the environment reads it, and as a file can hold it
    assert sum(row["completion"][0]["content"] == faulty for row in rows) == faults
    assert lines(tmp_path / "dropped") == [row for row in rows if row["completion"][0]["content"] != faulty]
    assert (dropped["turns"], dropped["turns_with_faults"]) == (len(rows), faults)
    assert dropped["samples"] == len(rows) - faults

    everything = collect(config(tmp_path / "all", min_reward=0.0))
    assert everything["kept"] == 24
    assert everything["samples"] == sum(record["steps"] for record in records)
    assert [row for row in lines(tmp_path / "all") if row["reward"] >= 0.5] == rows


def test_episodes_won_by_a_guess_can_be_left_out(tmp_path: Path) -> None:
    task = ("hops=[1,2]", "capacity=2", "chunk_tokens=64", "scratchpad=false", "unanswerable=0.0")
    options = {"policy": "random-70", "num_docs": 6, "set": task, "episodes": 60, "min_reward": 1.0}
    kept = {drop: collect(config(tmp_path / str(drop), drop_guesses=drop, **options))["kept"] for drop in (False, True)}
    asked = EvalConfig(
        env_id="AtomMem-Synthetic", policy="random-70", num_docs=6, set=task, episodes=60, split="train",
        out=tmp_path / "eval", durability="off",
    )  # fmt: skip
    evaluate(asked)
    won = [record for record in read_jsonl(tmp_path / "eval" / "episodes.jsonl") if record["reward"] == 1]
    known = [record for record in won if all(one["stored"] == one["evidence"] for one in record["questions"])]
    assert kept == {False: len(won), True: len(known)}
    assert len(known) < len(won)


def test_parquet_and_json_lines_hold_the_same_rows(tmp_path: Path) -> None:
    collect(config(tmp_path / "samples", policy="oracle", episodes=3, layout="shared_prefix"))
    table = pq.read_table(tmp_path / "samples" / "samples.parquet")
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == lines(tmp_path / "samples")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"in_flight": 1}), ("c", {"seed": 1})):
        collect(config(tmp_path / name, policy="oracle", episodes=6, **changes))
    for file in FILES[:4]:
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c
    assert (tmp_path / "a" / "summary.json").read_bytes() == (tmp_path / "b" / "summary.json").read_bytes()


def test_the_first_row_read_literally(tmp_path: Path) -> None:
    collect(config(tmp_path / "samples", episodes=1, min_reward=0.0, policy="constant=yes", layout="shared_prefix"))
    (spec,) = episode_specs(1_000_000, 1, seed=0)
    env = gym.make("AtomMem-Synthetic", split="train", durability="off")
    options = {"index": spec.index, "seed": spec.task_seed}
    seen = play_episode(env, lambda observation: "", seed=spec.seed, options=options).turns[0].observation
    first = lines(tmp_path / "samples")[0]
    system, user = first.pop("prompt")
    assert system["role"] == "system"
    assert user["role"] == "user"
    assert user["content"] == (
        f"## Question\n{seen['questions']}\n\n## Document, next piece\n{seen['chunk']}\n\n## Scratchpad\n(empty)\n\n"
        "## Search in force\n(none)\n\n## Memory entries found\n(none)"
    )
    assert first == {
        "completion": [{"role": "assistant", "content": ""}],
        "env_id": "AtomMem-Synthetic",
        "task_id": f"synthetic-train-{spec.index}",
        "episode": 0,
        "turn": 0,
        "reward": 0.0,
    }


def test_nothing_to_keep_is_an_error_that_says_what_was_seen_and_what_to_do(tmp_path: Path) -> None:
    out = tmp_path / "samples"
    for resume in (False, True):
        with pytest.raises(SettingError, match=r"0 of 4 .*silent .*0\.5 \(mean 0, best 0\)\. Lower --min-reward"):
            collect(config(out, policy="silent", episodes=4, resume=resume))
    faulty = {"policy": "collect_policies:always_faulty", "min_reward": 0.0, "drop_faults": True, "episodes": 2}
    with pytest.raises(SettingError, match=r"2 of 2 .* turns had faults\. Leave --drop-faults out"):
        collect(config(tmp_path / "faulty", **faulty))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_reward": float("nan")}, "min_reward must be between 0 and 1, got nan"),
        ({"min_reward": 50}, "got 50"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"layout": "brief"}, "layout must be one of"),
    ],
)
def test_settings_that_cannot_work_are_rejected_before_anything_is_played(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        collect(config(tmp_path / "samples", **changes))
    assert not (tmp_path / "samples").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SettingError, match="new or empty folder"):
            collect(config(out))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder that was never interrupted."""
    collect(config(tmp_path / "whole"))
    return tmp_path / "whole"


def test_a_run_that_was_interrupted_is_resumed_as_if_it_never_had_been(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    out.mkdir()
    (out / "config.json").write_bytes((whole / "config.json").read_bytes())
    episodes, samples = (read_jsonl(whole / name) for name in ("rewards.jsonl", "samples.jsonl"))
    good, bad = ([one["episode"] for one in episodes if one["kept"] is kept] for kept in (True, False))
    *ended, cut = good[4], bad[1], good[0], bad[0], good[2]  # as they ended; the last has no line yet
    rows = [row for number in (*ended, cut) for row in samples if row["episode"] == number]
    lines = "".join(to_jsonl(episodes[number]) for number in ended)
    (out / "rewards.jsonl").write_text(lines + f'{{"episode": {cut}, "rew')
    (out / "samples.jsonl").write_text("".join(map(to_jsonl, rows)) + '{"prompt": [{"ro')
    collect(config(out, resume=True))
    assert contents(out) == contents(whole)
    collect(config(out, resume=True))  # with nothing left to play
    assert contents(out) == contents(whole)


def test_a_finished_run_is_extended_as_if_it_had_been_longer_from_the_start(whole: Path, tmp_path: Path) -> None:
    collect(config(tmp_path / "samples", episodes=10))
    collect(config(tmp_path / "samples", episodes=24, resume=True))
    assert contents(tmp_path / "samples") == contents(whole)


def test_only_the_same_run_is_resumed(whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    for changes, message in (
        ({"episodes": 23}, "episodes was 24, is 23"),
        ({"min_reward": 0.25}, r"min_reward was 0\.5, is 0\.25"),
        ({"policy": "oracle"}, ".*policy was 'half', is 'oracle'"),
    ):
        with pytest.raises(SettingError, match=f"another configuration: {message}"):
            collect(config(whole, resume=True, **changes))
    with pytest.raises(SettingError, match="Nothing to resume"):
        collect(config(tmp_path / "nothing", resume=True))
    with pytest.raises(SettingError, match=r"new or empty folder.* or --resume"):
        collect(config(whole))
    assert contents(whole) == before


def test_no_rollout_is_in_memory_after_its_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: weakref.WeakSet[Rollout] = weakref.WeakSet()
    counts = []

    class Counted(Rollout):
        """A rollout that can be referred to weakly."""

        __hash__ = object.__hash__

        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            made.add(self)
            counts.append(len(made))

    monkeypatch.setattr(rollout, "Rollout", Counted)
    collect(config(tmp_path / "samples", in_flight=2))
    assert len(counts) == 24
    assert max(counts) <= 3


def test_what_a_policy_does_to_its_observation_is_in_no_sample(tmp_path: Path) -> None:
    for name in ("careful", "careless"):
        collect(config(tmp_path / name, policy=f"collect_policies:{name}", episodes=3, min_reward=0.0))
    assert "nothing" not in (tmp_path / "careless" / "samples.jsonl").read_text()
    assert lines(tmp_path / "careless") == lines(tmp_path / "careful")


@pytest.mark.parametrize("reward", ["nan", "inf"])
def test_a_reward_that_is_no_number_ends_the_run_and_is_never_a_sample(reward: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"must be a finite number, got {reward}"):
        collect(config(tmp_path / "samples", reward=f"collect_policies:{reward}", min_reward=0.0))
    assert (tmp_path / "samples" / "rewards.jsonl").read_text() == ""
    assert not (tmp_path / "samples" / "samples.parquet").exists()


def test_options_reach_the_environment_and_the_configuration(tmp_path: Path) -> None:
    out = tmp_path / "samples"
    collect(config(out, policy="oracle", episodes=2, durability="episode", set=("chunk_tokens=64",)))
    asked = json.loads((out / "config.json").read_text())
    assert (asked["settings"]["chunk_tokens"], asked["options"]["split"]) == (64, "train")
    assert (asked["layout"], asked["min_reward"], asked["drop_faults"]) == ("terse", 0.5, False)
    assert (out / "memory").is_dir()
