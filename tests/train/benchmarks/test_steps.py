"""`train.benchmarks.steps` in small: every part is found, shares add up, and TRL does the same work."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("trl")

import torch

from agents.models.transformers_model import TransformersModel
from train.benchmarks import steps


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with the tokenizer of the synthetic world, too small for anything."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from train.tiny_base import build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_moment_belongs_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0, 0.0]
    monkeypatch.setattr(steps, "_now", lambda: tuple(now))

    def work(wall: float, cpu: float) -> None:
        now[0] += wall
        now[1] += cpu

    def fail() -> None:
        clock.timed(work, lambda: "inner")(8, 2)
        work(16, 8)
        raise ZeroDivisionError

    clock = steps.Clock()
    work(1, 1)
    with clock.part("outer"):
        work(2, 1)
        with pytest.raises(ZeroDivisionError):
            clock.timed(fail, "failing")()
        work(4, 3)
    assert clock.take() == {steps.OTHER: (1, 1), "outer": (6, 4), "inner": (8, 2), "failing": (16, 8)}
    work(32, 0)
    assert clock.take() == {steps.OTHER: (32, 0)}


def test_every_part_of_a_step_is_found_and_shares_add_up(model: Path) -> None:
    shares = steps.measure_shares(model, steps=2, groups=2, group_size=2, num_docs=4, max_new_tokens=4)
    assert sum(shares.wall.values()) == pytest.approx(1) == sum(shares.cpu.values())
    assert shares.outside_wall == pytest.approx(
        sum(share for part, share in shares.wall.items() if part not in steps.MODEL_PARTS)
    )
    assert 0 < shares.outside_wall < 1
    expected = {"rows of the batch", "drawing tasks", "episode: observe", "episode: carry out", "chat to ids"}
    assert {*steps.MODEL_PARTS, *expected, steps.OTHER} <= {part for part, share in shares.wall.items() if share > 0}
    assert shares.wall["update: backward"] > 0  # so rewards were given: untrained, none would be earned
    assert len(shares.outside_by_step) == 2
    assert min(shares.outside_by_step)[0] <= shares.outside_wall <= max(shares.outside_by_step)[0]


def test_what_was_measured_is_left_as_it_was(model: Path) -> None:
    before = steps.Batch._sample, torch.Tensor.backward, steps.Episode.observe
    steps.measure_shares(model, steps=1, groups=1, group_size=2, num_docs=3, max_new_tokens=1)
    assert (steps.Batch._sample, torch.Tensor.backward, steps.Episode.observe) == before


def test_trl_does_the_same_work_and_both_are_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = functools.partial(steps.measure_against_trl, groups=2, group_size=2, prompt_words=10, reply_tokens=3)
    monkeypatch.setattr(steps, "measure_against_trl", small)
    steps.main(out=tmp_path / "new" / "steps.json", model=model, parts=("trl",), steps=1)
    [result] = json.loads((tmp_path / "new" / "steps.json").read_text()).values()
    assert (result["rollouts"], result["prompt_tokens"], result["reply_tokens"]) == (4, 12, 3)
    for part in ("generation", "update", "step"):
        ours, trl = result["seconds"][f"ours {part}"], result["seconds"][f"trl {part}"]
        assert result["ratio_wall"][part] == pytest.approx(trl / ours)
        assert result["tokens_per_second"][f"ours {part}"] == pytest.approx(4 * 15 / ours)
    assert "TRL" in capsys.readouterr().out


def test_the_end_of_a_reply_is_a_token_that_the_model_lacks(model: Path, tmp_path: Path) -> None:
    endless = TransformersModel(steps._never_ending(model, tmp_path / "endless"))
    prompts, seeds = [[7, 8, 9]] * 64, range(64)
    for one, ends in ((TransformersModel(model), True), (endless, False)):
        replies = one.generate(prompts, max_new_tokens=50, temperature=1.0, seeds=seeds)
        assert any(reply.stop == "stop" for reply in replies) is ends
