"""Opens and creates the tables of a memory store."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

from atommem_env.errors import MissingDependency, StoreError
from atommem_env.store.failures import RESTORE, convert_errors
from atommem_env.store.folder_lock import FolderLock
from atommem_env.store.tables import SCHEMA_VERSION, TABLES, VERSION_KEY, schema_of

_CACHE_BYTES = 4 << 20  # without a limit LanceDB's caches grow with every commit

_forked_after_lancedb = False


def forked_after_lancedb() -> bool:
    """Whether this process was forked from one that had loaded LanceDB, which hangs or crashes in such a child."""
    return _forked_after_lancedb


def _note_fork() -> None:
    global _forked_after_lancedb
    _forked_after_lancedb = _forked_after_lancedb or "lancedb" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class StoreTables:
    """The tables in a folder, opened as they are needed."""

    def __init__(self, folder_lock: FolderLock) -> None:
        self._folder_lock, self.folder = folder_lock, folder_lock.path
        self._connection: Any = None
        self._tables: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """A table, or None where there is none; creates neither table nor folder.

        Raises:
            StoreError: it is damaged, missing beside others, or of a newer version of AtomMem.
        """
        if forked_after_lancedb():
            raise StoreError(
                "This process was forked from one that had loaded LanceDB, which hangs or crashes in such a child. "
                "Start processes with multiprocessing.get_context('spawn'), or use threads."
            )
        if name not in self._tables:
            if self._connection is None and not self.folder.exists():
                return None
            table = self._open(name)
            if table is None and self._was_created(name):
                table = self._open(name)  # if another process has just created it
                if table is None:
                    raise StoreError(f"The table {name!r} of the memory store in {self.folder} is missing. {RESTORE}")
            if table is None:
                return None
            self._check_version(name, table.schema.metadata)
            self._tables[name] = table
        return self._tables[name]

    def ensure(self, name: str, dimension: int | None) -> Any:
        """A table, created where there is none; `dimension` (D) is needed for `journal` and `entries` only."""
        if (table := self.get(name)) is None:
            try:
                self._connect().create_table(name, schema=schema_of(name, dimension))
            except ValueError as error:
                if "already exists" not in str(error):  # another process was faster
                    raise
            table = self.get(name)
        return table

    def opened(self) -> list[Any]:
        """The tables that are open."""
        return list(self._tables.values())

    def close(self) -> None:
        """Closes all; a later call opens them again."""
        self._connection, self._tables = None, {}

    def _open(self, name: str) -> Any:
        """A table, or None where it has no version."""
        with convert_errors(self.folder, "open", name):
            try:
                return self._connect().open_table(name)
            except ValueError as error:
                if "was not found" not in str(error):
                    raise
                return None

    def _was_created(self, name: str) -> bool:
        """Whether a table without a version has data, or is missing beside one that is created after it."""
        if any((self.folder / f"{name}.lance" / "data").glob("*")):
            return True
        later = [table for other in TABLES[: TABLES.index(name)] if (table := self.get(other)) is not None]
        # Schema 1 created each when there were rows for it.
        return any(int(table.schema.metadata[VERSION_KEY]) > 1 for table in later)

    def _connect(self) -> Any:
        if self._connection is None:
            self._folder_lock.acquire_shared(make=False)
            try:
                import lancedb
            except ImportError as error:
                raise MissingDependency(
                    "A memory store needs the package lancedb: pip install lancedb, or set durability='off'."
                ) from error
            self._connection = lancedb.connect(
                self.folder,
                read_consistency_interval=timedelta(0),  # so that commits of other processes are visible
                session=lancedb.Session(
                    index_cache_size_bytes=_CACHE_BYTES,
                    metadata_cache_size_bytes=_CACHE_BYTES,
                ),
            )
        return self._connection

    def _check_version(self, name: str, metadata: dict[bytes, bytes] | None) -> None:
        version = (metadata or {}).get(VERSION_KEY)
        if version is None:
            raise StoreError(f"The table {name!r} in {self.folder} is not one of AtomMem's; choose another folder.")
        if int(version) > SCHEMA_VERSION:
            raise StoreError(
                f"The table {name!r} in {self.folder} has schema version {int(version)}, and this AtomMem reads up to "
                f"{SCHEMA_VERSION}. Upgrade atommem, or choose another folder."
            )
