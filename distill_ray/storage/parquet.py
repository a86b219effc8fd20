"""Parquet files that are at hand as bytes."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The whole table, or some of its columns. Raises pyarrow.ArrowException, OSError: no Parquet file."""
    # On this thread alone. Those of Arrow's pools, which pq.read_table uses, hold the Python buffer a moment longer
    # than the call, and one that lets go of it while the interpreter ends aborts the process (apache/arrow#34314).
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(columns=columns, use_threads=False)
