"""Episodes in flight against lock-step: `python -m eval.benchmarks.rollouts [--lengths RUN] [--engine vllm] [--out FILE]`.

Episodes have different numbers of turns, and turns replies of different lengths. **In flight**: a fixed number of episodes
is active at any moment, each continues as soon as its own reply ends, and the next one starts when one is over.
**Lock-step**, the usual loop: the same number of episodes start together and make each turn together, which takes as long as
its longest reply; the next ones start when the last of them is over. Both sample from the same model on the same engine, with
continuous batching (so in lock-step, too, a finished reply leaves the batch at once), and no token ends a reply: its length is
known in advance, and both do exactly the same work. They are measured alternately, in one process.

Lengths are drawn (under a minute on two cores), or taken from each turn of a run of `atommem eval`. The gain is the time that
batches wait for long replies in lock-step; the prefill of prompts costs both the same. So a run with long prompts gains less
where prefill is slow compared with decoding, as on a CPU.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from agents.chat_policy import ChatModel
from agents.models.transformers_model import TransformersModel
from agents.models.vllm_model import VLLMModel
from atommem_env.errors import SettingError
from atommem_env.types import Reply
from eval.benchmarks import write_figures
from eval.run_folder import read_jsonl

_WORDS = [f"w{index}" for index in range(250)]
_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of the model."""

    prompt: str
    reply_tokens: int
    seed: int


Engine = Literal["transformers", "vllm"]
Episode = tuple[Turn, ...]
Lengths = tuple[tuple[int, int], ...]  # of an episode: tokens of each turn's prompt and reply
Play = Callable[[ChatModel, Sequence[Episode], int], Coroutine[Any, Any, list[list[Reply]]]]


@dataclass(frozen=True, slots=True)
class Result:
    """The measurements; seconds and ratios are medians over the repetitions."""

    engine: Engine
    episodes: int
    in_flight: int
    turns: int
    prompt_tokens: int
    reply_tokens: int
    lock_step_s: float
    in_flight_s: float
    ratio: float  # of the two times of one repetition: above 1, in flight is faster
    ratios: tuple[float, ...]  # one a repetition
    threads: int


def drawn_lengths(count: int, seed: int) -> list[Lengths]:
    """Episodes of 2 to 8 turns; prompts of 40 to 120 tokens; replies of 4 to 96, half of them shorter than 20."""
    rng = np.random.default_rng(seed)

    def turn() -> tuple[int, int]:
        return int(rng.integers(40, 121)), round(float(np.exp(rng.uniform(np.log(4), np.log(96)))))

    return [tuple(turn() for _ in range(rng.integers(2, 9))) for _ in range(count)]


def recorded_lengths(run: Path) -> list[Lengths]:
    """The lengths of the turns in which a run's model was called.

    Raises:
        SettingError: no model was called in that run.
    """
    episodes = []
    for record in read_jsonl(run / "episodes.jsonl"):
        turns = zip(record["by_step"]["prompt_tokens"], record["by_step"]["completion_tokens"], strict=True)
        episodes.append(tuple((prompt, reply) for prompt, reply in turns if prompt and reply))
    if not any(episodes):
        raise SettingError(f"--lengths must be a run folder of `atommem eval` in which a model was called, got {run}.")
    return [episode for episode in episodes if episode]


def write_episodes(lengths: Sequence[Lengths], seed: int) -> list[Episode]:
    """Episodes of these lengths; random words, so that no two prompts share a prefix."""
    rng = np.random.default_rng(seed)
    return [
        tuple(
            Turn(" ".join(rng.choice(_WORDS, size=prompt)), reply, int(rng.integers(2**31)))
            for prompt, reply in episode
        )
        for episode in lengths
    ]


def random_model(
    engine: Engine, max_batch: int, layers: int = 4, width: int = 128, window: int = 512
) -> TransformersModel | VLLMModel:
    """A Llama with random weights and a word-level tokenizer, without an end-of-sequence token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token=_WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=window,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words, chat_template=_TEMPLATE).save_pretrained(folder)
        LlamaForCausalLM(config).save_pretrained(folder)
        return VLLMModel(folder) if engine == "vllm" else TransformersModel(Path(folder), max_batch=max_batch)


async def play_in_flight(model: ChatModel, episodes: Sequence[Episode], in_flight: int) -> list[list[Reply]]:
    """The replies of each episode."""
    gate = asyncio.Semaphore(in_flight)

    async def play(episode: Episode) -> list[Reply]:
        async with gate:
            return [await _reply(model, turn) for turn in episode]

    return list(await asyncio.gather(*map(play, episodes)))


async def play_in_lock_step(model: ChatModel, episodes: Sequence[Episode], in_flight: int) -> list[list[Reply]]:
    """The replies of each episode."""
    replies: list[list[Reply]] = [[] for _ in episodes]
    for start in range(0, len(episodes), in_flight):
        together = range(start, min(start + in_flight, len(episodes)))
        for turn in range(max(len(episodes[index]) for index in together)):
            acting = [index for index in together if turn < len(episodes[index])]
            sampled = await asyncio.gather(*(_reply(model, episodes[index][turn]) for index in acting))
            for index, reply in zip(acting, sampled, strict=True):
                replies[index].append(reply)
    return replies


async def _reply(model: ChatModel, turn: Turn) -> Reply:
    return await model.complete(
        [{"role": "user", "content": turn.prompt}],
        max_new_tokens=turn.reply_tokens,
        temperature=1.0,
        thinking=False,
        seed=turn.seed,
    )


def measure(engine: Engine, lengths: Sequence[Lengths], in_flight: int, repeats: int, seed: int) -> Result:
    """Times both alternately, starting with another one in each repetition; words are new each time."""
    longest = max(prompt + reply for episode in lengths for prompt, reply in episode)
    model = random_model(engine, in_flight, window=max(512, longest))
    seconds: dict[Play, list[float]] = {play_in_lock_step: [], play_in_flight: []}
    words = np.random.default_rng(seed)
    asyncio.run(play_in_flight(model, write_episodes(lengths[:in_flight], seed), in_flight))  # warms up
    work = set()
    for repeat in range(repeats):
        for play in list(seconds)[:: -1 if repeat % 2 else 1]:
            episodes = write_episodes(lengths, int(words.integers(2**31)))
            start = time.perf_counter()
            played = asyncio.run(play(model, episodes, in_flight))
            seconds[play].append(time.perf_counter() - start)
            replies = [reply for episode in played for reply in episode]
            prompt_tokens = sum(len(reply.prompt_ids) for reply in replies)
            reply_tokens = sum(len(reply.completion_ids) for reply in replies)
            work.add((prompt_tokens, reply_tokens))
    assert len(work) == 1, f"both must do the same work, they did {work} tokens"
    ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
    return Result(
        engine=engine,
        episodes=len(lengths),
        in_flight=in_flight,
        turns=sum(map(len, lengths)),
        prompt_tokens=prompt_tokens,
        reply_tokens=reply_tokens,
        lock_step_s=statistics.median(seconds[play_in_lock_step]),
        in_flight_s=statistics.median(seconds[play_in_flight]),
        ratio=statistics.median(ratios),
        ratios=tuple(ratios),
        threads=torch.get_num_threads(),
    )


def main(
    *,
    out: Path | None = None,
    lengths: Path | None = None,
    engine: Engine = "transformers",
    episodes: int = 64,
    in_flight: int = 16,
    repeats: int = 3,
    seed: int = 0,
) -> None:
    """Compare episodes in flight with lock-step and print a table.

    Args:
        out: JSON file for the numbers.
        lengths: run folder to take the lengths from.
        engine: that both sample with.
        episodes: to draw if no run is given.
        in_flight: episodes active at a time.
        repeats: timed repetitions of each; medians are reported.
        seed: of the episodes.
    """
    played = recorded_lengths(lengths) if lengths else drawn_lengths(episodes, seed)
    result = measure(engine, played, in_flight, repeats, seed)
    table = Table(
        title=f"{result.episodes} episodes, {in_flight} at a time: {result.prompt_tokens:,} tokens in {result.turns:,} prompts, "
        f"{result.reply_tokens:,} in replies, by {engine}"
    )
    for column in ("", "seconds", "new tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in (("lock-step", result.lock_step_s), ("in flight", result.in_flight_s)):
        table.add_row(name, f"{seconds:.2f}", f"{result.reply_tokens / seconds:,.0f}")
    table.add_row("ratio", f"{result.ratio:.2f}x", "")
    Console().print(table)
    write_figures(out, asdict(result))


if __name__ == "__main__":
    tyro.cli(main)
