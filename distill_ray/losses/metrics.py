"""Per-row evaluation figures of a student head, in chunks."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distill_ray.losses.head import default_chunk, project
from distill_ray.losses.objectives import bucket
from distill_ray.losses.partition import StudentChunk
from distill_ray.losses.types import SparseTargets


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


def _chunk_metrics(logits_NV: Tensor, targets: SparseTargets) -> RowMetrics:
    student = StudentChunk(logits_NV, targets.ids_NK)
    split = student.split(1.0)
    best_N, top1_N = logits_NV.max(1)
    kept_N = torch.minimum(targets.logprobs_NK, split.log_q_NK).exp().sum(1)
    tail_N = torch.minimum(targets.log_tail_N, split.log_tail_N).exp()
    return RowMetrics(
        bucket(student, targets, 1.0),
        top1_N == targets.ids_NK[:, 0],
        kept_N + tail_N,
        student.log_prob(targets.labels_N),
        (best_N - split.log_z_N).exp(),
        top1_N == targets.labels_N,
    )


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
