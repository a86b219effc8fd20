"""Stored rows against the same rows scored again. Pure numpy; knows nothing of engines or storage.

Every bound follows from two facts: the bytes say in which interval a captured number lay (`codec.unrounded`), and a
re-scored number lies within the tolerance of the captured one. So honest rows pass whatever their ties.

Legend of shapes: N rows, K kept tokens, R ≥ K re-scored tokens of each row, the most likely first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_ray.audit.columns import column_checks
from distill_ray.audit.drawn import draw_checks
from distill_ray.audit.pair import Check, Difference, Pair, anywhere, look_up, span
from distill_ray.audit.tolerance import Tolerance
from distill_ray.codec import unrounded, unrounded_log
from distill_ray.schema import TargetRows
from distill_ray.targets import CaptureIdentity, StoredSequence

RENORMALISED = 0.04
"""Nats by which decoding may move a whole row so that it sums to 1 (0.035, and float16's half step)."""


@dataclass(frozen=True)
class RowFigures:
    """What the comparison of one sequence gives."""

    rows: int
    worst: float
    """Largest difference of a log-probability beyond the codec's rounding, in nats."""
    worst_at: int
    """Its row."""
    moved_mass: float
    """Sum over rows of the total variation distance between stored and re-scored row."""
    difference: Difference | None


def compare_rows(
    identity: CaptureIdentity,
    stored: StoredSequence,
    decoded: TargetRows,
    again: TargetRows,
    tolerance: Tolerance,
) -> RowFigures:
    """Compare every row of one sequence; temperatures and entropy where both sides have them.

    Args:
        identity: the capture that the stored rows belong to.
        stored: one sequence as stored.
        decoded: what training reads of it (`targets.decode_rows`).
        again: its rows scored again, R ids each (2 K or more, so that a swap at the K-th place shows too).
        tolerance: of the teacher's arithmetic.
    """
    if len(decoded.ids_NK) != len(again.ids_NK):
        what = f"{len(decoded.ids_NK)} rows are stored, {len(again.ids_NK)} were scored again"
        return RowFigures(0, 0.0, 0, 0.0, Difference(min(len(decoded.ids_NK), len(again.ids_NK)), what))
    if len(decoded.ids_NK) == 0:
        return RowFigures(0, 0.0, 0, 0.0, None)
    value_NK, found_NK = look_up(decoded.ids_NK, again)
    kept_NR = look_up(again.ids_NK, decoded)[1]
    bounds = unrounded(stored.packed_NB, identity.top_k, identity.vocab_size)
    ids = (identity.vocab_size, identity.kept_below)
    pair = Pair(stored, decoded, bounds, again, *ids, tolerance.logprob, value_NK, found_NK, kept_NR)
    beyond_N = _beyond(pair)
    moved_N = _moved_mass(pair)
    checks = [*_id_checks(pair), *_value_checks(pair), *column_checks(pair), *draw_checks(pair), _decoding_check(pair)]
    checks.append(
        Check(
            ~(moved_N <= tolerance.row_mass),
            lambda t: f"{moved_N[t]:.3f} of the probability mass lies elsewhere, allowed {tolerance.row_mass}",
        )
    )
    worst_at = int(np.argmax(beyond_N))
    return RowFigures(len(beyond_N), float(beyond_N[worst_at]), worst_at, float(moved_N.sum()), _first(checks))


def _first(checks: list[Check]) -> Difference | None:
    rows = [int(np.argmax(c.bad_N)) for c in checks if c.bad_N.any()]
    if not rows:
        return None
    row = min(rows)
    return Difference(row, next(c for c in checks if c.bad_N[row]).say(row))


def _beyond(pair: Pair) -> np.ndarray:
    """[N] nats by which the row's log-probabilities differ beyond the codec's rounding."""
    found_N = pair.found_NK[:, 0]
    gap_NK = np.where(pair.found_NK & found_N[:, None], pair.bounds.gap_NK.distance(pair.gap_NK), 0.0)
    top_N = np.where(found_N, pair.bounds.top_N.distance(pair.value_NK[:, 0]), 0.0)
    actual_N = unrounded_log(pair.stored.actual_logprob_N).distance(pair.again.actual_logprob_N)
    return np.maximum(np.maximum(gap_NK.max(axis=1), top_N), actual_N)


def _moved_mass(pair: Pair) -> np.ndarray:
    """[N] total variation distance over the stored ids and one bucket for all others, of what training reads."""
    stored_NK = np.exp(pair.decoded.logprobs_NK.astype(np.float64))
    again_NK = np.exp(pair.value_NK)
    again_NK = np.where(pair.found_NK, again_NK, np.minimum(again_NK, stored_NK))
    rest_N = 1 - again_NK.sum(axis=1)
    tail_N = np.exp(pair.decoded.log_tail_N.astype(np.float64))
    return (np.abs(stored_NK - again_NK).sum(axis=1) + np.abs(tail_N - rest_N)) / 2


def _id_checks(pair: Pair) -> list[Check]:
    """The same ids but for ties: one may stand for another only where their re-scored values are that close."""
    ids_NK, again, slack = pair.decoded.ids_NK, pair.again, pair.slack
    lowest_NK = pair.bounds.top_N.low[:, None] - pair.bounds.gap_NK.high
    alien_NK = ~pair.found_NK & (lowest_NK > pair.last_N1 + slack)
    least_N1 = pair.value_NK.min(axis=1, keepdims=True)
    lost_NR = ~pair.kept_NR & (again.logprobs_NK > least_N1 + 2 * slack)
    above_NK = np.minimum.accumulate(pair.value_NK, axis=1)
    swapped_NK = np.zeros(ids_NK.shape, bool)
    swapped_NK[:, 1:] = pair.value_NK[:, 1:] > above_NK[:, :-1] + 2 * slack

    def alien(t: int) -> str:
        j = int(np.argmax(alien_NK[t]))
        return (
            f"id {ids_NK[t, j]} is stored at rank {j + 1} with log-probability {pair.decoded.logprobs_NK[t, j]:.4f}, "
            f"scored again it is not among the first {again.ids_NK.shape[1]} (≤ {pair.last_N1[t, 0]:.4f})"
        )

    def lost(t: int) -> str:
        j = int(np.argmax(lost_NR[t]))
        return (
            f"id {again.ids_NK[t, j]} is not stored, scored again it has rank {j + 1} and log-probability "
            f"{again.logprobs_NK[t, j]:.4f}, above {least_N1[t, 0]:.4f} of a stored one"
        )

    def swapped(t: int) -> str:
        j = int(np.argmax(swapped_NK[t]))
        return (
            f"id {ids_NK[t, j]} is stored at rank {j + 1}, scored again its log-probability {pair.value_NK[t, j]:.4f} "
            f"is above {above_NK[t, j - 1]:.4f} of an id stored before it"
        )

    return [
        Check(anywhere(alien_NK), alien),
        Check(anywhere(lost_NR), lost),
        Check(anywhere(swapped_NK), swapped),
    ]


def _value_checks(pair: Pair) -> list[Check]:
    """Kept log-probabilities: the first, and the gaps of all others to it."""
    bounds, slack, value_NK, decoded_NK = pair.bounds, pair.slack, pair.value_NK, pair.decoded.logprobs_NK
    top_N = pair.found_NK[:, 0] & ~(bounds.top_N.distance(value_NK[:, 0], slack) == 0)
    judged_NK = pair.found_NK & pair.found_NK[:, :1]
    gap_NK = judged_NK & ~(bounds.gap_NK.distance(pair.gap_NK, 2 * slack) == 0)

    def value(t: int, j: int) -> str:
        return (
            f"id {pair.decoded.ids_NK[t, j]} at rank {j + 1} has log-probability {decoded_NK[t, j]:.4f} stored and "
            f"{value_NK[t, j]:.4f} scored again, {abs(decoded_NK[t, j] - value_NK[t, j]):.4f} nats apart"
        )

    def gap(t: int) -> str:
        j = int(np.argmax(gap_NK[t]))
        return f"{value(t, j)}; its gap to rank 1 is {pair.gap_NK[t, j]:.4f}, {span(bounds.gap_NK, (t, j), 2 * slack)}"

    return [
        Check(top_N, lambda t: f"{value(t, 0)}; {span(bounds.top_N, (t,), slack)}"),
        Check(anywhere(gap_NK), gap),
    ]


def _decoding_check(pair: Pair) -> Check:
    """What training reads is what the bytes say: renormalised as a whole, with their gaps."""
    decoded_NK, first_N = pair.decoded.logprobs_NK.astype(np.float64), pair.value_NK[:, 0]
    moved_N = pair.found_NK[:, 0] & ~(np.abs(decoded_NK[:, 0] - first_N) <= RENORMALISED + pair.slack)
    other_NK = ~(pair.bounds.gap_NK.distance(decoded_NK[:, :1] - decoded_NK, 1e-4) == 0)
    return Check(
        moved_N | anywhere(other_NK),
        lambda t: (
            f"decoded, its first log-probability is {decoded_NK[t, 0]:.4f} and the last {decoded_NK[t, -1]:.4f}, which "
            f"is not what the bytes say; scored again the first is {first_N[t]:.4f}"
        ),
    )
