"""Units by the million: 65 bytes each in one array, and a `Unit` only when one is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa

from distill_ray.schema import SourceSlice, Unit

HASH = np.dtype("S32")
"""A unit's hash as its 32 hex digits."""
KINDS = ("file", "lines", "row_groups", "rows")
"""`SourceSlice.kind` by its number in a row."""
ROW = np.dtype(
    [
        ("hash", HASH),
        ("source", np.int32),
        ("kind", np.int8),
        ("start", np.int64),
        ("stop", np.int64),
        ("bytes", np.int64),
        ("multiplicity", np.int32),
    ]
)


class Source(NamedTuple):
    """One source object; see `SourceSlice`."""

    uri: str
    content: str
    version: str


@dataclass(frozen=True, eq=False)
class Units(Sequence[Unit]):
    """Units in the order of their hashes, each hash once."""

    rows: np.ndarray
    """[U] of `ROW`; `source` is a place in `sources`."""
    sources: tuple[Source, ...]

    @classmethod
    def merged(cls, rows: np.ndarray, sources: tuple[Source, ...]) -> Units:
        """Sorted; of rows with equal hashes the first stays, with their multiplicities added."""
        _, first, group = np.unique(rows["hash"], return_index=True, return_inverse=True)
        kept = rows[first]
        kept["multiplicity"] = np.bincount(group, weights=rows["multiplicity"], minlength=len(first))
        return cls(kept, sources)

    @classmethod
    def of(cls, units: Iterable[Unit]) -> Units:
        """The same from objects."""
        if isinstance(units, Units):
            return units
        places: dict[Source, int] = {}
        rows = [
            (
                u.hash.encode(),
                places.setdefault(Source(u.source.uri, u.source.content, u.source.version), len(places)),
                KINDS.index(u.source.kind),
                u.source.start,
                u.source.stop,
                u.bytes,
                u.multiplicity,
            )
            for u in units
        ]
        return cls.merged(np.array(rows, ROW), tuple(places))

    @property
    def hashes(self) -> np.ndarray:
        """[U] of `HASH`, ascending."""
        return self.rows["hash"]

    def where(self, chosen: np.ndarray) -> Units:
        """Those of a mask, or at ascending places."""
        return Units(self.rows[chosen], self.sources)

    def counted(self, multiplicity: np.ndarray) -> Units:
        """The same with other multiplicities [U]."""
        rows = self.rows.copy()
        rows["multiplicity"] = multiplicity
        return Units(rows, self.sources)

    def table(self) -> pa.Table:
        """One row a unit, which `unit_of` makes a unit again; nothing is shared between rows."""
        rows = self.rows
        sources = [self.sources[i] for i in rows["source"].tolist()]
        return pa.table(
            {
                "hash": pa.array(texts(rows["hash"]), pa.string()),
                "uri": pa.array([s.uri for s in sources], pa.string()),
                "content": pa.array([s.content for s in sources], pa.string()),
                "version": pa.array([s.version for s in sources], pa.string()),
                "kind": pa.array([KINDS[i] for i in rows["kind"].tolist()], pa.string()),
                **{name: pa.array(rows[name]) for name in ("start", "stop", "bytes", "multiplicity")},
            }
        )

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Unit: ...
    @overload
    def __getitem__(self, at: slice) -> Units: ...
    def __getitem__(self, at: int | slice) -> Unit | Units:
        if isinstance(at, slice):
            return Units(self.rows[at], self.sources)
        hash_, source, kind, start, stop, size, multiplicity = self.rows[at].item()
        uri, content, version = self.sources[source]
        return Unit(hash_.decode(), SourceSlice(uri, content, KINDS[kind], start, stop, version), size, multiplicity)

    def __iter__(self) -> Iterator[Unit]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Units) and self.table().equals(other.table())

    __hash__ = None  # type: ignore[assignment]


def unit_of(table: pa.Table) -> Unit:
    """The unit of a one-row slice of `Units.table`."""
    (row,) = table.to_pylist()
    source = SourceSlice(row["uri"], row["content"], row["kind"], row["start"], row["stop"], row["version"])
    return Unit(row["hash"], source, row["bytes"], row["multiplicity"])


def texts(hashes: np.ndarray) -> list[str]:
    """Hashes as strings."""
    return hashes.astype("U32").tolist()


def hashes_of(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """[n] of `HASH` from a text column of hashes, without a Python string for each."""
    fixed = column.cast(pa.binary(HASH.itemsize))
    whole = fixed.combine_chunks() if isinstance(fixed, pa.ChunkedArray) else fixed
    first = whole.offset * HASH.itemsize
    return np.frombuffer(whole.buffers()[1], np.uint8)[first : first + len(whole) * HASH.itemsize].view(HASH)


def places_in(ascending: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each wanted hash its place among the ascending ones, and whether it is there at all."""
    place = np.searchsorted(ascending, wanted)
    found = place < len(ascending)
    found[found] = ascending[place[found]] == wanted[found]
    return place, found


def in_sorted(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Mask of the wanted hashes that are among the ascending ones."""
    return places_in(ascending, wanted)[1]
