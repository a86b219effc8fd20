"""Logits of one vocabulary shard → what a row needs of it; shards → the row. Torch on any device.

A shard gives its own K best logits and, of everything else, three numbers: the greatest logit, the log-sum-exp at each
temperature, and the entropy among them. Merged, these are exact: nothing is ever found by subtracting from 1, and the
vocabulary itself never leaves its rank.

Legend: R rows, W columns of a shard, K kept, P shards, S = 1 + #T temperatures (the first is 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

_BLOCK_BYTES = 2**24
"""Bytes of float32 that exist at once while a tile of another type is summed."""
_CPU_TYPES = (torch.float32, torch.bfloat16)
_LEAST_RUN = 16
"""Columns for each kept one that the GPU kernel must have at least."""
_INF = float("inf")


@dataclass(frozen=True)
class ShardRows:
    """What one shard tells of R rows. Its rest are the columns that are not among its K best."""

    values_RK: torch.Tensor
    """float32 logits, descending, equal ones by ascending id; −inf where the shard has fewer than K columns."""
    ids_RK: torch.Tensor
    """int32 ids in the whole vocabulary."""
    greater_R: torch.Tensor
    """int32 number of columns that may be kept and whose logit is strictly greater than the actual token's."""
    rest_max_R: torch.Tensor
    """float32 greatest logit m of the rest; −inf where there is none."""
    rest_sum_RS: torch.Tensor
    """float32 log Σ_rest exp((z − m) / T), ≥ 0."""
    rest_entropy_R: torch.Tensor
    """float32 entropy of softmax over the rest alone."""


def reduce_tile(
    logits_RW: torch.Tensor, first_id: int, actual_R: torch.Tensor, top_k: int, temperatures: tuple[float, ...]
) -> ShardRows:
    """Reduce one tile. The kept logits in it are overwritten: the caller must not use it again.

    Args:
        logits_RW: [R, W] float32, bfloat16 or float16; never copied to float32 as a whole.
        first_id: id of column 0.
        actual_R: [R] float32 logit of the actual next token, whichever shard it lies in.
        top_k: K; 0 where none of these ids may be kept.
        temperatures: the T ≠ 1.
    """
    width = logits_RW.shape[1]
    if not width:
        return _nothing(len(logits_RW), top_k, 1 + len(temperatures), logits_RW.device)
    kernel = _kernel(logits_RW.device.type, logits_RW.dtype, width >= _LEAST_RUN * top_k) if top_k else None
    if kernel is not None:
        values_RK, ids_RK, *others = kernel(logits_RW, actual_R, top_k, temperatures)
        return ShardRows(values_RK, ids_RK.add_(first_id), *others)
    return reduce_by_torch(logits_RW, first_id, actual_R, top_k, temperatures)


def reduce_by_torch(
    logits_RW: torch.Tensor, first_id: int, actual_R: torch.Tensor, top_k: int, temperatures: tuple[float, ...]
) -> ShardRows:
    width = logits_RW.shape[1]
    kept = min(top_k, width)
    ids_RK = top_ids(logits_RW, kept)
    values_RK = logits_RW.gather(1, ids_RK).float()
    rivals_RW = logits_RW if top_k else logits_RW[:, :0]
    greater_R = (rivals_RW > actual_R[:, None].to(logits_RW.dtype)).sum(-1, dtype=torch.int32)
    logits_RW.scatter_(1, ids_RK, -_INF)
    step = max(1, _BLOCK_BYTES // (4 * width))
    parts = [_rest(block.float(), temperatures) for block in logits_RW.split(step)]
    pad = (0, top_k - kept)
    return ShardRows(
        torch.nn.functional.pad(values_RK, pad, value=-_INF),
        torch.nn.functional.pad(ids_RK.int() + first_id, pad, value=0),
        greater_R,
        *(torch.cat(column) for column in zip(*parts, strict=True)),
    )


@cache
def _kernel(device: str, dtype: torch.dtype, wide: bool) -> Callable[..., tuple[torch.Tensor, ...]] | None:
    """The compiled kernel for such a tile, if there is one."""
    if device == "cpu" and dtype in _CPU_TYPES and find_spec("numba"):
        return import_module("distill_ray.teacher.kernel_cpu").reduce_rows
    if device == "cuda" and wide and find_spec("triton"):
        return import_module("distill_ray.teacher.kernel_triton").reduce_rows
    return None


def _nothing(n_rows: int, top_k: int, n_sums: int, device: torch.device) -> ShardRows:
    """A shard of padding alone."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device)

    return ShardRows(
        zeros(n_rows, top_k) - _INF,
        zeros(n_rows, top_k).int(),
        zeros(n_rows).int(),
        zeros(n_rows) - _INF,
        zeros(n_rows, n_sums),
        zeros(n_rows),
    )


def _rest(z_RW: torch.Tensor, temperatures: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    greatest_R = z_RW.amax(-1)
    # A rest of nothing but −inf: the differences would be NaN.
    shift_R1 = torch.where(torch.isneginf(greatest_R), 0.0, greatest_R)[:, None]
    empty_R = torch.isneginf(greatest_R)
    gap_RW = z_RW - shift_R1
    sums = [torch.where(empty_R, 0.0, (gap_RW / t).exp().sum(-1).log()) for t in (1.0, *temperatures)]
    weighted_R = torch.where(torch.isneginf(gap_RW), 0.0, gap_RW.exp() * -gap_RW).sum(-1)
    entropy_R = torch.where(empty_R, 0.0, sums[0] + weighted_R / sums[0].exp())
    return greatest_R, torch.stack(sums, 1), entropy_R


def top_ids(logits_RW: torch.Tensor, top_k: int) -> torch.Tensor:
    """[R, K] int64 columns of the K greatest logits, in descending order, equal ones by ascending column.

    `torch.topk` may keep any of the columns that tie at the K-th place, and in bfloat16 most rows have such ties.
    """
    if not top_k:
        return torch.empty(len(logits_RW), 0, dtype=torch.long, device=logits_RW.device)
    values, ids = torch.topk(logits_RW, top_k, dim=-1)
    threshold_R1 = values[:, -1:]
    tied = ((logits_RW >= threshold_R1).sum(-1) > top_k).nonzero()[:, 0]
    step = max(1, _BLOCK_BYTES // (4 * logits_RW.shape[1]))
    for rows in tied.split(step):
        z, threshold = logits_RW[rows], threshold_R1[rows]
        above, equal = z > threshold, z == threshold
        missing = top_k - above.sum(-1, keepdim=True, dtype=torch.int32)
        chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))
        if bool((chosen.sum(-1) == top_k).all()):  # not so in a row with NaN, which is refused later
            ids[rows] = chosen.nonzero()[:, 1].view(-1, top_k)
    ids = ids.sort(dim=-1).values
    order = logits_RW.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)


@dataclass(frozen=True)
class Candidates:
    """The K best of every shard, C = P·K, in descending order of logits; the first K of them are kept."""

    values_RC: torch.Tensor
    """float32 logits, equal ones by ascending id."""
    ids_RC: torch.Tensor
    """int32 ids in the whole vocabulary."""
    shard_RC: torch.Tensor
    """int64 which shard each comes from."""


def candidates(shards: list[ShardRows]) -> Candidates:
    """All shards' best, put in order.

    Args:
        shards: in ascending order of their ids, which breaks ties; those reduced with top_k = 0 are the last.
    """
    values_RC = torch.cat([s.values_RK for s in shards], 1)
    ids_RC = torch.cat([s.ids_RK for s in shards], 1)
    if values_RC.shape[1] == shards[0].values_RK.shape[1]:
        return Candidates(values_RC, ids_RC, torch.zeros_like(ids_RC, dtype=torch.long))
    order = values_RC.sort(dim=-1, descending=True, stable=True).indices
    return Candidates(values_RC.gather(1, order), ids_RC.gather(1, order), order // shards[0].values_RK.shape[1])


def merge(
    shards: list[ShardRows],
    actual_R: torch.Tensor,
    temperatures: tuple[float, ...],
    found: Candidates | None = None,
) -> torch.Tensor:
    """Rows of the whole vocabulary, as the words of `wire`, without draws.

    Args:
        shards: in ascending order of their ids.
        actual_R: [R] float32 logit of the actual next token.
        temperatures: the T ≠ 1.
        found: `candidates(shards)`, where they are at hand.

    Returns:
        [R, 2 K + 4 + #T] int32.
    """
    top_k = shards[0].values_RK.shape[1]
    found = found or candidates(shards)
    ids_RC, top_R1 = found.ids_RC, found.values_RC[:, :1]
    gaps_RC = found.values_RC - top_R1  # z − z_max; small numbers, so float32 is enough at any T
    kept_RK, dropped_RC = gaps_RC[:, :top_k], gaps_RC[:, top_k:]
    tails, totals = [], []
    for i, t in enumerate((1.0, *temperatures)):
        rests = [(s.rest_max_R - top_R1[:, 0]) / t + s.rest_sum_RS[:, i] for s in shards]
        tail_R = torch.cat([torch.stack(rests, 1), dropped_RC / t], 1).logsumexp(-1)
        total_R = torch.cat([kept_RK / t, tail_R[:, None]], 1).logsumexp(-1)
        tails.append(tail_R - total_R)
        totals.append(total_R)
    lse_R = totals[0]
    single_RC = gaps_RC - lse_R[:, None]
    surprise_R = torch.where(torch.isneginf(single_RC), 0.0, single_RC.exp() * -single_RC).sum(-1)
    for s in shards:
        log_mass_R = (s.rest_max_R - top_R1[:, 0]) + s.rest_sum_RS[:, 0] - lse_R
        inside_R = log_mass_R.exp() * (s.rest_entropy_R - log_mass_R)
        surprise_R = surprise_R + torch.where(torch.isneginf(log_mass_R), 0.0, inside_R)
    rank_R = 1 + torch.stack([s.greater_R for s in shards]).sum(0, dtype=torch.int32)
    numbers = [tails[0], actual_R - top_R1[:, 0] - lse_R, rank_R.view(torch.float32), surprise_R, *tails[1:]]
    logprobs_RK = kept_RK - lse_R[:, None]
    return torch.cat([ids_RC[:, :top_k], logprobs_RK.view(torch.int32), _bits(numbers)], 1)


def _bits(columns: list[torch.Tensor]) -> torch.Tensor:
    # Not torch.stack of floats: a float copy may quiet the NaN pattern of an integer's bits.
    return torch.stack([c.contiguous().view(torch.int32) for c in columns], 1)


def to_words(shard: ShardRows) -> torch.Tensor:
    """[R, 2 K + 3 + S] int32: all that one rank tells the others of its rows."""
    return torch.cat(
        [
            shard.ids_RK,
            shard.values_RK.view(torch.int32),
            shard.greater_R[:, None],
            _bits([shard.rest_max_R, shard.rest_entropy_R]),
            shard.rest_sum_RS.contiguous().view(torch.int32),
        ],
        1,
    )


def from_words(words: torch.Tensor, top_k: int) -> ShardRows:
    """The inverse of `to_words`."""
    words = words.contiguous()
    floats, at = words.view(torch.float32), 2 * top_k
    return ShardRows(
        values_RK=floats[:, top_k:at],
        ids_RK=words[:, :top_k],
        greater_R=words[:, at],
        rest_max_R=floats[:, at + 1],
        rest_sum_RS=floats[:, at + 3 :],
        rest_entropy_R=floats[:, at + 2],
    )
