"""What the folder of a run is: JSON lines, whole files written at once, and the checks that keep two runs apart."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atommem_env  # noqa: F401  (registers the environments)
from atommem_env.errors import SettingError
from eval.options import EvalConfig

_ABSENT = object()


_Records = dict[int, dict[str, Any]]  # by episode


def _open_run(config: EvalConfig, resolved_config: dict[str, Any]) -> tuple[_Records, _Records]:
    """Writes the run's configuration, or checks it against the one that is there; finished episodes and their costs."""
    path, lines, cost_lines = (config.out / name for name in ("config.json", "episodes.jsonl", "costs.jsonl"))
    if not config.resume:
        if lines.exists() and lines.stat().st_size:
            raise SettingError(f"{config.out} holds a run. Go on with it by --resume, or choose another --out.")
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomic(cost_lines, "")  # of one that was stopped before its first episode ended
        write_atomic(path, json.dumps(resolved_config, indent=2, ensure_ascii=False) + "\n")
        return {}, {}
    require_same_config(path, resolved_config)
    costs = {cost["episode"]: cost for cost in read_jsonl(cost_lines)}
    records = {record["episode"]: record for record in read_jsonl(lines) if record["episode"] in costs}
    costs = {position: costs[position] for position in records}
    for file, kept in ((lines, records), (cost_lines, costs)):
        write_atomic(file, "".join(map(to_jsonl, kept.values())))
    return records, costs


def require_empty_dir(folder: Path, otherwise: str = "") -> None:
    """Whether a run can begin in `folder`; `otherwise` is what to do besides choosing another.

    Raises:
        SettingError: it is a file, or holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} must be a new or empty folder, and is not. Choose another --out{otherwise}.")


def require_same_config(path: Path, resolved_config: dict[str, Any]) -> None:
    """Whether the run that is to be resumed is the one that `config.json` at `path` describes.

    Raises:
        SettingError: there is none, or it is another; the message names what differs.
    """
    if not path.is_file():
        raise SettingError(f"Nothing to resume: {path} does not exist. Leave --resume out to start.")
    before = json.loads(path.read_text(encoding="utf-8"))
    told = "; ".join(_differences({name: before.get(name) for name in resolved_config}, resolved_config))
    if told:
        raise SettingError(f"{path.parent} holds a run of another configuration: {told}.")


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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The finished episodes of an `episodes.jsonl`, in its order; none where there is no file.

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
