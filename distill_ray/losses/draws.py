"""Targets made of tokens drawn in the teacher's process, for the `sampled` and `head_tail` objectives.

Capture keeps ids, counts and log-probabilities, and whoever reads them makes `SparseTargets` of them here. Draws come
from the full distribution (or its whole tail) at the temperature of the loss: drawn from a truncated top k, they would
be biased, and another temperature would need other draws.
"""

from __future__ import annotations

from dataclasses import replace

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
    head: SparseTargets | None = None,
) -> SparseTargets:
    """Targets of `sampled`: tokens drawn from the full p, with weights counts / Σ counts.

    Args:
        ids_NM: int64, distinct within a row where counted; slots of count 0 may hold any id of the vocabulary.
        counts_NM: how often each was drawn at `temperature`, 0 in unused slots.
        logprobs_NM: the teacher's log-probabilities at T = 1, in unused slots any finite ones.
        labels_N: int64 actual next tokens.
        temperature: that the draws were made at.
        logprobs_T: log-probabilities at `temperature`; None at T = 1.
        head: the exact top k of the same rows, where it is known: its likeliest token then stands first, drawn or not,
            with weight 0, so that agreement is judged on it.

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
    targets = SparseTargets(
        ids_NM,
        at_1_NM,
        _log_left(at_1_NM, counts_NM),
        labels_N,
        temperature=temperature,
        logprobs_T=at_T_NM,
        log_tail_T=None if at_T_NM is None else _log_left(at_T_NM, counts_NM),
        weights_NK=(counts_NM / total_N1).to(torch.promote_types(logprobs_NM.dtype, torch.float32)),
    )
    return targets if head is None else _headed(targets, head)


def _headed(drawn: SparseTargets, head: SparseTargets) -> SparseTargets:
    assert drawn.weights_NK is not None

    def first(of_head: Tensor | None, of_drawn: Tensor | None) -> Tensor | None:
        return None if of_head is None or of_drawn is None else torch.cat([of_head[:, :1], of_drawn], 1)

    return replace(
        drawn,
        ids_NK=first(head.ids_NK, drawn.ids_NK),
        logprobs_NK=first(head.logprobs_NK, drawn.logprobs_NK),
        logprobs_T=first(head.logprobs_T, drawn.logprobs_T),
        weights_NK=first(torch.zeros_like(drawn.weights_NK), drawn.weights_NK),
    )


def _among(ids_NM: Tensor, sought_NK: Tensor) -> Tensor:
    """[N, M] whether each id is one of the row's K others."""
    sorted_NK = sought_NK.sort(1).values
    at_NM = torch.searchsorted(sorted_NK, ids_NM).clamp_(max=sorted_NK.shape[1] - 1)
    return sorted_NK.gather(1, at_NM) == ids_NM


def _log_left(logprobs_NM: Tensor, counts_NM: Tensor) -> Tensor:
    """log of the mass outside the drawn ids; a figure for reports, so a difference is good enough."""
    mass_N = torch.where(counts_NM > 0, logprobs_NM.double().exp(), 0).sum(1)
    return (1 - mass_N).clamp_min(0).log().clamp_min(_LOG_EMPTY).to(logprobs_NM.dtype)


def head_tail_targets(
    head: SparseTargets,
    ids_NM: Tensor,
    logprobs_NM: Tensor,
    logprobs_T: Tensor | None = None,
    counts_NM: Tensor | None = None,
) -> SparseTargets:
    """Targets of `head_tail`: the exact top k with weights p, and m draws from the tail with (1 − P)/m each.

    Args:
        head: the exact top k, at the temperature of the draws.
        ids_NM: int64 ids drawn from the tail; without counts, a token drawn twice stands twice.
        logprobs_NM: the teacher's log-probabilities of them at T = 1, in unused slots any finite ones.
        logprobs_T: at `head.temperature`; None at T = 1.
        counts_NM: how often each was drawn, 0 in unused slots, whose ids may be any. A row may have no draw at all
            where its tail is empty. None: once each.

    Raises:
        ValueError: no draws, or a draw that is in the head: it would be counted twice.
    """
    counts_NM = torch.ones_like(ids_NM) if counts_NM is None else counts_NM
    if not ids_NM.shape[1]:
        raise ValueError("no tail draws: 0 a row; take objective `truncated` or `bucket` on the head alone")
    twice_N = (_among(ids_NM, head.ids_NK) & (counts_NM > 0)).any(1)
    if twice_N.any():
        raise ValueError(
            f"{int(twice_N.sum())} of {len(twice_N)} rows draw a tail token that is among their top "
            f"{head.ids_NK.shape[1]}; tail draws exclude the head"
        )
    log_p_NK, log_tail_N = head.at(head.temperature)
    total_N1 = counts_NM.sum(1, keepdim=True)
    bare_N = (total_N1[:, 0] == 0) & (log_tail_N > _LOG_EMPTY / 2)
    if bare_N.any():
        raise ValueError(f"{int(bare_N.sum())} of {len(bare_N)} rows have a tail and no draw of it; capture them again")
    tail_NM = log_tail_N.exp()[:, None] * counts_NM / total_N1.clamp_min(1)
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
