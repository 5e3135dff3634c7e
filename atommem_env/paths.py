"""Where data, models and memories live on this machine."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import platformdirs


def data_folder(*parts: str) -> Path:
    """The folder `ATOMMEM_DATA`, or `atommem` in the user's cache folder, joined with `parts`; not created here."""
    root = os.environ.get("ATOMMEM_DATA")
    return (Path(root) if root else platformdirs.user_cache_path("atommem", appauthor=False)).joinpath(*parts)


def temporary_folder(purpose: str) -> Path:
    """A new folder that nobody else has; `remove_with` says when it goes."""
    return Path(tempfile.mkdtemp(prefix=f"atommem-{purpose}-"))


def remove_with(owner: object, folder: Path) -> Callable[[], object]:
    """Removes a folder when nobody has `owner` any more, at the end of the process, or when what is returned is called."""
    return weakref.finalize(owner, _remove, str(folder), os.getpid())


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not at the end of a child that was forked
        shutil.rmtree(folder, ignore_errors=True)
