"""Which stored sequences are scored again: chosen by hash, spread over units, the same for the same manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from distill_ray.errors import UserError
from distill_ray.targets import ManifestUnit, RunManifest


@dataclass(frozen=True)
class UnitSample:
    """Sequences of one unit."""

    unit: ManifestUnit
    sequences: tuple[int, ...]
    """Ascending places in the stored order."""


def choose(manifest: RunManifest, seed: str, sequences: int) -> list[UnitSample]:
    """`sequences` of the manifest's, or all where there are fewer: one of each unit before a second of any.

    Args:
        manifest: the run's targets.
        seed: what makes another choice; the manifest's SHA-256, so that every week looks elsewhere.
        sequences: how many.
    """
    units = [u for u in manifest.units if len(u.lengths)]
    units.sort(key=lambda u: _rank(seed, u.unit))
    left = min(sequences, sum(len(u.lengths) for u in units))
    counts = [0] * len(units)
    while left:
        for i, unit in enumerate(units):
            if left and counts[i] < len(unit.lengths):
                counts[i] += 1
                left -= 1
    found = []
    for unit, count in zip(units, counts, strict=True):
        if count:
            places = sorted(range(len(unit.lengths)), key=lambda i, u=unit: _rank(seed, u.unit, i))
            found.append(UnitSample(unit, tuple(sorted(places[:count]))))
    return found


def whole(manifest: RunManifest, units: Listing[str]) -> list[UnitSample]:
    """Every sequence of the named units.

    Raises:
        UserError: the run uses no such unit.
    """
    known = {u.unit: u for u in manifest.units}
    unknown = [u for u in units if u not in known]
    if unknown:
        raise UserError(
            f"audit.units: the run uses no unit {', '.join(unknown)}; its {len(known)} units are the names of the "
            f"objects under targets/{manifest.fingerprint}, one: {min(known)}"
        )
    return [UnitSample(known[u], tuple(range(len(known[u].lengths)))) for u in dict.fromkeys(units)]


def _rank(*parts: object) -> bytes:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
