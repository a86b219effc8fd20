"""The two element-wise passes over a chunk's logits, one program a row. Import only where triton is installed."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _logits(raw, scale, cap, HAS_CAP: tl.constexpr):
    z = raw * scale
    if HAS_CAP:
        # tanh by exp, which every backend and the interpreter has; exact to rounding at both ends.
        a = tl.abs(z / cap)
        e = tl.exp(-2 * a)
        z = tl.where(z < 0, -cap, cap) * (1 - e) / (1 + e)
    # Named entries were set to −inf, which a soft-cap would turn into −cap.
    return tl.where(raw == float("-inf"), float("-inf"), z)


@triton.jit
def rest_sums(
    raw_ptr, stride, top_ptr, sum_1_ptr, sum_T_ptr, V, scale, cap, inverse_T,
    HAS_CAP: tl.constexpr, TWO: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Per row: the largest logit and Σ exp(z − top), also at 1/T where TWO; −inf entries take no part."""
    row = tl.program_id(0)
    top = -1e30
    sum_1 = 0.0
    sum_T = 0.0
    for begin in range(0, V, SIZE):
        at = begin + tl.arange(0, SIZE)
        raw = tl.load(raw_ptr + row.to(tl.int64) * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
        z = _logits(raw, scale, cap, HAS_CAP)
        higher = tl.maximum(top, tl.max(z, 0))
        sum_1 = sum_1 * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        if TWO:
            sum_T = sum_T * tl.exp((top - higher) * inverse_T) + tl.sum(tl.exp((z - higher) * inverse_T), 0)
        top = higher
    tl.store(top_ptr + row, top)
    tl.store(sum_1_ptr + row, sum_1)
    if TWO:
        tl.store(sum_T_ptr + row, sum_T)


@triton.jit
def write_gradient(
    raw_ptr, stride, out_ptr, out_stride, rest_1_ptr, rest_T_ptr, gain_1_ptr, gain_T_ptr, V, scale, cap, inverse_T,
    HAS_CAP: tl.constexpr, TWO: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Per row: gain_1·exp(z − rest_1) + gain_T·exp(z/T − rest_T), through scale and soft-cap; 0 at −inf.

    `out` may lie over `raw` in a narrower type: a row is one program, which reads a block before it writes at or before
    that block's place.
    """
    row = tl.program_id(0)
    rest_1, gain_1 = tl.load(rest_1_ptr + row), tl.load(gain_1_ptr + row)
    rest_T, gain_T = tl.load(rest_T_ptr + row), tl.load(gain_T_ptr + row)
    for begin in range(0, V, SIZE):
        at = begin + tl.arange(0, SIZE)
        raw = tl.load(raw_ptr + row.to(tl.int64) * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
        z = _logits(raw, scale, cap, HAS_CAP)
        d = gain_1 * tl.exp(z - rest_1)
        if TWO:
            d += gain_T * tl.exp(z * inverse_T - rest_T)
        if HAS_CAP:
            d *= 1 - (z / cap) * (z / cap)
        d = tl.where(raw == float("-inf"), 0.0, d * scale)
        # All of a block must be read before any of it is written: the narrower type ends inside what was read.
        tl.debug_barrier()
        tl.store(out_ptr + row.to(tl.int64) * out_stride + at, d.to(out_ptr.dtype.element_ty), mask=at < V)


def launch(kernel: Any, rows: int, *arguments: Any, has_cap: bool, two: bool, block: int = BLOCK) -> None:
    """Run a kernel with one program for each row."""
    if rows:
        kernel[(rows,)](*arguments, HAS_CAP=has_cap, TWO=two, SIZE=block)
