"""`atommem collect`: a teacher's trajectories, as samples for supervised fine-tuning.

    atommem collect AtomMem-Synthetic --policy oracle --episodes 500 --out runs/oracle-samples

Episodes whose reward is too small are left out; of the others every turn is a sample, in TRL's conversational form: `prompt` is
the chat that shows the observation, in the layout that the *student* is to read, `completion` the reply. The folder `--out` then
holds them as `samples.parquet` and, the same rows, as `samples.jsonl`, beside `config.json` (what was asked for),
`rewards.jsonl` (a line an episode, of those left out too) and `summary.json` (the numbers). The same configuration gives the
same bytes.

An episode is written when it ends. A run that was interrupted continues with `--resume`, as if it never had been; with more
`--episodes` a finished one is extended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from agents.event_loop import run_blocking
from agents.rollout import episode_specs
from atommem_env.episode import legal_text
from atommem_env.errors import SettingError
from atommem_env.prompts import get_layout
from atommem_env.types import Message, Observation, Rollout, Turn
from eval.options import PlayConfig
from eval.players import Parts, prepare
from eval.progress import episode_bar
from eval.provenance import add_session
from eval.run_folder import Record, read_jsonl, require_empty_dir, require_same_config, to_jsonl, write_atomic

_ROW_GROUP = 1000  # samples of `samples.parquet` that are in memory at the same time
_CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("prompt", _CHAT),  # what the layout makes of the observation
        ("completion", _CHAT),  # one message, the reply: the loss is on this alone
        ("env_id", pa.string()),
        ("task_id", pa.string()),
        ("episode", pa.int64()),  # 0 ≤ episode < episodes played
        ("turn", pa.int64()),  # 0 ≤ turn < turns of the episode
        ("reward", pa.float64()),  # of the whole episode, in [0, 1]
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig(PlayConfig):
    """Whose trajectories, and which of them. Options left out are the environment's own."""

    out: Path = Path("runs/collect")
    """Folder of the samples; new or empty, unless --resume."""
    split: str = "train"
    """Split of the dataset."""
    durability: str = "off"
    """off, or episode: keep every entry in the folder's memory/."""
    min_reward: float = 0.5
    """Episodes with a smaller reward (the mean exact match over their questions) are left out."""
    drop_guesses: bool = False
    """Leave out episodes that were won by a guess: not all of a question's evidence was stored when it was answered."""
    drop_faults: bool = False
    """Leave out turns of whose reply an operation was not carried out as written."""
    resume: bool = False
    """Resume an interrupted run in the same folder: only what is missing is played. With more --episodes a finished run is
    extended."""


def collect(config: CollectConfig, console: Console | None = None, parts: Parts | None = None) -> dict[str, Any]:
    """Plays the episodes, writes the samples, and returns what `summary.json` holds.

    Args:
        console: where a progress bar is drawn; stderr unless given.
        parts: objects in the place of what the configuration names.

    Raises:
        SettingError: the folder is not empty, or holds another run than that to resume; a setting cannot work, or no turn was
            good enough.
        Exception: what the policy, the embedder or the store raised. Finished episodes are kept for `resume`.
    """
    parts = parts or Parts()
    layout = get_layout(parts.layout or config.layout)
    if not 0 <= config.min_reward <= 1:
        raise SettingError(f"min_reward must be between 0 and 1, got {config.min_reward}.")
    if not config.resume:
        require_empty_dir(config.out, ", or --resume")
    driver, policy, resolved_config = prepare(config, parts)
    resolved_config |= {name: getattr(config, name) for name in ("min_reward", "drop_guesses", "drop_faults")}
    folder = _Folder.open(config, resolved_config)
    specs = dict(enumerate(episode_specs(len(driver.source), config.episodes, config.seed)))
    numbers = [number for number in specs if number not in folder.episodes]
    rewards = [one["reward"] for one in folder.episodes.values()]
    name = f"{policy.name} on {config.env_id}"
    with (
        closing(driver.store),
        folder.appending() as append,
        episode_bar(console, None, name, len(numbers), rewards) as bar,
    ):

        def finished(position: int, rollout: Rollout) -> None:
            append(*_collected(config, numbers[position], rollout, lambda seen: layout(seen, driver.settings)))
            bar.ended(rollout.reward)

        run_blocking(
            driver.stream(
                [specs[number] for number in numbers],
                policy,
                in_flight=config.in_flight,
                finished=finished,
                replied=bar.replied,
            )
        )
    folder.write_in_order()
    episodes = folder.episodes.values()
    good = [one for one in episodes if one["kept"]]
    summary = {
        "env_id": config.env_id,
        "policy": policy.name,
        "privileged": policy.privileged,
        "episodes": len(episodes),
        "kept": len(good),
        "turns": sum(one["turns"] for one in good),
        "turns_with_faults": sum(one["turns_with_faults"] for one in good),
        "samples": sum(one["samples"] for one in good),
        "reward": round(fmean(one["reward"] for one in episodes), 4),  # mean over all episodes played
        "schema_version": resolved_config["schema_version"],
    }
    if not summary["samples"]:
        best = max(one["reward"] for one in episodes)
        raise SettingError(
            f"No samples: {len(good)} of {len(episodes)} episodes of {policy.name} reached a reward of "
            f"{config.min_reward:g} (mean {summary['reward']:g}, best {best:g})"
            + (f", and all of their {summary['turns']} turns had faults. Leave --drop-faults out, " if good else ". ")
            + ("or" if good else "Lower --min-reward, or")
            + " choose a better --policy, with another --out; or play more --episodes with --resume."
        )
    write_atomic(config.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _collected(
    config: CollectConfig, number: int, rollout: Rollout, show: Callable[[Observation], list[Message]]
) -> tuple[Record, list[Record]]:
    """An episode's line of `rewards.jsonl`, and its samples."""
    kept = rollout.reward >= config.min_reward and not (config.drop_guesses and _has_guess(rollout))
    samples = [
        {
            "prompt": show(turn.observation),
            "completion": [Message(role="assistant", content=legal_text(turn.reply.text)[0])],
            "env_id": config.env_id,
            "task_id": rollout.task_id,
            "episode": number,
            "turn": index,
            "reward": rollout.reward,
        }
        for index, turn in enumerate(rollout.turns)
        if kept and not (config.drop_faults and _has_fault(turn))
    ]
    episode = {
        "episode": number,
        "task_id": rollout.task_id,
        "reward": rollout.reward,
        "kept": kept,
        "turns": len(rollout.turns),
        "turns_with_faults": sum(map(_has_fault, rollout.turns)),
        "samples": len(samples),
    }
    return episode, samples


@dataclass(frozen=True, slots=True)
class _Folder:
    """The folder of samples while episodes end, in any order; no more than the lines of `rewards.jsonl` is in memory."""

    path: Path
    episodes: dict[int, Record]  # the lines of `rewards.jsonl`, by number

    @classmethod
    def open(cls, config: CollectConfig, resolved_config: Record) -> _Folder:
        """Begins or resumes; what a killed run left of an episode that was not over is gone afterwards.

        Raises:
            SettingError: there is no run to resume, or it is another one.
        """
        path = config.out
        if config.resume:
            require_same_config(path / "config.json", resolved_config, extendable="episodes")
        path.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "samples.parquet"):  # of a finished run
            (path / name).unlink(missing_ok=True)
        write_atomic(path / "config.json", json.dumps(resolved_config, indent=2, ensure_ascii=False) + "\n")
        add_session(path)
        folder = cls(path, {episode["episode"]: episode for episode in read_jsonl(path / "rewards.jsonl")})
        folder._write(list(folder.episodes))
        return folder

    @contextmanager
    def appending(self) -> Iterator[Callable[[Record, Sequence[Record]], None]]:
        """Opens the two files of lines; gives what appends an episode and its samples to them."""
        names = (
            "samples.jsonl",
            "rewards.jsonl",
        )  # a kill between the two leaves samples without their episode: no harm
        samples, episodes = ((self.path / name).open("a", encoding="utf-8", newline="\n") for name in names)
        with samples, episodes:

            def append(episode: Record, rows: Sequence[Record]) -> None:
                self.episodes[episode["episode"]] = episode
                for file, lines in ((samples, rows), (episodes, [episode])):
                    file.writelines(map(to_jsonl, lines))
                    file.flush()

            yield append

    def write_in_order(self) -> None:
        """Puts both files of lines into the order of episodes, and writes the samples as `samples.parquet` too."""
        self._write(sorted(self.episodes))
        partial = self.path / "samples.parquet.tmp"
        with (self.path / "samples.jsonl").open(encoding="utf-8") as lines, pq.ParquetWriter(partial, SCHEMA) as file:
            while rows := [json.loads(line) for line in islice(lines, _ROW_GROUP)]:
                file.write_table(pa.Table.from_pylist(rows, SCHEMA))
        partial.replace(self.path / "samples.parquet")

    def _write(self, numbers: Sequence[int]) -> None:
        """Writes the lines of these episodes, in this order, and no other."""
        samples = self.path / "samples.jsonl"
        samples.touch()
        spans: dict[int, tuple[int, int]] = {}  # in bytes; an episode's samples are one after the other
        partial = samples.with_name("samples.jsonl.tmp")
        with samples.open("rb") as file, partial.open("wb") as ordered:
            end = 0
            for line in file:
                start, end = end, end + len(line)
                if line.endswith(b"\n"):  # else a kill left half of it
                    number = json.loads(line)["episode"]
                    spans[number] = spans.get(number, (start, 0))[0], end
            for start, end in (spans[number] for number in numbers if number in spans):
                file.seek(start)
                ordered.write(file.read(end - start))
        partial.replace(samples)
        write_atomic(self.path / "rewards.jsonl", "".join(to_jsonl(self.episodes[number]) for number in numbers))


def _has_guess(rollout: Rollout) -> bool:
    """Whether a right answer was luck: some of its evidence was not stored."""
    return any(outcome.em == 1 and outcome.stored < outcome.evidence for outcome in rollout.questions)


def _has_fault(turn: Turn) -> bool:
    """Whether something in the reply was not carried out as written, or something was missing from it."""
    return any(result.fault is not None for result in turn.results)


def main(config: CollectConfig) -> None:
    """Collect a policy's trajectories, every turn a prompt and a completion to train on."""
    summary = collect(config)
    Console().print(
        f"{summary['kept']} of {summary['episodes']} episodes kept (mean reward {summary['reward']:.3f}): "
        f"{summary['samples']} samples, {summary['turns_with_faults']} of {summary['turns']} turns with faults.\n"
        f"Written to [bold]{config.out}[/]: samples.parquet, samples.jsonl, rewards.jsonl, config.json, summary.json."
    )
