"""Targets made of tokens drawn in the teacher's process, for the `sampled` and `head_tail` objectives.

This is where a store that holds draws plugs in: what captures them keeps ids, counts and log-probabilities, and the
reader makes `SparseTargets` of them here. Draws come from the full distribution (or its whole tail) at the temperature
of the loss: drawn from a truncated top k, they would be biased, and another temperature would need other draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_ray.losses.types import SparseTargets

_LOG_EMPTY = -80.0
"""Log mass of nothing, as the codec stores it."""


def drawn_targets(
    ids_NM: Tensor,
    counts_NM: Tensor,
    logprobs_NM: Tensor,
    labels_N: Tensor,
    *,
    temperature: float = 1.0,
    logprobs_T: Tensor | None = None,
) -> SparseTargets:
    """Targets of `sampled`: tokens drawn from the full p, with weights counts / Σ counts.

    Args:
        ids_NM: int64, distinct within a row where counted; slots of count 0 may hold any id of the vocabulary.
        counts_NM: how often each was drawn at `temperature`, 0 in unused slots.
        logprobs_NM: the teacher's log-probabilities at T = 1, finite in unused slots too.
        labels_N: int64 actual next tokens.
        temperature: that the draws were made at.
        logprobs_T: log-probabilities at `temperature`; None at T = 1.

    Raises:
        ValueError: a row without a draw.
    """
    total_N1 = counts_NM.sum(1, keepdim=True)
    if (total_N1 < 1).any():
        raise ValueError(f"{int((total_N1 < 1).sum())} of {len(total_N1)} rows hold no draw; capture them again")
    # The most likely first: the student's agreement is judged on entry 0.
    order_NM = torch.where(counts_NM > 0, logprobs_NM, -torch.inf).argsort(1, descending=True)
    counts_NM, ids_NM = counts_NM.gather(1, order_NM), ids_NM.gather(1, order_NM)
    at_1_NM = logprobs_NM.gather(1, order_NM)
    at_T_NM = None if logprobs_T is None else logprobs_T.gather(1, order_NM)
    return SparseTargets(
        ids_NM,
        at_1_NM,
        _log_left(at_1_NM, counts_NM),
        labels_N,
        temperature=temperature,
        logprobs_T=at_T_NM,
        log_tail_T=None if at_T_NM is None else _log_left(at_T_NM, counts_NM),
        weights_NK=(counts_NM / total_N1).to(torch.promote_types(logprobs_NM.dtype, torch.float32)),
    )


def _log_left(logprobs_NM: Tensor, counts_NM: Tensor) -> Tensor:
    """log of the mass outside the drawn ids; a figure for reports, so a difference is good enough."""
    mass_N = torch.where(counts_NM > 0, logprobs_NM.double().exp(), 0).sum(1)
    return (1 - mass_N).clamp_min(0).log().clamp_min(_LOG_EMPTY).to(logprobs_NM.dtype)


def head_tail_targets(
    head: SparseTargets, ids_NM: Tensor, logprobs_NM: Tensor, logprobs_T: Tensor | None = None
) -> SparseTargets:
    """Targets of `head_tail`: the exact top k with weights p, and m draws from the tail with (1 − P)/m each.

    Args:
        head: the exact top k, at the temperature of the draws.
        ids_NM: int64 ids drawn from the tail; a token drawn twice stands twice.
        logprobs_NM: the teacher's log-probabilities of them at T = 1.
        logprobs_T: at `head.temperature`; None at T = 1.

    Raises:
        ValueError: no draws, or a draw that is in the head: it would be counted twice.
    """
    m = ids_NM.shape[1]
    if not m:
        raise ValueError("no tail draws: 0 a row; take objective `truncated` or `bucket` on the head alone")
    twice_N = (ids_NM[:, :, None] == head.ids_NK[:, None, :]).flatten(1).any(1)
    if twice_N.any():
        raise ValueError(
            f"{int(twice_N.sum())} of {len(twice_N)} rows draw a tail token that is among their top "
            f"{head.ids_NK.shape[1]}; tail draws exclude the head"
        )
    log_p_NK, log_tail_N = head.at(head.temperature)
    tail_NM = (log_tail_N.exp() / m)[:, None].expand(-1, m)
    at_T = None if head.temperature == 1.0 or logprobs_T is None else torch.cat([log_p_NK, logprobs_T], 1)
    return SparseTargets(
        torch.cat([head.ids_NK, ids_NM], 1),
        torch.cat([head.logprobs_NK, logprobs_NM], 1),
        head.log_tail_N,
        head.labels_N,
        head.mask_N,
        head.temperature,
        at_T,
        head.log_tail_T,
        torch.cat([log_p_NK.exp(), tail_NM], 1),
    )
