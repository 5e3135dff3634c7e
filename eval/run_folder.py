"""What the folder of a run is: JSON lines, whole files written at once, and the checks that keep two runs apart.

An evaluation's folder holds `config.json` (what it was asked for, every setting with its value), `episodes.jsonl` (a line an
episode; the same bytes for the same configuration), `costs.jsonl` (what the clock and a model's service decide), `summary.json`
(the numbers, once all episodes are played) and `memory/` (LanceDB).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atommem_env.errors import DataError, SettingError
from atommem_env.types import EpisodeSettings
from eval.metrics import SCHEMA_VERSION

Record = dict[str, Any]
_ABSENT = object()
_RENAMED = {"replies_cut": "replies_truncated"}  # fields of records in schema 2


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of an evaluation that is being played."""

    path: Path
    records: dict[int, Record]  # the finished episodes, by number
    costs: dict[int, Record]  # of each of them

    @classmethod
    def begin(cls, path: Path, resolved_config: Record) -> RunFolder:
        """Writes the configuration of a new run.

        Raises:
            SettingError: the folder holds a run with finished episodes.
        """
        lines = path / "episodes.jsonl"
        if lines.exists() and lines.stat().st_size:
            raise SettingError(f"{path} holds a run. Resume it by --resume, or choose another --out.")
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / "costs.jsonl", "")  # of one that was stopped before its first episode ended
        write_atomic(path / "config.json", json.dumps(resolved_config, indent=2, ensure_ascii=False) + "\n")
        return cls(path, {}, {})

    @classmethod
    def resume(cls, path: Path, resolved_config: Record) -> RunFolder:
        """The finished episodes of an interrupted run; half a line that a kill left is gone afterwards.

        Raises:
            SettingError: there is no run, or it is another one.
        """
        require_same_config(path / "config.json", resolved_config)
        costs = {cost["episode"]: cost for cost in read_jsonl(path / "costs.jsonl")}
        records = {one["episode"]: one for one in read_records(path / "episodes.jsonl") if one["episode"] in costs}
        folder = cls(path, records, {number: costs[number] for number in records})
        folder._write(list(records))
        return folder

    @contextmanager
    def appending(self) -> Iterator[Callable[[Record, Record], None]]:
        """Opens the two files of lines; gives what appends an episode's record and cost to them."""
        before = max((cost["elapsed"] for cost in self.costs.values()), default=0.0)
        started = time.perf_counter()
        names = ("costs.jsonl", "episodes.jsonl")  # a kill between the two leaves a cost without its episode: no harm
        costs, episodes = ((self.path / name).open("a", encoding="utf-8", newline="\n") for name in names)
        with costs, episodes:

            def append(record: Record, cost: Record) -> None:
                number = record["episode"]
                self.records[number] = record
                self.costs[number] = cost | {"elapsed": round(before + time.perf_counter() - started, 3)}
                for line, file in ((self.costs[number], costs), (record, episodes)):
                    file.write(to_jsonl(line))
                    file.flush()

            yield append

    def finish(self, numbers: Sequence[int], summary: Record) -> None:
        """Writes the episodes in their order, and the summary."""
        self._write(numbers)
        write_atomic(self.path / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def _write(self, numbers: Sequence[int]) -> None:
        for name, lines in (("episodes.jsonl", self.records), ("costs.jsonl", self.costs)):
            write_atomic(self.path / name, "".join(to_jsonl(lines[number]) for number in numbers))


def require_empty_dir(folder: Path, otherwise: str = "") -> None:
    """Whether a run can begin in `folder`; `otherwise` is what to do besides choosing another.

    Raises:
        SettingError: it is a file, or holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} must be a new or empty folder, and is not. Choose another --out{otherwise}.")


def require_same_config(path: Path, resolved_config: dict[str, Any], *, extendable: str | None = None) -> None:
    """Whether the run that is to be resumed is the one that `config.json` at `path` describes.

    Args:
        extendable: a setting that may be greater than it was: how long the run is.

    Raises:
        SettingError: there is none, or it is another; the message names what differs.
    """
    if not path.is_file():
        raise SettingError(f"Nothing to resume: {path} does not exist. Leave --resume out to start.")
    before = read_config(path)
    if extendable and resolved_config[extendable] >= before.get(extendable, 0):
        before[extendable] = resolved_config[extendable]
    differences = "; ".join(_differences({name: before.get(name) for name in resolved_config}, resolved_config))
    if differences:
        raise SettingError(f"{path.parent} holds a run of another configuration: {differences}.")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs, in words.

    >>> list(_differences({"seed": 0, "settings": {"top_k": 6, "capacity": None}}, {"seed": 0, "settings": {"top_k": 12}}))
    ['capacity was None, is not given', 'top_k was 6, is 12']
    """
    for name in sorted({*before, *now}):
        old, new = (side.get(name, _ABSENT) for side in (before, now))
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            was, is_ = ("not given" if value is _ABSENT else repr(value) for value in (old, new))
            yield f"{name} was {was}, is {is_}"


def read_config(path: Path) -> Record:
    """A run's `config.json`, as this version would have written it: settings that came later are at their defaults.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. It must be the JSON that `atommem` wrote.") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    if isinstance(config.get("settings"), dict):
        config["settings"] = json.loads(json.dumps(EpisodeSettings().record())) | config["settings"]
    if config.get("schema_version") == 2:
        config["schema_version"] = SCHEMA_VERSION
    return config


def read_records(path: Path) -> list[Record]:
    """The finished episodes of an `episodes.jsonl`, under the names that this version gives their fields."""
    records = [{_RENAMED.get(name, name): value for name, value in record.items()} for record in read_jsonl(path)]
    for record in records:
        if "cut" in record["faults"]:  # schema 2
            record["faults"] = {"truncated" if name == "cut" else name: n for name, n in record["faults"].items()}
    return records


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file, in its order; none where there is no file.

    The last line may be half a line, left by a run that was killed. Lines end with "\\n" alone: a prediction can hold other
    characters that Python takes for ends of lines.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]


def to_jsonl(record: dict[str, Any]) -> str:
    """A record as a line of a JSON lines file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_atomic(path: Path, text: str) -> None:
    """Writes a whole file at once: a reader sees the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
