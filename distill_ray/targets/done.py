"""Which units of a capture are done, for captures of millions: one listing and one read of the index, in columns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa

from distill_ray.errors import IntegrityError
from distill_ray.schema import UnitSummary
from distill_ray.storage.base import NotFoundError, Storage
from distill_ray.targets.identity import CaptureIdentity
from distill_ray.targets.index import (
    INDEXED_AT,
    UNITS_PER_OBJECT,
    Report,
    append_index,
    each_object,
    load_index,
    load_table,
    warn,
)
from distill_ray.targets.reader import read_unit
from distill_ray.units import HASH, hashes_of, in_sorted, places_in, texts

_READERS = 8
_OBJECT = np.dtype([("hash", HASH), ("size", np.int64), ("modified", np.float64)])
_RECORDED = ("object_sha256", "teacher_seconds")


def object_sizes(storage: Storage, capture: CaptureIdentity | str) -> tuple[np.ndarray, np.ndarray]:
    """Of every target object, whole or not: [n] hashes, ascending, and [n] int64 bytes."""
    objects = _objects(storage, capture)
    return objects["hash"], objects["size"]


def done_units(
    storage: Storage, capture: CaptureIdentity | str, *, report: Report | None = None
) -> dict[str, UnitSummary]:
    """The units of `done_hashes` with their summaries: over a kilobyte and 16 bytes a sequence for each unit."""
    done = set(texts(done_hashes(storage, capture, report=report)))
    return {unit: summary for unit, summary in load_index(storage, capture, report=report).items() if unit in done}


def done_hashes(storage: Storage, capture: CaptureIdentity | str, *, report: Report | None = None) -> np.ndarray:
    """[n] hashes, ascending, of the units whose object is there and whole; everything else has to be captured.

    An object that the index names is done if it still has the recorded size and has not been written since. One that
    the index does not name (a crash before the index was written) or that changed is read whole and verified: sound
    ones are added to the index, broken ones are reported and are not done.

    Args:
        storage: the store that holds `targets/`.
        capture: identity, or its fingerprint.
        report: told of every broken or vanished object (default: a logged warning).
    """
    report = report or warn
    table, broken = load_table(storage, capture, columns=("object_bytes",), report=report)
    # Listed after the index was read: what another driver writes in between is verified, not taken for gone.
    objects = _objects(storage, capture)
    named = hashes_of(table["unit"])
    for unit in texts(named[~in_sorted(objects["hash"], named)]):
        report(f"target object of unit {unit} is in the index but gone from {storage.uri}; it is captured again")
    place, found = places_in(named, objects["hash"])
    sound = found.copy()
    entry, object_ = place[found], objects[found]
    sound[found] = table["object_bytes"].to_numpy()[entry] == object_["size"]
    sound[found] &= object_["modified"] <= table[INDEXED_AT].to_numpy()[entry]
    unknown = objects["hash"][~sound]
    recorded = None
    if (found & ~sound).any():
        recorded, _ = load_table(storage, capture, only=unknown, columns=_RECORDED, report=lambda _: None)
    verified = _verified(storage, capture, unknown, recorded, report)
    for key in broken:  # only now: what it named is verified and indexed anew
        storage.delete(key)
    return np.sort(np.concatenate([objects["hash"][sound], verified]))


def _objects(storage: Storage, capture: CaptureIdentity | str) -> np.ndarray:
    """[n] of `_OBJECT`, in the order of the hashes."""
    each = ((unit.encode(), info.size, info.modified) for unit, info in each_object(storage, capture))
    objects = np.fromiter(each, _OBJECT)
    return objects[np.argsort(objects["hash"], kind="stable")]


def _verified(
    storage: Storage, capture: CaptureIdentity | str, unknown: np.ndarray, recorded: pa.Table | None, report: Report
) -> np.ndarray:
    """Those of the unknown units whose objects are sound; they are in the index now."""
    found: list[str] = []
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(unknown), UNITS_PER_OBJECT):  # so that a crash keeps what was verified
            batch = unknown[start : start + UNITS_PER_OBJECT]
            entries = _entries(recorded, batch)
            read = pool.map(
                lambda unit, e=entries: _read_whole(storage, capture, unit, e.get(unit), report), texts(batch)
            )
            summaries = [summary for summary in read if summary is not None]
            append_index(storage, capture, summaries)
            found += [summary.unit for summary in summaries]
    return np.array(found, HASH)


def _entries(recorded: pa.Table | None, batch: np.ndarray) -> dict[str, tuple[str, float]]:
    """Unit → recorded SHA-256 and teacher's seconds, of an ascending run of units."""
    if recorded is None:
        return {}
    first, last = np.searchsorted(hashes_of(recorded["unit"]), batch[[0, -1]])
    rows = recorded.slice(first, last + 1 - first).to_pylist()
    return {row["unit"]: (row["object_sha256"], row["teacher_seconds"]) for row in rows}


def _read_whole(
    storage: Storage, capture: CaptureIdentity | str, unit: str, entry: tuple[str, float] | None, report: Report
) -> UnitSummary | None:
    try:
        summary = read_unit(storage, capture, unit).summary()
    except (IntegrityError, NotFoundError) as error:
        report(f"{error} (it counts as not captured)")
        return None
    if entry and entry[0] == summary.object_sha256:
        return replace(summary, teacher_seconds=entry[1])  # the same object, copied or touched
    return summary
