"""The batched index of a capture: what planning and resume need of every unit, without opening its object.

`targets/<fingerprint>/index/<units>-<content hash>.parquet`. Objects are only ever added whole, under a name made from
what they hold, so that drivers on one capture never overwrite each other; small ones are merged into a larger one
(written first) and then removed. A reader that meets a removed one lists again.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray.errors import IntegrityError
from distill_ray.schema import UnitSummary
from distill_ray.storage.base import NotFoundError, ObjectInfo, Storage
from distill_ray.storage.parquet import read_table
from distill_ray.targets.identity import CaptureIdentity, capture_prefix, fingerprint_of
from distill_ray.units import hashes_of, in_sorted

UNITS_PER_OBJECT = 1000
"""Index objects with fewer units than this are small: merged once there are MERGE_AT of them."""
MERGE_AT = 8
_READERS = 8
_ATTEMPTS = 5
_NAME = re.compile(r"index/(\d{7})-([0-9a-f]{32})\.parquet")
_UNIT = re.compile(r"([0-9a-f]{32})\.parquet")
INDEXED_AT = "indexed_at"
"""Column of Unix seconds; of two entries of a unit captured twice, the later one counts."""
_FINGERPRINT = b"distill_ray_capture"
_OPTIONAL = ("distinct_draws", "unfinished")
"""Counts whose columns only those captures have that keep draws, or completions of the teacher."""

Report = Callable[[str], None]


def summaries_table(summaries: list[UnitSummary]) -> pa.Table:
    """One row per unit."""

    def lists(arrays: list[np.ndarray], kind: pa.DataType) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])])
        values = np.concatenate([np.empty(0, kind.to_pandas_dtype()), *arrays])
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, kind))

    table = pa.table(
        {
            "unit": pa.array([s.unit for s in summaries], pa.string()),
            "lengths": lists([s.lengths for s in summaries], pa.int32()),
            "supervised": lists([s.supervised for s in summaries], pa.int32()),
            "doc_keys": lists([s.doc_keys for s in summaries], pa.uint64()),
            "object_bytes": pa.array([s.object_bytes for s in summaries], pa.int64()),
            "object_sha256": pa.array([s.object_sha256 for s in summaries], pa.string()),
            "kept_mass_sum": pa.array([s.kept_mass_sum for s in summaries], pa.float64()),
            "dead": pa.array([s.dead for s in summaries], pa.int64()),
            "teacher_seconds": pa.array([s.teacher_seconds for s in summaries], pa.float64()),
            "entropy": pa.array([s.entropy for s in summaries], pa.bool_()),
        }
    )
    for name in _OPTIONAL:
        counts = [getattr(s, name) for s in summaries]
        if any(counts):
            table = table.append_column(name, pa.array(counts, pa.int64()))
    return table


def table_summaries(table: pa.Table) -> list[UnitSummary]:
    """The inverse of `summaries_table`; other columns are ignored."""
    arrays = {}
    for name in ("lengths", "supervised", "doc_keys"):
        column = table.column(name).combine_chunks()
        offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
        arrays[name] = [values[a:b] for a, b in pairwise(offsets.tolist())]
    scalars = ["unit", "object_bytes", "object_sha256", "kept_mass_sum", "dead", "teacher_seconds"]
    scalars += [name for name in _OPTIONAL if name in table.column_names]
    rows = zip(*(table.column(name).to_pylist() for name in scalars), strict=True)
    # Tables written before this column was kept say nothing of it.
    known = "entropy" in table.column_names
    entropy = table.column("entropy").to_pylist() if known else [None] * table.num_rows
    return [
        UnitSummary(
            **dict(zip(scalars, row, strict=True)),
            **{name: arrays[name][i] for name in arrays},
            entropy=entropy[i],
        )
        for i, row in enumerate(rows)
    ]


def table_bytes(table: pa.Table) -> bytes:
    """A small metadata table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


def append_index(storage: Storage, capture: CaptureIdentity | str, summaries: Iterable[UnitSummary]) -> None:
    """Add captured units to the index; call it with many at a time (≥ 1,000 where there are so many).

    Small index objects are merged once there are MERGE_AT of them, so that loading stays a few reads whatever the
    batches were.
    """
    now = time.time()
    table = summaries_table(list(summaries))
    if not table.num_rows:
        return
    fingerprint = fingerprint_of(capture)
    _write(storage, fingerprint, table.append_column(INDEXED_AT, pa.array([now] * table.num_rows, pa.float64())))
    # Never the capture's whole prefix here: a million target objects are a thousand pages, for each batch.
    small = [key for key in _index_keys(storage, fingerprint) if _units(key) < UNITS_PER_OBJECT]
    if len(small) >= MERGE_AT:
        _merge(storage, fingerprint, small)


def drop_units(storage: Storage, capture: CaptureIdentity | str, hashes: np.ndarray) -> None:
    """Take units out of the index; call it before their objects are removed. A crash leaves entries twice, or all.

    One index object at a time is read, written without them, and only then removed. A broken one names nothing and is
    left to the next capture, which replaces it.

    Args:
        storage: the store that holds `targets/`.
        capture: identity, or its fingerprint; no driver may be at work on it.
        hashes: ascending.
    """
    fingerprint = fingerprint_of(capture)
    for key in _index_keys(storage, fingerprint):
        try:
            table = _parse(storage.get(key), key, fingerprint, None)
        except IntegrityError as error:
            warn(str(error))
            continue
        kept = ~in_sorted(hashes, hashes_of(table["unit"]))
        if kept.all():
            continue
        if kept.any():
            _write(storage, fingerprint, table.filter(pa.array(kept)))
        storage.delete(key)


def load_index(
    storage: Storage, capture: CaptureIdentity | str, *, report: Report | None = None
) -> dict[str, UnitSummary]:
    """Unit hash → summary of every indexed unit; says nothing of whether the objects are still there.

    Args:
        storage: the store that holds `targets/`.
        capture: identity, or its fingerprint.
        report: told of every broken index object (default: a logged warning); its units count as not indexed.
    """
    table, _ = load_table(storage, capture, report=report)
    return {s.unit: s for s in table_summaries(table)}


def load_table(
    storage: Storage,
    capture: CaptureIdentity | str,
    *,
    only: np.ndarray | None = None,
    columns: tuple[str, ...] | None = None,
    report: Report | None = None,
) -> tuple[pa.Table, list[str]]:
    """The index as one table in the order of the units' hashes, each unit once, and the keys of broken index objects.

    Of each index object only what is asked for is kept.

    Args:
        storage: the store that holds `targets/`.
        capture: identity, or its fingerprint.
        only: ascending hashes of the units wanted; None takes all.
        columns: of `summaries_table`, beside "unit" and "indexed_at"; None takes all.
        report: told of every broken index object (default: a logged warning); its units count as not indexed.
    """
    fingerprint = fingerprint_of(capture)
    wanted = None if columns is None else ["unit", INDEXED_AT, *columns]
    for _ in range(_ATTEMPTS):
        try:
            return _read(storage, fingerprint, _index_keys(storage, fingerprint), report or warn, only, wanted)
        except NotFoundError:  # merged into another by another driver since the listing
            continue
    raise IntegrityError(
        f"index objects under {storage.uri}/{capture_prefix(fingerprint)}index/ vanish while being read"
    )


def warn(message: str) -> None:
    """The default `Report`."""
    logging.getLogger(__name__).warning(message)


def _index_keys(storage: Storage, fingerprint: str) -> list[str]:
    """Keys of the capture's index objects."""
    prefix = capture_prefix(fingerprint)
    return [info.key for info in storage.list(f"{prefix}index/") if _NAME.fullmatch(info.key[len(prefix) :])]


def target_objects(storage: Storage, capture: CaptureIdentity | str) -> dict[str, ObjectInfo]:
    """Unit hash → target object, of every object under the capture, whole or not."""
    return dict(each_object(storage, capture))


def each_object(storage: Storage, capture: CaptureIdentity | str) -> Iterator[tuple[str, ObjectInfo]]:
    """Unit hash and target object, in the order of the listing, which is read page by page."""
    prefix = capture_prefix(capture)
    for info in storage.list(prefix):
        if match := _UNIT.fullmatch(info.key[len(prefix) :]):
            yield match[1], info


def _read(
    storage: Storage,
    fingerprint: str,
    keys: list[str],
    report: Report,
    only: np.ndarray | None = None,
    columns: list[str] | None = None,
) -> tuple[pa.Table, list[str]]:
    """`load_table` of the named index objects. Raises NotFoundError where one of them is gone."""
    parts, broken = [summaries_table([]).append_column(INDEXED_AT, pa.array([], pa.float64()))], list[str]()
    if columns is not None:
        parts[0] = parts[0].select(columns)

    def one(key: str) -> pa.Table | IntegrityError:
        try:
            table = _parse(storage.get(key), key, fingerprint, columns)
        except IntegrityError as error:
            return error
        return table if only is None else table.filter(pa.array(in_sorted(only, hashes_of(table["unit"]))))

    with ThreadPoolExecutor(_READERS) as pool:
        for key, got in zip(keys, pool.map(one, keys), strict=True):
            if isinstance(got, IntegrityError):
                broken.append(key)
                report(str(got))
            else:
                parts.append(got)
    return _each_unit_once(pa.concat_tables(parts, promote_options="default")), broken


def _each_unit_once(table: pa.Table) -> pa.Table:
    for place, name in enumerate(table.column_names):
        # A number that some index objects lack is 0 there; whether they hold the entropy stays unknown.
        if name != "entropy" and table.column(place).null_count:
            table = table.set_column(place, name, table.column(place).fill_null(0))
    hashes, times = hashes_of(table["unit"]), table[INDEXED_AT].to_numpy()
    order = np.argsort(-times, kind="stable")
    order = order[np.argsort(hashes[order], kind="stable")]
    first = np.ones(len(order), bool)
    first[1:] = hashes[order[1:]] != hashes[order[:-1]]
    return table.take(pa.array(order[first]))


def _units(key: str) -> int:
    return int(key.rsplit("/", 1)[1].split("-")[0])


def _write(storage: Storage, fingerprint: str, table: pa.Table) -> str:
    data = table_bytes(table.replace_schema_metadata({_FINGERPRINT: fingerprint}))
    name = hashlib.sha256(data).hexdigest()[:32]
    key = f"{capture_prefix(fingerprint)}index/{table.num_rows:07d}-{name}.parquet"
    storage.put(key, data)
    return key


def _parse(data: bytes, key: str, fingerprint: str, columns: list[str] | None) -> pa.Table:
    named = key.rsplit("-", 1)[1].removesuffix(".parquet")
    if (got := hashlib.sha256(data).hexdigest()[:32]) != named:
        raise IntegrityError(f"index object {key} has content hash {got}, its name says {named}: truncated or altered")
    table = read_table(data, columns)
    of = (table.schema.metadata or {}).get(_FINGERPRINT, b"").decode()
    if of != fingerprint:
        raise IntegrityError(f"index object {key} belongs to capture {of or 'unknown'}, not {fingerprint}")
    return table.replace_schema_metadata(None)


def _merge(storage: Storage, fingerprint: str, small: list[str]) -> None:
    """Write what the small objects hold as one, then remove them. Any crash leaves entries twice, never none."""
    try:
        table, broken = _read(storage, fingerprint, small, warn)
    except NotFoundError:
        return  # another driver is merging the same ones
    kept = _write(storage, fingerprint, table)
    for key in small:
        if key not in broken and key != kept:
            storage.delete(key)
