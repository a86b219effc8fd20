"""A target object's footer, checked: what it holds, of which capture and unit, and where its row groups lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray.errors import IntegrityError
from distill_ray.schema import DeadLetter, SourceSlice, Unit
from distill_ray.targets.container import MAGIC, REMEDY, Region, Window
from distill_ray.targets.identity import CaptureIdentity
from distill_ray.targets.layout import METADATA_KEY, SCHEMA_VERSION


@dataclass(frozen=True)
class UnitInfo:
    """The checked footer of a target object."""

    identity: CaptureIdentity
    unit: Unit
    sequences: int
    rows: int
    kept_mass_sum: float
    dead: tuple[DeadLetter, ...]
    entropy: bool
    """Whether the rows hold the teacher's entropy; the one column that objects of a capture may have or lack."""
    regions: tuple[Region, ...]
    engine: str = ""
    """What computed the rows, and its version; empty where the object is older than this field."""


def open_footer(footer: bytes, window: Window, sealed: int, where: str) -> tuple[pq.ParquetFile, UnitInfo]:
    """The Parquet file over a window of row groups to come, and what its footer says.

    The one place where pyarrow's and JSON's own errors about a footer become ours.

    Args:
        footer: as `open_sealed` gives it.
        window: of the whole object's size.
        sealed: offset at which the row groups end.
        where: the object's name for messages.

    Raises:
        IntegrityError: it cannot be read, or does not describe the row groups.
    """
    try:
        parsed = pq.read_metadata(pa.BufferReader(footer))
        metadata = json.loads((parsed.metadata or {})[METADATA_KEY])
        # Given its metadata, pyarrow reads nothing of the window but the row groups asked for.
        file = pq.ParquetFile(window, metadata=parsed, pre_buffer=False)
        return file, _info(metadata, file, sealed, where)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{where}: its footer cannot be read ({type(error).__name__}: {error}); {REMEDY}"
        ) from error


def _info(metadata: dict[str, Any], file: pq.ParquetFile, sealed: int, where: str) -> UnitInfo:
    if metadata["schema_version"] != SCHEMA_VERSION:
        raise IntegrityError(
            f"{where}: schema version {metadata['schema_version']}, this program reads {SCHEMA_VERSION}; use the "
            "version of distill_ray that wrote it, or capture again"
        )
    unit = dict(metadata["unit"])
    source = SourceSlice(**unit.pop("source"))
    ends = [len(MAGIC), *(end for end, _ in metadata["row_groups"])]
    if len(ends) != file.num_row_groups + 1 or ends[-1] != sealed:
        raise IntegrityError(f"{where}: digests of {len(ends) - 1} row groups for {file.num_row_groups}; {REMEDY}")
    regions = [
        Region(start, end, digest) for start, (end, digest) in zip(ends[:-1], metadata["row_groups"], strict=True)
    ]
    return UnitInfo(
        identity=CaptureIdentity.from_dict(metadata["identity"]),
        unit=Unit(source=source, **unit),
        sequences=metadata["sequences"],
        rows=metadata["rows"],
        kept_mass_sum=metadata["kept_mass_sum"],
        dead=tuple(DeadLetter(**d) for d in metadata["dead"]),
        entropy="entropy" in file.schema_arrow.names,
        regions=tuple(regions),
        engine=metadata.get("engine", ""),
    )


def check_identity(info: UnitInfo, fingerprint: str, unit: str, where: str) -> None:
    """Raises IntegrityError: of another capture or unit than these."""
    if info.identity.fingerprint != fingerprint:
        teacher = json.dumps(dict(info.identity.teacher), sort_keys=True)
        raise IntegrityError(
            f"{where}: holds targets of capture {info.identity.fingerprint} (teacher {teacher}, "
            f"k={info.identity.top_k}), not of {fingerprint}: targets of two teachers must not be mixed; {REMEDY}"
        )
    if info.unit.hash != unit:
        raise IntegrityError(f"{where}: holds unit {info.unit.hash}, not {unit}; {REMEDY}")
