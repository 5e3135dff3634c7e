"""How operations are written as text, one file a dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from atommem_env.dialects.public_code import PublicCodeDialect
from atommem_env.dialects.tags import TagsDialect
from atommem_env.dialects.tool_calls import ToolCallsDialect
from atommem_env.errors import SettingError
from atommem_env.types import Entry, EpisodeSettings, Operation, OperationResult


class Dialect(Protocol):
    """Reads operations out of a reply, and writes them and the entries they name."""

    name: str

    def parse(self, reply: str) -> list[Operation | OperationResult]:
        """What `reply` says, in the order written; an `OperationResult` is a piece that could not be read. Never raises."""
        ...

    def write(self, operation: Operation) -> str:
        """The text that `parse` reads back as `operation`, if its text is one that the dialect can hold.

        None holds spaces at the ends of a text, NUL and lone surrogates. Of the dialects with tags none holds a tag of its own,
        nor an answer with `\\boxed{…}` in it; JSON holds the rest.
        """
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


_DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect for dialect in (TagsDialect(), PublicCodeDialect(), ToolCallsDialect())
}


def get_dialect(name: str) -> Dialect:
    """The dialect of the setting `dialect`.

    Raises:
        SettingError: there is none of that name.
    """
    if name not in _DIALECTS:
        raise SettingError(f"dialect must be one of {sorted(_DIALECTS)}, got {name!r}.")
    return _DIALECTS[name]
