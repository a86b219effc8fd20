"""A run's manifest: which captured units it uses. Written last; what makes it count is the run's published entry."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray.config import fingerprint
from distill_ray.errors import IntegrityError, UserError
from distill_ray.lease import LeaseToken, document_entry, put_owned, read_document
from distill_ray.schema import Unit, UnitSummary
from distill_ray.storage.base import Storage
from distill_ray.targets.identity import CaptureIdentity
from distill_ray.targets.index import indexed_times, summaries_table, table_bytes, table_summaries

SCHEMA_VERSION = 1
_IDENTITY = b"distill_ray_identity"
_VERSION = b"distill_ray_manifest"


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


@dataclass(frozen=True)
class RunManifest:
    """What a run trains and evaluates on; units in the order of their hashes."""

    identity: CaptureIdentity
    units: tuple[ManifestUnit, ...]

    @property
    def fingerprint(self) -> str:
        """The capture all units belong to."""
        return self.identity.fingerprint

    @property
    def corpus(self) -> str:
        """Fingerprint over unit hashes and multiplicities."""
        return _corpus((u.unit, u.multiplicity) for u in self.units)

    @property
    def rows(self) -> int:
        """Distinct target rows."""
        return sum(u.rows for u in self.units)

    @property
    def sequences(self) -> int:
        """Distinct sequences."""
        return sum(len(u.lengths) for u in self.units)

    @property
    def dead(self) -> int:
        """Dead letters of all units."""
        return sum(u.dead for u in self.units)

    @property
    def mean_kept_mass(self) -> float:
        """Mean over rows of the kept mass P; NaN without rows."""
        return sum(u.kept_mass for u in self.units) / self.rows if self.rows else float("nan")


def _corpus(units: Iterable[tuple[str, int]]) -> str:
    return fingerprint({"units": sorted([unit, multiplicity] for unit, multiplicity in units)})


def write_run_manifest(
    storage: Storage,
    token: LeaseToken,
    identity: CaptureIdentity,
    units: list[Unit],
    summaries: Mapping[str, UnitSummary],
) -> dict[str, Any]:
    """Write a run's manifest.

    Args:
        storage: the run's store.
        token: of the run's lease; the manifest becomes `<run>/targets.parquet`.
        identity: the capture.
        units: the run's plan.
        summaries: unit hash → summary, for at least these units.

    Returns:
        The entry to publish: key, sha256 and counts as plain JSON values.

    Raises:
        UserError: units that have not been captured.
    """
    units = sorted(units, key=lambda u: u.hash)
    missing = [u.hash for u in units if u.hash not in summaries]
    if missing:
        raise UserError(f"{len(missing)} of {len(units)} units are not captured (first: {missing[0]}); run capture")
    table = summaries_table([summaries[u.hash] for u in units])
    table = table.append_column("multiplicity", pa.array([u.multiplicity for u in units], pa.int64()))
    table = table.append_column("source", pa.array([u.source.uri for u in units], pa.string()))
    text = json.dumps(identity.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    data = table_bytes(table.replace_schema_metadata({_IDENTITY: text, _VERSION: str(SCHEMA_VERSION)}))
    key = f"{token.run_prefix}/targets.parquet"
    put_owned(storage, token, key, data)
    manifest = _parse(data, key)
    return {
        **document_entry(key, data),
        "bytes": len(data),
        "fingerprint": identity.fingerprint,
        "corpus": manifest.corpus,
        "units": len(units),
        "sequences": manifest.sequences,
        "rows": manifest.rows,
        "dead": manifest.dead,
        "target_bytes": sum(u.object_bytes for u in manifest.units),
    }


def read_run_manifest(storage: Storage, entry: Mapping[str, Any]) -> RunManifest:
    """Read the manifest that a published entry names.

    Raises:
        IntegrityError: missing, truncated, altered, or not the published one.
    """
    data = read_document(storage, entry, "run `distill-ray capture` again: it writes it anew from the stored targets")
    return _parse(data, f"{storage.uri}/{entry['key']}")


def units_of_lost_manifest(storage: Storage, entry: Mapping[str, Any], planned: list[Unit]) -> list[Unit] | None:
    """The units that a lost manifest named, told by the published fingerprint over them; None where they cannot be.

    Either all that is planned now, or, where the corpus has grown since, the planned units that were indexed first:
    what came later was captured later. That order is only a guess, the fingerprint the proof.

    Args:
        storage: the run's store.
        entry: "targets" of the run's record.
        planned: the corpus as it is now, cut into units.
    """
    at = indexed_times(storage, entry["fingerprint"])
    captured = sorted((u for u in planned if u.hash in at), key=lambda u: (at[u.hash], u.hash))
    for units in (planned, captured[: entry["units"]]):
        if _corpus((u.hash, u.multiplicity) for u in units) == entry.get("corpus"):
            return sorted(units, key=lambda u: u.hash)
    return None


def _parse(data: bytes, where: str) -> RunManifest:
    try:
        table = pq.read_table(pa.BufferReader(data))
        metadata = table.schema.metadata or {}
        version, identity = int(metadata[_VERSION]), json.loads(metadata[_IDENTITY])
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{where} is not a run manifest ({type(error).__name__}: {error})") from error
    if version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{where} has schema version {version}, this program reads {SCHEMA_VERSION}; run capture again"
        )
    counts, sources = table.column("multiplicity").to_pylist(), table.column("source").to_pylist()
    units = [ManifestUnit(*row) for row in zip(table_summaries(table), counts, sources, strict=True)]
    return RunManifest(CaptureIdentity.from_dict(identity), tuple(units))
