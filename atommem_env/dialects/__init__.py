"""How operations are written as text, one file a dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from atommem_env.dialects.tags import TagsDialect
from atommem_env.errors import SettingError
from atommem_env.types import Entry, EpisodeSettings, Operation, OperationResult


class Dialect(Protocol):
    """Reads operations out of a reply, and writes them and the entries they name."""

    name: str

    def parse(self, reply: str) -> list[Operation | OperationResult]:
        """What `reply` says, in the order written; an `OperationResult` is a piece that could not be read. Never raises."""
        ...

    def write(self, operation: Operation) -> str:
        """The text that `parse` reads back as `operation`."""
        ...

    def show(self, entries: Sequence[Entry]) -> str:
        """The entries as an observation shows them, best first."""
        ...

    def entry_id(self, target: str, shown: Sequence[str]) -> str:
        """The entry id that `target` means, given the ids shown in the observation; need not exist."""
        ...

    def describe(self, settings: EpisodeSettings) -> str:
        """The operations that these settings allow, explained to a language model."""
        ...


_DIALECTS: dict[str, Dialect] = {"tags": TagsDialect()}


def get_dialect(name: str) -> Dialect:
    """The dialect of the setting `dialect`.

    Raises:
        SettingError: there is none of that name.
    """
    if name not in _DIALECTS:
        raise SettingError(f"dialect must be one of {sorted(_DIALECTS)}, got {name!r}.")
    return _DIALECTS[name]
