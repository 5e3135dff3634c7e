"""The environment's own tokenizers, so that every policy sees the same chunks whatever model it uses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from atommem_env.errors import MissingDependency, SettingError


class Tokenizer(Protocol):
    """Finds the tokens of a text."""

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of every token, in characters, in order."""
        ...

    def count(self, text: str) -> int:
        """The number of tokens in `text`."""
        ...


class BuiltinTokenizer:
    """Words and punctuation marks; needs no file.

    >>> BuiltinTokenizer().count("Ada's boat, 1907.")
    7
    """

    _token = re.compile(r"\w+|[^\w\s]")

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        return (match.span() for match in self._token.finditer(text))

    def count(self, text: str) -> int:
        # A whole context is counted at every reset. Counting word starts and marks in the classes of its bytes takes half the
        # time of finding the tokens.
        try:
            classes = text.encode("latin-1").translate(_CLASSES)
        except UnicodeEncodeError:
            return len(self._token.findall(text))
        return classes.count(b".") + classes.count(b" w") + classes.count(b".w") + classes.startswith(b"w")


def _class_of(character: str) -> str:
    return "w" if re.match(r"\w", character) else " " if character.isspace() else "."


_CLASSES = "".join(_class_of(chr(number)) for number in range(256)).encode()  # of each character of Latin-1


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` format, to count as a paper's model does."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise MissingDependency(
                f"tokenizer={str(path)!r} needs the package 'tokenizers': pip install 'atommem[local]'."
            ) from error
        self._backend = Backend.from_file(str(path))

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        return iter(self._backend.encode(text, add_special_tokens=False).offsets)

    def count(self, text: str) -> int:
        return len(self._backend.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=8)
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of the setting `tokenizer`: "builtin", or the path of a `tokenizer.json`.

    Raises:
        SettingError: it is neither of the two.
    """
    if name == "builtin":
        return BuiltinTokenizer()
    if Path(name).is_file():
        return FileTokenizer(Path(name))
    raise SettingError(f"tokenizer must be 'builtin' or the path of an existing tokenizer.json, got {name!r}.")


def truncate(text: str, limit: int, tokenizer: Tokenizer) -> str:
    """The longest prefix of `text` with at most `limit` tokens; `text` itself if it fits.

    >>> truncate("one two three", 2, BuiltinTokenizer())
    'one two'
    """
    if len(text) <= limit:  # a token has at least one character
        return text
    end = 0
    for index, span in enumerate(tokenizer.spans(text)):
        if index == limit:
            return text[:end]
        end = span[1]
    return text
