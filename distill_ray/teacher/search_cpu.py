"""Finds drawn tokens in a logits tile on a CPU: compiled, one pass over each row that has draws in it.

Importing this module compiles it, or loads it from the cache. Masses are e^{(z − greatest) / T}, in float32 within a
block of columns and summed in float64 over blocks; the draws, in ascending order, are met on the way.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, types

from distill_ray.codec.format import flat_rows
from distill_ray.jit import compiled
from distill_ray.teacher.threads import by_rows

_BLOCK = 256
_LN_2 = math.log(2)
_C = tuple(np.float32(_LN_2**n / math.factorial(n)) for n in range(7))
"""Taylor coefficients of 2^f; on |f| ≤ ½ the first one left out adds less than 1.3e-7."""
_LEAST = np.float32(-126)
"""Least exponent of a normal float32; what lies below has no mass at all, so that −inf is never drawn."""


@njit(forceinline=True, nogil=True, error_model="numpy")
def _exp2(y):
    """2^y for y in [−126, 0]."""
    n = np.rint(y)
    f = y - n
    p = _C[4] + f * (_C[5] + f * _C[6])
    p = _C[1] + f * (_C[2] + f * (_C[3] + f * p))
    p = _C[0] + f * p
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(forceinline=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _masses(bits, shift, greatest, scale, out):
    """Fill `out` with the masses of a block of logits; their sum."""
    total = np.float32(0)
    for i in range(len(bits)):
        y = (np.uint32(np.uint32(bits[i]) << shift).view(np.float32) - greatest) * scale
        e = _exp2(min(max(y, _LEAST), np.float32(0)))
        out[i] = e if y > _LEAST else np.float32(0)
        total += out[i]
    return total


@njit(forceinline=True, nogil=True, error_model="numpy")
def _search_row(bits_W, shift, greatest, scale, wanted_N, order_N, masses, columns_N):
    """Fill `columns_N` of the draws `order_N`, which are in ascending order of what is wanted."""
    at, n, running, last = 0, len(order_N), 0.0, -1
    for start in range(0, len(bits_W), _BLOCK):
        block = bits_W[start : start + _BLOCK]
        after = running + _masses(block, shift, greatest, scale, masses)
        if wanted_N[order_N[at]] < after:
            for i in range(len(block)):
                if masses[i] > 0:
                    last = start + i
                    running += masses[i]
                    while at < n and wanted_N[order_N[at]] < running:
                        columns_N[order_N[at]] = last
                        at += 1
            while at < n and wanted_N[order_N[at]] < after:  # between two sums of the same masses: rounding
                columns_N[order_N[at]] = last
                at += 1
            if at == n:
                return
        running = after
    for start in range((len(bits_W) - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):  # beyond the whole sum by rounding
        block = bits_W[start : start + _BLOCK]
        if _masses(block, shift, greatest, scale, masses) > 0:
            last = len(block) - 1
            while not masses[last] > 0:
                last -= 1
            columns_N[order_N[at:]] = start + last
            return


@njit(forceinline=True, nogil=True, error_model="numpy")
def _search(bits, shift, stride, width, greatest_R, scale, wanted, n_draws, begin, end, columns):
    masses = np.empty(_BLOCK, np.float32)
    for r in range(begin, end):
        wanted_N = wanted[r * n_draws : (r + 1) * n_draws]
        order_N = np.argsort(wanted_N)
        first = 0
        while first < n_draws and not wanted_N[order_N[first]] >= 0:
            first += 1
        if first < n_draws:
            bits_W = bits[r * stride : r * stride + width]
            columns_N = columns[r * n_draws : (r + 1) * n_draws]
            _search_row(bits_W, shift, greatest_R[r], scale, wanted_N, order_N[first:], masses, columns_N)


def _signature(kind: types.Type) -> tuple[types.Type, ...]:
    tile = (types.Array(kind, 1, "C", readonly=True), types.uint32, types.intp, types.intp)
    wanted = (types.Array(types.float64, 1, "C", readonly=True), types.intp, types.intp, types.intp)
    greatest = types.Array(types.float32, 1, "C", readonly=True)
    return (*tile, greatest, types.float32, *wanted, types.Array(types.int32, 1, "C"))


@compiled(_signature(types.uint32))
def _search_float32(bits, shift, stride, width, greatest_R, scale, wanted, n_draws, begin, end, columns):
    _search(bits, shift, stride, width, greatest_R, scale, wanted, n_draws, begin, end, columns)


@compiled(_signature(types.uint16))
def _search_bfloat16(bits, shift, stride, width, greatest_R, scale, wanted, n_draws, begin, end, columns):
    _search(bits, shift, stride, width, greatest_R, scale, wanted, n_draws, begin, end, columns)


def search(
    logits_RW: torch.Tensor, greatest_R: torch.Tensor, temperature: float, wanted_RN: torch.Tensor
) -> torch.Tensor:
    """`draws.search_by_torch` for float32 and bfloat16 in host memory, their columns adjacent."""
    wide = logits_RW.dtype is torch.float32
    bits, stride = flat_rows(logits_RW.view(torch.int32 if wide else torch.int16).numpy())
    tile = (bits.view(np.uint32 if wide else np.uint16), np.uint32(0 if wide else 16), stride, logits_RW.shape[1])
    numbers = (greatest_R.contiguous().numpy(), np.float32(1 / (math.log(2) * temperature)))
    wanted = wanted_RN.contiguous().numpy().reshape(-1)
    columns = np.full(wanted.shape, -1, np.int32)
    kernel = _search_float32 if wide else _search_bfloat16

    def rows(begin: int, end: int) -> None:
        kernel(*tile, *numbers, wanted, wanted_RN.shape[1], begin, end, columns)

    by_rows(len(logits_RW), rows)
    return torch.from_numpy(columns.reshape(wanted_RN.shape).astype(np.int64))
