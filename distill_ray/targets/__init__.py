"""Soft targets in storage: one object per corpus unit, an index over them, and a run's manifest of which it uses."""

from distill_ray.targets.done import done_hashes, done_units, object_sizes
from distill_ray.targets.draws import decode_draws, offsets_of
from distill_ray.targets.identity import CaptureIdentity, capture_prefix, unit_key
from distill_ray.targets.index import append_index, drop_units, each_object, load_index, load_table, target_objects
from distill_ray.targets.inspect import InspectReport, inspect
from distill_ray.targets.layout import StoredDraws, StoredSequence, stored_row_bytes
from distill_ray.targets.manifest import (
    ManifestUnit,
    ManifestUnits,
    RunManifest,
    read_run_manifest,
    units_of_lost_manifest,
    write_run_manifest,
)
from distill_ray.targets.reader import UnitReader, UnitTargets, decode_rows, open_unit, read_unit
from distill_ray.targets.witness import (
    Witness,
    places,
    read_witness,
    to_witness,
    witness_key,
    witnessed,
    write_witness,
)
from distill_ray.targets.writer import encode_unit

__all__ = [
    "CaptureIdentity",
    "InspectReport",
    "ManifestUnit",
    "ManifestUnits",
    "RunManifest",
    "StoredDraws",
    "StoredSequence",
    "UnitReader",
    "UnitTargets",
    "Witness",
    "append_index",
    "capture_prefix",
    "decode_draws",
    "decode_rows",
    "done_hashes",
    "done_units",
    "drop_units",
    "each_object",
    "encode_unit",
    "inspect",
    "load_index",
    "load_table",
    "object_sizes",
    "offsets_of",
    "open_unit",
    "places",
    "read_run_manifest",
    "read_unit",
    "read_witness",
    "stored_row_bytes",
    "target_objects",
    "to_witness",
    "unit_key",
    "units_of_lost_manifest",
    "witness_key",
    "witnessed",
    "write_run_manifest",
    "write_witness",
]
