"""Per-row evaluation figures of a student head, in chunks."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distill_ray.losses.head import project
from distill_ray.losses.objectives import partition_kl
from distill_ray.losses.partition import RowIds, split_logits
from distill_ray.losses.types import SparseTargets

_CHUNK_LOGITS = 2**24
"""Logits of one chunk: 64 MiB in float32, of which a few copies live at once."""


def default_chunk(vocab_size: int) -> int:
    """Rows a chunk may have so that its logits take about 64 MiB in float32."""
    return max(16, _CHUNK_LOGITS // vocab_size)


@dataclass(frozen=True)
class RowMetrics:
    """One figure a row, all at T = 1, in row order."""

    kl_N: Tensor
    """float32 bucket KL(teacher ‖ student) on kept + tail, nats."""
    top1_agree_N: Tensor
    """bool: the student's most likely token is the teacher's."""
    acceptance_N: Tensor
    """float32 Σ min(p, q) on kept + bucket: an upper bound of the speculative acceptance over the full vocabulary."""
    logprob_N: Tensor
    """float32 student's log-probability of the actual next token."""
    confidence_N: Tensor
    """float32 student's probability of its most likely token."""
    correct_N: Tensor
    """bool: the student's most likely token is the actual next one."""


@dataclass(frozen=True)
class ModelRows:
    """One model's distribution on the partition that the teacher's kept ids make, at T = 1."""

    log_q_NK: Tensor
    """Log-probabilities of the teacher's kept ids."""
    log_tail_N: Tensor
    """log(1 − S), S the model's mass on the kept ids."""
    top1_N: Tensor
    """int64 most likely id."""
    top1_logprob_N: Tensor
    actual_logprob_N: Tensor
    """Log-probability of the actual next token."""


def compare_rows(model: ModelRows, targets: SparseTargets, *, vocab_size: int) -> RowMetrics:
    """Figures of a model against the teacher's targets; the teacher itself may be the model.

    Args:
        model: N rows.
        targets: N rows.
        vocab_size: real vocabulary; where all of it is kept there is no tail bucket.
    """
    has_tail = targets.ids_NK.shape[1] < vocab_size
    log_p_NK, log_tail_N = targets.logprobs_NK, targets.log_tail_N
    acceptance_N = torch.minimum(log_p_NK, model.log_q_NK).exp().sum(1)
    if has_tail:
        acceptance_N = acceptance_N + torch.minimum(log_tail_N, model.log_tail_N).exp()
    return RowMetrics(
        partition_kl(log_p_NK, log_tail_N, model.log_q_NK, model.log_tail_N, has_tail=has_tail),
        model.top1_N == targets.ids_NK[:, 0],
        acceptance_N,
        model.actual_logprob_N,
        model.top1_logprob_N.exp(),
        model.top1_N == targets.labels_N,
    )


def _chunk_metrics(logits_NV: Tensor, targets: SparseTargets) -> RowMetrics:
    split = split_logits(logits_NV, RowIds.of(targets.ids_NK, targets.labels_N, logits_NV.shape[1]))
    best_N, top1_N = logits_NV.max(1)
    rows = ModelRows(split.log_q_NK, split.log_tail_N, top1_N, best_N - split.log_z_N, split.log_q_label_N)
    return compare_rows(rows, targets, vocab_size=logits_NV.shape[1])


@torch.no_grad()
def head_metrics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: SparseTargets,
    *,
    vocab_size: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> RowMetrics:
    """Score N rows of hidden states against the teacher; `mask_N` is not applied: one figure a row given.

    Args:
        hidden_ND: final hidden states.
        weight_VD: head weight; rows ≥ vocab_size are excluded.
        bias_V: head bias or None.
        targets: N rows.
        vocab_size: real vocabulary.
        logit_scale: see `LossSpec`.
        softcap: see `LossSpec`.
        chunk: rows at a time; by default about 64 MiB of float32 logits.
    """
    step = chunk or default_chunk(vocab_size)
    parts = []
    for start in range(0, max(len(targets), 1), step):
        rows = slice(start, start + step)
        logits_NV = project(
            hidden_ND[rows], weight_VD, bias_V, vocab_size=vocab_size, logit_scale=logit_scale, softcap=softcap
        )
        parts.append(_chunk_metrics(logits_NV, targets.select(rows)))
    return RowMetrics(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(RowMetrics)))
