"""Checks on drawn tokens: their log-probabilities against those scored again, and where they fell against the tails.

Which of two equally likely tokens was drawn nobody can check; how often draws fell outside the kept ones, over a whole
unit, is a sum of independent numbers with known mean and variance.

Legend of shapes: N rows, M the most distinct ids that one of them drew.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from distill_ray.audit.pair import Check, Difference, Pair, anywhere, look_up, span
from distill_ray.codec import unrounded_log
from distill_ray.schema import Draws
from distill_ray.targets import CaptureIdentity, StoredDraws, StoredSequence, UnitTargets, decode_draws, decode_rows

_SIGMAS = 7.0
_ROUNDED = 2e-3
"""Share by which the stored tails' rounding, mostly averaged out over rows, may move what is expected outside."""
_FEW = 30.0
"""Draws more or less that prove nothing: of rare events the normal bound alone would accuse honest units."""


def draw_checks(pair: Pair) -> list[Check]:
    """Every drawn id has the log-probability that it gets when scored again; beyond rank R no more than the R-th, where
    rows may keep it."""
    if pair.stored.draws is None:
        return []
    ids_NM, used_NM, logprobs_NM = _padded(pair.stored.draws)
    value_NM, found_NM = look_up(ids_NM, pair.again)
    stored = unrounded_log(logprobs_NM)
    other_NM = ~(stored.distance(value_NM, pair.slack) == 0)
    above_NM = (ids_NM < pair.kept_below) & ~(stored.low <= value_NM + pair.slack)
    bad_NM = used_NM & np.where(found_NM, other_NM, above_NM)

    def say(t: int) -> str:
        j = int(np.argmax(bad_NM[t]))
        beyond = "" if found_NM[t, j] else "at most "
        return (
            f"id {ids_NM[t, j]} was drawn with log-probability {logprobs_NM[t, j]:.4f}, scored again it has {beyond}"
            f"{value_NM[t, j]:.4f}; {span(stored, (t, j), pair.slack)}"
        )

    return [Check(anywhere(bad_NM), say)]


def check_draws_fall(identity: CaptureIdentity, stored: UnitTargets) -> tuple[int, Difference] | None:
    """Draws of a whole unit against its own tails: as many outside the kept ids as their mass there says.

    That finds draws from the kept ids alone, at another temperature, or of other rows; of draws from the tail only
    that none is kept.
    """
    outside = expected = variance = 0.0
    seen: set[bytes] = set()
    for i in range(len(stored) if identity.draws else 0):
        sequence = stored.sequence(i)
        beyond_N, total_N = _outside(identity, sequence)
        if identity.draws_from == "tail":
            if (kept := np.flatnonzero(beyond_N != total_N)).size:
                t = int(kept[0])
                return i, Difference(
                    t, f"{total_N[t] - beyond_N[t]} of its {total_N[t]} draws from the tail are kept ids"
                )
            continue
        if (key := hashlib.sha256(sequence.tokens.tobytes()).digest()) in seen:
            continue  # draws are seeded by their sequence: a second copy of it tells nothing new
        seen.add(key)
        log_tail_N = decode_rows(identity, sequence, identity.draws_temperature).log_tail_N.astype(np.float64)
        tail_N = np.exp(np.minimum(log_tail_N, 0.0))
        outside += beyond_N.sum()
        expected += float((total_N * tail_N).sum())
        variance += float((total_N * tail_N * (1 - tail_N)).sum())
    if abs(outside - expected) <= _SIGMAS * math.sqrt(variance) + _ROUNDED * expected + _FEW:
        return None
    return 0, Difference(
        0,
        f"over the whole unit {outside:,.0f} draws fell outside the kept ids, where their tails at T = "
        f"{identity.draws_temperature:g} expect {expected:,.0f} ± {math.sqrt(variance):,.0f}: they are not drawn from "
        "this distribution",
    )


def _outside(identity: CaptureIdentity, stored: StoredSequence) -> tuple[np.ndarray, np.ndarray]:
    """[N] draws that fell outside the kept ids, and [N] all draws."""
    assert stored.draws is not None
    ids_NK, draws = decode_rows(identity, stored).ids_NK, decode_draws(stored.draws)
    row_M = _row_of(draws)
    base = np.int64(identity.vocab_size)
    kept_M = np.isin(row_M * base + draws.ids_M, np.arange(len(ids_NK))[:, None] * base + ids_NK)
    total_N = np.bincount(row_M, weights=draws.counts_M, minlength=len(ids_NK))
    inside_N = np.bincount(row_M, weights=draws.counts_M * kept_M, minlength=len(ids_NK))
    return (total_N - inside_N).astype(np.int64), total_N.astype(np.int64)


def _row_of(draws: Draws) -> np.ndarray:
    return np.repeat(np.arange(len(draws.distinct_N)), draws.distinct_N)


def _padded(stored: StoredDraws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[N, M] ids, which of them are draws, and float16 log-probabilities; the others are id 0."""
    used_NM = np.arange(max(1, int(stored.distinct_N.max(initial=0)))) < stored.distinct_N[:, None]
    ids_NM, logprobs_NM = np.zeros(used_NM.shape, np.int64), np.zeros(used_NM.shape, np.float16)
    ids_NM[used_NM] = decode_draws(stored).ids_M
    logprobs_NM[used_NM] = stored.logprobs_M
    return ids_NM, used_NM, logprobs_NM
