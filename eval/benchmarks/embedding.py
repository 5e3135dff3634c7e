"""Embedding the texts of many episodes in one batch per step: `python -m eval.benchmarks.embedding [--out FILE]`, about a minute.

In a step each of 64 episodes needs the vectors of three entries and a query. **One batch**: all of them at once, as the driver
and the vector environment request them. **A call per episode**: one after the other, as 64 single environments do. **A call per
text**: as code does that embeds in each operation. All three give each text the same vector, bit for bit, which is checked.
**The library** is `SentenceTransformer.encode` on all texts at once, padded to the longest of 32: the cost of a batch if a
text's vector may depend on the others.

Texts are sentences, passages and questions of AtomMem-Synthetic, each one new. All ways are measured alternately, in one
process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from atommem_env.embedders import embed
from atommem_env.embedders.minilm import MiniLMEmbedder
from atommem_env.embedders.sentence_transformers import SentenceTransformerEmbedder
from atommem_env.tasks.synthetic import SyntheticSource
from atommem_env.types import EmbeddingRequest
from eval.benchmarks import write_figures

Step = list[list[EmbeddingRequest]]  # of each episode
Way = Callable[[SentenceTransformerEmbedder, Step], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Result:
    """The measurements; seconds and ratios are medians over the repetitions."""

    model: str
    dtype: str
    device: str
    threads: int
    episodes: int
    texts: int  # of a repetition
    tokens: tuple[int, ...]  # of a text, special tokens included: the least, the quartiles, the most
    batch_s: float
    episode_s: float
    text_s: float
    library_s: float
    over_episode: float  # time of a call per episode divided by that of one batch: above 1, one batch is faster
    over_text: float  # the same for a call per text
    over_library: float
    ratios: tuple[tuple[float, float, float], ...]  # of each repetition, in this order
    library_error: float  # largest difference between a number of the library's vectors and of the embedder's


def draw_steps(steps: int, episodes: int, seed: int) -> list[Step]:
    """The requests of each episode in each step, no text twice."""
    rng = np.random.default_rng(seed)
    source = SyntheticSource(split="train")
    seen: set[str] = set()

    def requests(index: int) -> list[EmbeddingRequest]:
        task = source.task(index, seed)
        passages = [f"{document.title}: {document.text}" for document in task.documents]
        sentences = [f"{each.title}: {part}." for each in task.documents for part in each.text.rstrip(".").split(". ")]
        written = [str(rng.choice(sentences if rng.random() < 0.5 else passages)) for _ in range(9)]
        entries = [text for text in dict.fromkeys(written) if text not in seen][:3]
        query = next(q.text for q in task.questions)
        seen.update(entries, [query])
        return [*(EmbeddingRequest(text, "document") for text in entries), EmbeddingRequest(query, "query")]

    return [[requests(step * episodes + episode) for episode in range(episodes)] for step in range(steps)]


def one_batch(embedder: SentenceTransformerEmbedder, step: Step) -> NDArray[np.float32]:
    """The vectors of a step, [texts, D]."""
    return embed(embedder, [request for requests in step for request in requests])


def call_per_episode(embedder: SentenceTransformerEmbedder, step: Step) -> NDArray[np.float32]:
    """The vectors of a step, [texts, D]."""
    return np.concatenate([embed(embedder, requests) for requests in step])


def call_per_text(embedder: SentenceTransformerEmbedder, step: Step) -> NDArray[np.float32]:
    """The vectors of a step, [texts, D]."""
    return np.concatenate([embed(embedder, [request]) for requests in step for request in requests])


def call_library(embedder: SentenceTransformerEmbedder, step: Step) -> NDArray[np.float32]:
    """The vectors of a step, [texts, D]."""
    texts = [request.text for requests in step for request in requests]
    vectors: NDArray[np.float32] = embedder.model.encode(texts, batch_size=32, show_progress_bar=False)
    return vectors


def measure(embedder: SentenceTransformerEmbedder, steps: Sequence[Step], repeats: int) -> Result:
    """Times all ways alternately, starting with another one in each repetition."""
    ways: list[Way] = [one_batch, call_per_episode, call_per_text, call_library]
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    vectors_of: dict[Way, NDArray[np.float32]] = {}
    one_batch(embedder, steps[0])  # warms up
    for repeat in range(repeats):
        turn = repeat % len(ways)
        for way in [*ways[turn:], *ways[:turn]]:
            start = time.perf_counter()
            vectors = [way(embedder, step) for step in steps]
            seconds[way].append(time.perf_counter() - start)
            vectors_of[way] = np.concatenate(vectors)
    for way in (call_per_episode, call_per_text):
        assert vectors_of[way].tobytes() == vectors_of[one_batch].tobytes(), (
            f"{way.__name__} must give the same vectors"
        )
    error = float(np.abs(vectors_of[call_library] - vectors_of[one_batch]).max())
    assert error < 1e-3, f"the library must give nearly the same vectors, they differ by {error}"
    batch, others = seconds[one_batch], (seconds[call_per_episode], seconds[call_per_text], seconds[call_library])
    ratios = [tuple(other[repeat] / batch[repeat] for other in others) for repeat in range(repeats)]
    over_episode, over_text, over_library = (statistics.median(column) for column in zip(*ratios, strict=True))
    texts = [request.text for step in steps for requests in step for request in requests]
    tokens = [len(ids) for ids in embedder.model.tokenizer(texts)["input_ids"]]
    return Result(
        model=embedder.name,
        dtype=embedder.dtype,
        device=embedder.device,
        threads=torch.get_num_threads(),
        episodes=len(steps[0]),
        texts=len(texts),
        tokens=tuple(int(value) for value in np.quantile(tokens, [0, 0.25, 0.5, 0.75, 1])),
        batch_s=statistics.median(batch),
        episode_s=statistics.median(seconds[call_per_episode]),
        text_s=statistics.median(seconds[call_per_text]),
        library_s=statistics.median(seconds[call_library]),
        over_episode=over_episode,
        over_text=over_text,
        over_library=over_library,
        ratios=tuple(ratios),  # type: ignore[arg-type]  # three each
        library_error=error,
    )


def main(*, out: Path | None = None, episodes: int = 64, steps: int = 2, repeats: int = 5, seed: int = 0) -> None:
    """Compare one batch per step with a call per episode and a call per text, and print a table.

    Args:
        out: JSON file for the numbers.
        episodes: active at the same time.
        steps: of each episode, with four texts.
        repeats: timed repetitions of each way; medians are reported.
        seed: of the texts.
    """
    result = measure(MiniLMEmbedder(), draw_steps(steps, episodes, seed), repeats)
    least, _, median, _, most = result.tokens
    table = Table(
        title=f"{result.model} ({result.dtype}, {result.device}, {result.threads} threads): {result.texts} texts of {least} to "
        f"{most} tokens, median {median}; {episodes} episodes"
    )
    for column in ("", "seconds", "texts/s", "of one batch's time"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds, ratio in (
        ("one batch", result.batch_s, 1.0),
        ("a call per episode", result.episode_s, result.over_episode),
        ("a call per text", result.text_s, result.over_text),
        ("the library, padded to the longest", result.library_s, result.over_library),
    ):
        table.add_row(name, f"{seconds:.2f}", f"{result.texts / seconds:,.0f}", f"{ratio:.2f}x")
    Console().print(table)
    write_figures(out, asdict(result))


if __name__ == "__main__":
    tyro.cli(main)
