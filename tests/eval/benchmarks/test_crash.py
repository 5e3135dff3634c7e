"""`eval.benchmarks.crash` with two deaths of each kind, and a check that it notices losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("lancedb")

from atommem_env.store.memory_store import MemoryStore
from eval.benchmarks import crash


@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGKILL"), reason="this system has no kill -9")
@pytest.mark.parametrize("durability", ["episode", "step"])
def test_two_deaths_lose_nothing(durability: str) -> None:
    result = crash.measure(durability, 2, 1, Console(quiet=True), longest=1.0)
    assert (result.unreadable, result.lost, result.inconsistent, result.not_resumed, result.too_many_files) == (0,) * 5


def test_what_is_missing_is_noticed(tmp_path: Path) -> None:
    acknowledged = crash.write_and_kill(tmp_path, "step", 3, 2.0)
    assert acknowledged
    assert not [line for line in crash.inspect(tmp_path, acknowledged, 0) if line != "resumed"]
    more = {episode: (steps + 99, over) for episode, (steps, over) in acknowledged.items()}
    lost = [line for line in crash.inspect(tmp_path, more | {"never": (1, False)}, 0) if line.startswith("lost")]
    assert len(lost) == len(more) + 1
    store = MemoryStore(tmp_path)
    nonempty = [record for record in store.episodes() if len(store.memory_at(record.episode_id, record.steps))]
    episode = nonempty[-1]
    store._tables.get("journal").delete(f"episode_id = '{episode.episode_id}' AND operation = 'create'")
    (line,) = crash.inspect(tmp_path, {}, 0)
    assert line.startswith("unreadable: ")
    assert f"of episode {episode.episode_id} the table 'journal' has" in line
