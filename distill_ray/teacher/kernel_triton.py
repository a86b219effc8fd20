"""Top-k, log-sum-exp and entropy of a logits tile on a GPU, in one read of the tile. Not run on a GPU yet.

1. `_runs`: of every run of columns the greatest logit, and the sums at each temperature relative to it.
2. The K runs with the greatest maxima (of equal ones the first) hold the K kept: any other column is beaten by the
   greatest of each of these. Only they, a few percent of the row, are looked at again.
3. `_candidates`: their columns that reach the K-th of these maxima, in ascending order; sorted, the kept.
4. `_rest`: the sums over what is not kept, from the sums of the other runs and, column by column, of these.

Nothing is subtracted from a total, so a tail keeps its precision when the kept mass rounds to 1.
The module can be imported without triton. `TRITON_INTERPRET=1` runs the kernels on a CPU, slowly.

Legend: R rows, W columns, K kept, G runs, S temperatures (the first is 1).
"""

# pyright: reportInvalidTypeForm=false
# (triton reads the annotation `tl.constexpr` by its text; without triton there is no such type)

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton: Any = None
    tl: Any = None

_LOG2_E = 1 / math.log(2)
ROOM = 1024
"""Candidates a row may have; a row with more (thousands of equal logits) is selected by torch."""


def _runs(
    z, actual, scales, maxima, sums, weighted, greater,
    width, z_stride, n_runs,
    S: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Grid (R, G / RUNS): RUNS runs of one row. `greater` is counted by block, `sums` is [R, S, G]."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    run = block * RUNS + tl.arange(0, RUNS)
    column = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    value = tl.load(z + row * z_stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
    own = tl.load(actual + row)
    tl.store(greater + row * tl.num_programs(1) + block, tl.sum(tl.sum((value > own).to(tl.int32), 1), 0))
    top = tl.max(value, 1)
    # A maximum may drop NaN; the gaps carry it into the sums.
    shift = tl.where(top == float("-inf"), 0.0, top)
    gap = value - shift[:, None]
    live = run < n_runs
    tl.store(maxima + row * n_runs + run, top, mask=live)
    for s in tl.static_range(S):
        e = tl.exp2(gap * tl.load(scales + s))
        tl.store(sums + (row * S + s) * n_runs + run, tl.sum(e, 1), mask=live)
        if s == 0:
            surprise = tl.where(gap == float("-inf"), 0.0, e * -gap)
            tl.store(weighted + row * n_runs + run, tl.sum(surprise, 1), mask=live)


def _candidates(
    z, chosen, thresholds, values, ids, counts, width, z_stride, K: tl.constexpr, RUN: tl.constexpr, ROOM: tl.constexpr
):
    """Grid (R): columns of the chosen runs that reach the threshold, in ascending order; `counts` may exceed ROOM."""
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(thresholds + row)
    count = tl.zeros((), tl.int32)
    for i in range(K):
        column = tl.load(chosen + row * K + i) * RUN + tl.arange(0, RUN)
        value = tl.load(z + row * z_stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        reaches = (value >= threshold) & (column < width)
        place = count + tl.cumsum(reaches.to(tl.int32), 0) - 1
        fits = reaches & (place < ROOM)
        tl.store(values + row * ROOM + place, value, mask=fits)
        tl.store(ids + row * ROOM + place, column.to(tl.int32), mask=fits)
        count += tl.sum(reaches.to(tl.int32), 0)
    tl.store(counts + row, count)


def _rest(
    z, chosen, last_value, last_id, scales, maxima, sums, weighted, rest_max, rest_sum, rest_entropy,
    width, z_stride, n_runs,
    K: tl.constexpr, S: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Grid (R): join the runs that were not chosen (the others' maxima are −inf) and the chosen runs' other columns."""
    row = tl.program_id(0).to(tl.int64)
    least, least_id = tl.load(last_value + row), tl.load(last_id + row)
    top = float("-inf")
    for g in range(0, n_runs, RUNS):
        run = g + tl.arange(0, RUNS)
        top = tl.maximum(top, tl.max(tl.load(maxima + row * n_runs + run, mask=run < n_runs, other=float("-inf")), 0))
    for i in range(K):
        column = tl.load(chosen + row * K + i) * RUN + tl.arange(0, RUN)
        value = tl.load(z + row * z_stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        kept = (value > least) | ((value == least) & (column <= least_id))
        top = tl.maximum(top, tl.max(tl.where(kept, float("-inf"), value), 0))
    tl.store(rest_max + row, top)
    shift = tl.where(top == float("-inf"), 0.0, top)
    first = 0.0
    surprise = 0.0
    for s in tl.static_range(S):
        scale = tl.load(scales + s)
        total = 0.0
        for g in range(0, n_runs, RUNS):
            run = g + tl.arange(0, RUNS)
            there = run < n_runs
            gap = tl.load(maxima + row * n_runs + run, mask=there, other=float("-inf")) - shift
            part = tl.load(sums + (row * S + s) * n_runs + run, mask=there, other=0.0)
            factor = tl.exp2(gap * scale)
            # Nothing from a run that was chosen, or holds nothing but −inf; NaN from one that holds NaN.
            empty = (gap == float("-inf")) & (part == part)
            total += tl.sum(tl.where(empty, 0.0, factor * part), 0)
            if s == 0:
                inside = tl.load(weighted + row * n_runs + run, mask=there, other=0.0)
                surprise += tl.sum(tl.where(empty, 0.0, factor * (inside - gap * part)), 0)
        for i in range(K):
            column = tl.load(chosen + row * K + i) * RUN + tl.arange(0, RUN)
            value = tl.load(z + row * z_stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
            kept = (value > least) | ((value == least) & (column <= least_id))
            gap = tl.where(kept, float("-inf"), value - shift)
            e = tl.exp2(gap * scale)
            total += tl.sum(e, 0)
            if s == 0:
                surprise += tl.sum(tl.where(gap == float("-inf"), 0.0, e * -gap), 0)
        if s == 0:
            first = total
        log_total = tl.where(top == float("-inf"), 0.0, tl.log(total))
        tl.store(rest_sum + row * S + s, log_total)
    entropy = tl.where(top == float("-inf"), 0.0, tl.log(first) + surprise / first)
    tl.store(rest_entropy + row, entropy)


@cache
def _compiled() -> tuple[Any, Any, Any]:
    return triton.jit(_runs), triton.jit(_candidates), triton.jit(_rest)


def run_length(width: int, top_k: int) -> int:
    """Columns of one run: the longest of at most 256 that gives four times as many runs as are chosen, at least 16."""
    length = 256
    while length > 16 and width < 4 * top_k * length:
        length //= 2
    return length


def reduce_rows(
    logits_RW: torch.Tensor, actual_R: torch.Tensor, top_k: int, temperatures: tuple[float, ...], room: int = ROOM
) -> tuple[torch.Tensor, ...]:
    """The columns of `reduction.ShardRows`, in its order, for a tile whose column 0 has id 0.

    Args:
        logits_RW: [R, W] float32, bfloat16 or float16, its columns adjacent; left as it is.
        actual_R: [R] float32.
        top_k: K; the tile has at least K runs of 16 columns.
        temperatures: the T ≠ 1.
        room: candidates that a row may have, a power of 2.
    """
    from distill_ray.teacher.reduction import top_ids

    runs_kernel, candidates_kernel, rest_kernel = _compiled()
    (n_rows, width), device, stride = logits_RW.shape, logits_RW.device, logits_RW.stride(0)
    run = run_length(width, top_k)
    n_runs, per_block = triton.cdiv(width, run), 4096 // run
    blocks, n_sums = triton.cdiv(n_runs, per_block), 1 + len(temperatures)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    scales = torch.tensor([_LOG2_E / t for t in (1.0, *temperatures)], device=device)
    maxima, sums, weighted = new(n_rows, n_runs), new(n_rows, n_sums, n_runs), new(n_rows, n_runs)
    greater = new(n_rows, blocks, dtype=torch.int32)
    runs_kernel[(n_rows, blocks)](
        logits_RW,
        actual_R.contiguous(),
        scales,
        maxima,
        sums,
        weighted,
        greater,
        width,
        stride,
        n_runs,
        n_sums,
        run,
        per_block,
    )
    best = maxima.sort(dim=1, descending=True, stable=True)
    threshold, chosen = best.values[:, top_k - 1].contiguous(), best.indices[:, :top_k].sort(dim=1).values.contiguous()
    values = torch.full((n_rows, room), float("-inf"), device=device)
    ids, counts = new(n_rows, room, dtype=torch.int32), new(n_rows, dtype=torch.int32)
    candidates_kernel[(n_rows,)](logits_RW, chosen, threshold, values, ids, counts, width, stride, top_k, run, room)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    kept_values, kept_ids = values.gather(1, order), ids.gather(1, order)
    crowded = (counts > room).nonzero()[:, 0]
    if len(crowded):
        rows = logits_RW[crowded]
        columns = top_ids(rows, top_k)
        kept_values[crowded], kept_ids[crowded] = rows.gather(1, columns).float(), columns.int()
    maxima.scatter_(1, chosen, float("-inf"))
    rest_max, rest_sum, rest_entropy = new(n_rows), new(n_rows, n_sums), new(n_rows)
    rest_kernel[(n_rows,)](
        logits_RW, chosen, kept_values[:, -1].contiguous(), kept_ids[:, -1].contiguous(), scales, maxima, sums,
        weighted, rest_max, rest_sum, rest_entropy, width, stride, n_runs, top_k, n_sums, run, 256,
    )  # fmt: skip
    return kept_values, kept_ids, greater.sum(1, dtype=torch.int32), rest_max, rest_sum, rest_entropy
