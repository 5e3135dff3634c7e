"""The real launcher with the real stack: Ray, vLLM, DeepSpeed ZeRO 3 on two ranks, LanceDB, OpenRLHF unmodified."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from atommem_env.store.memory_store import MemoryStore

Finish = Callable[..., tuple[Path, list[dict[str, Any]]]]


def test_a_run_as_a_user_starts_it(finish: Finish, tiny: Path) -> None:
    out, lines = finish()
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert sorted(position for line in steps for position in line["positions"]) == list(range(8))
    for line in steps:
        assert line["groups_failed"] == 0
        assert line["groups_active"] + line["groups_zero_variance"] == 4
        if not line["groups_active"]:
            continue
        # bfloat16 on both sides; garbage weights in the engine would give 1 and more
        assert math.isfinite(line["sampler_kl"])
        assert abs(line["sampler_kl"]) < 0.05
        assert 0 < line["grad_norm"] < 100
        assert line["samples"] > 4  # turns, not rollouts; that each was trained on once is checked in the run
    assert [line["step"] for line in lines if "eval_em" in line] == [0, 2]
    before, after = load_file(tiny / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    last = load_file(out / "last" / "model.safetensors")
    assert before.keys() == last.keys() == after.keys()
    assert any((before[name] != last[name]).any() for name in before)
    store = MemoryStore(out / "memory")
    assert (
        len(store.episodes()) == 2 * 16 + 2 * 8
    )  # the rollouts of both steps, and the held-out episodes of two evaluations
    store.close()
    assert (out / "curve.png").stat().st_size > 10_000
    said = subprocess.run(
        [sys.executable, "-c", _GENERATE, str(out / "model")], capture_output=True, text=True, timeout=300, check=False
    )
    assert "tokens: 8" in said.stdout, said.stderr[-3000:]


# In a process of its own: vLLM takes a process over.
_GENERATE = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(sys.argv[1], enforce_eager=True, max_model_len=256)
    reply, = model.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=8, ignore_eos=True))
    print("tokens:", len(reply.outputs[0].token_ids))
"""
