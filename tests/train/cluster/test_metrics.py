"""What a cluster run logs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eval.run_folder import read_jsonl, to_jsonl, write_atomic
from train.cluster.metrics import MetricsLogger


def test_metrics_are_those_of_one_machine_and_are_truncated_when_a_run_resumes(tmp_path: Path) -> None:
    handed_on: list[Any] = []
    board = SimpleNamespace(
        log_train=lambda *given: handed_on.append(given), log_eval=lambda *given: handed_on.append(given)
    )
    logger = MetricsLogger(tmp_path / "metrics.jsonl", board)
    write_atomic(tmp_path / "metrics.jsonl", to_jsonl({"step": 1}) + to_jsonl({"step": 2}))
    logger.truncate(1)
    logger.positions = [4, 5]
    logger.log_train(
        2, {"vllm_kl": 0.5, "rollout/turns": 3.0, "rollout/operations/create": 0.25, "generated_samples": ["", 1]}
    )
    logger.log_eval(2, {"eval_held_out_pass1": 0.5, "eval_num_samples": 100.0})
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert lines == [
        {"step": 1},
        {"step": 2, "positions": [4, 5], "sampler_kl": 0.5, "turns": 3.0, "operations": {"create": 0.25}},
        {"step": 2, "eval_em": 0.5, "eval_em_ci95": [0.402, 0.598], "eval_episodes": 100},
    ]
    assert len(handed_on) == 2
