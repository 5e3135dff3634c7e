"""Prompt tokens that a prefix cache saves, by the order of the prompt: `python -m eval.benchmarks.prefix_cache [--out FILE]`;
needs vLLM.

The rollouts of a group read the same chunks with different memories. In the layout `shared_prefix` the chunk comes before
everything that differs, and a prefix cache computes it once for all of them; in the order of AtomMem's public code (question,
scratchpad, query, entries, chunk) each rollout computes its own. The same rollouts, of a policy that stores random facts, are
rendered in both orders, and sent to an engine turn by turn, all of a turn at once, as in training. The computed tokens are as
counted by vLLM: prompt tokens minus prefix cache hits. They do not depend on the weights, which are those of `tiny`, nor on
the machine; times are not reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import atommem_env  # noqa: F401  registers the environments
from agents.event_loop import run_blocking
from agents.models.chat_tokenizer import ChatTokenizer
from agents.models.find import find_model
from agents.registry import load_policy
from agents.rollout import Driver, EpisodeSpec
from atommem_env.prompts import Layout, shared_prefix
from atommem_env.types import EpisodeSettings, Message, Observation, Rollout
from eval.benchmarks import write_figures


@dataclass(frozen=True, slots=True)
class Result:
    """Prompt tokens of one group, from its first turn to its last."""

    layout: str
    group_size: int
    turns: int  # of all rollouts
    chunk_tokens: int
    prompt_tokens: int
    computed_tokens: int  # not in the prefix cache


def public_order(observation: Observation, settings: EpisodeSettings) -> list[Message]:
    """The messages of `shared_prefix`, with the chunk at the end, as in AtomMem's public code."""
    system, user = shared_prefix.messages(observation, settings)
    parts = ("\n\n" + user["content"]).split("\n\n## ")[1:]
    parts.sort(key=lambda part: part.startswith("Document, next piece"))  # stable
    return [system, Message(role="user", content="\n\n".join(f"## {part}" for part in parts))]


def play_group(group_size: int, chunk_tokens: int, documents: int, seed: int) -> tuple[list[Rollout], EpisodeSettings]:
    """Rollouts of one task, by a policy that stores random facts."""
    env: Any = gym.make("AtomMem-Synthetic", num_docs=documents, chunk_tokens=chunk_tokens)
    driver = Driver.of(env)
    specs = [EpisodeSpec(0, seed, int(each)) for each in np.random.default_rng(seed).integers(2**31, size=group_size)]
    policy = load_policy("random-70", driver.settings)
    return run_blocking(driver.run(specs, policy, in_flight=group_size)), driver.settings


def count_tokens(engine: Any, prompts_by_turn: Sequence[Sequence[list[int]]]) -> tuple[int, int]:
    """(prompt tokens sent, those that the engine computed), starting with an empty cache."""
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    before = _counters(engine)
    for prompts in prompts_by_turn:
        engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], SamplingParams(max_tokens=1), use_tqdm=False
        )
    queries, hits = (after - first for after, first in zip(_counters(engine), before, strict=True))
    return queries, queries - hits


def _counters(engine: Any) -> tuple[int, int]:
    values = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    return values["vllm:prefix_cache_queries"], values["vllm:prefix_cache_hits"]


def measure(group_size: int, chunk_tokens: int, documents: int, seed: int) -> tuple[Result, Result]:
    """The two layouts' figures, `shared_prefix` first, on the same rollouts."""
    from vllm import LLM

    model = find_model("tiny")
    chat = ChatTokenizer(model)
    rollouts, settings = play_group(group_size, chunk_tokens, documents, seed)
    layouts: dict[str, Layout] = {"shared_prefix": shared_prefix.messages, "public order": public_order}
    prompts = {
        name: [
            [
                chat.prompt_ids(layout(rollout.turns[turn].observation, settings))
                for rollout in rollouts
                if turn < len(rollout.turns)
            ]
            for turn in range(max(len(rollout.turns) for rollout in rollouts))
        ]
        for name, layout in layouts.items()
    }
    longest = max(len(prompt) for sent in prompts.values() for turn in sent for prompt in turn)
    engine = LLM(
        str(model),
        hf_overrides={"max_position_embeddings": longest + 16},
        max_model_len=longest + 16,
        enable_prefix_caching=True,
        enforce_eager=True,
        disable_log_stats=False,
    )
    results = []
    for name, sent in prompts.items():
        tokens, computed = count_tokens(engine, sent)
        results.append(Result(name, group_size, sum(map(len, sent)), chunk_tokens, tokens, computed))
    return results[0], results[1]


def main(
    out: Path | None = None, group_size: int = 16, chunk_tokens: int = 4096, documents: int = 800, seed: int = 0
) -> None:
    """Count the prompt tokens to compute in spite of a prefix cache, by the order of the prompt.

    Args:
        out: JSON file for the figures.
        group_size: rollouts of the task.
        chunk_tokens: most tokens of a chunk, by the environment's own tokenizer; a model's count differs a little.
        documents: of the task; 800 are about 16,000 tokens.
        seed: of the task and of the rollouts.
    """
    shared, public = measure(group_size, chunk_tokens, documents, seed)
    table = Table(title=f"A group of {group_size}: {shared.turns} turns, chunks of {chunk_tokens:,} tokens")
    for column in ("layout", "prompt tokens", "computed", "share"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for one in (shared, public):
        share = f"{one.computed_tokens / one.prompt_tokens:.1%}"
        table.add_row(one.layout, f"{one.prompt_tokens:,}", f"{one.computed_tokens:,}", share)
    Console().print(table, f"{public.computed_tokens / shared.computed_tokens:.1f} times fewer in shared_prefix.")
    ratio = public.computed_tokens / shared.computed_tokens
    write_figures(out, {"results": [asdict(shared), asdict(public)], "ratio": ratio})


if __name__ == "__main__":
    tyro.cli(main)
