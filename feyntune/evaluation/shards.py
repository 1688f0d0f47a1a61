"""Parts of a table, kept beside a step's output until it is complete, so that an interrupted step resumes."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_shard(path: Path, schema: pa.Schema, rows: int) -> pa.Table | None:
    """The table at `path`; None where there is none, or not a whole one of `schema` with so many rows."""
    try:
        table = pq.read_table(path)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return table if table.num_rows == rows and table.schema.equals(schema) else None


def write_shard(table: pa.Table, path: Path) -> None:
    tmp = path.with_suffix(".tmp")
    pq.write_table(table, tmp)
    os.replace(tmp, path)
