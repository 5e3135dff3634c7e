"""Reads the official files of datasets record by record; and reads and writes JSON lines with random access."""

from __future__ import annotations

import gzip
import json
import mmap
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from atommem_env.errors import DataError, DatasetNotFound

_PIECE = 1 << 20  # characters of a JSON list read at a time
_LONGEST = 1 << 24  # characters; a longer record is damaged, and must not fill the memory
_decode = json.JSONDecoder().raw_decode
_SPACE = re.compile(r"\s*")

# ------------------------------------------------------------------------------------------------------- official files


def read_records(path: Path, progress: Callable[[int], object] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file that holds one JSON list, JSON lines or a parquet table; the first two plain or gzipped.

    The form is detected by content, not by name. Only a piece of the file is in memory at a time.

    Args:
        path: the file.
        progress: called regularly with the number of bytes read so far.

    Yields:
        The location, such as "dev.json, index 3 of the list" (from 0) or "dev.jsonl, line 4" (from 1), and the record.

    Raises:
        DatasetNotFound: there is no such file.
        DataError: the file is truncated, not UTF-8, not JSON, or a record is not an object or far too long.
    """
    if not path.is_file():
        raise DatasetNotFound(f"There is no file {path}: give the path of the dataset's official file.")
    last = "its beginning"
    try:
        with path.open("rb") as raw:
            start = raw.peek(4)
            if start[:4] == b"PK\x03\x04":
                raise DataError("its beginning: a zip archive; unpack it, and give the file of questions inside.")
            items = _parquet_rows(raw) if start[:4] == b"PAR1" else _json_items(raw, gzipped=start[:2] == b"\x1f\x8b")
            for number, (last, value) in enumerate(items):
                if not isinstance(value, dict):
                    raise DataError(f"{last}: expected a JSON object, got {type(value).__name__}.")
                if progress and number % 256 == 0:
                    progress(raw.tell())
                yield f"{path}, {last}", value
            if progress:
                progress(path.stat().st_size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: damaged or truncated gzip after {last} ({error}); download the file again."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text after {last} ({error.reason}); download the file again.") from error
    except DataError as error:
        raise DataError(f"{path}, {error}") from error


def _json_items(raw: Any, *, gzipped: bool) -> Iterator[tuple[str, Any]]:
    """(location, value) of each item of a JSON list, or of each line."""
    binary = gzip.GzipFile(fileobj=raw) if gzipped else raw
    listed = binary.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    with TextIOWrapper(binary, encoding="utf-8-sig") as stream:
        yield from _list_items(stream) if listed else _line_items(stream)


def _line_items(stream: IO[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(iter(lambda: stream.readline(_LONGEST + 1), ""), 1):
        if len(line) > _LONGEST:
            raise _too_long(f"line {number}")
        if not line.isspace():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number}: not JSON ({error}); expected JSON lines or one JSON list.") from error
            yield f"line {number}", value


def _list_items(stream: IO[str]) -> Iterator[tuple[str, Any]]:
    text, at, index = "", 0, 0  # text[at:] has been read and not yet parsed

    def more() -> bool:
        nonlocal text, at
        piece = stream.read(max(_PIECE, len(text) - at))  # doubling: a long record takes linear time
        text, at = text[at:] + piece, 0
        return bool(piece)

    def next_character() -> str:
        nonlocal at
        while True:
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches everywhere
            if at < len(text) or not more():
                return text[at : at + 1]

    next_character()
    at += 1  # the "[" of the list
    if next_character() != "]":
        while True:
            next_character()
            while True:
                try:
                    value, at = _decode(text, at)
                    break
                except (ValueError, RecursionError) as error:  # damaged, or not read to its end yet
                    if len(text) - at > _LONGEST:
                        raise _too_long(f"index {index} of the list") from error
                    if not more():
                        raise DataError(f"index {index} of the list: not JSON, or cut off ({error}).") from error
            yield f"index {index} of the list", value
            character = next_character()
            at += 1
            if character == "]":
                break
            if character != ",":
                raise DataError(
                    f"after index {index} of the list: expected ',' or ']', got {character or 'the end'!r}."
                )
            index += 1
    else:
        at += 1
    if next_character():
        raise DataError("after the list: expected the end of the file; for JSON lines put one object on each line.")


def _too_long(location: str) -> DataError:
    return DataError(
        f"{location}: longer than {_LONGEST:,} characters, which no record of a dataset is; download the file again."
    )


def _parquet_rows(raw: Any) -> Iterator[tuple[str, Any]]:
    """(location, value) of each row of a parquet table, the form of the Hugging Face hub."""
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(raw).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except (ArrowException, OSError) as error:
        raise DataError(f"row {number}: damaged parquet ({error}); download the file again.") from error


# --------------------------------------------------------------------------------------------------- our own JSON lines


def _offsets_path(path: Path) -> Path:
    return path.with_suffix(".offsets.npy")


class JsonLinesWriter:
    """Writes JSON lines, and next to `x.jsonl` the file `x.offsets.npy` for random access."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def append(self, value: Any) -> int:
        """Writes one line; returns its index."""
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._file.write(line)
        self._offsets.append(self._offsets[-1] + len(line))
        return len(self) - 1

    def __enter__(self) -> JsonLinesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        np.save(_offsets_path(self._path), np.frombuffer(self._offsets, dtype=np.int64))


class JsonLines:
    """The lines of a file of `JsonLinesWriter`, each parsed on access; opening takes constant time."""

    def __init__(self, path: Path) -> None:
        self._offsets = np.asarray(np.load(_offsets_path(path), mmap_mode="r"))  # [lines + 1], bytes
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Any:
        # These lines have no whitespace around them; skipping `json.loads`, which looks for it, saves a quarter of the time.
        return _decode(self._bytes[self._offsets[index] : self._offsets[index + 1]].decode())[0]
