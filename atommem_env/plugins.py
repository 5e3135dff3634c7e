"""User-defined parts by name: `module:attribute`, the same wherever a part can be named."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any, TypeGuard, TypeVar

from atommem_env.errors import PluginError, SettingError, ShadowedPackage

T = TypeVar("T")

MODULES = (
    "ATOMMEM_MODULES"  # variable with the folder that modules are looked for in after the working folder: on a cluster
)
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_target(name: object) -> TypeGuard[str]:
    """Whether a name has the form `module:attribute`.

    >>> is_target("my_module:policy"), is_target("my.package:Class.method"), is_target("oracle"), is_target("openai:a/b")
    (True, True, False, False)
    """
    return isinstance(name, str) and _TARGET.fullmatch(name) is not None


def load_module(name: str) -> ModuleType:
    """A module, which is looked for in the working folder first.

    Raises:
        PluginError: there is none, or it cannot be imported; the message is one line.
        ShadowedPackage: it imports `agents`, `eval` or `train`, and finds a package that is not this project's.
    """
    for folder in filter(None, (os.environ.get(MODULES), str(Path.cwd()))):
        if folder not in sys.path[:2]:  # not only somewhere behind other folders
            sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ShadowedPackage:
        raise
    except (Exception, SystemExit) as error:  # of any kind: the module is anybody's
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise PluginError(
                f"There is no module {name!r} in the working folder, {Path.cwd()}, nor on Python's path."
            ) from error
        cause = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise PluginError(
            f"Module {name!r} cannot be imported: {type(error).__name__}: {cause} ({raised_at(error)})."
        ) from error


def raised_at(error: BaseException) -> str:
    """File and line where an error was raised: the last that is not of an installed package, where there is one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen ")]
    of_ones_own = [
        frame for frame in frames[1:] if not frame.filename.startswith(installed)
    ]  # the first is this module
    last = (of_ones_own or frames)[-1]
    return f"{last.filename}, line {last.lineno}"


def load_attribute(target: str) -> Any:
    """What `module:attribute` names; the module is looked for in the working folder first.

    Raises:
        PluginError: there is no such module, it cannot be imported, or it has no such attribute.
        ShadowedPackage: as in `load_module`.
    """
    module_name, _, attribute = target.partition(":")
    found: Any = load_module(module_name)
    where = getattr(found, "__file__", None)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PluginError(
                f"Module {module_name!r} ({where}) has no {attribute!r}{suggest(part, dir(found)) or '.'}"
            )
        found = getattr(found, part)
    return found


_load = cache(load_attribute)


def find_function(given: str | T, known: Mapping[str, T], what: str, expected: str) -> T:
    """The function that is called so in `known`, that `module:attribute` names, or `given` itself.

    Args:
        what, expected: for the message: what it is to be, and what can be given beside the names of `known`.

    Raises:
        SettingError: there is none of that name, or it cannot be called.
        PluginError: `module:attribute` names nothing.
    """
    if isinstance(given, str) and given in known:
        return known[given]
    function: Any = _load(given) if is_target(given) else given
    if isinstance(function, str) or not callable(function):
        raise SettingError(
            f"{what} must be one of {', '.join(known)}, {expected}, got {given!r}{suggest(str(given), known) or '.'}"
        )
    found: T = function
    return found


def load_part(target: str) -> Any:
    """The object that `module:attribute` names; a class is instantiated, without arguments.

    Raises:
        PluginError: it names nothing, or a class that needs arguments.
    """
    part = load_attribute(target)
    if not isinstance(part, type):
        return part
    try:
        return part()
    except TypeError as error:
        raise PluginError(f"{target} is a class that needs arguments ({error}); name an object of it.") from error


def name_of(part: object) -> str:
    """A part's name in records: the name as given, or `module:attribute` of an object's class or function.

    >>> name_of("tags"), name_of(name_of)
    ('tags', 'atommem_env.plugins:name_of')
    """
    if isinstance(part, str):
        return part
    definition = part if hasattr(part, "__qualname__") else type(part)
    return f"{definition.__module__}:{definition.__qualname__}"


def suggest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, as the end of a sentence; "" where none is close.

    >>> suggest("oracel", ["oracle", "random"]), suggest("xyz", ["oracle"])
    ("; did you mean 'oracle'?", '')
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
