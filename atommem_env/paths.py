"""Where data, models and memories live on this machine."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import platformdirs


def data_folder(*parts: str) -> Path:
    """The folder `ATOMMEM_DATA`, else `atommem` in the user's cache folder, joined with `parts`; not created here."""
    root = os.environ.get("ATOMMEM_DATA")
    return (Path(root) if root else platformdirs.user_cache_path("atommem", appauthor=False)).joinpath(*parts)


def temporary_folder(purpose: str) -> Path:
    """A new temporary folder; `remove_with` sets when it is removed."""
    return Path(tempfile.mkdtemp(prefix=f"atommem-{purpose}-"))


def remove_with(owner: object, folder: Path) -> Callable[[], object]:
    """Removes a folder when `owner` is garbage collected, at the end of the process, or when the returned function is called."""
    return weakref.finalize(owner, _remove, str(folder), os.getpid())


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not at the end of a forked child
        shutil.rmtree(folder, ignore_errors=True)
