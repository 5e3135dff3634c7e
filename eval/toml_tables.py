"""Recipes: configurations from the tables of TOML files. A field is a key, and its type says which values it takes.

A recipe may be based on another one, which it names before its first table, and then says only what differs:

    base = "qwen3-8b-hotpotqa"        # a shipped recipe of the same command, or a path relative to this file

    [env]
    set = ["scratchpad=false"]        # added to the base's: of two values the later one counts

Tables are merged key by key; every other value, a list of tables like [[policies]] too, replaces the base's. "None" leaves a
field without a value, as on the command line, where that is possible. A base may have a base of its own.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from atommem_env.errors import SettingError
from atommem_env.plugins import suggest


def fields_of(made: type) -> dict[str, Any]:
    """Name → type of a configuration's fields."""
    hints = get_type_hints(made)
    return {field.name: hints[field.name] for field in dataclasses.fields(made)}


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """What a recipe and its bases say together; as text, the names of their files."""

    paths: tuple[Path, ...]  # the recipe's own file, its base's, that one's base's, …
    tables: dict[str, Any]  # merged, without `base`

    @property
    def name(self) -> str:
        """What a record calls the recipe: the name of its file, without the folder."""
        return self.paths[0].name.removesuffix(".toml")

    def __str__(self) -> str:
        first, *bases = map(str, self.paths)
        return f"{first} (base: {', '.join(bases)})" if bases else first


def read_recipe_file(name: str, shipped: Path, *, joined: Collection[str] = ("set",)) -> RecipeFile:
    """The recipe that a command line names, merged with its bases.

    Args:
        name: of a recipe that comes with this package, with or without `.toml`; or the path of a TOML file.
        shipped: the folder of those that come with this package.
        joined: keys whose lists are added to the base's.

    Raises:
        SettingError: there is no such recipe, one of the files is not TOML, or they are based on one another in a circle.
    """
    paths: list[Path] = []
    layers: list[dict[str, Any]] = []
    wanted, folder = name, Path()
    while True:
        path = _find_recipe(wanted, shipped, folder, based=paths[-1] if paths else None)
        if any(path.samefile(before) for before in paths):
            circle = " → ".join(map(str, [*paths, path]))
            raise SettingError(f"Recipes are based on one another in a circle: {circle}. Take one `base` out.")
        paths.append(path)
        layers.append(_read_toml(path))
        base = layers[-1].pop("base", None)
        if base is None:
            break
        if not isinstance(base, str):
            raise SettingError(f"{path}: base must be the name or the path of a recipe, got {base!r}.")
        wanted, folder = base, path.parent
    tables: dict[str, Any] = {}
    for layer in reversed(layers):
        tables = _merged(tables, layer, joined)
    return RecipeFile(tuple(paths), tables)


def shipped_recipes(shipped: Path) -> list[str]:
    """The recipes that come with this package, in a folder of `configs/`."""
    return sorted(path.stem for path in shipped.glob("*.toml"))


def _find_recipe(name: str, shipped: Path, folder: Path, *, based: Path | None) -> Path:
    """The file of a recipe; `folder` is what a path is relative to, `based` the file that names it as its base."""
    stem = name.removesuffix(".toml")
    names, suffix = shipped_recipes(shipped), name[len(stem) :]
    given = folder / Path(name).expanduser()
    if given.is_file() and not (stem in names and not suffix):  # a bare name is that of a shipped one
        return given
    if stem in names:
        return shipped / f"{stem}.toml"
    argument = f"{based}: base" if based else "A recipe"
    known = ", ".join(known + suffix for known in names)
    raise SettingError(
        f"{argument} is one of {known}, or the path of a TOML file; got {name!r}{suggest(stem, names) or '.'}"
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not TOML: {error}.") from error


def _merged(base: dict[str, Any], own: dict[str, Any], joined: Collection[str]) -> dict[str, Any]:
    """
    >>> _merged({"env": {"set": ["a=1"], "seed": 0}}, {"env": {"set": ["a=2"]}, "steps": 3}, ("set",))
    {'env': {'set': ['a=1', 'a=2'], 'seed': 0}, 'steps': 3}
    """
    merged = dict(base)
    for name, value in own.items():
        before = base.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[name] = _merged(before, value, joined)
        elif name in joined and isinstance(before, list) and isinstance(value, list):
            merged[name] = before + value
        else:
            merged[name] = value
    return merged


def read_table(where: object, table: str, values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The values of a table, converted to the types of the fields that they are for.

    Args:
        where, table: the file and its table, for the message.
        fields: name → type, as from `fields_of`.

    Raises:
        SettingError: there is no such field, or its value is of another type.
    """
    read = {}
    for name, value in values.items():
        if name not in fields:
            raise SettingError(
                f"{where}: [{table}] has no {name!r}{suggest(name, fields) or '.'} It has: {', '.join(fields)}."
            )
        try:
            read[name] = _convert(value, fields[name])
        except TypeError:
            expected = " or ".join(_names(fields[name]))
            raise SettingError(f"{where}: [{table}] {name} must be {expected}, got {value!r}.") from None
    return read


def _convert(value: Any, expected: Any) -> Any:
    """A value of TOML converted to a field's type; TypeError where that cannot be.

    >>> _convert(["a=1"], tuple[str, ...]), _convert(1, float | None), _convert("None", str | None)
    (('a=1',), 1.0, None)
    """
    origin = get_origin(expected)
    if origin in (Union, UnionType):
        if value == "None" and NoneType in get_args(expected):
            return None
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
