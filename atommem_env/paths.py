"""Where data, models and memories live on this machine."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def data_folder(*parts: str) -> Path:
    """The folder `ATOMMEM_DATA`, else `atommem` in the user's cache folder, joined with `parts`; not created here."""
    root = os.environ.get("ATOMMEM_DATA")
    return (Path(root) if root else platformdirs.user_cache_path("atommem", appauthor=False)).joinpath(*parts)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which replaces it at the end of the block; after an error `path` is as it was before.

    A symbolic link stays, and what it points to is replaced. A device or a pipe is written itself.

    Raises:
        OSError: from the block; it names `path` where it named no file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_folder(purpose: str) -> Path:
    """A new temporary folder; `remove_with` sets when it is removed."""
    return Path(tempfile.mkdtemp(prefix=f"atommem-{purpose}-"))


def remove_with(owner: object, folder: Path) -> Callable[[], object]:
    """Removes a folder when `owner` is garbage collected, at the end of the process, or when the returned function is called."""
    return weakref.finalize(owner, _remove, str(folder), os.getpid())


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not at the end of a forked child
        shutil.rmtree(folder, ignore_errors=True)
