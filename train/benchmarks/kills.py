"""Kills training commands: `python -m train.benchmarks.kills [--trials 20] [--out FILE]`, some minutes on two cores.

`collect`, `sft` and `grpo` of a tiny model run in a process that is ended by kill -9 at a random moment, and once more after it
was resumed; then the run is resumed to its end. What its folder holds must be, but for times, what a run that was never killed
has left, bit for bit.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from eval.benchmarks import write_figures
from eval.run_folder import read_jsonl, to_jsonl
from train import collect, grpo, sft
from train.collect import CollectConfig
from train.settings import LocalGRPOConfig, SFTConfig
from train.tiny_base import build_tokenizer

COMMANDS = ("collect", "sft", "grpo")
_KILLS = 2  # of each trial, at most
# a state with times, pictures of what is compared, and dates
_NOT_COMPARED = ("checkpoint.pt", "curve.png", "tensorboard", "provenance.json")
_ENV: dict[str, Any] = {
    "env_id": "AtomMem-Synthetic",
    "num_docs": 4,
    "set": ("hops=[1]", "chunk_tokens=48", "replies_per_question=2"),
    "layout": "terse",
    "max_new_tokens": 8,
}


@dataclass(frozen=True, slots=True)
class Result:
    """What was found with one command; the last must be 0."""

    command: str
    trials: int
    kills: int  # that came before the end
    seconds: float  # of a run that was never killed
    different: int  # trials whose end was another


def prepare(work: Path) -> None:
    """Makes what the runs start from: a model that was never trained, and samples."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(work / "model")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(work / "model")
    collect.collect(CollectConfig(**_ENV, out=work / "samples", episodes=12), Console(quiet=True))


def run(command: str, work: Path, out: Path) -> None:
    """Begins a run of the command in `out`, or resumes it, to its end."""
    resume, model = (out / "config.json").is_file(), str(work / "model")
    if command == "collect":
        collect.collect(CollectConfig(**_ENV, out=out, episodes=40, in_flight=8, resume=resume), Console(quiet=True))
    elif command == "sft":
        options: dict[str, Any] = {"batch_size": 4, "save_every": 3, "resume": resume}
        sft.train(SFTConfig(samples=work / "samples", model=model, out=out, **options))
    else:
        options = {"steps": 6, "groups": 2, "group_size": 3, "save_every": 2, "eval_every": 3, "eval_episodes": 3}
        options |= {"fault_penalty": 0.1, "resume": resume}  # what this model gets otherwise is always the same
        grpo.Trainer(LocalGRPOConfig(**_ENV, **options, model=model, out=out), Console(quiet=True)).train()


def run_until_killed(command: str, work: str, out: str) -> None:
    """`run` in a process of its own, which prints a line when it may be killed."""
    if command != "collect":
        import peft  # noqa: F401  # these take seconds, in which nothing could go wrong
        import trl  # noqa: F401
    os.write(1, b"\n")
    run(command, Path(work), Path(out))


def killed(command: str, work: Path, out: Path, delay: float) -> bool:
    """Runs the command in a process for `delay` seconds, then kills it: whether it was not over by then.

    Raises:
        RuntimeError: the process failed by itself.
    """
    code = "import sys; from train.benchmarks.kills import run_until_killed; run_until_killed(*sys.argv[1:])"
    words = [sys.executable, "-c", code, command, str(work), str(out)]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, cwd=Path(__file__).parents[2]) as child,
    ):
        assert child.stdout is not None
        child.stdout.readline()
        timer = threading.Timer(delay, child.send_signal, (signal.SIGKILL,))
        timer.start()
        status = child.wait()
        timer.cancel()
        if status not in (0, -signal.SIGKILL):
            errors.seek(0)
            raise RuntimeError(f"{command} ended with status {status}: {errors.read().decode()[-2000:]}")
    return status != 0


def contents(out: Path) -> Iterator[tuple[str, bytes]]:
    """What a finished run has left, but for times: the files and their bytes."""
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out)
        if path.is_file() and name.parts[0] not in _NOT_COMPARED:
            timed = name.name == "metrics.jsonl"
            yield str(name), "".join(map(_without_times, read_jsonl(path))).encode() if timed else path.read_bytes()


def _without_times(line: dict[str, Any]) -> str:
    return to_jsonl({name: value for name, value in line.items() if "second" not in name and "runtime" not in name})


def measure(command: str, work: Path, trials: int, seed: int, console: Console) -> Result:
    """Kills `trials` runs of a command, resumes them, and prints which ends were other than that of one never killed."""
    rng = np.random.default_rng(seed)
    whole = work / command / "whole" / "run"
    started = time.perf_counter()
    run(command, work, whole)
    seconds, expected = time.perf_counter() - started, dict(contents(whole))
    kills = different = 0
    for trial in track(range(trials), command, console=console, transient=True):
        out = work / command / f"trial-{trial}" / "run"
        for _ in range(_KILLS):
            if not killed(command, work, out, float(rng.uniform(0, seconds))):
                break
            kills += 1
        run(command, work, out)
        got = dict(contents(out))
        wrong = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        if wrong:
            different += 1
            console.print(f"{command}, trial {trial}: {', '.join(wrong)} differ", markup=False)
    return Result(command, trials, kills, round(seconds, 1), different)


def main(*, out: Path | None = None, trials: int = 20, seed: int = 0) -> None:
    """Kill and resume training commands, and print a table; the status is 1 if a resumed run ended otherwise.

    Args:
        out: JSON file for the numbers.
        trials: Runs of each command.
        seed: Draws the moments.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet, redirect_stderr(quiet):
        prepare(Path(folder))
        results = [measure(command, Path(folder), trials, seed, console) for command in COMMANDS]
    fields = [field.name for field in dataclasses.fields(Result)]
    table = Table(title="kill -9, then --resume")
    for name in fields:
        table.add_column(name, justify="left" if name == "command" else "right")
    for result in results:
        table.add_row(*(str(getattr(result, name)) for name in fields))
    console.print(table)
    write_figures(out, [asdict(result) for result in results])
    sys.exit(any(result.different for result in results))


if __name__ == "__main__":
    tyro.cli(main)
