"""How operations are written as text, one file a dialect."""

from __future__ import annotations

from functools import cache
from typing import Any

from atommem_env.dialects.public_code import PublicCodeDialect
from atommem_env.dialects.tags import TagsDialect
from atommem_env.dialects.tool_calls import ToolCallsDialect
from atommem_env.errors import SettingError
from atommem_env.plugins import is_target, load_part, suggest
from atommem_env.types import Dialect

_DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect for dialect in (TagsDialect(), PublicCodeDialect(), ToolCallsDialect())
}


def get_dialect(dialect: str | Dialect) -> Dialect:
    """The dialect of the setting `dialect`: its name, `module:attribute` of your own object or class, or the object.

    Raises:
        SettingError: there is no dialect of that name, or the object is not a dialect.
        PluginError: `module:attribute` names nothing.
    """
    if not isinstance(dialect, str):
        return _check(dialect)
    if dialect in _DIALECTS:
        return _DIALECTS[dialect]
    if is_target(dialect):
        return _load(dialect)
    raise SettingError(
        f"dialect must be one of {', '.join(sorted(_DIALECTS))}, module:attribute or an object, got {dialect!r}"
        f"{suggest(dialect, _DIALECTS) or '.'}"
    )


@cache
def _load(target: str) -> Dialect:
    return _check(load_part(target))


def _check(dialect: Any) -> Dialect:
    missing = [
        name for name in ("name", "parse", "write", "show", "entry_id", "describe") if not hasattr(dialect, name)
    ]
    if missing or isinstance(dialect, type):
        raise SettingError(
            f"A dialect is an object like atommem_env.types.Dialect, got {dialect!r}"
            + (f", which has no {', '.join(missing)}." if missing else ", a class; give an object of it.")
        )
    checked: Dialect = dialect
    return checked
