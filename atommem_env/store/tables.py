"""The tables of a memory store as Arrow schemas and batches; `memory_store.py` decides which rows are written, and when."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

SCHEMA_VERSION = 2  # 1 had no column `changes`
VERSION_KEY = b"atommem_schema_version"  # in every table's metadata
TABLES = ("journal", "entries", "turns", "episodes")  # in the order in which a commit writes them; created in reverse
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def schema_of(name: str, dimension: int | None) -> Any:
    """The Arrow schema of a table; `dimension` (D) is needed for `journal` and `entries` only."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    vector = pa.list_(pa.float32(), dimension or -1)
    columns = {
        "turns": {
            "step": number,
            "reply": text,
            "reply_raw": pa.binary(),  # UTF-8 with surrogates; null unless the reply has lone ones, which `reply` lacks
            "notice": text,
            "query": text,
            "scratchpad": text,
            "changes": number,  # rows of the step in `journal`
        },
        "journal": {
            "seq": number,
            "step": number,
            "operation": text,
            "entry_id": text,
            "text": text,
            "vector": vector,
        },
        "entries": {"entry_id": text, "text": text, "vector": vector},
        "episodes": {
            "env_id": text,
            "task_id": text,
            "index": number,
            "task_seed": number,
            "episode_seed": number,
            "settings": text,
            "status": text,
            "reward": pa.float64(),
            "steps": number,
            "writers": pa.list_(text),
            "schema_version": number,
            "committed_at": pa.timestamp("us", tz="UTC"),
        },
    }
    fields = {"episode_id": text, "writer": text} | columns[name]
    return pa.schema(list(fields.items()), metadata={VERSION_KEY: str(SCHEMA_VERSION)})


def batch_of(name: str, columns: Sequence[Sequence[Any]], dimension: int | None) -> Any:
    """Columns, in the order of the schema, as an Arrow batch; lone surrogates become U+FFFD.

    Each vector is [D] or None, and copied once.
    """
    import pyarrow as pa

    schema = schema_of(name, dimension)
    arrays = [_array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def reader_of(first: Any, others: Iterator[Any], columns: Sequence[str]) -> Any:
    """A reader of these columns of batches that makes each one when the one before has been consumed."""
    import pyarrow as pa

    batches = (batch.select(columns) for batch in chain([first], others))
    return pa.RecordBatchReader.from_batches(first.select(columns).schema, batches)


def replace_surrogates(text: str) -> str:
    """`text` with lone surrogates, which no file can hold, replaced by U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)


def surrogate_bytes(text: str) -> bytes | None:
    """`text` as UTF-8 with surrogates if it has lone ones, else None."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return None


def _array(values: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        nothing = np.zeros(kind.list_size, dtype=np.float32)
        numbers = np.concatenate([nothing if vector is None else vector for vector in values])
        missing = pa.array([vector is None for vector in values], pa.bool_())
        return pa.FixedSizeListArray.from_arrays(pa.array(numbers), kind.list_size, mask=missing)
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([replace_surrogates(value) for value in values], kind)
