"""Soft targets in storage: one object per corpus unit, an index over them, and a run's manifest of which it uses."""

from distill_ray.targets.identity import CaptureIdentity, capture_prefix, unit_key
from distill_ray.targets.layout import StoredSequence
from distill_ray.targets.reader import UnitReader, UnitTargets, decode_rows, open_unit, read_unit
from distill_ray.targets.writer import encode_unit

__all__ = [
    "CaptureIdentity",
    "StoredSequence",
    "UnitReader",
    "UnitTargets",
    "capture_prefix",
    "decode_rows",
    "encode_unit",
    "open_unit",
    "read_unit",
    "unit_key",
]
