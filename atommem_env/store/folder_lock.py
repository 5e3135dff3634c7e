"""A folder that several processes use at a time: who is there, and what is on the disk for good."""

from __future__ import annotations

import errno
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_NAME = ".in_use"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a network file system that was mounted without them


class FolderLock:
    """A folder and this user's mark in it, which the system removes with the process, however that ends.

    Where the system has no file locks nobody is ever known to be alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark: int | None = None  # a file descriptor
        self._close: Callable[[], object] = lambda: None

    def acquire_shared(self, *, make: bool) -> None:
        """Leaves a mark, once; `make` makes folder and file where they are not there, else there is no mark then.

        Raises:
            OSError: the folder cannot be made or written.
        """
        if self._mark is not None or sys.platform == "win32":
            return
        if make:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not (self.path / _NAME).exists():
            return
        mark = os.open(self.path / _NAME, os.O_RDWR | os.O_CREAT if make else os.O_RDONLY, 0o666)
        close = weakref.finalize(self, os.close, mark)
        try:
            fcntl.flock(mark, fcntl.LOCK_SH)  # waits while another user is alone
        except OSError as error:
            close()
            if error.errno not in _NO_LOCKS:
                raise
        else:
            self._mark, self._close = mark, close

    @contextmanager
    def acquire_exclusive(self, *, leaving: bool = False) -> Iterator[bool]:
        """Whether nobody else has a mark here; if so, whoever comes waits until the block is over.

        With `leaving` this user's own mark is gone afterwards. Of those who leave at the same time the last one is alone.
        """
        if self._mark is None or sys.platform == "win32":
            yield False
            return
        try:
            fcntl.flock(self._mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gives the own mark up first
            alone = True
        except BlockingIOError:
            alone = False
            if not leaving:
                fcntl.flock(self._mark, fcntl.LOCK_SH)
        try:
            yield alone
        finally:
            if leaving:
                self._close()
                self._mark = None
            elif alone:
                fcntl.flock(self._mark, fcntl.LOCK_SH)

    def sync(self) -> None:
        """Returns when all that is in the folder is on the disk, and would outlast a loss of power.

        Raises:
            OSError: the disk failed.
        """
        for folder, _, names in os.walk(self.path):
            for name in names:
                _sync(os.path.join(folder, name))
            _sync(folder)  # after what it lists
        _sync(str(self.path.parent))


def _sync(path: str) -> None:
    if sys.platform == "win32" and os.path.isdir(path):
        return  # Windows cannot, and need not
    try:
        handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    except FileNotFoundError:
        return  # another process joined files meanwhile
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
