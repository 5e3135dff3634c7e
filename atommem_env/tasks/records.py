"""The common form of the rows of all question-answering datasets, and the checks of their fields."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from atommem_env.errors import DataError, OutOfRange
from atommem_env.types import Document, Question

T = TypeVar("T")

_NAMES = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Record:
    """One question with the documents of its row."""

    question: Question
    documents: tuple[Document, ...]  # in the order of the file; blank ones are left out
    supporting: tuple[int, ...]  # indices of those that contain evidence, ascending
    repairs: tuple[str, ...] = ()  # problems of the row that were repaired, each once


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def excerpt(value: object) -> str:
    """A value in an error message, shortened.

    >>> len(excerpt("x" * 1000)), excerpt("Ada")
    (60, "'Ada'")
    """
    return _SHORT.repr(value)


def some(names: Iterable[object]) -> str:
    """Names in an error message, at most 6 of them.

    >>> some(["a", "b"]), some(range(10)), some([])
    ('a, b', '0, 1, 2, 3, 4, 5 … (10 in all)', 'none')
    """
    every = [str(name) for name in names]
    listed = ", ".join(name if len(name) <= 20 else f"{name[:19]}…" for name in every[:6])
    return (listed or "none") + (f" … ({len(every)} in all)" if len(every) > 6 else "")


def check_range(name: str, value: int, end: int | None = None) -> None:
    """Checks the index (below `end`) or the seed (of any size) that names a task.

    Raises:
        OutOfRange: it is negative, or not below `end`.
    """
    if value < 0 or (end is not None and value >= end):
        expected = "at least 0" if end is None else f"from 0 to {end - 1}"
        raise OutOfRange(f"{name} must be {expected}, got {value}.")


def required(record: Mapping[str, Any], name: str, kind: type[T], where: str = "") -> T:
    """The value of a field.

    Args:
        record: the object that must have the field.
        name: of the field.
        kind: the exact type that the value must have.
        where: prefix of the name in an error, e.g. "paragraphs[3]." for a nested object.

    Raises:
        DataError: the field is missing, of another type, or text that is not Unicode.
    """
    return checked(present(record, name, where), kind, where + name)


def present(record: Mapping[str, Any], name: str, where: str = "") -> Any:
    """The value of a field, of any type; raises `DataError` where it is missing."""
    if name not in record:
        raise DataError(f"field '{where}{name}' is missing; the fields are {some(record)}.")
    return record[name]


def required_text(record: Mapping[str, Any], name: str, where: str = "") -> str:
    """The value of a text field that must not be blank; raises `DataError` as `required` does, or where it is blank."""
    text = required(record, name, str, where)
    if not text.strip():
        raise DataError(f"field '{where}{name}' is blank.")
    return text


def checked(value: Any, kind: type[T], name: str) -> T:
    """`value`, if it is of exactly the type `kind` (`True` is not an int); else raises `DataError` with the field's `name`."""
    if type(value) is not kind:
        raise DataError(f"field '{name}' must be {_NAMES[kind]}, got {excerpt(value)}.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can escape half a character, which no file or store can hold
            raise DataError(f"field '{name}' has a lone surrogate at character {error.start}.") from error
    return value


def required_rows(record: Mapping[str, Any], name: str) -> list[Any]:
    """The rows of a field that is a list of rows, an object of columns, or the JSON text of either.

    The official files have lists; conversions on the Hugging Face hub have the other two forms.

    >>> required_rows({"context": {"title": ["Bath", "Emma"], "sentences": [["A city."], ["A novel."]]}}, "context")
    [{'title': 'Bath', 'sentences': ['A city.']}, {'title': 'Emma', 'sentences': ['A novel.']}]

    Raises:
        DataError: the field is missing, none of these, or has columns of different lengths.
    """
    value = present(record, name)
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"field '{name}' is text that is not JSON ({error}).") from error
    if not isinstance(value, dict):
        return checked(value, list, name)
    columns = {column: checked(values, list, f"{name}.{column}") for column, values in value.items()}
    if len({len(values) for values in columns.values()}) > 1:
        lengths = some(f"{len(values)} of '{column}'" for column, values in columns.items())
        raise DataError(f"field '{name}' must have columns of one length, got {lengths}.")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
