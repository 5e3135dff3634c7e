"""The benchmark of updates compares forms that compute the same gradient, and reports all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from train.benchmarks import updates

SMALL = updates.Shape(name="small", groups=2, rollouts=3, turns=2, shared=20, own=(3, 6), reply=(2, 4), max_tokens=80)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_all_forms_compute_the_same_gradient_and_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(updates, "SHAPES", (SMALL,))
    updates.main(rounds=1, shapes=("small",), out=tmp_path / "updates.json")
    [result] = json.loads((tmp_path / "updates.json").read_text())["shapes"]
    assert result["seconds"].keys() == {"padded", "sorted", "packed", "shared"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["ratio"]["padded"] == 1
    assert max(result["gradient_difference"].values()) <= 1e-4
    assert result["samples"] == 2 * 3 * 2
    assert result["shared_tokens_computed"] < 0.7 * result["sample_tokens"]
    assert "shared" in capsys.readouterr().out


def test_samples_of_a_shape_share_what_it_says() -> None:
    samples = updates.draw_samples(SMALL, 500)
    first, second = (next(sample for sample in samples if sample.key == (1, rollout, 1)) for rollout in (0, 1))
    assert first.token_ids[:20] == second.token_ids[:20] != samples[0].token_ids[:20]
    for sample in samples:
        [(start, end)] = sample.trained
        assert 23 <= start <= 26
        assert 2 <= end - start <= 4
        assert end == len(sample.token_ids)
