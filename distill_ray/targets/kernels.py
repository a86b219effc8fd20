"""The checks of `validate` as one pass of machine code. Importing this module compiles it, or loads it from the cache.

Legend of shapes: N rows, K kept tokens.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from distill_ray.jit import compiled

_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)  # nine significant bits: exact when multiplied by a small whole number
_LN2_LOW = np.float32(-2.12194440e-4)
_LEAST = np.float32(-87.0)  # below, exp is no normal float32


@njit(forceinline=True, nogil=True, error_model="numpy")
def _exp(x):
    """float32 e^x within 2e-7 for −87 ≤ x ≤ 1, held there outside; vector instructions, unlike the library's.

    Range reduction and minimax polynomial of the Cephes library's expf (S. L. Moshier).
    """
    x = min(max(x, _LEAST), np.float32(1))
    n = np.rint(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(forceinline=True, nogil=True, error_model="numpy")
def _sum(values_K):
    """In a fixed order that four float64 lanes can keep."""
    k = len(values_K)
    a = b = c = d = 0.0
    for j in range(0, k - 3, 4):
        a += values_K[j]
        b += values_K[j + 1]
        c += values_K[j + 2]
        d += values_K[j + 3]
    for j in range(k - k % 4, k):
        a += values_K[j]
    return (a + b) + (c + d)


@njit(forceinline=True, nogil=True, error_model="numpy")
def _is_of_token(ids_K, logprobs_K, log_tail, token, actual, rank, tolerance, floor):
    """`validate._check_actual` for one row."""
    k = len(ids_K)
    actual = max(actual, floor)
    ranked = max(logprobs_K[min(rank, k) - 1], floor)
    agrees = abs(ranked - actual) <= tolerance if rank <= k else actual <= ranked + tolerance
    held = np.int32(0)
    for j in range(k):
        held |= np.int32(1) if ids_K[j] == token else np.int32(0)
    if not held:
        last = max(logprobs_K[k - 1], floor)
        return agrees and actual <= last + tolerance and _exp(actual) <= _exp(log_tail) + tolerance
    at = 0
    while ids_K[at] != token:
        at += 1
    return agrees and abs(max(logprobs_K[at], floor) - actual) <= tolerance


def _read_only(kind):
    return types.Array(kind, 1, "C", readonly=True)


@compiled(
    (
        *(_read_only(types.int32), _read_only(types.int32), _read_only(types.float32), _read_only(types.int64)),
        *(_read_only(types.int32), types.intp, _read_only(types.float32), types.intp, types.intp),
        *(types.intp, types.intp, types.intp, types.boolean, types.float32, types.float32),
    )
)
def first_unsound_draws(
    drawn, counts, drawn_logprobs, offsets, ids, id_stride, logprobs, stride, k, vocab, kept_below, draws, tail_only,
    tolerance, floor,
):  # fmt: skip
    """The first row whose draws cannot be what the teacher drew, −1 if none; `validate` says why.

    Args:
        drawn: ids drawn, row after row.
        counts: how often each was drawn.
        drawn_logprobs: their log-probabilities.
        offsets: where each row begins in these three, and their end.
        ids: kept ids, flat; row t begins at t·id_stride.
        id_stride: items.
        logprobs: of the kept ids, flat; row t begins at t·stride.
        stride: items.
        k: kept tokens.
        vocab: V.
        kept_below: ids from it on are never kept, however likely.
        draws: that a row's counts sum to, unless it has none.
        tail_only: none may be among the kept.
        tolerance: of log-probabilities, nats.
        floor: least log-probability told apart from −inf.
    """
    for t in range(len(offsets) - 1):
        if offsets[t] == offsets[t + 1]:
            continue  # whether a row may have none is the caller's question
        ids_K = ids[t * id_stride : t * id_stride + k]
        least = max(logprobs[t * stride + k - 1], floor)
        before, total = -1, 0
        for j in range(offsets[t], offsets[t + 1]):
            id_, logprob = drawn[j], drawn_logprobs[j]
            total += counts[j]
            if not before < id_ < vocab or counts[j] < 1 or not -np.inf < logprob <= tolerance:
                return t
            before, at = id_, -1
            for i in range(k):
                at = i if ids_K[i] == id_ else at
            logprob = max(logprob, floor)
            if at < 0:
                if id_ < kept_below and logprob > least + tolerance:
                    return t
            elif tail_only or not abs(logprob - max(logprobs[t * stride + at], floor)) <= tolerance:
                return t
        if total != draws:
            return t
    return -1


@compiled(
    (
        *(_read_only(types.int32), types.intp),
        *(_read_only(types.float32), types.intp, types.intp),
        *(types.Array(types.float32, 1, "A", readonly=True), types.Array(types.int32, 1, "A", readonly=True)),
        *(types.Array(types.float32, 1, "A", readonly=True), types.Array(types.int32, 1, "A", readonly=True)),
        *(types.intp, types.float32, types.float32, types.Array(types.float64, 1, "C")),
    )
)
def rows_are_sound(
    ids, id_stride, logprobs, stride, k, tail_N, next_N, actual_N, rank_N, vocab, tolerance, floor, kept_N
):
    """Order, mass and alignment of N rows, up to the first that fails.

    Args:
        ids: flat; row t begins at t·id_stride.
        id_stride: items.
        logprobs: flat; row t begins at t·stride.
        stride: items.
        k: kept tokens.
        tail_N: log tail mass.
        next_N: the tokens that came next.
        actual_N: their log-probabilities.
        rank_N: their ranks.
        vocab: V.
        tolerance: of masses, and of log-probabilities in nats.
        floor: least log-probability told apart from −inf.
        kept_N: receives the kept mass.

    Returns:
        False when a row fails; only `validate`'s numpy checks say which and why.
    """
    masses_K = np.empty(k, np.float32)
    for t in range(len(tail_N)):
        ids_K = ids[t * id_stride : t * id_stride + k]
        logprobs_K = logprobs[t * stride : t * stride + k]
        descends = np.int32(0)
        for j in range(k - 1):
            descends += np.int32(1) if logprobs_K[j + 1] <= logprobs_K[j] else np.int32(0)
        if descends != k - 1 or np.isnan(logprobs_K[0]) or not actual_N[t] <= tolerance:
            return False
        for j in range(k):
            masses_K[j] = _exp(logprobs_K[j])
        kept_N[t] = _sum(masses_K)
        if not abs(kept_N[t] + _exp(tail_N[t]) - 1.0) <= tolerance or not tail_N[t] <= tolerance:
            return False
        if not 1 <= rank_N[t] <= vocab:
            return False
        if not _is_of_token(ids_K, logprobs_K, tail_N[t], next_N[t], actual_N[t], rank_N[t], tolerance, floor):
            return False
    return True
