"""A run's manifest: which captured units it uses. Written last; what makes it count is the run's published entry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa

from distill_ray.errors import IntegrityError, UserError
from distill_ray.lease import LeaseToken, document_entry, put_owned, read_document
from distill_ray.schema import Unit, UnitSummary
from distill_ray.storage.base import Storage
from distill_ray.storage.parquet import read_table
from distill_ray.targets.identity import CaptureIdentity
from distill_ray.targets.index import INDEXED_AT, load_table, summaries_table, table_bytes, table_summaries
from distill_ray.units import Units, hashes_of, places_in, texts

SCHEMA_VERSION = 1
_IDENTITY = b"distill_ray_identity"
_VERSION = b"distill_ray_manifest"
_AT_ONCE = 1000
"""Units made into objects at a time."""


@dataclass(frozen=True)
class ManifestUnit:
    """One captured unit of a run; see `UnitSummary` for the arrays."""

    summary: UnitSummary
    multiplicity: int
    """How many times the unit's content occurs among the run's sources."""
    source: str
    """URI the content was read from, for people."""

    @property
    def unit(self) -> str:
        return self.summary.unit

    @property
    def lengths(self) -> np.ndarray:
        return self.summary.lengths

    @property
    def supervised(self) -> np.ndarray:
        return self.summary.supervised

    @property
    def doc_keys(self) -> np.ndarray:
        return self.summary.doc_keys

    @property
    def object_bytes(self) -> int:
        return self.summary.object_bytes

    @property
    def object_sha256(self) -> str:
        return self.summary.object_sha256

    @property
    def kept_mass(self) -> float:
        """Sum over rows of the kept mass."""
        return self.summary.kept_mass_sum

    @property
    def dead(self) -> int:
        return self.summary.dead

    @property
    def teacher_seconds(self) -> float:
        return self.summary.teacher_seconds

    @property
    def rows(self) -> int:
        """Target rows of the unit, counted once."""
        return self.summary.rows


class ManifestUnits(Sequence[ManifestUnit]):
    """The units of a manifest as its table; objects, over a kilobyte each, are made only while one looks at them."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, units: Iterable[ManifestUnit]) -> ManifestUnits:
        """From objects, in any order."""
        found = sorted(units, key=lambda u: u.unit)
        table = summaries_table([u.summary for u in found])
        return cls(_with_units(table, [u.multiplicity for u in found], [u.source for u in found]))

    @property
    def hashes(self) -> np.ndarray:
        """[U] of `units.HASH`, ascending."""
        return hashes_of(self.table["unit"])

    @property
    def sequences(self) -> int:
        """Sequences of all units."""
        return sum(len(chunk.flatten()) for chunk in self.table["lengths"].chunks)

    @property
    def tokens(self) -> int:
        """Tokens of all units."""
        return sum(int(chunk.flatten().to_numpy().sum()) for chunk in self.table["lengths"].chunks)

    def sum_of(self, column: str) -> Any:
        """Sum over units of one of their numbers."""
        return self.table[column].to_numpy().sum().item()

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, at: int) -> ManifestUnit: ...
    @overload
    def __getitem__(self, at: slice) -> ManifestUnits: ...
    def __getitem__(self, at: int | slice) -> ManifestUnit | ManifestUnits:
        if isinstance(at, slice):
            return ManifestUnits(self.table.take(pa.array(range(len(self))[at], pa.int64())))
        place = range(len(self))[at]
        return next(iter(ManifestUnits(self.table.slice(place, 1))))

    def __iter__(self) -> Iterator[ManifestUnit]:
        for start in range(0, len(self), _AT_ONCE):
            part = self.table.slice(start, _AT_ONCE)
            counts, sources = part["multiplicity"].to_pylist(), part["source"].to_pylist()
            yield from map(ManifestUnit, table_summaries(part), counts, sources)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ManifestUnits) and self.table.equals(other.table)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RunManifest:
    """What a run trains and evaluates on; units in the order of their hashes."""

    identity: CaptureIdentity
    units: ManifestUnits
    """Given as any sequence of units."""

    def __post_init__(self) -> None:
        if not isinstance(self.units, ManifestUnits):
            object.__setattr__(self, "units", ManifestUnits.of(self.units))

    @property
    def fingerprint(self) -> str:
        """The capture all units belong to."""
        return self.identity.fingerprint

    @property
    def corpus(self) -> str:
        """Fingerprint over unit hashes and multiplicities."""
        batches = self.units.table.select(["unit", "multiplicity"]).to_batches(_AT_ONCE)
        return _corpus(pair for batch in batches for pair in zip(*(c.to_pylist() for c in batch.columns), strict=True))

    @property
    def rows(self) -> int:
        """Distinct target rows."""
        return self.units.tokens - self.units.sequences

    @property
    def sequences(self) -> int:
        """Distinct sequences."""
        return self.units.sequences

    @property
    def dead(self) -> int:
        """Dead letters of all units."""
        return self.units.sum_of("dead")

    @property
    def mean_kept_mass(self) -> float:
        """Mean over rows of the kept mass P; NaN without rows."""
        return self.units.sum_of("kept_mass_sum") / self.rows if self.rows else float("nan")


def _corpus(units: Iterable[tuple[str, int]]) -> str:
    """`config.fingerprint` of {"units": [[hash, multiplicity], …]}; a million, by ascending hash, are never a list."""
    found, comma = hashlib.sha256(b'{"units":['), ""
    for unit, multiplicity in units:
        found.update(f'{comma}["{unit}",{multiplicity}]'.encode())
        comma = ","
    found.update(b"]}")
    return found.hexdigest()[:32]


def _with_units(table: pa.Table, multiplicities: Sequence[int] | np.ndarray, sources: list[str]) -> pa.Table:
    table = table.append_column("multiplicity", pa.array(multiplicities, pa.int64()))
    return table.append_column("source", pa.array(sources, pa.string()))


def write_run_manifest(
    storage: Storage,
    token: LeaseToken,
    identity: CaptureIdentity,
    units: Sequence[Unit],
    summaries: Mapping[str, UnitSummary] | pa.Table,
) -> dict[str, Any]:
    """Write a run's manifest.

    Args:
        storage: the run's store.
        token: of the run's lease; the manifest becomes `<run>/targets.parquet`.
        identity: the capture.
        units: the run's plan; `Units`, if there are very many.
        summaries: for at least these units: by hash, or as `load_table` gives them.

    Returns:
        The entry to publish: key, sha256 and counts as plain JSON values.

    Raises:
        UserError: units that have not been captured.
    """
    plan = Units.of(units)
    sources = [plan.sources[i].uri for i in plan.rows["source"].tolist()]
    table = _with_units(_rows_of(plan, summaries), plan.rows["multiplicity"], sources)
    text = json.dumps(identity.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    data = table_bytes(table.replace_schema_metadata({_IDENTITY: text, _VERSION: str(SCHEMA_VERSION)}))
    key = f"{token.run_prefix}/targets.parquet"
    put_owned(storage, token, key, data)
    manifest = RunManifest(identity, ManifestUnits(table))
    return {
        **document_entry(key, data),
        "bytes": len(data),
        "fingerprint": identity.fingerprint,
        "corpus": manifest.corpus,
        "units": len(plan),
        "sequences": manifest.sequences,
        "rows": manifest.rows,
        "dead": manifest.dead,
        "target_bytes": manifest.units.sum_of("object_bytes"),
    }


def _rows_of(plan: Units, summaries: Mapping[str, UnitSummary] | pa.Table) -> pa.Table:
    if isinstance(summaries, Mapping):
        table = summaries_table(sorted(summaries.values(), key=lambda s: s.unit))
    else:
        table = summaries.drop_columns([INDEXED_AT])
    place, found = places_in(hashes_of(table["unit"]), plan.hashes)
    if not found.all():
        missing = plan.hashes[~found]
        raise UserError(
            f"{len(missing)} of {len(plan)} units are not captured (first: {texts(missing[:1])[0]}); run capture"
        )
    return table if table.num_rows == len(plan) else table.take(pa.array(place))


def read_run_manifest(storage: Storage, entry: Mapping[str, Any]) -> RunManifest:
    """Read the manifest that a published entry names.

    Raises:
        IntegrityError: missing, truncated, altered, or not the published one.
    """
    data = read_document(storage, entry, "run `distill-ray capture` again: it writes it anew from the stored targets")
    return _parse(data, f"{storage.uri}/{entry['key']}")


def units_of_lost_manifest(storage: Storage, entry: Mapping[str, Any], planned: Sequence[Unit]) -> Units | None:
    """The units that a lost manifest named, told by the published fingerprint over them; None where they cannot be.

    Either all that is planned now, or, where the corpus has grown since, the planned units that were indexed first:
    what came later was captured later. That order is only a guess, the fingerprint the proof.

    Args:
        storage: the run's store.
        entry: "targets" of the run's record.
        planned: the corpus as it is now, cut into units; `Units`, if there are very many.
    """
    plan = Units.of(planned)
    captured, _ = load_table(storage, entry["fingerprint"], only=plan.hashes, columns=())
    first = np.argsort(captured[INDEXED_AT].to_numpy(), kind="stable")[: entry["units"]]
    place, _ = places_in(plan.hashes, hashes_of(captured["unit"])[np.sort(first)])
    for units in (plan, plan.where(place)):
        if _corpus((u.hash, u.multiplicity) for u in units) == entry.get("corpus"):
            return units
    return None


def _parse(data: bytes, where: str) -> RunManifest:
    try:
        table = read_table(data)
        metadata = table.schema.metadata or {}
        version, identity = int(metadata[_VERSION]), json.loads(metadata[_IDENTITY])
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{where} is not a run manifest ({type(error).__name__}: {error})") from error
    if version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{where} has schema version {version}, this program reads {SCHEMA_VERSION}; run capture again"
        )
    return RunManifest(CaptureIdentity.from_dict(identity), ManifestUnits(table))
