"""LanceDB's exceptions as errors of a memory store, each with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atommem_env.errors import StoreError

_DISK_FULL = ("No space left", "os error 28", "File too large", "os error 27", "quota", "os error 122")
_UNUSABLE = (
    "Permission denied",
    "Read-only",
    "Operation not permitted",
    "File exists",
    "Not a directory",
    "parse path",
)
# of no use to a reader
_FROM_RUST = re.compile(r"lance error: |LanceError\(\w+\): |Generic N/A error: |Wrapped error: |,? /\S+\.rs:\d+(:\d+)?")
_PANICS = ("RustPanic", "PanicException")  # of LanceDB's Rust on damaged bytes, by name: they cannot be imported
_WRITING = ("write", "optimize")
RESTORE = (
    "If the folder was copied while a process wrote to it, copy it again when none does; else restore it from a backup."
)


@contextmanager
def convert_errors(folder: Path, action: str, table: str = "") -> Iterator[None]:
    """Converts LanceDB's exceptions into a StoreError.

    Args:
        action: what is done to the store: "open", "read", "search", "write", "optimize".
        table: the one that it is done to, where it is known.
    """
    try:
        yield
    except StoreError:
        raise
    except BaseException as error:
        if not isinstance(error, (OSError, RuntimeError, ValueError)) and type(error).__name__ not in _PANICS:
            raise
        cause = " ".join(_FROM_RUST.sub("", str(error)).split()).rstrip(".")
        what = f"the table {table!r} of the memory store" if table else "the memory store"
        raise StoreError(f"Cannot {action} {what} in {folder}: {cause}. {_advice(action, str(error))}") from error


def _advice(action: str, cause: str) -> str:
    """What to do after an error of LanceDB."""
    if any(sign in cause for sign in _DISK_FULL):
        return "Free some space and write again: everything is still buffered."
    if any(sign in cause for sign in _UNUSABLE):
        return f"Name a folder that this user can {'write' if action in _WRITING else 'read'}, or set durability='off'."
    if action in _WRITING and "Not found" not in cause:
        return "Name a folder that this user can write, or set durability='off'."
    return f"A file of it is damaged or missing. {RESTORE}"


@contextmanager
def ignore_conflicts() -> Iterator[None]:
    """For cleanup: another process did the same at that moment, no row is at stake, and a later call completes it."""
    try:
        yield
    except RuntimeError as error:
        if "conflict" not in str(error).lower():
            raise
