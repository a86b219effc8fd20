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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray.errors import IntegrityError
from distill_ray.schema import UnitSummary
from distill_ray.storage.base import NotFoundError, ObjectInfo, Storage
from distill_ray.targets.identity import CaptureIdentity, capture_prefix, fingerprint_of
from distill_ray.targets.reader import read_unit

UNITS_PER_OBJECT = 1000
"""Index objects with fewer units than this are small: merged once there are MERGE_AT of them."""
MERGE_AT = 8
_READERS = 8
_NAME = re.compile(r"index/(\d{7})-([0-9a-f]{32})\.parquet")
_UNIT = re.compile(r"([0-9a-f]{32})\.parquet")
_FINGERPRINT = b"distill_ray_capture"
_DRAWS = "distinct_draws"
"""Column that only captures with draws have."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Entry:
    summary: UnitSummary
    indexed_at: float
    """Unix seconds; of two entries of a unit captured twice, the later one counts."""


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
    if not any(s.distinct_draws for s in summaries):
        return table
    return table.append_column(_DRAWS, pa.array([s.distinct_draws for s in summaries], pa.int64()))


def table_summaries(table: pa.Table) -> list[UnitSummary]:
    """The inverse of `summaries_table`; other columns are ignored."""
    arrays = {}
    for name in ("lengths", "supervised", "doc_keys"):
        column = table.column(name).combine_chunks()
        offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
        arrays[name] = [values[a:b] for a, b in pairwise(offsets.tolist())]
    scalars = ["unit", "object_bytes", "object_sha256", "kept_mass_sum", "dead", "teacher_seconds"]
    scalars += [_DRAWS] if _DRAWS in table.column_names else []
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
    added = [_Entry(s, now) for s in summaries]
    if not added:
        return
    _write(storage, fingerprint_of(capture), added)
    small = [o for o in _listed(storage, capture)[0] if _units(o.key) < UNITS_PER_OBJECT]
    if len(small) >= MERGE_AT:
        _merge(storage, capture, small)


def load_index(
    storage: Storage, capture: CaptureIdentity | str, *, report: Report | None = None
) -> dict[str, UnitSummary]:
    """Unit hash → summary of every indexed unit; says nothing of whether the objects are still there.

    Args:
        storage: the store that holds `targets/`.
        capture: identity, or its fingerprint.
        report: told of every broken index object (default: a logged warning); its units count as not indexed.
    """
    entries, _, _ = _load(storage, capture, report or _warn)
    return {unit: e.summary for unit, e in entries.items()}


def indexed_times(storage: Storage, capture: CaptureIdentity | str) -> dict[str, float]:
    """Unit hash → Unix seconds at which it was indexed last; the units of `load_index`."""
    entries, _, _ = _load(storage, capture, _warn)
    return {unit: e.indexed_at for unit, e in entries.items()}


def done_units(
    storage: Storage, capture: CaptureIdentity | str, *, report: Report | None = None
) -> dict[str, UnitSummary]:
    """Units whose object is there and whole; everything else has to be captured.

    An object that the index names is done if it still has the recorded size and has not been written since. One that
    the index does not name (a crash before the index was written) or that changed is read whole and verified: sound
    ones are added to the index, broken ones are reported and are not done.

    Args:
        storage: the store that holds `targets/`.
        capture: identity, or its fingerprint.
        report: told of every broken or vanished object (default: a logged warning).
    """
    report = report or _warn
    entries, objects, broken = _load(storage, capture, report)
    done: dict[str, UnitSummary] = {}
    unknown: list[str] = []
    for unit in entries.keys() - objects.keys():
        report(f"target object of unit {unit} is in the index but gone from {storage.uri}; it is captured again")
    for unit, info in objects.items():
        entry = entries.get(unit)
        if entry and entry.summary.object_bytes == info.size and info.modified <= entry.indexed_at:
            done[unit] = entry.summary
        else:
            unknown.append(unit)
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(unknown), UNITS_PER_OBJECT):  # so that a crash keeps what was verified
            batch = unknown[start : start + UNITS_PER_OBJECT]
            verified = pool.map(lambda unit: _verified(storage, capture, unit, entries.get(unit), report), batch)
            found = [summary for summary in verified if summary is not None]
            append_index(storage, capture, found)
            done |= {summary.unit: summary for summary in found}
    for key in broken:  # only now: what it named is verified and indexed anew
        storage.delete(key)
    return done


def _verified(
    storage: Storage, capture: CaptureIdentity | str, unit: str, entry: _Entry | None, report: Report
) -> UnitSummary | None:
    try:
        summary = read_unit(storage, capture, unit).summary()
    except (IntegrityError, NotFoundError) as error:
        report(f"{error} (it counts as not captured)")
        return None
    if entry and entry.summary.object_sha256 == summary.object_sha256:
        return entry.summary  # the same object, copied or touched: keep the seconds its capture took
    return summary


def _warn(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def _units(key: str) -> int:
    return int(key.rsplit("/", 1)[1].split("-")[0])


def target_objects(storage: Storage, capture: CaptureIdentity | str) -> dict[str, ObjectInfo]:
    """Unit hash → target object, of every object under the capture, whole or not."""
    return _listed(storage, capture)[1]


def _listed(storage: Storage, capture: CaptureIdentity | str) -> tuple[list[ObjectInfo], dict[str, ObjectInfo]]:
    """One listing: the index objects, and unit → target object."""
    prefix = capture_prefix(capture)
    index, objects = [], {}
    for info in storage.list(prefix):
        name = info.key[len(prefix) :]
        if _NAME.fullmatch(name):
            index.append(info)
        elif match := _UNIT.fullmatch(name):
            objects[match[1]] = info
    return index, objects


def _load(
    storage: Storage, capture: CaptureIdentity | str, report: Report
) -> tuple[dict[str, _Entry], dict[str, ObjectInfo], list[str]]:
    """Entries, target objects, keys of broken index objects."""
    for _ in range(5):
        index, objects = _listed(storage, capture)
        broken: list[str] = []
        try:
            entries = _read(storage, capture, [o.key for o in index], broken, report)
        except NotFoundError:  # merged into another by another driver since the listing
            continue
        return entries, objects, broken
    raise IntegrityError(f"index objects under {storage.uri}/{capture_prefix(capture)}index/ vanish while being read")


def _read(
    storage: Storage, capture: CaptureIdentity | str, keys: list[str], broken: list[str], report: Report
) -> dict[str, _Entry]:
    def one(key: str) -> list[_Entry] | str:
        try:
            return _parse(storage.get(key), key, fingerprint_of(capture))
        except IntegrityError as error:
            return str(error)

    entries: dict[str, _Entry] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for key, got in zip(keys, pool.map(one, keys), strict=True):
            if isinstance(got, str):
                broken.append(key)
                report(got)
                continue
            for entry in got:
                unit = entry.summary.unit
                if unit not in entries or entries[unit].indexed_at < entry.indexed_at:
                    entries[unit] = entry
    return entries


def _write(storage: Storage, fingerprint: str, entries: list[_Entry]) -> str:
    table = summaries_table([e.summary for e in entries])
    table = table.append_column("indexed_at", pa.array([e.indexed_at for e in entries], pa.float64()))
    data = table_bytes(table.replace_schema_metadata({_FINGERPRINT: fingerprint}))
    name = hashlib.sha256(data).hexdigest()[:32]
    key = f"{capture_prefix(fingerprint)}index/{len(entries):07d}-{name}.parquet"
    storage.put(key, data)
    return key


def _parse(data: bytes, key: str, fingerprint: str) -> list[_Entry]:
    named = key.rsplit("-", 1)[1].removesuffix(".parquet")
    if (got := hashlib.sha256(data).hexdigest()[:32]) != named:
        raise IntegrityError(f"index object {key} has content hash {got}, its name says {named}: truncated or altered")
    table = pq.read_table(pa.BufferReader(data))
    of = (table.schema.metadata or {}).get(_FINGERPRINT, b"").decode()
    if of != fingerprint:
        raise IntegrityError(f"index object {key} belongs to capture {of or 'unknown'}, not {fingerprint}")
    times = table.column("indexed_at").to_pylist()
    return [_Entry(s, t) for s, t in zip(table_summaries(table), times, strict=True)]


def _merge(storage: Storage, capture: CaptureIdentity | str, small: list[ObjectInfo]) -> None:
    """Write what the small objects hold as one, then remove them. Any crash leaves entries twice, never none."""
    keys = [o.key for o in small]
    broken: list[str] = []
    try:
        entries = _read(storage, capture, keys, broken, _warn)
    except NotFoundError:
        return  # another driver is merging the same ones
    kept = _write(storage, fingerprint_of(capture), list(entries.values()))
    for key in keys:
        if key not in broken and key != kept:
            storage.delete(key)
