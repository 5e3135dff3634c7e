"""Task sources, one file for each dataset."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from atommem_env.errors import SettingError
from atommem_env.plugins import is_target, load_attribute, suggest
from atommem_env.tasks.files import FilesSource
from atommem_env.tasks.haystack import HaystackSource
from atommem_env.tasks.synthetic import SyntheticSource
from atommem_env.tasks.task_list import TaskList
from atommem_env.types import Task, TaskSource

SOURCES: dict[str, Callable[..., TaskSource]] = {
    "hotpotqa": partial(HaystackSource, "hotpotqa"),
    "2wikimultihopqa": partial(HaystackSource, "2wikimultihopqa"),
    "musique": partial(HaystackSource, "musique"),
    "synthetic": SyntheticSource,
    "files": FilesSource,
}
Source = str | Task | Sequence[Task] | TaskSource | Callable[..., TaskSource]
"""What selects a task source: a dataset's name, `module:attribute`, tasks, a source, or a factory that takes the options."""


def source_options(source: Source) -> dict[str, inspect.Parameter]:
    """The options of a task source: the keyword arguments of its factory; none for an object.

    Raises:
        SettingError, PluginError: as in `make_source`.
    """
    factory = _factory(source)
    parameters = inspect.signature(factory).parameters.values()
    return {parameter.name: parameter for parameter in parameters}


def make_source(source: Source, **options: Any) -> TaskSource:
    """The task source of a built-in dataset, or your own.

    Args:
        source: a name of `SOURCES`; one or more `Task`; a `TaskSource`; a class or function that returns one; or
            `module:attribute` of any of these.
        options: of the source, by keyword.

    Raises:
        SettingError: no such dataset, an unknown option, or an object that is not a task source.
        PluginError: `module:attribute` names nothing.
    """
    factory = _factory(source)
    known = inspect.signature(factory).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise SettingError(
            f"{source} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}"
            f"{suggest(unknown[0], known) or '.'}"
        )
    made = factory(**options)
    missing = [name for name in ("dataset", "task", "__len__") if not hasattr(made, name)]
    if missing:
        raise SettingError(
            f"A task source is an object like atommem_env.types.TaskSource, got {made!r}, which has no {', '.join(missing)}."
        )
    return made


def _factory(source: Source) -> Callable[..., TaskSource]:
    """The function that makes the source from its options."""
    if isinstance(source, str) and source in SOURCES:
        return SOURCES[source]
    part: Any = load_attribute(source) if is_target(source) else source
    if isinstance(part, Task):
        return lambda: TaskList([part])
    if isinstance(part, list | tuple):
        return lambda: TaskList(part)
    if hasattr(part, "task") and not isinstance(part, type):
        return lambda: part
    if callable(part):
        return part
    raise SettingError(
        f"source must be one of {', '.join(sorted(SOURCES))}, module:attribute, tasks or an object like "
        f"atommem_env.types.TaskSource, got {source!r}{suggest(str(source), SOURCES) or '.'}"
    )
