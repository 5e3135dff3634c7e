"""Configurations from the tables of a TOML file: a field is a key, and its type says what may stand there."""

from __future__ import annotations

import dataclasses
import tomllib
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from atommem_env.errors import SettingError


def fields_of(made: type) -> dict[str, Any]:
    """Name → type of a configuration's fields."""
    hints = get_type_hints(made)
    return {field.name: hints[field.name] for field in dataclasses.fields(made)}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        SettingError: it is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not TOML: {error}.") from error


def read_table(path: Path, table: str, values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The values of a table, as the types of the fields that they are for have them.

    Args:
        path, table: where they stand, for the message.
        fields: name → type, as from `fields_of`.

    Raises:
        SettingError: there is no such field, or its value is of another type.
    """
    read = {}
    for name, value in values.items():
        if name not in fields:
            raise SettingError(f"{path}: [{table}] has no {name!r}. It has: {', '.join(fields)}.")
        try:
            read[name] = _convert(value, fields[name])
        except TypeError:
            expected = " or ".join(_names(fields[name]))
            raise SettingError(f"{path}: [{table}] {name} must be {expected}, got {value!r}.") from None
    return read


def _convert(value: Any, expected: Any) -> Any:
    """A value of TOML as a field's type has it; TypeError where it is of another.

    >>> _convert(["a=1"], tuple[str, ...]), _convert(1, float | None)
    (('a=1',), 1.0)
    """
    origin = get_origin(expected)
    if origin in (Union, UnionType):
        for option in get_args(expected):
            with suppress(TypeError):
                return _convert(value, option)
    elif origin is Literal:
        if value in get_args(expected):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(item, get_args(expected)[0]) for item in value)
    elif expected is Path and isinstance(value, str):
        return Path(value)
    elif expected is float and type(value) is int:
        return float(value)
    elif type(value) is expected:
        return value
    raise TypeError


def _names(expected: Any) -> list[str]:
    """What a type accepts, in words.

    >>> _names(Literal["a", "b"]), _names(tuple[str, ...]), _names(int | tuple[int, ...])
    (["'a'", "'b'"], ['a list of strings'], ['a whole number', 'a list of whole numbers'])
    """
    origin = get_origin(expected)
    if origin in (Union, UnionType):
        return [name for option in get_args(expected) if option is not NoneType for name in _names(option)]
    if origin is Literal:
        return [repr(option) for option in get_args(expected)]
    if origin is tuple:
        (item,) = _names(get_args(expected)[0])
        return [f"a list of {item.removeprefix('a ')}s"]
    return [{int: "a whole number", float: "a number", bool: "true or false"}.get(expected, "a string")]
