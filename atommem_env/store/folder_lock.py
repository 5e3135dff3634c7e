"""A lock on a folder that several processes share, and a sync of the folder to the disk."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_NAME = ".in_use"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a network file system mounted without locks


class FolderLock:
    """A folder and this process's lock on it, which the system releases with the process, however that ends.

    Where the system has no file locks, no exclusive lock is ever granted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None  # of the open lock file
        self._close: Callable[[], object] = lambda: None

    def acquire_shared(self, *, make: bool) -> None:
        """Takes a shared lock, unless it is held already.

        Args:
            make: creates folder and lock file where they do not exist; without it, nothing is locked then.

        Raises:
            OSError: the folder cannot be created or written.
        """
        if self._descriptor is not None or sys.platform == "win32":
            return
        if make:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not (self.path / _NAME).exists():
            return
        descriptor = os.open(self.path / _NAME, os.O_RDWR | os.O_CREAT if make else os.O_RDONLY, 0o666)
        close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits while another process holds the exclusive lock
        except OSError as error:
            close()
            if error.errno not in _NO_LOCKS:
                raise
        else:
            self._descriptor, self._close = descriptor, close

    @contextmanager
    def acquire_exclusive(self, *, leaving: bool = False) -> Iterator[bool]:
        """Tries to take the exclusive lock for the block; yields whether it was granted, which it is to the only user.

        Other processes wait until the block is over. With `leaving` this process's lock is released afterwards; of several
        that leave at the same time the last one is granted the exclusive lock.
        """
        if self._descriptor is None or sys.platform == "win32":
            yield False
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # releases the shared lock first
            granted = True
        except BlockingIOError:
            granted = False
            if not leaving:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        try:
            yield granted
        finally:
            if leaving:
                self._close()
                self._descriptor = None
            elif granted:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def clock_difference(self) -> float:
        """By how many seconds this process's clock is ahead of the clock that dates the files in the folder.

        Raises:
            OSError: the folder cannot be written.
        """
        with tempfile.TemporaryFile(dir=self.path, buffering=0) as file:
            file.write(b"\n")
            now = time.time()
            return now - os.fstat(file.fileno()).st_mtime

    def sync(self) -> None:
        """Returns when everything in the folder is on the disk and survives a loss of power.

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
        return  # another process compacted files meanwhile
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
