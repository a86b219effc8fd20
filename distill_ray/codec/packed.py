"""Codec v1: `[top-1 logprob f16][log tail f16][q8 × k][low 16 id bits × k][bit planes of id bits ≥ 16]`, little-endian.

q = round(255·√(Δ/24)) with Δ the gap in nats to the top-1, clipped at 24: fine near the top, where the mass is, and
at most 0.0945 nats off at the far end. Renormalising moves a row as a whole by its mass-weighted gap error: below 0.01
nats on a language model's rows, 0.035 at the very worst (511 ties at the least fortunate gap).
A plane holds one id bit of the k ids in ⌈k/8⌉ bytes, the first id in the highest bit.

Legend of shapes: N rows, K kept tokens (k), V real vocabulary, B bytes of a row.
"""

from __future__ import annotations

import numpy as np

from distill_ray.errors import IntegrityError

CODEC_VERSION = 1
MAX_GAP = 24.0
"""Nats below the top-1 at which kept log-probabilities are clipped; −inf (a one-hot teacher) is stored there."""
LOG_FLOOR = -80.0
"""Least log mass stored: log(1 − P) of a row whose P rounds to 1. exp(−80) = 1.8e-35 is still a normal float32."""
MAX_K = 512
MAX_VOCAB = 1 << 20

_HEAD = 4
_ABOVE_ZERO = 1e-3  # a log-probability this far above 0 is rounding; more is an error
_BLOCK = 1 << 17  # elements worked on at once, so that temporaries stay in the cache
_GAPS = (MAX_GAP * (np.arange(256) / 255.0) ** 2).astype(np.float32)
_WEIGHTS = np.exp(-_GAPS.astype(np.float64)).astype(np.float32)


def _planes(vocab_size: int) -> int:
    return max(0, (vocab_size - 1).bit_length() - 16)


def row_bytes(k: int, vocab_size: int) -> int:
    """Stride of one packed row in bytes: 204 at k = 64 and V = 128,256; 212 at V = 151,936.

    Raises:
        ValueError: k outside 1 … min(512, V), or V outside 1 … 2^20.
    """
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocab_size={vocab_size} is outside 1 … {MAX_VOCAB}; codec v1 stores no larger ids")
    if not 1 <= k <= min(MAX_K, vocab_size):
        raise ValueError(f"k={k} is outside 1 … {min(MAX_K, vocab_size)}; lower top_k")
    return _HEAD + 3 * k + _planes(vocab_size) * ((k + 7) // 8)


def encode(ids_NK: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray, vocab_size: int) -> np.ndarray:
    """Pack rank-sorted rows.

    Args:
        ids_NK: integers in 0 … V − 1, distinct within a row, most likely first; the order is kept.
        logprobs_NK: float log-probabilities, descending (ties allowed). −inf below the top-1 is clipped at gap 24.
        log_tail_N: float log(1 − P); −inf (P rounds to 1) is stored as LOG_FLOOR.
        vocab_size: V, at most 2^20.

    Returns:
        uint8 [N, row_bytes(K, V)].

    Raises:
        IntegrityError: NaN, an infinite top-1, unsorted, duplicate or out-of-range ids; names the row and the numbers.
        ValueError: shapes that do not fit each other or the format.
    """
    ids_NK = np.asarray(ids_NK)
    if ids_NK.ndim != 2 or logprobs_NK.shape != ids_NK.shape or log_tail_N.shape != ids_NK.shape[:1]:
        raise ValueError(
            f"shapes do not fit: ids {ids_NK.shape}, logprobs {logprobs_NK.shape}, log tail {log_tail_N.shape}"
        )
    n, k = ids_NK.shape
    out_NB = np.empty((n, row_bytes(k, vocab_size)), np.uint8)
    step = max(1, _BLOCK // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        logprobs = np.ascontiguousarray(logprobs_NK[part], np.float32)
        tail = np.asarray(log_tail_N[part], np.float32)
        _check(ids_NK[part], logprobs, tail, vocab_size, start)
        _encode_block(ids_NK[part], logprobs, tail, vocab_size, out_NB[part])
    return out_NB


def _encode_block(
    ids_NK: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray, vocab_size: int, out_NB: np.ndarray
) -> None:
    n, k = ids_NK.shape
    top_N1 = logprobs_NK[:, :1]
    gap_NK = top_N1 - logprobs_NK
    # minimum() before the root: the gap to −inf is +inf, by definition the clipped gap.
    np.minimum(gap_NK, np.float32(MAX_GAP), out=gap_NK)
    gap_NK *= np.float32(255.0**2 / MAX_GAP)
    np.rint(np.sqrt(gap_NK, out=gap_NK), out=gap_NK)
    head_N2 = np.concatenate([top_N1, np.maximum(log_tail_N, LOG_FLOOR)[:, None]], axis=1)
    out_NB[:, :_HEAD] = np.minimum(head_N2, 0.0).astype("<f2").view(np.uint8)
    out_NB[:, _HEAD : _HEAD + k] = gap_NK
    at = _HEAD + 3 * k
    out_NB[:, _HEAD + k : at] = ids_NK.astype("<u2").view(np.uint8).reshape(n, 2 * k)
    width = (k + 7) // 8
    planes = _planes(vocab_size)
    high_NK = (ids_NK >> 16).astype(np.uint8) if planes else ids_NK
    for bit in range(planes):
        out_NB[:, at : at + width] = np.packbits(high_NK & np.uint8(1 << bit), axis=1)
        at += width


def _check(ids_NK: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray, vocab_size: int, first: int) -> None:
    top_N = logprobs_NK[:, 0]
    bad = np.flatnonzero(~(np.isfinite(top_N) & (top_N <= _ABOVE_ZERO)))
    if len(bad):
        raise IntegrityError(
            f"row {first + bad[0]}: top-1 logprob is {top_N[bad[0]]}, not a log-probability; "
            "the teacher's output is broken at this row"
        )
    # `not <=` rather than `>`: a NaN anywhere in the row fails it too.
    descends_NK = logprobs_NK[:, 1:] <= logprobs_NK[:, :-1]
    if not descends_NK.all():
        row, rank = np.argwhere(~descends_NK)[0]
        raise IntegrityError(
            f"row {first + row}: logprob {logprobs_NK[row, rank + 1]} at rank {rank + 2} follows "
            f"{logprobs_NK[row, rank]} at rank {rank + 1}; rows must be finite and sorted, most likely first"
        )
    bad = np.flatnonzero(~(log_tail_N <= _ABOVE_ZERO))
    if len(bad):
        raise IntegrityError(f"row {first + bad[0]}: log tail mass is {log_tail_N[bad[0]]}, not a log mass (≤ 0)")
    if ids_NK.min(initial=0) < 0 or ids_NK.max(initial=0) >= vocab_size:
        row, rank = np.argwhere((ids_NK < 0) | (ids_NK >= vocab_size))[0]
        raise IntegrityError(
            f"row {first + row}: id {ids_NK[row, rank]} at rank {rank + 1} is outside 0 … {vocab_size - 1}; "
            "padded vocabulary rows or unfilled slots must not reach the store"
        )
    sorted_NK = np.sort(ids_NK.astype(np.int32, copy=False), axis=1)
    twice_NK = sorted_NK[:, 1:] == sorted_NK[:, :-1]
    if twice_NK.any():
        row, at = np.argwhere(twice_NK)[0]
        raise IntegrityError(f"row {first + row}: id {sorted_NK[row, at]} occurs twice; kept ids must be distinct")


def decode(packed_NB: np.ndarray, k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unpack rows; kept + tail are renormalised to 1.

    Args:
        packed_NB: uint8 [N, row_bytes(k, V)].
        k: kept tokens per row.
        vocab_size: V at encoding.

    Returns:
        ids_NK int32 in the order they were given, logprobs_NK float32 descending, log_tail_N float32, all finite.

    Raises:
        IntegrityError: the stride is not that of (k, V).
    """
    stride = row_bytes(k, vocab_size)
    if packed_NB.ndim != 2 or packed_NB.shape[1] != stride or packed_NB.dtype != np.uint8:
        raise IntegrityError(
            f"packed rows are {packed_NB.dtype} {packed_NB.shape}; k={k} and vocab_size={vocab_size} need "
            f"uint8 rows of {stride} bytes: they were captured under another k or vocabulary"
        )
    n = len(packed_NB)
    ids_NK = np.empty((n, k), np.int32)
    logprobs_NK = np.empty((n, k), np.float32)
    log_tail_N = np.empty(n, np.float32)
    step = max(1, _BLOCK // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        _decode_ids(packed_NB[part], k, vocab_size, ids_NK[part])
        _decode_mass(packed_NB[part], k, logprobs_NK[part], log_tail_N[part])
    return ids_NK, logprobs_NK, log_tail_N


def _decode_ids(packed_NB: np.ndarray, k: int, vocab_size: int, ids_NK: np.ndarray) -> None:
    at = _HEAD + 3 * k
    ids_NK[:] = np.ascontiguousarray(packed_NB[:, _HEAD + k : at]).view("<u2")
    width = (k + 7) // 8
    for bit in range(_planes(vocab_size)):
        plane_NK = np.unpackbits(packed_NB[:, at : at + width], axis=1, count=k)
        ids_NK |= np.left_shift(plane_NK, np.int32(16 + bit), dtype=np.int32)
        at += width


def _decode_mass(packed_NB: np.ndarray, k: int, logprobs_NK: np.ndarray, log_tail_N: np.ndarray) -> None:
    head_N2 = np.ascontiguousarray(packed_NB[:, :_HEAD]).view("<f2").astype(np.float32)
    q_NK = packed_NB[:, _HEAD : _HEAD + k]
    kept_N = np.exp(head_N2[:, 0]) * np.take(_WEIGHTS, q_NK).sum(axis=1, dtype=np.float32)
    log_total_N = np.log(kept_N + np.exp(head_N2[:, 1]))
    # Rounding of exp and log can put a mass of 1 a hair above it.
    top_N = np.minimum(head_N2[:, 0] - log_total_N, 0.0)
    np.subtract(top_N[:, None], np.take(_GAPS, q_NK), out=logprobs_NK)
    np.minimum(head_N2[:, 1] - log_total_N, 0.0, out=log_tail_N)


def at_temperature(logprobs_NK: np.ndarray, log_tail_T_N: np.ndarray, temperature: float) -> np.ndarray:
    """Kept log-probabilities of softmax(z / T), scaled so that they sum to 1 − tail_T.

    log p_T(i) = log p(i)/T − a_T is exact for every kept id; the stored log tail mass at T fixes a_T, so the rounding
    of the 8-bit gaps never leaks into the tail.

    Args:
        logprobs_NK: log-probabilities at T = 1.
        log_tail_T_N: stored log tail mass at T, ≤ 0.
        temperature: T > 0.

    Returns:
        float32 [N, K], finite and descending where the input is.
    """
    scaled_NK = logprobs_NK.astype(np.float32) / np.float32(temperature)
    scaled_NK -= scaled_NK.max(axis=1, keepdims=True)
    # The top k of at most 2^20 ids hold at least 9.5e-7 at any T, so a tail that rounded to 1 in float16 is below this.
    tail_N = np.minimum(log_tail_T_N.astype(np.float32), np.float32(-(2.0**-24)))
    log_kept_N = np.log(-np.expm1(tail_N)) - np.log(np.exp(scaled_NK).sum(axis=1))
    return scaled_NK + log_kept_N[:, None]
