"""Where tasks come from, one file a dataset."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from atommem_env.errors import SettingError
from atommem_env.tasks.files import FilesSource
from atommem_env.tasks.haystack import HaystackSource
from atommem_env.tasks.synthetic import SyntheticSource
from atommem_env.types import TaskSource

SOURCES: dict[str, Callable[..., TaskSource]] = {
    "hotpotqa": partial(HaystackSource, "hotpotqa"),
    "2wikimultihopqa": partial(HaystackSource, "2wikimultihopqa"),
    "musique": partial(HaystackSource, "musique"),
    "synthetic": SyntheticSource,
    "files": FilesSource,
}


def source_options(dataset: str) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a dataset's source.

    Raises:
        SettingError: there is no such dataset.
    """
    if dataset not in SOURCES:
        raise SettingError(f"dataset must be one of {sorted(SOURCES)}, got {dataset!r}.")
    parameters = inspect.signature(SOURCES[dataset]).parameters.values()
    return {parameter.name: parameter for parameter in parameters}


def make_source(dataset: str, **options: Any) -> TaskSource:
    """The task source of a dataset.

    Raises:
        SettingError: no such dataset, or an option that it does not have.
    """
    known = source_options(dataset)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise SettingError(f"{dataset} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return SOURCES[dataset](**options)
