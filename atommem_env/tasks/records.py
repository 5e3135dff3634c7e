"""The form that a row of every question-answering dataset is brought into, and the checks of its fields."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from atommem_env.errors import DataError
from atommem_env.types import Document, Question

T = TypeVar("T")

_NAMES = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Record:
    """One question with the documents that its dataset puts beside it."""

    question: Question
    documents: tuple[Document, ...]  # in the order of the file; blank ones are left out
    supporting: tuple[int, ...]  # which of them hold evidence, ascending
    repairs: tuple[str, ...] = ()  # what was wrong with the row and has been mended, each thing once


def required(record: Mapping[str, Any], name: str, kind: type[T], where: str = "") -> T:
    """The value of a field.

    Args:
        record: The object that must have the field.
        name: The field.
        kind: The exact type that the value must have.
        where: What stands before the name in an error, e.g. "paragraphs[3]." for a nested object.

    Raises:
        DataError: the field is missing, of another type, or text that is not Unicode.
    """
    if name not in record:
        raise DataError(f"field '{where}{name}' is missing; the fields are {', '.join(map(str, record)) or 'none'}.")
    return checked(record[name], kind, where + name)


def required_text(record: Mapping[str, Any], name: str, where: str = "") -> str:
    """The value of a text field that must say something; raises `DataError` as `required` does, or when it is blank."""
    text = required(record, name, str, where)
    if not text.strip():
        raise DataError(f"field '{where}{name}' is blank.")
    return text


def checked(value: Any, kind: type[T], name: str) -> T:
    """`value`, known to be of exactly the type `kind` (`True` is no whole number), else `DataError` naming it."""
    if type(value) is not kind:
        raise DataError(f"field '{name}' must be {_NAMES[kind]}, got {reprlib.repr(value)}.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a character, which no file and no store can hold
            raise DataError(f"field '{name}' has a lone surrogate at character {error.start}.") from error
    return value
