"""Which stored sequences are scored again: chosen by hash, spread over units, the same for the same manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from heapq import nsmallest

import pyarrow.compute as pc

from distill_ray.errors import UserError
from distill_ray.targets import ManifestUnit, RunManifest
from distill_ray.units import texts

_AT_ONCE = 10_000
"""Hashes made into strings at a time."""


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
    counts_U = pc.call_function("list_value_length", [manifest.units.table["lengths"]]).to_numpy()
    # Objects only of units that get a sequence: a manifest may name millions.
    ranked = ((_rank(seed, name), at) for at, name in _names(manifest) if counts_U[at])
    units = [manifest.units[at] for _, at in nsmallest(sequences, ranked)]
    return spread([(unit, range(len(unit.lengths))) for unit in units], seed, sequences)


def spread(units: Listing[tuple[ManifestUnit, Listing[int]]], seed: str, sequences: int) -> list[UnitSample]:
    """`sequences` of these units, or all where there are fewer: one of each unit before a second of any.

    Args:
        units: each with the places of its sequences that may be chosen.
        seed: what makes another choice.
        sequences: how many.
    """
    choices = [sorted(places, key=lambda i, u=unit: _rank(seed, u.unit, i)) for unit, places in units]
    left = min(sequences, sum(map(len, choices)))
    counts = [0] * len(units)
    while left:
        for i, choice in enumerate(choices):
            if left and counts[i] < len(choice):
                counts[i] += 1
                left -= 1
    each = zip(units, choices, counts, strict=True)
    return [UnitSample(unit, tuple(sorted(choice[:count]))) for (unit, _), choice, count in each if count]


def whole(manifest: RunManifest, units: Listing[str]) -> list[UnitSample]:
    """Every sequence of the named units.

    Raises:
        UserError: the run uses no such unit.
    """
    wanted = dict.fromkeys(units)
    place = {name: at for at, name in _names(manifest) if name in wanted}
    unknown = [name for name in wanted if name not in place]
    if unknown:
        raise UserError(
            f"audit.units: the run uses no unit {', '.join(unknown)}; its {len(manifest.units)} units are the names of "
            f"the objects under targets/{manifest.fingerprint}, one: {manifest.units[0].unit}"
        )
    found = [manifest.units[place[name]] for name in wanted]
    return [UnitSample(unit, tuple(range(len(unit.lengths)))) for unit in found]


def _names(manifest: RunManifest) -> Iterator[tuple[int, str]]:
    """Place and hash of every unit."""
    hashes = manifest.units.hashes
    for start in range(0, len(hashes), _AT_ONCE):
        yield from enumerate(texts(hashes[start : start + _AT_ONCE]), start)


def _rank(*parts: object) -> bytes:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
