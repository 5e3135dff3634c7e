"""`eval.benchmarks.rollouts` in small: both ways do the same work, and in flight takes fewer steps."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from atommem_env.errors import SettingError
from eval.benchmarks import rollouts


def test_episodes_are_a_function_of_the_seed_and_mixed() -> None:
    episodes = rollouts.drawn_lengths(20, 3)
    assert episodes == rollouts.drawn_lengths(20, 3) != rollouts.drawn_lengths(20, 4)
    assert len({len(episode) for episode in episodes}) > 3
    replies = [reply for episode in episodes for _, reply in episode]
    assert 4 <= min(replies) < 8 < 64 < max(replies) <= 96
    written = rollouts.write_episodes(episodes, 5)
    assert written == rollouts.write_episodes(episodes, 5) != rollouts.write_episodes(episodes, 6)
    assert [[(len(turn.prompt.split()), turn.reply_tokens) for turn in episode] for episode in written] == [
        list(episode) for episode in episodes
    ]


def test_both_ways_do_the_same_work_and_in_flight_in_fewer_steps() -> None:
    model = rollouts.random_model("transformers", 4, layers=1, width=16)
    episodes = rollouts.write_episodes(rollouts.drawn_lengths(10, 0), 0)
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    model.model.register_forward_pre_hook(count)
    in_flight = asyncio.run(rollouts.play_in_flight(model, episodes, 4))
    in_flight_steps, steps = steps, 0
    lock_step = asyncio.run(rollouts.play_in_lock_step(model, episodes, 4))
    for one, other, episode in zip(in_flight, lock_step, episodes, strict=True):
        assert [reply.completion_ids for reply in one] == [reply.completion_ids for reply in other]
        assert [len(reply.completion_ids) for reply in one] == [turn.reply_tokens for turn in episode]
    assert steps > 1.25 * in_flight_steps


def test_the_figures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rollouts.random_model("transformers", 2, layers=1, width=16)
    monkeypatch.setattr(rollouts, "random_model", lambda engine, max_batch, window: model)
    rollouts.main(out=tmp_path / "new" / "rollouts.json", episodes=4, in_flight=2, repeats=1)
    figures = json.loads((tmp_path / "new" / "rollouts.json").read_text())
    assert figures["ratio"] == pytest.approx(figures["lock_step_s"] / figures["in_flight_s"])
    assert figures["reply_tokens"] > 0


def test_the_lengths_of_a_run_are_taken_turn_by_turn(tmp_path: Path) -> None:
    steps = [([30, 0, 7], [4, 0, 2]), ([5], [9]), ([0], [0])]  # the second turn of the first episode called no model
    records = [{"by_step": {"prompt_tokens": prompt, "completion_tokens": reply}} for prompt, reply in steps]
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert rollouts.recorded_lengths(tmp_path) == [((30, 4), (7, 2)), ((5, 9),)]
    with pytest.raises(SettingError, match="a model was called"):
        rollouts.recorded_lengths(tmp_path / "nothing")
