"""Reads the official files of datasets record by record; and reads and writes JSON lines with random access."""

from __future__ import annotations

import gzip
import json
import mmap
import re
import reprlib
import zlib
from array import array
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from atommem_env.errors import DataError, DatasetNotFound

_PIECE = 1 << 20  # characters of a JSON list read at a time
_LONGEST = 1 << 24  # characters; a longer record is damaged, and must not fill the memory
_MOST_BLANK = 1 << 20  # whitespace characters between two records: a few kilobytes of gzip hold an hour of empty lines
_MOST_VALUES = (
    1 << 24
)  # of a column in a row group of parquet; each takes memory even where it takes no byte of the file
_SMALL_COLUMN = 1 << 23  # bytes of a parquet column in a row group
_MOST_EXPANSION = 100  # of a parquet column by decompression, above 256 MB; text has less than 20
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
    start = binary.peek(64)
    encoding = "utf-16" if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    listed = start.removeprefix(BOM_UTF8).replace(b"\0", b"").lstrip(b" \t\r\n\xff\xfe")[:1] == b"["
    with TextIOWrapper(binary, encoding=encoding) as stream:
        yield from _list_items(stream) if listed else _line_items(stream)


def _line_items(stream: IO[str]) -> Iterator[tuple[str, Any]]:
    blank = 0
    for number, line in enumerate(iter(lambda: stream.readline(_LONGEST + 1), ""), 1):
        if len(line) > _LONGEST:
            raise _too_long(f"line {number}")
        if line.isspace():
            blank = _add_blank(f"line {number}", blank, len(line))
            continue
        blank = 0
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"line {number}: not JSON ({error}); it begins {reprlib.repr(line)}; expected JSON lines or one JSON list."
            ) from error
        yield f"line {number}", value


def _add_blank(location: str, blank: int, more: int) -> int:
    """The length of the whitespace since the last record; raises `DataError` where no file of records has so much."""
    if blank + more > _MOST_BLANK:
        raise DataError(f"{location}: more than {_MOST_BLANK:,} blank characters in a row; download the file again.")
    return blank + more


def _list_items(stream: IO[str]) -> Iterator[tuple[str, Any]]:
    text, at, index = "", 0, 0  # text[at:] has been read and not yet parsed

    def more() -> bool:
        nonlocal text, at
        piece = stream.read(max(_PIECE, len(text) - at))  # doubling: a long record takes linear time
        text, at = text[at:] + piece, 0
        return bool(piece)

    def next_character() -> str:
        nonlocal at
        blank = 0
        while True:
            before, at = at, _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches everywhere
            blank = _add_blank(f"index {index} of the list", blank, at - before)
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
        metadata = parquet.ParquetFile(raw).metadata
        for group in range(metadata.num_row_groups):
            shared, rows = _plan(metadata.row_group(group), f"row {number}")
            file = parquet.ParquetFile(raw, metadata=metadata, read_dictionary=shared, buffer_size=_PIECE)
            for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
                whole = batch.num_rows > 1 and _decoded_size(batch) <= _LONGEST
                for part in [batch] if whole else [batch.slice(index, 1) for index in range(batch.num_rows)]:
                    if not whole and _decoded_size(part) > _LONGEST:
                        raise _too_long(f"row {number}")
                    for row in part.to_pylist():
                        yield f"row {number}", row
                        number += 1
    except (ArrowException, OSError) as error:
        raise DataError(f"row {number}: damaged parquet ({error}); download the file again.") from error


def _plan(group: Any, location: str) -> tuple[list[str], int]:
    """How a row group is read, by its metadata.

    A text that the file has once, in a dictionary, for many values would be repeated in memory for each. So columns of few
    bytes are read as dictionaries, which costs little there; and where other columns have one, few rows are read at a time.

    Returns:
        The columns to read as dictionaries, and the number of rows to read at a time.

    Raises:
        DataError: the sizes are not those of a table of records.
    """
    shared: list[str] = []
    rows = 1024
    for column in map(group.column, range(group.num_columns)):
        name, size, packed = column.path_in_schema, column.total_uncompressed_size, column.total_compressed_size
        if column.num_values > _MOST_VALUES or size > max(1 << 28, _MOST_EXPANSION * packed):
            raise DataError(
                f"{location}: the column {reprlib.repr(name)} has {column.num_values:,} values and {size:,} bytes in one row "
                f"group, from {packed:,} compressed, which no file of a dataset has; download the file again."
            )
        if column.physical_type == "BYTE_ARRAY" and column.has_dictionary_page:
            if size <= _SMALL_COLUMN:
                shared.append(name)
            else:
                rows = 16
    return shared, max(1, min(rows, 4 * _LONGEST * group.num_rows // max(1, group.total_byte_size)))


def _decoded_size(values: Any) -> int:
    """About the bytes of an Arrow array, or of a batch, as Python objects."""
    import pyarrow
    from pyarrow import compute

    if isinstance(values, pyarrow.RecordBatch):
        return sum(map(_decoded_size, values.columns))
    size = 64 * len(values)
    if isinstance(values, pyarrow.DictionaryArray):
        lengths = compute.binary_length(values.dictionary).cast("int64")
        return size + (compute.sum(lengths.take(values.indices)).as_py() or 0)
    if isinstance(values, pyarrow.StructArray):
        return size + sum(map(_decoded_size, values.flatten()))
    if isinstance(values, pyarrow.ListArray | pyarrow.LargeListArray | pyarrow.FixedSizeListArray):
        return size + _decoded_size(values.flatten())
    return size + values.nbytes


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
