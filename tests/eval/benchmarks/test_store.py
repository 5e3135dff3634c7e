"""`eval.benchmarks.store` in small: all memories do the same work, and the durable ones store it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lancedb")

from eval.benchmarks import store


def test_episodes_are_a_function_of_the_seed_and_have_the_mix() -> None:
    played = store.draw(30, 10, 8, 3)
    again = store.draw(30, 10, 8, 3)
    assert [[step.texts for step in episode] for episode in played] == [
        [step.texts for step in episode] for episode in again
    ]
    steps = [step for episode in played for step in episode]
    assert {len(step.vectors) for step in steps} == {5}
    assert 0.2 < np.mean([step.deleted is not None for step in steps]) < 0.4
    assert np.allclose([np.linalg.norm(step.vectors, axis=1) for step in steps], 1, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LangChain's community package is no longer maintained
@pytest.mark.parametrize("peer", ["faiss", "lancedb", "memory"])
def test_all_find_the_nearest_entries_of_their_episode(tmp_path: Path, peer: str) -> None:
    if peer == "faiss":
        pytest.importorskip("faiss")
        pytest.importorskip("langchain_community")
    played = store.draw(3, 8, 8, 0)
    memory = store.makers(8, 3)[peer](tmp_path)
    memory.fill([store.state_after(episode, 4) for episode in played], 4)
    for number in range(4, 8):
        for index, episode in enumerate(played):
            entries = store.state_after(episode, number + 1).values()
            query = episode[number].vectors[4]
            nearest = sorted(entries, key=lambda pair: -float(pair[1] @ query))[: store.TOP_K]
            assert memory.do(index, episode[number]) == [text for text, _ in nearest]
        memory.acknowledge(False)
    memory.close()


def test_the_figures_are_written_and_what_was_kept_is_checked(tmp_path: Path) -> None:
    played = store.draw(2, 6, 8, 0)
    results = {result.memory: result for result in store.whole(played, 2, tmp_path)}
    assert results.keys() == {"memory", "episode", "step"}
    assert all(result.steps == 12 and len(result.all_seconds) == 2 for result in results.values())
    memory = store.makers(8, 2)["episode"](tmp_path / "short")
    memory.acknowledge(True)
    memory.close()
    with pytest.raises(AssertionError, match="steps are missing"):
        store.check(tmp_path / "short", played)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_program(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("langchain_community")
    store.main(out=tmp_path / "new" / "f.json", episodes=(2,), steps=4, dimension=8, slow_steps=2, repeats=1)
    figures = json.loads((tmp_path / "new" / "f.json").read_text())
    assert [row["memory"] for row in figures["middle"]] == ["faiss", "lancedb", "memory"]
    assert figures["dtype"] == "float32"
