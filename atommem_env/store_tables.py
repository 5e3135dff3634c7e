"""The tables of a memory store as Arrow schemas and batches; which rows are written, and when, is `store.py`'s matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atommem_env.types import Vector

SCHEMA_VERSION = 1
VERSION_KEY = b"atommem_schema_version"  # in every table's metadata
TABLES = ("turns", "journal", "entries", "episodes")  # in the order in which a commit writes them


def schema_of(name: str, dimension: int | None) -> Any:
    """The Arrow schema of a table; D is needed for `journal` and `entries` alone."""
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


def batch_of(
    name: str, rows: list[dict[str, object]], vectors: Sequence[Vector | None] | None, dimension: int | None
) -> Any:
    """Rows as an Arrow table, with their vectors as fixed-size lists."""
    import pyarrow as pa

    schema = schema_of(name, dimension)
    columns = {
        field.name: pa.array([row[field.name] for row in rows], field.type)
        for field in schema
        if field.name != "vector"
    }
    if vectors is not None:
        assert dimension is not None
        matrix = np.zeros((len(rows), dimension), dtype=np.float32)
        for row, vector in enumerate(vectors):
            if vector is not None:
                matrix[row] = vector
        missing = pa.array([vector is None for vector in vectors], pa.bool_())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), dimension, mask=missing)
    return pa.table(columns, schema=schema)
