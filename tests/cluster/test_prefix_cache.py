"""`eval.benchmarks.prefix_cache` in small, with a real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from atommem_env.prompts import shared_prefix
from eval.benchmarks.prefix_cache import play_group, public_order


def test_both_orders_show_the_same() -> None:
    rollouts, settings = play_group(2, 256, 50, 0)
    for turn in rollouts[0].turns:
        here = shared_prefix.messages(turn.observation, settings)
        there = public_order(turn.observation, settings)
        parts = [sorted(f"\n\n{said[1]['content']}".split("\n\n## ")) for said in (here, there)]
        assert parts[0] == parts[1]
        if turn.observation["chunk"]:
            assert there[1]["content"].endswith(turn.observation["chunk"])


def test_a_group_computes_fewer_tokens_where_the_chunk_comes_first(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    words = ["--group-size", "8", "--chunk-tokens", "512", "--documents", "100", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "eval.benchmarks.prefix_cache", *words], check=True, timeout=300)
    figures = json.loads(out.read_text())
    shared, public = figures["results"]
    assert shared["turns"] == public["turns"] > 16
    assert abs(shared["prompt_tokens"] - public["prompt_tokens"]) < 0.01 * public["prompt_tokens"]
    assert shared["computed_tokens"] < public["computed_tokens"] < public["prompt_tokens"]
    assert figures["ratio"] > 1.3
