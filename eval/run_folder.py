"""The run folder: JSON lines, atomic writes, and the checks that keep two runs apart.

An evaluation's run folder has `config.json` (the resolved configuration, every setting with its value), `episodes.jsonl` (a
line for each episode; the same bytes for the same configuration), `costs.jsonl` (what depends on timing and on a model's
service), `summary.json` (the numbers, once all episodes are played) and `memory/` (LanceDB).
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atommem_env.errors import DataError, SettingError
from atommem_env.packages import PACKAGES
from atommem_env.paths import replacing
from atommem_env.plugins import is_target
from atommem_env.types import EpisodeSettings
from eval.metrics import SCHEMA_VERSION

if sys.platform != "win32":
    import fcntl

Record = dict[str, Any]
_ABSENT = object()
_SINCE_3 = ("data", "fingerprints")  # fields of config.json that came with schema 3
_OUR_PACKAGES = ("atommem_env", *PACKAGES)
_Kinds = dict[str, type | tuple[type, ...]]
_NUMBER = (int, float)
CONFIG_FIELDS: _Kinds = {  # of config.json, those that readers of any run need
    "env_id": str,
    "episodes": int,
    "layout": str,
    "options": dict,
    "policy": str,
    "sampling": dict,
    "settings": dict,
}
_RECORD_FIELDS: _Kinds = {
    **dict.fromkeys(("episode", "seed", "steps", "replies_truncated", "calls", "retrievals", "dropped_tokens"), int),
    **dict.fromkeys(("task_id", "stop_reason"), str),
    **dict.fromkeys(("operations", "faults", "tokens"), dict),
    "questions": list,
    "reward": _NUMBER,
}
_QUESTION_FIELDS: _Kinds = {
    **dict.fromkeys(("hops", "evidence", "stored", "retrieved"), int),
    **dict.fromkeys(("id", "kind"), str),
    **dict.fromkeys(("em", "f1"), (*_NUMBER, type(None))),  # None: no gold
    "prediction": (str, type(None)),
}
_RENAMED = {"replies_cut": "replies_truncated"}  # fields of records in schema 2


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The run folder of an evaluation in progress."""

    path: Path
    records: dict[int, Record]  # of the finished episodes, by number
    costs: dict[int, Record]  # of the same episodes

    @classmethod
    @contextmanager
    def claimed(cls, path: Path, resolved_config: Record, *, resume: bool) -> Iterator[RunFolder]:
        """The folder of a new or resumed run, which is this process's until the context ends.

        Raises:
            SettingError: another process plays in it; or as in `begin` and `resume`.
        """
        path.mkdir(parents=True, exist_ok=True)
        with _claim(path):
            yield (cls.resume if resume else cls.begin)(path, resolved_config)

    @classmethod
    def begin(cls, path: Path, resolved_config: Record) -> RunFolder:
        """Writes the configuration of a new run.

        Raises:
            SettingError: the folder has a run with finished episodes.
        """
        lines = path / "episodes.jsonl"
        if lines.exists() and lines.stat().st_size:
            raise SettingError(f"{path} already has a run. Resume it with --resume, or choose another --out.")
        write_atomic(path / "costs.jsonl", "")  # left by a run that was stopped before its first episode ended
        write_atomic(path / "config.json", json.dumps(resolved_config, indent=2, ensure_ascii=False) + "\n")
        return cls(path, {}, {})

    @classmethod
    def resume(cls, path: Path, resolved_config: Record) -> RunFolder:
        """The finished episodes of an interrupted run; removes the incomplete line that a kill may have left.

        More episodes than before extend a run: the first ones are the same.

        Raises:
            SettingError: there is no run, or it has another configuration.
        """
        config = path / "config.json"
        require_same_config(config, resolved_config, extendable="episodes")
        if read_config(config).get("episodes") != resolved_config["episodes"]:
            (path / "summary.json").unlink(missing_ok=True)  # it has too few
            write_atomic(config, json.dumps(resolved_config, indent=2, ensure_ascii=False) + "\n")
        costs = {cost["episode"]: cost for cost in read_jsonl(path / "costs.jsonl")}
        records = {one["episode"]: one for one in read_records(path / "episodes.jsonl") if one["episode"] in costs}
        folder = cls(path, records, {number: costs[number] for number in records})
        folder._write(list(records))
        return folder

    @contextmanager
    def appending(self) -> Iterator[Callable[[Record, Record], None]]:
        """Opens the two JSON lines files; yields a function that appends an episode's record and cost to them."""
        before = max((cost["elapsed"] for cost in self.costs.values()), default=0.0)
        started = time.perf_counter()
        names = (
            "costs.jsonl",
            "episodes.jsonl",
        )  # a kill between the two leaves a cost without its episode, harmlessly
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
        """Writes the episodes in order of their numbers, and the summary."""
        self._write(numbers)
        write_atomic(self.path / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def _write(self, numbers: Sequence[int]) -> None:
        for name, lines in (("episodes.jsonl", self.records), ("costs.jsonl", self.costs)):
            write_atomic(self.path / name, "".join(to_jsonl(lines[number]) for number in numbers))


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder, by a lock that the system removes with this process.

    Where the system has no file locks nobody is kept out.

    Raises:
        SettingError: another process plays in it.
    """
    if sys.platform == "win32":
        yield
        return
    path = folder / ".lock"
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SettingError(
                    f"Another process plays in {folder}. Wait until it ends, or choose another --out."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
            if not path.exists() or path.stat().st_ino != os.fstat(lock.fileno()).st_ino:
                continue  # its last owner has just removed it
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def require_empty_dir(folder: Path, otherwise: str = "") -> None:
    """Checks that a run can begin in `folder`; `otherwise` is an alternative to choosing another, for the message.

    Raises:
        SettingError: it is a file, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} must be a new or empty folder, but it is not. Choose another --out{otherwise}.")


def require_same_config(path: Path, resolved_config: dict[str, Any], *, extendable: str | None = None) -> None:
    """Checks that a run to resume has the configuration in the `config.json` at `path`.

    Args:
        extendable: a setting that may be greater than it was: how long the run is.

    Raises:
        SettingError: there is no such file, or the configuration differs; the message lists the differences.
    """
    if not path.is_file():
        raise SettingError(f"Nothing to resume: {path} does not exist. Leave out --resume to start a new run.")
    before = read_config(path)
    if extendable and resolved_config[extendable] >= before.get(extendable, 0):
        before[extendable] = resolved_config[extendable]
    for name in _SINCE_3:
        if name not in before:  # an earlier version did not record it
            resolved_config = {key: value for key, value in resolved_config.items() if key != name}
    differences = "; ".join(_differences({name: before.get(name) for name in resolved_config}, resolved_config))
    if differences:
        raise SettingError(f"{path.parent} has a run with another configuration: {differences}. Choose another --out.")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The differences of two configurations, in words.

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
    """A run's `config.json`, as this version would have written it: newer settings are at their defaults.

    Raises:
        DataError: it is not a JSON object.
    """
    config = read_json(path)
    if isinstance(config.get("settings"), dict):
        config["settings"] = json.loads(json.dumps(EpisodeSettings().record())) | config["settings"]
    if config.get("schema_version") == 2:
        config["schema_version"] = SCHEMA_VERSION
    return config


def read_json(path: Path) -> Record:
    """The object in a JSON file.

    Raises:
        DataError: it is no JSON object.
    """
    return _json_object(path.read_bytes(), str(path))


def _json_object(data: bytes, where: str) -> Record:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is damaged: {error}. It must be the JSON that `atommem` wrote.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} must hold a JSON object, got {type(value).__name__}.")
    return value


def named_modules(config: Record) -> list[str]:
    """The modules, other than ours, that making what a `config.json` or `atommem.json` describes would import.

    >>> named_modules({"env_id": "mine:Env-v0", "layout": "terse", "options": {"embedder": "st:a", "reward": "own:short"}})
    ['mine', 'own']
    """
    module, colon, _ = str(config.get("env_id", "")).partition(":")  # of gymnasium, which has hyphens
    names = {module} if colon else set()
    names |= {
        text.partition(":")[0] for name in ("options", "settings", "layout") for text in _targets(config.get(name))
    }
    ours = ("openai", "st", "vllm", "public_code")  # before a colon that names no attribute
    return sorted(name for name in names if name not in ours and name.partition(".")[0] not in _OUR_PACKAGES)


def _targets(value: object) -> Iterator[str]:
    """All texts of the form `module:attribute` in a value of JSON."""
    if is_target(value):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _targets(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _targets(name)
            yield from _targets(item)


def require_trusted(config: Record, path: Path, *, trust: bool) -> None:
    """Rejects a file that would make this process import modules, which run code, unless its reader trusts them.

    Args:
        path: of the file, for the message.

    Raises:
        SettingError: it names modules, and `trust` is off.
    """
    modules = named_modules(config)
    if modules and not trust:
        raise SettingError(
            f"{path} names {', '.join(modules)}, and importing a module runs its code. If you trust whoever made this file, and "
            "the modules of these names here, say so by --trust."
        )


def read_records(path: Path) -> list[Record]:
    """The finished episodes of an `episodes.jsonl`, under the names that this version gives their fields.

    Raises:
        DataError: a line is damaged, or lacks a field.
    """
    records = []
    for number, line in enumerate(read_jsonl(path), start=1):
        record = {_RENAMED.get(name, name): value for name, value in line.items()}
        require_fields(record, _RECORD_FIELDS, f"{path}, record {number},")
        for question in record["questions"]:
            require_fields(question, _QUESTION_FIELDS, f"{path}, record {number}, a question")
        if "cut" in record["faults"]:  # schema 2
            record["faults"] = {"truncated" if name == "cut" else name: n for name, n in record["faults"].items()}
        records.append(record)
    return records


def require_fields(value: object, kinds: _Kinds, where: str) -> None:
    """Checks that an object of JSON has fields of these kinds, and maybe others.

    Raises:
        DataError: it has not; the message begins with `where`.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} must be a JSON object, got {type(value).__name__}.")
    for name, kind in kinds.items():
        if not isinstance(value.get(name, _ABSENT), kind):
            got = type(value[name]).__name__ if name in value else "no such field"
            raise DataError(f"{where} is damaged: {name} is not as `atommem eval` writes it, got {got}.")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file, in order; none if there is no file.

    An incomplete last line, left by a run that was killed, is ignored. Lines end with "\\n" only: a prediction can contain
    other characters that Python treats as line ends.
    """
    data = path.read_bytes() if path.exists() else b""
    records = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n"), start=1):
        if line:
            records.append(_json_object(line, f"{path}, line {number},"))
    return records


def to_jsonl(record: dict[str, Any]) -> str:
    """A record as a line of a JSON lines file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_atomic(path: Path, text: str) -> None:
    """Writes a whole file at once: a reader sees the old or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
