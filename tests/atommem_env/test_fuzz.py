"""Whatever a policy writes is legal. The long form is a program:

python tests/atommem_env/test_fuzz.py --replies 100000 --dialect tool_calls
"""

from __future__ import annotations

import argparse
import re
import time

import numpy as np
import pytest

from atommem_env.dialects import get_dialect
from atommem_env.embedders import embed, get_embedder
from atommem_env.episode import Episode
from atommem_env.tasks import make_source
from atommem_env.types import EpisodeSettings, Operation, OperationKind

DIALECTS = {"tags": "m{}", "public_code": "{}", "tool_calls": "m{}"}  # how each names an entry
_KINDS = list(OperationKind)
_PIECES = [
    *(
        f"<{slash}{name}>"
        for name in ("create_memory", "read_memory", "update_memory", "delete_memory", "add_memory", "modify_memory")
        for slash in ("", "/")
    ),
    *(
        "<update_scratchpad>",
        "</update_scratchpad>",
        "<final_answer>",
        "</final_answer>",
        "\\boxed{",
        "}",
        "{",
        ":",
        "m1: ",
    ),
    *(
        "<tool_call>",
        "</tool_call>",
        '{"name": "create_memory", "arguments": {"text": "a"}}',
        '{"name": "delete_memory", "arguments": {"id": "m1"}}',
        '{"name": "',
        '"arguments": ',
        '"tool_calls": ',
        "[",
        "]",
        '"',
        "\\",
        "\\u0000",
        "\\ud800",
        "null",
        "1e999",
    ),
    *(
        "<create_memory",
        "create_memory>",
        "< create_memory >",
        "<CREATE_MEMORY>",
        "</",
        "<>",
        "&lt;",
        "\n",
        " ",
        "\t",
        "\r\n",
    ),
    *(
        "\x00",
        "\ud800",
        "\udfff",
        "\ufeff",
        "\u202e",
        "\U0001f600",
        "é",
        "e\u0301",
        "漢字",
        "\x1b[31m",
        "%s",
        "{0}",
        "NaN",
        "-1",
    ),
    *(
        "Memory 0",
        "Memory 1",
        "m0",
        "m1",
        "m2",
        "m999999999999999999999",
        "m-1",
        "m1.0",
        "M1",
        "id",
        "null",
        "drop table",
    ),
]


def random_reply(rng: np.random.Generator, name: str) -> str:
    """A mixture of well-formed operations, torn ones and rubbish, now and then long."""
    dialect = get_dialect(name)
    pieces = []
    for _ in range(int(rng.geometric(0.15))):
        form = rng.integers(4)
        if form == 0:
            text = " ".join(rng.choice(_PIECES, size=rng.integers(0, 4)).tolist())
            pieces.append(
                dialect.write(Operation(_KINDS[rng.integers(6)], text, DIALECTS[name].format(rng.integers(30))))
            )
        elif form == 1:
            pieces.append(str(rng.choice(_PIECES)))
        elif form == 2:
            pieces.append("".join(map(chr, rng.integers(1, 0xD800, size=rng.integers(0, 20)).tolist())))
        else:
            pieces.append(
                dialect.write(Operation(_KINDS[rng.integers(6)], "plain text", DIALECTS[name].format(rng.integers(9))))
            )
    reply = "".join(pieces)
    return reply * int(rng.integers(100, 1000)) if rng.random() < 0.002 else reply


def named_entries(reply: str, alive: dict[str, str], retrieved: str, dialect: str) -> set[str]:
    """The entries that the reply can mean: only these may change."""
    if dialect != "public_code":
        return {entry_id for entry_id in alive if entry_id in reply}
    entries = {
        int(index): text.replace("\n    Memory", "\nMemory")
        for index, text in re.findall(
            r"^Memory ([0-9]+): (.*?)(?=\nMemory [0-9]+: |\Z)", retrieved, re.DOTALL | re.MULTILINE
        )
    }
    texts = [entries[int(index)] for index in re.findall(r"Memory\s+([0-9]{1,9})", reply) if int(index) in entries]
    return {entry_id for entry_id, text in alive.items() if any(text.startswith(each) for each in texts)}


def fuzz(replies: int, seed: int, dialect: str) -> dict[str, int]:
    """Plays random replies in a dialect, and checks after each what may have changed. Returns counts.

    Raises:
        AssertionError: an entry changed that was not named, or an observation is not text.
    """
    rng = np.random.default_rng(seed)
    source = make_source("synthetic", num_docs=12, questions=2)
    embedder = get_embedder("hashing")
    counts = {"replies": 0, "episodes": 0, "operations": 0, "faults": 0}
    while counts["replies"] < replies:
        settings = EpisodeSettings(
            dialect=dialect,
            advance=["always", "on_write"][rng.integers(2)],
            chunk_tokens=40,
            capacity=[None, 3, 40][rng.integers(3)],
            read_latency=int(rng.integers(2)),
            retrieval=["top_k", "random"][rng.integers(2)],
            memory_tokens=[4096, 10][rng.integers(2)],
            scratchpad_tokens=[2048, 5][rng.integers(2)],
        )
        task_seed = int(rng.integers(1000))
        episode = Episode(source.task(int(rng.integers(len(source))), task_seed), settings, seed=task_seed)
        counts["episodes"] += 1
        while episode.stop_reason is None and counts["replies"] < replies:
            reply = random_reply(rng, dialect)
            retrieved = episode.observe()["retrieved"]
            before = {entry.id: entry.text for entry in episode.memory.entries()}
            step = episode.steps
            result = episode.resolve(embed(embedder, episode.submit(reply)))
            after = {entry.id: entry.text for entry in episode.memory.entries()}
            for entry_id in set(before) - named_entries(reply, before, retrieved, dialect):
                assert after.get(entry_id) == before[entry_id], (reply, entry_id)
            assert episode.steps == step + 1
            assert settings.capacity is None or len(after) <= settings.capacity
            for value in result.observation.values():
                assert isinstance(value, int) or value.encode("utf-8") is not None
            assert 0.0 <= result.reward <= 1.0
            counts["replies"] += 1
            counts["operations"] += sum(item.fault is None for item in result.results)
            counts["faults"] += sum(item.fault is not None for item in result.results)
    return counts


@pytest.mark.parametrize("dialect", DIALECTS)
def test_random_replies_raise_nothing_and_change_nothing_that_was_not_named(dialect: str) -> None:
    counts = fuzz(1500, seed=0, dialect=dialect)
    assert counts["operations"] > 1000  # the fuzzer reaches what it is to test
    assert counts["faults"] > 1000


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_reply_of_ten_megabytes_is_carried_out(dialect: str) -> None:
    task = make_source("synthetic", num_docs=12).task(0, 0)
    embedder = get_embedder("hashing")
    write = get_dialect(dialect).write

    def seconds(megabytes: int) -> float:
        episode = Episode(task, EpisodeSettings(dialect=dialect, chunk_tokens=40), seed=0)
        text = ("lorem ipsum " * (megabytes * 2**20 // 12)).strip()
        reply = write(Operation(OperationKind.CREATE, text)) + write(Operation(OperationKind.READ, "x"))
        start = time.process_time()
        result = episode.resolve(embed(embedder, episode.submit(reply)))
        assert result.results[0].entry_id == "m1"
        assert "first 4096 tokens" in result.observation["notice"]
        return time.process_time() - start

    assert seconds(10) < 40 * max(seconds(1), 0.02)  # linear would be 10 times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Plays random replies and checks that nothing breaks.")
    parser.add_argument("--replies", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dialect", choices=list(DIALECTS), default="tags")
    arguments = parser.parse_args()
    started = time.perf_counter()
    print(fuzz(arguments.replies, arguments.seed, arguments.dialect), f"{time.perf_counter() - started:.0f} s")
