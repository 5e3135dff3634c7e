"""Opening a dataset, and resets: `python -m eval.benchmarks.tasks [--data FILE --corpus FILE] [--out FILE]`, a few minutes.

**Opening**: 20,000 questions, imported once, are opened by `gym.make`, and the first task is drawn, each time in a fresh
process with a warm page cache, against `json.load` of the whole question file. Both return the number of questions and the
first one's id. **Reset**: a task is drawn and its episode begun, in one warm process. Most of that is splitting the context
into chunks, which is also timed with tokens counted by regular-expression matches; both must make the same chunks. It uses one
thread, and the times are processor times, independent of other processes.

`--data` and `--corpus` are official files of HotpotQA's form; the rows are repeated under other ids and titles until there are
enough. Without them rows of the same size are generated.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from atommem_env.chunking import chunk_documents
from atommem_env.episode import Episode
from atommem_env.tasks.catalogue import import_dataset
from atommem_env.tasks.haystack import HaystackSource
from atommem_env.tasks.jsonl import read_records
from atommem_env.tokens import BuiltinTokenizer, get_tokenizer
from atommem_env.types import EpisodeSettings
from eval.benchmarks import write_figures

_REPORT = """
import json, sys, time
begun = time.perf_counter()
{imports}
imported = time.perf_counter()
count, first = {opening}
opened = time.perf_counter()
memory = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([imported - begun, opened - imported, memory, count, first]))
"""
_OURS = _REPORT.format(
    imports="import gymnasium, atommem_env, atommem_env.env\n"
    "def make():\n"
    "    env = gymnasium.make('AtomMem-HotpotQA', num_docs=10, durability='off').unwrapped\n"
    "    env.reset(options={'index': 0})\n"
    "    return len(env.source), env.episode.task.questions[0].id",
    opening="make()",
)
_WHOLE_FILE = _REPORT.format(
    imports="",
    opening="(lambda rows: (len(rows), rows[0]['_id']))(json.load(open(sys.argv[1], encoding='utf-8')))",
)


@dataclass(frozen=True, slots=True)
class Opening:
    """One way to open the questions, in a fresh process; medians over the repetitions."""

    way: str
    import_s: float  # Python's own imports
    open_s: float  # and the first task, or row
    process_s: float  # from start to end of the process
    peak_bytes: int  # of the process's memory


@dataclass(frozen=True, slots=True)
class Reset:
    """Drawing a task and beginning its episode, in processor time; medians over the tasks."""

    num_docs: int
    tokens: int  # of the context, mean
    chunks: int  # of all tasks
    draw_ms: float
    begin_ms: float
    reset_ms: float  # both
    chunk_ms: float  # part of begin_ms: splitting into chunks
    chunk_by_matches_ms: float  # the same with tokens counted by matches
    ratio: float  # of the last two, per task


@dataclass(frozen=True, slots=True)
class Result:
    """The measurements."""

    questions: int
    documents: int
    import_s: float  # `atommem data import`, once
    file_bytes: int
    openings: tuple[Opening, ...]
    resets: tuple[Reset, ...]
    chunk_tokens: int
    repeats: int
    cpus: int
    rows_from: str


class MatchingTokenizer(BuiltinTokenizer):
    """Counts tokens by matching each one."""

    def count(self, text: str) -> int:
        return len(self._token.findall(text))


def generate_rows(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of HotpotQA's form: ten documents of about 90 words each; one document in four has a letter beyond Latin-1."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(5000)]
    for row in range(200):
        context = []
        for number in range(10):
            sentences = [" ".join(rng.choices(words, k=22)).capitalize() + ", 1907." for _ in range(4)]
            context.append([f"Title {row} {number}" + (" Łódź" if rng.random() < 0.25 else ""), sentences])
        facts = [[context[number][0], 0] for number in (3, 7)]
        yield {
            "_id": f"row{row}",
            "question": " ".join(rng.choices(words, k=15)) + "?",
            "answer": rng.choice(words),
            "type": "bridge",
            "context": context,
            "supporting_facts": facts,
        }


def write_rows(path: Path, rows: Sequence[dict[str, Any]], count: int) -> None:
    """Writes `count` rows as one JSON list: the given rows, repeated with different ids and titles."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row, suffix = rows[number % len(rows)], f" #{number // len(rows)}" if number >= len(rows) else ""
            renamed = row | {
                "_id": f"{row['_id']}{suffix}",
                "context": [[title + suffix, sentences] for title, sentences in row["context"]],
                "supporting_facts": [[title + suffix, index] for title, index in row["supporting_facts"]],
            }
            file.write(("," if number else "[") + json.dumps(renamed, ensure_ascii=False))
        file.write("]")


def measure_openings(file: Path, repeats: int) -> tuple[tuple[Opening, ...], int]:
    """Times both alternately, each time in a fresh process; also returns the number of questions, on which they must agree."""
    measured: dict[str, list[tuple[float, float, float, int]]] = {"opened": [], "whole file read": []}
    agreed = set()
    for repeat in range(repeats + 1):  # the first one warms the page cache
        for way, code in (("opened", _OURS), ("whole file read", _WHOLE_FILE))[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - start
            imported, opened, memory, count, first = json.loads(done.stdout)
            agreed.add((count, first))
            if repeat:
                measured[way].append((imported, opened, seconds, memory))
    assert len(agreed) == 1, f"both must return the same questions, they returned {agreed}"
    openings = []
    for way, rows in measured.items():
        imported, opened, seconds, memory = map(statistics.median, zip(*rows, strict=True))
        openings.append(Opening(way, imported, opened, seconds, int(memory)))
    return tuple(openings), agreed.pop()[0]


def measure_resets(num_docs: int, tasks: int, settings: EpisodeSettings) -> Reset:
    """Times `tasks` resets after one that warms up, starting with the other way to count tokens each time."""
    source = HaystackSource("hotpotqa", num_docs=num_docs)
    own = get_tokenizer(settings.tokenizer)
    seconds: dict[str, list[float]] = {name: [] for name in ("draw", "begin", "reset", "own", "matches")}
    tokens, chunks = 0, 0

    def timed(work: Callable[[], Any], name: str) -> Any:
        start = time.process_time()
        result = work()
        seconds[name].append(time.process_time() - start)
        return result

    for index in range(tasks + 1):
        task = timed(partial(source.task, index % len(source), index), "draw")
        episode = timed(partial(Episode, task, settings, 0), "begin")
        seconds["reset"].append(seconds["draw"][-1] + seconds["begin"][-1])
        for name in ("own", "matches")[:: -1 if index % 2 else 1]:
            count = own if name == "own" else MatchingTokenizer()
            split = timed(partial(chunk_documents, task.documents, settings.chunk_tokens, count), name)
            assert split == episode.chunks, "both must make the same chunks"
        chunks += len(episode.chunks)
        tokens += sum(map(own.count, episode.chunks))
    medians = {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}
    ratios = [slow / fast for slow, fast in zip(seconds["matches"][1:], seconds["own"][1:], strict=True)]
    return Reset(
        num_docs=num_docs,
        tokens=round(tokens / (tasks + 1)),
        chunks=chunks,
        draw_ms=medians["draw"],
        begin_ms=medians["begin"],
        reset_ms=medians["reset"],
        chunk_ms=medians["own"],
        chunk_by_matches_ms=medians["matches"],
        ratio=statistics.median(ratios),
    )


def measure(
    folder: Path,
    questions: int,
    sizes: Sequence[int],
    repeats: int,
    data: Path | None = None,
    corpus: Path | None = None,
) -> Result:
    """Writes the files into `folder`, which also becomes the data folder of this process, and measures."""
    rows = [row for _, row in read_records(data)] if data else list(generate_rows())
    write_rows(folder / "questions.json", rows, questions)
    os.environ["ATOMMEM_DATA"] = str(folder)
    start = time.perf_counter()
    report = import_dataset("hotpotqa", "dev", folder / "questions.json", corpus)
    imported = time.perf_counter() - start
    openings, count = measure_openings(folder / "questions.json", repeats)
    settings = EpisodeSettings()
    return Result(
        questions=count,
        documents=report.documents,
        import_s=imported,
        file_bytes=report.sources[0].bytes,
        openings=openings,
        resets=tuple(measure_resets(size, 4 * repeats, settings) for size in sizes),
        chunk_tokens=settings.chunk_tokens,
        repeats=repeats,
        cpus=len(os.sched_getaffinity(0)),
        rows_from=data.name if data else "generated",
    )


def main(
    *,
    out: Path | None = None,
    data: Path | None = None,
    corpus: Path | None = None,
    questions: int = 20_000,
    sizes: tuple[int, ...] = (200, 800, 6400),
    repeats: int = 5,
) -> None:
    """Measure opening and resets, and print two tables.

    Args:
        out: JSON file for the numbers.
        data: a file of HotpotQA's form whose rows are repeated; without it, rows are generated.
        corpus: documents that fill contexts.
        questions: number of questions.
        sizes: documents of a context.
        repeats: repetitions of each opening; resets are timed four times as often.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), questions, sizes, repeats, data, corpus)
    console = Console()
    title = f"{result.questions:,} questions, {result.documents:,} documents; imported in {result.import_s:.1f} s"
    table = Table(title=title)
    for column in ("fresh process", "imports s", "opening s", "in all s", "peak MB"):
        table.add_column(column, justify="left" if column == "fresh process" else "right")
    for item in result.openings:
        seconds = (f"{value:.3f}" for value in (item.import_s, item.open_s, item.process_s))
        table.add_row(item.way, *seconds, f"{item.peak_bytes / 1e6:,.0f}")
    console.print(table)
    table = Table(title=f"Reset, chunks of {result.chunk_tokens} tokens")
    for column in ("docs", "tokens", "draw ms", "begin ms", "reset ms", "chunks ms", "by matches", "ratio"):
        table.add_column(column, justify="right")
    for reset in result.resets:
        times = (reset.draw_ms, reset.begin_ms, reset.reset_ms, reset.chunk_ms, reset.chunk_by_matches_ms)
        table.add_row(
            str(reset.num_docs), f"{reset.tokens:,}", *(f"{value:.2f}" for value in times), f"{reset.ratio:.2f}x"
        )
    console.print(table)
    write_figures(out, asdict(result))


if __name__ == "__main__":
    tyro.cli(main)
