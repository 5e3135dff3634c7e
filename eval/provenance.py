"""What a number is a number of: the code, the weights, the data and the machine behind a run.

What decides a run's numbers is part of its `config.json`, as hashes (`fingerprints`): a run is only resumed, pooled or compared
with what has the same. What merely surrounds it is in `provenance.json`, an item each time that it was started or resumed
(`session_record`): versions, commit, command, date, machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from agents.models.find import WEIGHTS
from atommem_env.packages import PACKAGES
from eval.run_folder import Record, write_atomic

FILE = "provenance.json"
_VERSIONS = ("gymnasium", "lancedb", "numpy", "torch", "transformers", "vllm")
_ROOT = Path(__file__).resolve().parents[1]
_OURS = (*PACKAGES, "atommem_env")
_WHOLE = 256 << 20  # bytes up to which a file is hashed whole
_BLOCKS, _BLOCK = 64, 1 << 20  # of a larger one: so many blocks of so many bytes, at equal distances


def fingerprints(parts: Mapping[str, object]) -> dict[str, str]:
    """SHA-256 of what is behind each part, by its name; a part of this package has none but its version.

    A part with a `folder` is its model's files (`hash_folder`); any other part of your own is the file that defines it.
    """
    found = {name: fingerprint(part) for name, part in parts.items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def fingerprint(part: object) -> str | None:
    """SHA-256 of a model's files, or of the source of a part of your own; None: it is one of ours, or has no source."""
    folder = getattr(part, "folder", None)
    if isinstance(folder, Path):
        return hash_folder(folder)
    return _hash_source(part)


def hash_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files: weights, configuration, tokenizer, chat template.

    Of a file above 256 MiB 64 blocks of 1 MiB count, at equal distances, and its size.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in WEIGHTS)
    stats = ((path, path.stat()) for path in files if path.name != "atommem.json")  # which says how the model is played
    return _hash_files(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@cache
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of paths, sizes and times of change; the time decides only whether a file is hashed again."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _hash_source(part: object) -> str | None:
    made: Any = part if inspect.isroutine(part) or isinstance(part, type) else type(part)
    module = sys.modules.get(getattr(made, "__module__", ""))
    if module is None or module.__name__.partition(".")[0] in (*_OURS, "builtins"):
        return None
    try:
        text = Path(inspect.getsourcefile(made) or "").read_bytes()
    except (OSError, TypeError):  # of a notebook or of the interpreter: what was typed, as far as Python knows it
        try:
            text = inspect.getsource(made).encode()
        except (OSError, TypeError):
            code = getattr(made, "__code__", None)
            text = code.co_code + repr(code.co_consts).encode() if code else b""
    return hashlib.sha256(text).hexdigest() if text else None


def session_record() -> Record:
    """What surrounds a run while it is played: versions, commit, command, date, machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "commit": commit(),
        "machine": {
            "name": platform.node(),
            "system": platform.platform(),
            "processors": os.cpu_count(),
        },
    }


@cache
def versions() -> dict[str, str | None]:
    """The versions of Python, of this package and of those that decide numbers; None: not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in ("atommem", *_VERSIONS)}}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The commit that this package runs from, with "+changes" where files differ from it; None: it is no checkout."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(_ROOT), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if status else "")


def add_session(folder: Path) -> None:
    """Adds `session_record` to the `provenance.json` of a run's folder."""
    sessions = read_sessions(folder)
    write_atomic(folder / FILE, json.dumps([*sessions, session_record()], indent=2, ensure_ascii=False) + "\n")


def read_sessions(folder: Path) -> list[Record]:
    """The items of a run's `provenance.json`, the first one first; none where there is no such file."""
    path = folder / FILE
    sessions: list[Record] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return sessions
