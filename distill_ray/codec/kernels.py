"""The codec's inner loops as machine code. Importing this module compiles them, or loads them from numba's cache.

Arrays are flat and rows are found by their stride, so that any block of equally spaced rows is read where it lies.
Every loop over K is written so that the compiler makes vector instructions of it; measured, not guessed.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from distill_ray.jit import compiled

_SPREAD = np.uint64(0x8040201008040201)
"""Times the eight lowest bits of eight bytes: gathers them in the top byte, the first byte's highest. And back."""
_LOWEST = np.uint64(0x0101010101010101)


def _read_only(kind: types.Type) -> types.Array:
    return types.Array(kind, 1, "C", readonly=True)


def _written(kind: types.Type) -> types.Array:
    return types.Array(kind, 1, "C")


def _encode_signature(id_kind: types.Type) -> tuple[types.Type, ...]:
    source = (_read_only(id_kind), types.intp, _read_only(types.float32), types.intp)
    sizes = (types.intp, types.intp, types.intp, types.intp)
    return (*source, *sizes, types.float32, types.float32, types.float32, _written(types.uint8), types.intp)


@njit(forceinline=True, nogil=True, error_model="numpy")
def _is_sound(ids_K, logprobs_K, vocab_size, above_zero, seen):
    """The checks of `reference.check` on one row, but for its tail. `seen` is V bits, all 0 before and after."""
    k = len(ids_K)
    least = most = ids_K[0]
    for j in range(k):
        least, most = min(least, ids_K[j]), max(most, ids_K[j])
    if least < 0 or most >= vocab_size:
        return False
    descends = np.int32(0)
    for j in range(k - 1):
        descends += np.int32(1) if logprobs_K[j + 1] <= logprobs_K[j] else np.int32(0)
    if descends != k - 1 or not (-np.inf < logprobs_K[0] <= above_zero):
        return False
    twice = np.uint8(0)
    for j in range(k):
        at = np.uint32(ids_K[j]) >> np.uint32(3)
        bit = np.uint8(1) << np.uint8(ids_K[j] & 7)
        held = seen[at]
        twice |= held & bit
        seen[at] = held | bit
    for j in range(k):
        seen[np.uint32(ids_K[j]) >> np.uint32(3)] = 0
    return twice == 0


@njit(forceinline=True, nogil=True, error_model="numpy")
def _pack_planes(ids_K, planes, words, out_B):
    """Bit planes of one row. `words` are ⌈k/8⌉ uint64, whose bytes beyond k are 0."""
    high_K = words.view(np.uint8)
    for j in range(len(ids_K)):
        high_K[j] = np.uint8(ids_K[j] >> 16)
    width = len(words)
    for plane in range(planes):
        for g in range(width):
            bits = (words[g] >> np.uint64(plane)) & _LOWEST
            out_B[plane * width + g] = np.uint8((bits * _SPREAD) >> np.uint64(56))


@njit(forceinline=True, nogil=True, error_model="numpy")
def _encode(ids, id_stride, logprobs, stride, n, k, vocab_size, planes, above_zero, max_gap, scale, out, head):
    width = (k + 7) // 8
    size = head + 3 * k + planes * width
    seen = np.zeros((vocab_size + 7) // 8, np.uint8)
    words = np.zeros(width, np.uint64)
    for row in range(n):
        ids_K = ids[row * id_stride : row * id_stride + k]
        logprobs_K = logprobs[row * stride : row * stride + k]
        if not _is_sound(ids_K, logprobs_K, vocab_size, above_zero, seen):
            return False
        out_B = out[row * size + head : (row + 1) * size]
        top = logprobs_K[0]
        for j in range(k):
            scaled = min(top - logprobs_K[j], max_gap) * scale
            out_B[j] = np.uint8(np.int32(np.rint(np.sqrt(scaled))))
        low_2K = out_B[k : 3 * k]
        for j in range(k):
            low_2K[2 * j] = np.uint8(ids_K[j])
            low_2K[2 * j + 1] = np.uint8(ids_K[j] >> 8)
        if planes:
            _pack_planes(ids_K, planes, words, out_B[3 * k :])
    return True


@compiled(_encode_signature(types.int32))
def encode_int32(ids, id_stride, logprobs, stride, n, k, vocab_size, planes, above_zero, max_gap, scale, out, head):
    """Check n rows and write all of them but their first `head` bytes; False: a row is broken, nothing is usable."""
    return _encode(ids, id_stride, logprobs, stride, n, k, vocab_size, planes, above_zero, max_gap, scale, out, head)


@compiled(_encode_signature(types.int64))
def encode_int64(ids, id_stride, logprobs, stride, n, k, vocab_size, planes, above_zero, max_gap, scale, out, head):
    """`encode_int32` for the ids that `torch.topk` gives."""
    return _encode(ids, id_stride, logprobs, stride, n, k, vocab_size, planes, above_zero, max_gap, scale, out, head)


@compiled(
    (
        *(_read_only(types.uint8), types.intp, types.intp, types.intp, types.intp, types.intp),
        *(_read_only(types.int64), _written(types.int32), _written(types.int64)),
    )
)
def decode_ids(packed, stride, n, k, planes, head, masses, ids, mass_N):
    """Ids of n rows, and the sum of `masses` over each row's q."""
    width = (k + 7) // 8
    words = np.zeros(width, np.uint64)
    high_K = words.view(np.uint8)
    for row in range(n):
        row_B = packed[row * stride + head : row * stride + head + 3 * k + planes * width]
        ids_K = ids[row * k : (row + 1) * k]
        mass = np.int64(0)
        for j in range(k):
            mass += masses[row_B[j]]
        mass_N[row] = mass
        low_2K = row_B[k : 3 * k]
        for j in range(k):
            ids_K[j] = np.int32(low_2K[2 * j]) | (np.int32(low_2K[2 * j + 1]) << np.int32(8))
        if planes:
            for g in range(width):
                spread = np.uint64(0)
                for plane in range(planes):
                    byte = np.uint64(row_B[3 * k + plane * width + g])
                    spread |= (((byte * _SPREAD) >> np.uint64(7)) & _LOWEST) << np.uint64(plane)
                words[g] = spread
            for j in range(k):
                ids_K[j] |= np.int32(high_K[j]) << np.int32(16)


@compiled(
    (
        *(_read_only(types.uint8), types.intp, types.intp, types.intp, types.intp),
        *(_read_only(types.float32), _read_only(types.float32), _written(types.float32)),
    )
)
def decode_logprobs(packed, stride, n, k, head, gaps, top_N, logprobs):
    """Log-probabilities of n rows: the renormalised top-1 less the gaps."""
    for row in range(n):
        q_K = packed[row * stride + head : row * stride + head + k]
        logprobs_K = logprobs[row * k : (row + 1) * k]
        top = top_N[row]
        for j in range(k):
            logprobs_K[j] = top - gaps[q_K[j]]
