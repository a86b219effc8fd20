"""Codec v1 in plain numpy: what the compiled codec must equal byte for byte, and the words of every refusal.

Legend of shapes: N rows, K kept tokens (k), V real vocabulary, B bytes of a row.
"""

from __future__ import annotations

import numpy as np

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
    planes_of,
    read_head,
    row_bytes,
    write_head,
)
from distill_ray.errors import IntegrityError


def encode(ids_NK: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray, vocab_size: int) -> np.ndarray:
    """Pack rank-sorted rows; arguments, result and errors are those of `distill_ray.codec.encode`."""
    ids_NK = np.asarray(ids_NK)
    check_input(ids_NK, logprobs_NK, log_tail_N)
    n, k = ids_NK.shape
    out_NB = np.empty((n, row_bytes(k, vocab_size)), np.uint8)
    step = max(1, BLOCK // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        logprobs = np.ascontiguousarray(logprobs_NK[part], np.float32)
        tail = np.asarray(log_tail_N[part], np.float32)
        check(ids_NK[part], logprobs, tail, vocab_size, start)
        _encode_block(ids_NK[part], logprobs, tail, vocab_size, out_NB[part])
    return out_NB


def _encode_block(
    ids_NK: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray, vocab_size: int, out_NB: np.ndarray
) -> None:
    n, k = ids_NK.shape
    gap_NK = logprobs_NK[:, :1] - logprobs_NK
    # minimum() before the root: the gap to −inf is +inf, by definition the clipped gap.
    np.minimum(gap_NK, np.float32(MAX_GAP), out=gap_NK)
    gap_NK *= GAP_SCALE
    np.rint(np.sqrt(gap_NK, out=gap_NK), out=gap_NK)
    write_head(logprobs_NK[:, 0], log_tail_N, out_NB)
    out_NB[:, HEAD : HEAD + k] = gap_NK
    at = HEAD + 3 * k
    out_NB[:, HEAD + k : at] = ids_NK.astype("<u2").view(np.uint8).reshape(n, 2 * k)
    width = (k + 7) // 8
    planes = planes_of(vocab_size)
    high_NK = (ids_NK >> 16).astype(np.uint8) if planes else ids_NK
    for bit in range(planes):
        out_NB[:, at : at + width] = np.packbits(high_NK & np.uint8(1 << bit), axis=1)
        at += width


def check(ids_NK: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray, vocab_size: int, first: int) -> None:
    """Refuse rows that are no rank-sorted log-probabilities of distinct ids.

    Args:
        ids_NK: integers.
        logprobs_NK: float32.
        log_tail_N: float32.
        vocab_size: V.
        first: number of the first row, for messages.

    Raises:
        IntegrityError: names the row and the numbers.
    """
    top_N = logprobs_NK[:, 0]
    bad = np.flatnonzero(~(np.isfinite(top_N) & (top_N <= ABOVE_ZERO)))
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
    bad = np.flatnonzero(~(log_tail_N <= ABOVE_ZERO))
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
    """Unpack rows; arguments, result and errors are those of `distill_ray.codec.decode`."""
    check_packed_shape(packed_NB, k, vocab_size)
    n = len(packed_NB)
    ids_NK = np.empty((n, k), np.int32)
    logprobs_NK = np.empty((n, k), np.float32)
    log_tail_N = np.empty(n, np.float32)
    step = max(1, BLOCK // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        _decode_ids(packed_NB[part], k, vocab_size, ids_NK[part])
        q_NK = packed_NB[part, HEAD : HEAD + k]
        top_N, log_tail_N[part] = read_head(packed_NB[part], np.take(MASSES, q_NK).sum(axis=1))
        np.subtract(top_N[:, None], np.take(GAPS, q_NK), out=logprobs_NK[part])
    return ids_NK, logprobs_NK, log_tail_N


def _decode_ids(packed_NB: np.ndarray, k: int, vocab_size: int, ids_NK: np.ndarray) -> None:
    at = HEAD + 3 * k
    ids_NK[:] = np.ascontiguousarray(packed_NB[:, HEAD + k : at]).view("<u2")
    width = (k + 7) // 8
    for bit in range(planes_of(vocab_size)):
        plane_NK = np.unpackbits(packed_NB[:, at : at + width], axis=1, count=k)
        ids_NK |= np.left_shift(plane_NK, np.int32(16 + bit), dtype=np.int32)
        at += width
