"""Top-k, log-sum-exp and entropy of a logits tile on a CPU: compiled, vectorised, a thread for each core.

Each row is read from memory once; the second look at it finds it in the cache.
1. Columns are parted in groups of 16 (every 64th of 1,024, so that the maxima of 64 groups are one vector loop). The
   (K+1)-th greatest group maximum bounds the (K+1)-th greatest logit from below, so only the groups that reach it, K+1
   or a few more, are searched with a heap.
2. Block by block, the sums over everything that is not kept, in float32 within a block and float64 over blocks.

Legend: R rows, W columns, K kept, S temperatures (the first is 1).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from distill_ray.jit import compiled
from distill_ray.teacher.threads import by_rows

_STRIDE = 64
"""Columns between two of one group."""
_CHUNK = 16 * _STRIDE
"""Columns of 64 groups."""
_BLOCK = 2048
_INF = np.float32(np.inf)
_LOG2_E = np.float32(1 / math.log(2))
_LN_2 = math.log(2)
_C = tuple(np.float32(_LN_2**n / math.factorial(n)) for n in range(7))
"""Taylor coefficients of 2^f; on |f| ≤ ½ the first one left out adds less than 1.3e-7."""
_BF16_MINUS_INF = np.int16(-128)


def _emit_floor(context: Any, value: Any) -> Any:
    def emit(c: Any, builder: Any, s: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.floor", [ir.FloatType()]), args)

    return types.float32(types.float32), emit


def _emit_scaled(context: Any, value: Any, exponent: Any) -> Any:
    """value · 2^exponent for an integral float32 exponent, by its bits; in 32-bit integers, so that it vectorises."""

    def emit(c: Any, builder: Any, s: Any, args: Any) -> Any:
        word = ir.IntType(32)
        shifted = builder.shl(builder.fptosi(args[1], word), ir.Constant(word, 23))
        return builder.bitcast(builder.add(builder.bitcast(args[0], word), shifted), ir.FloatType())

    return types.float32(types.float32, types.float32), emit


def _emit_load(context: Any, value: Any) -> Any:
    """A logit as float32; an int16 holds the bits of a bfloat16."""
    if value == types.float32:
        return types.float32(types.float32), lambda c, builder, s, args: args[0]

    def widen(c: Any, builder: Any, s: Any, args: Any) -> Any:
        high = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(high, ir.FloatType())

    return types.float32(types.int16), widen


_floor: Any = intrinsic(_emit_floor)
_times_power_of_2: Any = intrinsic(_emit_scaled)
_load: Any = intrinsic(_emit_load)


# A function compiled from within a fastmath one is fastmath itself: the usual rounding by (y + M) − M would be y.
@njit(forceinline=True, nogil=True)
def _exp2(y: Any) -> Any:
    """2^y for y in [−126, 0]."""
    n = _floor(y + np.float32(0.5))
    f = y - n
    p = _C[5] + f * _C[6]
    p = _C[4] + f * p
    p = _C[3] + f * p
    p = _C[2] + f * p
    p = _C[1] + f * p
    return _times_power_of_2(_C[0] + f * p, n)


# Slices, indexed from 0: with start + i as the index, a test for negative ones would keep the loops scalar.
@njit(forceinline=True, nogil=True)
def _group_maxima(z_W: Any, maxima: Any) -> int:
    """Fill `maxima`; the number of groups, 64 for each chunk begun. NaN is never a maximum."""
    n_groups = (len(z_W) + _CHUNK - 1) // _CHUNK * _STRIDE
    for c in range(n_groups // _STRIDE):
        best = maxima[c * _STRIDE : (c + 1) * _STRIDE]
        best[:] = -_INF
        for start in range(c * _CHUNK, min((c + 1) * _CHUNK, len(z_W)), _STRIDE):
            z = z_W[start : start + _STRIDE]
            for j in range(len(z)):
                value = _load(z[j])
                best[j] = value if value > best[j] else best[j]
    return n_groups


@njit(forceinline=True, nogil=True)
def _sift_down(values: Any, ids: Any, size: int, at: int) -> None:
    """Min-heap: at the root the least value, among equal ones the one with the highest id."""
    value, id_ = values[at], ids[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            values[other] < values[child] or (values[other] == values[child] and ids[other] > ids[child])
        ):
            child = other
        if values[child] > value or (values[child] == value and ids[child] < id_):
            break
        values[at], ids[at] = values[child], ids[child]
        at = child
    values[at], ids[at] = value, id_


@njit(forceinline=True, nogil=True)
def _offer(values: Any, ids: Any, size: int, value: Any, id_: int) -> int:
    """Offer a value to a heap of room len(values); its size then."""
    if size < len(values):
        values[size], ids[size] = value, id_
        size += 1
        if size == len(values):
            for at in range(size // 2 - 1, -1, -1):
                _sift_down(values, ids, size, at)
    elif value > values[0] or (value == values[0] and id_ < ids[0]):
        values[0], ids[0] = value, id_
        _sift_down(values, ids, size, 0)
    return size


@njit(forceinline=True, nogil=True)
def _threshold(maxima: Any, best_C: Any, values: Any, ids: Any) -> Any:
    """The len(values)-th greatest group maximum; fills `best_C` with each chunk's greatest. −inf for fewer groups.

    That of the chunks' greatest bounds it from below, so that few groups ever enter the heap.
    """
    room, size, least = len(values), 0, -_INF
    for c in range(len(best_C)):
        best = -_INF
        for g in range(c * _STRIDE, (c + 1) * _STRIDE):
            best = max(best, maxima[g])
        best_C[c] = best
        if size < room or best > least:
            size = _offer(values, ids, size, best, c)
            least = values[0] if size == room else -_INF
    size = 0
    for c in range(len(best_C)):
        if best_C[c] >= least:
            for g in range(c * _STRIDE, (c + 1) * _STRIDE):
                # Tested here too: a call costs several times the test, and nearly all fail it.
                if maxima[g] >= least and (size < room or maxima[g] > least):
                    size = _offer(values, ids, size, maxima[g], g)
                    least = values[0] if size == room else least
    return least if size == room else -_INF


@njit(forceinline=True, nogil=True)
def _select(z_W: Any, values: Any, ids: Any, maxima: Any, best_C: Any) -> None:
    """The len(values) greatest, in descending order, equal ones by ascending column. W ≥ len(values)."""
    groups = _group_maxima(z_W, maxima)
    threshold = _threshold(maxima, best_C, values, ids)
    size = 0
    for g in range(groups):
        if maxima[g] >= threshold:
            start = g // _STRIDE * _CHUNK + g % _STRIDE
            for i in range(start, min(start + _CHUNK, len(z_W)), _STRIDE):
                value = _load(z_W[i])
                if value >= threshold:
                    size = _offer(values, ids, size, value, i)
    values[size:], ids[size:] = -_INF, 0  # only in a row with NaN, which is refused
    for end in range(size - 1, 0, -1):  # a full heap, sorted in place
        values[0], values[end] = values[end], values[0]
        ids[0], ids[end] = ids[end], ids[0]
        _sift_down(values, ids, end, 0)


@njit(forceinline=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _block(z: Any, top: Any, actual: Any, gaps: Any) -> Any:
    """Fill `gaps` with d = z − top; how many logits exceed `actual`, how many are NaN, Σ e^d and Σ e^d·(−d) / ln 2."""
    greater = bad = total = weighted = np.float32(0)
    for i in range(len(z)):
        value = _load(z[i])
        gap = value - top
        gaps[i] = gap
        greater += np.float32(1) if value > actual else np.float32(0)
        bad += np.float32(1) if value != value else np.float32(0)
        y = max(gap * _LOG2_E, np.float32(-126))
        e = _exp2(y)
        total += e
        weighted -= e * y
    return greater, bad, total, weighted


@njit(forceinline=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _block_sum(gaps: Any, count: int, scale: Any) -> Any:
    """Σ 2^(d · scale)."""
    total = np.float32(0)
    for i in range(count):
        total += _exp2(max(gaps[i] * scale, np.float32(-126)))
    return total


@njit(forceinline=True, nogil=True)
def _reduce_rows(tile: Any, actual_R: Any, scales: Any, begin: int, end: int, out: Any) -> None:
    z, stride, width, minus_inf = tile
    values_RK, ids_RK, greater_R, rest_max_R, rest_sum_RS, rest_entropy_R = out
    top_k, n_sums = values_RK.shape[1], len(scales)
    room = min(top_k + 1, width)
    values, ids = np.empty(room, np.float32), np.empty(room, np.int32)
    best_C = np.empty((width + _CHUNK - 1) // _CHUNK, np.float32)
    maxima = np.empty(len(best_C) * _STRIDE, np.float32)
    gaps = np.empty(_BLOCK, np.float32)
    sums = np.empty(n_sums, np.float64)
    for r in range(begin, end):
        z_W = z[r * stride : r * stride + width]
        _select(z_W, values, ids, maxima, best_C)
        greatest = values[top_k] if room > top_k else -_INF
        greater = 0.0
        for i in range(min(room, top_k)):
            values_RK[r, i], ids_RK[r, i] = values[i], ids[i]
            greater += 1.0 if values[i] > actual_R[r] else 0.0
            z_W[ids[i]] = minus_inf
        top = greatest if greatest > -_INF else np.float32(0)
        bad, weighted = 0.0, 0.0
        sums[:] = 0.0
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            above, nans, total, more = _block(z_W[start:stop], top, actual_R[r], gaps)
            greater += above
            bad += nans
            sums[0] += total
            weighted += more
            for s in range(1, n_sums):
                sums[s] += _block_sum(gaps, stop - start, scales[s])
        greater_R[r] = int(greater)
        rest_max_R[r] = greatest
        for s in range(n_sums):
            rest_sum_RS[r, s] = np.log(sums[s]) if greatest > -_INF else 0.0
        rest_entropy_R[r] = np.log(sums[0]) + weighted * _LN_2 / sums[0] if greatest > -_INF else 0.0
        if bad > 0:
            rest_sum_RS[r, :] = np.nan
            rest_max_R[r] = np.nan


def _signature(kind: types.Type) -> tuple[types.Type, ...]:
    def array(of: types.Type, dimensions: int = 1) -> types.Type:
        return types.Array(of, dimensions, "C")

    real = array(types.float32)
    tile = types.Tuple((array(kind), types.intp, types.intp, kind))
    kept = (array(types.float32, 2), array(types.int32, 2), array(types.int32))
    return tile, real, real, types.intp, types.intp, types.Tuple((*kept, real, array(types.float32, 2), real))


# Only these two are kept on disk: with their parts cached too, the last bit of a sum would depend on which parts this
# process compiled, and so could inline, and which it loaded.
@compiled(_signature(types.float32))
def _reduce_float32(tile, actual_R, scales, begin, end, out):
    _reduce_rows(tile, actual_R, scales, begin, end, out)


@compiled(_signature(types.int16))
def _reduce_bfloat16(tile, actual_R, scales, begin, end, out):
    _reduce_rows(tile, actual_R, scales, begin, end, out)


def reduce_rows(
    logits_RW: torch.Tensor, actual_R: torch.Tensor, top_k: int, temperatures: tuple[float, ...]
) -> tuple[torch.Tensor, ...]:
    """The columns of `reduction.ShardRows`, in its order, for a tile whose column 0 has id 0.

    The kept logits in the tile are overwritten.

    Args:
        logits_RW: [R, W] float32 or bfloat16 in host memory, its columns adjacent; W ≥ 1.
        actual_R: [R] float32.
        top_k: K.
        temperatures: the T ≠ 1.
    """
    n_rows, width = logits_RW.shape
    stride = logits_RW.stride(0) if n_rows > 1 else width
    z = logits_RW.as_strided(((n_rows - 1) * stride + width,), (1,))
    if logits_RW.dtype is torch.bfloat16:
        kernel, tile = _reduce_bfloat16, (z.view(torch.int16).numpy(), stride, width, _BF16_MINUS_INF)
    else:
        kernel, tile = _reduce_float32, (z.numpy(), stride, width, -_INF)
    scales = np.array([_LOG2_E / t for t in (1.0, *temperatures)], np.float32)
    out = (
        np.full((n_rows, top_k), -_INF, np.float32),
        np.zeros((n_rows, top_k), np.int32),
        np.empty(n_rows, np.int32),
        np.empty(n_rows, np.float32),
        np.empty((n_rows, len(scales)), np.float32),
        np.empty(n_rows, np.float32),
    )

    def rows(begin: int, end: int) -> None:
        kernel(tile, actual_R.numpy(), scales, begin, end, out)

    by_rows(n_rows, rows)
    return tuple(torch.from_numpy(column) for column in out)
