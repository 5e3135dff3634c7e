"""The files of a folder, in reading order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"(\d+)")


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder and of its subfolders, but hidden ones, by name, numbers by value (`ch2` before `ch10`)."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return sorted(files, key=_reading_order)


def _reading_order(path: Path) -> list[list[Any]]:
    """
    >>> [path.name for path in sorted(map(Path, ("ch10.md", "ch2.md", "Ch1.md")), key=_reading_order)]
    ['Ch1.md', 'ch2.md', 'ch10.md']
    """
    return [
        [int(piece) if number % 2 else piece.casefold() for number, piece in enumerate(_NUMBER.split(part))]
        for part in path.parts
    ]
