"""Parquet sources: their layout, whole row groups, and runs of rows inside a group that is too large for one unit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from distill_ray.config import fingerprint
from distill_ray.corpus.containers import locate
from distill_ray.corpus.spool import open_copy
from distill_ray.errors import UserError
from distill_ray.schema import SourceSlice

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ROWS = 1024
"""Rows of one batch."""


@contextmanager
def readable(uri: str, otherwise: str) -> Iterator[None]:
    """Turn whatever pyarrow raises over damaged bytes into a UserError: "corpus source URI `otherwise`: why"."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        # OSError for Thrift that cannot be read; KeyError and UnicodeDecodeError for garbled column names.
        raise UserError(f"corpus source {uri} {otherwise}: {error}; upload it again") from None


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    import pyarrow.parquet as pq

    store, key = locate(uri)
    with store.open_input(key) as stream:
        yield pq.ParquetFile(stream)


def layout(uri: str) -> tuple[list[str], list[int], list[int]]:
    """Column names, and each row group's uncompressed bytes and rows.

    Raises:
        UserError: the source is damaged.
    """
    with readable(uri, "is not a whole Parquet file"), _opened(uri) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        if sum(g.num_rows for g in groups) != file.metadata.num_rows or any(g.total_byte_size < 0 for g in groups):
            raise ValueError(f"its row groups do not add up to its {file.metadata.num_rows:,} rows")
        return list(file.schema_arrow.names), [g.total_byte_size for g in groups], [g.num_rows for g in groups]


def batches(source: SourceSlice, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a slice ("row_groups" or "rows"), those of these columns alone that the source has.

    Raises:
        UserError: the source is damaged.
    """
    with readable(source.uri, "is damaged"), _opened(source.uri) as file:
        if source.kind == "row_groups":
            yield from _group_batches(file, list(range(source.start, source.stop)), columns)
            return
        group, first = _group_of(file, source.start)
        found = _copied(source, file, group, columns) if source.start > first else None
        if found is None:
            yield from _cuts(_group_batches(file, [group], columns), [(source.start - first, source.stop - first)])
            return
        import pyarrow as pa

        with found, pa.ipc.open_file(found) as copy:
            held = (copy.get_batch(i) for i in range(copy.num_record_batches))
            yield from _cuts(held, [(source.start - first, source.stop - first)])


def rows_at(uri: str, spans: list[tuple[int, int]], columns: Collection[str], reach: int) -> Iterator[pa.RecordBatch]:
    """The rows of ascending spans [start, stop), those of these columns alone that the source has, without a copy of
    anything on this machine.

    A row group cannot be entered in its middle, so what lies before a span is decoded too: of a group of more than
    `reach` uncompressed bytes the spans are moved towards its beginning, in proportion.

    Raises:
        UserError: the source is damaged.
    """
    with readable(uri, "is damaged"), _opened(uri) as file:
        first = 0
        for group in range(file.metadata.num_row_groups):
            about = file.metadata.row_group(group)
            rows, far = about.num_rows, max(1.0, about.total_byte_size / reach)
            inside = [(max(a - first, 0), min(b - first, rows)) for a, b in spans if a < first + rows and b > first]
            moved = [(int(a / far), int(a / far) + b - a) for a, b in inside]
            if moved:
                yield from _cuts(_group_batches(file, [group], columns), moved)
            first += rows


def _cuts(found: Iterator[pa.RecordBatch], spans: list[tuple[int, int]]) -> Iterator[pa.RecordBatch]:
    """The rows of ascending spans of consecutive batches."""
    at = 0
    for batch in found:
        for start, stop in spans:
            low, high = max(start - at, 0), min(stop - at, batch.num_rows)
            if low < high:
                yield batch.slice(low, high - low)
        at += batch.num_rows
        if at >= spans[-1][1]:
            return


def _group_batches(file: pq.ParquetFile, groups: list[int], columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    # On this thread alone, as `storage.read_table`: what lies below is a Python file.
    present = _present(file, columns)
    yield from file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=present, use_threads=False)


def _present(file: pq.ParquetFile, columns: Collection[str]) -> list[str]:
    return [name for name in file.schema_arrow.names if name in columns]


def _group_of(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    """The row group that holds a row of the file, and the group's first row."""
    first = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row < first + rows:
            return group, first
        first += rows
    raise ValueError(f"row {row:,} of {first:,}")


def _copied(source: SourceSlice, file: pq.ParquetFile, group: int, columns: Collection[str]) -> IO[bytes] | None:
    """This machine's copy of a row group as an Arrow file: Parquet itself cannot be entered in mid-group."""
    import pyarrow as pa

    def write(out: IO[bytes]) -> None:
        schema = pa.schema([file.schema_arrow.field(name) for name in _present(file, columns)])
        with pa.ipc.new_file(out, schema) as writer:
            for batch in _group_batches(file, [group], columns):
                writer.write_batch(batch)
        store, key = locate(source.uri)
        now = store.head(key)
        if source.version and (now is None or now.version != source.version):
            raise UserError(f"corpus source {source.uri} changed since the run was planned; run again to plan it anew")

    return open_copy(f"{source.content}-{fingerprint({'group': group, 'columns': sorted(columns)})}", write)
