"""Mixing weights: how often each epoch takes the sequences of a source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from distill_ray.errors import UserError
from distill_ray.storage import matching

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def check_mix(mix: Mapping[str, float], sources: Iterable[str]) -> dict[str, float]:
    """The weight of each distinct source; 1 where no pattern matches it.

    Args:
        mix: weight by source, URIs or globs as `corpus.sources` takes them.
        sources: URIs of the run's sources, repeated or not.

    Raises:
        UserError: a pattern matches no source, or two match one.
    """
    named = sorted(set(sources))
    found: dict[str, str] = {}
    for pattern in sorted(mix):
        matched = sorted(matching(pattern, named))
        if not matched:
            raise UserError(
                f"train.mix: {pattern!r} matches none of the {len(named)} source(s) of the run (the first is "
                f"{named[0] if named else 'missing'}); correct it or remove it. Text that lies in several sources "
                "belongs to the one it is listed under in the run's manifest"
            )
        for uri in matched:
            if uri in found:
                raise UserError(
                    f"train.mix: {found[uri]!r} and {pattern!r} both match {uri}; let one pattern match each source"
                )
            found[uri] = pattern
    return {uri: mix[found[uri]] if uri in found else 1.0 for uri in named}


def epoch_counts(times_S: np.ndarray, doc_key_S: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """How often one epoch takes each sequence: `times_S` rounded down or up.

    What is left of a whole number is spread over the epochs by a hash of the document: after E epochs a sequence was
    taken ⌊E·times⌋ or ⌈E·times⌉ times, all windows of a document as often as each other, and 0.5 takes one half of the
    documents in the first epoch and the other half in the second.

    Args:
        times_S: [S] float64, 0 or more.
        doc_key_S: [S] uint64.
        seed: of the run.
        epoch: from 0.

    Returns:
        [S] int64.
    """
    # 32 bits, so that the sum with any count below 2^20 is exact and a whole number stays one.
    start_S = (_hashed(doc_key_S, seed) >> np.uint64(32)).astype(np.float64) / 2.0**32
    upto, before = (np.floor(start_S + n * times_S) for n in (epoch + 1, epoch))
    return (upto - before).astype(np.int64)


def _hashed(keys_S: np.ndarray, seed: int) -> np.ndarray:
    """[S] uint64: the finaliser of SplitMix64 over the keys, moved by the seed's own number."""
    h = np.asarray(keys_S, np.uint64) + np.uint64((seed + 1) * _GAMMA % 2**64)
    for shift, factor in _MIX:
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return h ^ (h >> np.uint64(_LAST_SHIFT))


def times_of(sources: Sequence[str], multiplicity_U: np.ndarray, mix: Mapping[str, float]) -> np.ndarray:
    """[U] float64: how often an epoch takes the sequences of each unit, given its source. Raises as `check_mix`."""
    weights = check_mix(mix, sources)
    return multiplicity_U * np.array([weights[uri] for uri in sources], np.float64)
