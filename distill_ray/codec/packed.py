"""Codec v1, compiled: the same bytes, values and refusals as `reference`, several times as fast.

Legend of shapes: N rows, K kept tokens (k), V real vocabulary, B bytes of a row.
"""

from __future__ import annotations

import numpy as np

from distill_ray.codec import reference
from distill_ray.codec.format import (
    ABOVE_ZERO,
    BLOCK,
    GAP_SCALE,
    GAPS,
    HEAD,
    MASSES,
    MAX_GAP,
    check_input,
    check_packed_shape,
    flat_rows,
    planes_of,
    read_head,
    row_bytes,
    write_head,
)


def encode(
    ids_NK: np.ndarray,
    logprobs_NK: np.ndarray,
    log_tail_N: np.ndarray,
    vocab_size: int,
    out_NB: np.ndarray | None = None,
) -> np.ndarray:
    """Check and pack rank-sorted rows.

    int32 or int64 ids and float32 log-probabilities are read where they lie, also as columns of a wider array (an
    engine's k + 1 entries a row without the first); other types and layouts are copied. The GIL is released.

    Args:
        ids_NK: integers in 0 … V − 1, distinct within a row, most likely first; the order is kept.
        logprobs_NK: float log-probabilities, descending (ties allowed). −inf below the top-1 is clipped at gap 24.
        log_tail_N: float log(1 − P); −inf (P rounds to 1) is stored as LOG_FLOOR.
        vocab_size: V, at most 2^20.
        out_NB: where to write; a new array by default.

    Returns:
        uint8 [N, row_bytes(K, V)].

    Raises:
        IntegrityError: NaN, an infinite top-1, unsorted, duplicate or out-of-range ids; names the row and the numbers.
            What `out_NB` then holds must not be used.
        ValueError: shapes that do not fit each other or the format.
    """
    from distill_ray.codec import kernels

    ids_NK, logprobs_NK, log_tail_N = np.asarray(ids_NK), np.asarray(logprobs_NK), np.asarray(log_tail_N)
    check_input(ids_NK, logprobs_NK, log_tail_N)
    n, k = ids_NK.shape
    size = row_bytes(k, vocab_size)
    if out_NB is None:
        out_NB = np.empty((n, size), np.uint8)
    elif out_NB.shape != (n, size) or out_NB.dtype != np.uint8 or not out_NB.flags.c_contiguous:
        raise ValueError(f"out is {out_NB.dtype} {out_NB.shape}; {n} rows need contiguous uint8 {(n, size)}")
    if n == 0:
        return out_NB
    ids, id_stride = flat_rows(ids_NK if ids_NK.dtype in (np.int32, np.int64) else ids_NK.astype(np.int64))
    logprobs, stride = flat_rows(logprobs_NK.astype(np.float32, copy=False))
    tail_N = log_tail_N.astype(np.float32, copy=False)
    kernel = kernels.encode_int32 if ids.dtype == np.int32 else kernels.encode_int64
    sizes = (n, k, vocab_size, planes_of(vocab_size))
    numbers = (np.float32(ABOVE_ZERO), np.float32(MAX_GAP), GAP_SCALE)
    sound = kernel(ids, id_stride, logprobs, stride, *sizes, *numbers, out_NB.reshape(-1), HEAD)
    if not (sound and bool((tail_N <= ABOVE_ZERO).all())):
        reference.encode(ids_NK, logprobs_NK, log_tail_N, vocab_size)
        raise AssertionError("the compiled codec refuses rows that the reference accepts")
    write_head(logprobs_NK[:, 0].astype(np.float32, copy=False), tail_N, out_NB)
    return out_NB


def decode(packed_NB: np.ndarray, k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unpack rows; kept + tail are renormalised to 1. The GIL is released.

    Args:
        packed_NB: uint8 [N, row_bytes(k, V)].
        k: kept tokens per row.
        vocab_size: V at encoding.

    Returns:
        ids_NK int32 in the order they were given, logprobs_NK float32 descending, log_tail_N float32, all finite.

    Raises:
        IntegrityError: the stride is not that of (k, V).
    """
    from distill_ray.codec import kernels

    check_packed_shape(packed_NB, k, vocab_size)
    n, planes = len(packed_NB), planes_of(vocab_size)
    ids_NK = np.empty((n, k), np.int32)
    logprobs_NK = np.empty((n, k), np.float32)
    log_tail_N = np.empty(n, np.float32)
    step = max(1, BLOCK // k)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        rows = part.stop - start
        mass_N = np.empty(rows, np.int64)
        packed, stride = flat_rows(packed_NB[part])
        kernels.decode_ids(packed, stride, rows, k, planes, HEAD, MASSES, ids_NK[part].reshape(-1), mass_N)
        top_N, log_tail_N[part] = read_head(packed_NB[part], mass_N)
        kernels.decode_logprobs(packed, stride, rows, k, HEAD, GAPS, top_N, logprobs_NK[part].reshape(-1))
    return ids_NK, logprobs_NK, log_tail_N


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
