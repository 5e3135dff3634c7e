"""The environment's own tokenizers, so that every policy sees the same chunks whatever model it uses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from atommem_env.errors import MissingDependency, SettingError

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(Protocol):
    """Finds the tokens of a text."""

    @property
    def additive(self) -> bool:
        """Whether a text has as many tokens as its parts between white space together, and a token at least one character."""
        ...

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

    additive = True
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
    """A `tokenizer.json` of the Hugging Face `tokenizers` format, to count as a paper's model does.

    What the file says about truncation and padding does not count, nor do special tokens that a model's template adds.
    """

    additive = False  # white space can be tokens, and a character can be several

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise MissingDependency(
                f"tokenizer={str(path)!r} needs the package 'tokenizers': pip install 'atommem[local]'."
            ) from error
        self._backend = Backend.from_file(str(path))
        self._backend.no_truncation()
        self._backend.no_padding()

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        return iter(self._encode(text).offsets)

    def count(self, text: str) -> int:
        return len(self._encode(text).ids)

    def _encode(self, text: str) -> Any:
        # A lone surrogate, which a task of your own can have, is no Unicode.
        return self._backend.encode(_SURROGATE.sub("\ufffd", text), add_special_tokens=False)


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
    """The longest prefix of `text` that ends with a token and has at most `limit` of them; `text` itself if it fits.

    >>> truncate("one two three", 2, BuiltinTokenizer())
    'one two'
    """
    if tokenizer.additive and len(text) <= limit:
        return text
    ends = [end for _, end in islice(tokenizer.spans(text), limit + 1)]
    if len(ends) <= limit:
        return text
    for end in reversed(ends[:limit]):
        # Of a token that is a part of a character the prefix has the whole character; and alone it may have other tokens.
        if tokenizer.additive or tokenizer.count(text[:end]) <= limit:
            return text[:end]
    return ""
