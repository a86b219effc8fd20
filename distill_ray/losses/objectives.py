"""Objectives on sparse targets: each maps a student's split and a teacher's to one loss a row, at one temperature.

A new objective is a function of type `Objective` entered in `OBJECTIVES`; `head_loss` needs no change, since it
differentiates the objective in the K + 1 logits and one LSE that a row is reduced to. T² is applied by the caller, to
the objective itself, so value and gradient both carry it.

Below p is the teacher and q the student, P and S their kept mass, K the kept ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_ray.losses.partition import RowIds, Split, split_logits
from distill_ray.losses.types import LossSpec

LOG_FLOOR = -80.0
"""Least log-probability of the teacher in the reverse divergence, which is infinite where p = 0 and q is not; the same
as the log tail that the codec stores for an empty bucket."""


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's side at the temperature of the loss, in the type of the student's split."""

    log_p_NK: Tensor
    log_tail_N: Tensor
    """log(1 − P)."""
    weights_NK: Tensor | None = None
    """Of −log q, where the row holds draws; None: p itself, exact."""
    has_tail: bool = True
    """False where K = V, so that the bucket is empty for both."""


Objective = Callable[[Split, TeacherRows, LossSpec], Tensor]
"""(student, teacher, spec) → loss [N] in nats, differentiable in the student's split."""


def _expected(p_NK: Tensor, log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    # 0·log 0 = 0; where() keeps the 0·(−inf) of an underflowed probability out of the sum and of the gradient.
    return torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), 0).sum(1)


def partition_kl(
    log_p_NK: Tensor, log_p_tail_N: Tensor, log_q_NK: Tensor, log_q_tail_N: Tensor, *, has_tail: bool = True
) -> Tensor:
    """KL(p ‖ q) on the partition {kept tokens, tail}, [N] nats.

    Args:
        log_p_NK: log-probabilities of the kept ids under p.
        log_p_tail_N: log(1 − P).
        log_q_NK: the same ids under q.
        log_q_tail_N: log(1 − S).
        has_tail: False where K = V, so that the bucket is empty for both.
    """
    kl_N = _expected(log_p_NK.exp(), log_p_NK, log_q_NK)
    if not has_tail:
        return kl_N
    tail_N = log_p_tail_N.exp()
    return kl_N + torch.where(tail_N > 0, tail_N * (log_p_tail_N - log_q_tail_N), 0)


def bucket(student: Split, teacher: TeacherRows, spec: LossSpec) -> Tensor:
    """Kullback-Leibler divergence on the partition {kept tokens, tail}: never negative, at most the full KL.

    Σ_K p log(p/q) + (1 − P) log((1 − P)/(1 − S)).
    Gradient in the logits (times 1/T): q_j − p_j on K, q_j·(1 − (1 − P)/(1 − S)) off K.
    """
    return partition_kl(
        teacher.log_p_NK, teacher.log_tail_N, student.log_q_NK, student.log_tail_N, has_tail=teacher.has_tail
    )


def truncated(student: Split, teacher: TeacherRows, spec: LossSpec) -> Tensor:
    """Σ_K p log(p/q), gradient P·q − p_K: pulls the tail to zero. May be negative, and is never clamped: a clamp would
    stop the gradient wherever it is active."""
    return _expected(teacher.log_p_NK.exp(), teacher.log_p_NK, student.log_q_NK)


def renormalised(student: Split, teacher: TeacherRows, spec: LossSpec) -> Tensor:
    """KL of p/P and q/S on K, gradient q_j/S − p_j/P on K and none off K, so nothing stops mass leaking there."""
    log_p_NK = teacher.log_p_NK - teacher.log_p_NK.logsumexp(1, keepdim=True)
    return _expected(log_p_NK.exp(), log_p_NK, student.log_q_NK - student.log_q_NK.logsumexp(1, keepdim=True))


def drawn(student: Split, teacher: TeacherRows, spec: LossSpec) -> Tensor:
    """Σ w (log p − log q) over draws: an unbiased estimate of the full KL, with gradient Σw·q − w.

    `sampled` (RS-KD): ids drawn from the full p, w = counts / N. `head_tail`: w = p on the exact top k and (1 − P)/m on
    each of m draws from the tail. Σw = 1 for both; a single row may be negative.
    """
    if teacher.weights_NK is None:
        raise ValueError(f"objective {spec.objective} needs draws, but these targets hold the exact top k only")
    return _expected(teacher.weights_NK, teacher.log_p_NK, student.log_q_NK)


def reverse_kl(student: Split, teacher: TeacherRows, spec: LossSpec) -> Tensor:
    """KL(q ‖ p) on {kept tokens, tail}; log p is held at `LOG_FLOOR`, else a one-hot teacher makes it infinite."""
    return partition_kl(
        student.log_q_NK,
        student.log_tail_N,
        teacher.log_p_NK.clamp_min(LOG_FLOOR),
        teacher.log_tail_N.clamp_min(LOG_FLOOR),
        has_tail=teacher.has_tail,
    )


def _mixture(student: Split, teacher: TeacherRows, share: float) -> tuple[Tensor, Tensor]:
    """log(share·p + (1 − share)·q) on kept ids and tail."""
    a, b = math.log(share), math.log1p(-share)
    tail_N = student.log_tail_N
    if teacher.has_tail:
        tail_N = torch.logaddexp(teacher.log_tail_N + a, tail_N + b)
    return torch.logaddexp(teacher.log_p_NK + a, student.log_q_NK + b), tail_N


def jsd(student: Split, teacher: TeacherRows, spec: LossSpec) -> Tensor:
    """β·KL(p ‖ m) + (1 − β)·KL(q ‖ m), m = β·p + (1 − β)·q, on {kept tokens, tail} (GKD, arXiv 2306.13649)."""
    m = _mixture(student, teacher, spec.jsd_beta)
    forward_N = partition_kl(teacher.log_p_NK, teacher.log_tail_N, *m, has_tail=teacher.has_tail)
    reverse_N = partition_kl(student.log_q_NK, student.log_tail_N, *m, has_tail=teacher.has_tail)
    return spec.jsd_beta * forward_N + (1 - spec.jsd_beta) * reverse_N


def skewed_kl(student: Split, teacher: TeacherRows, spec: LossSpec) -> Tensor:
    """KL(p ‖ s·p + (1 − s)·q) on {kept tokens, tail} (DistiLLM, arXiv 2402.03898)."""
    m = _mixture(student, teacher, spec.skew)
    return partition_kl(teacher.log_p_NK, teacher.log_tail_N, *m, has_tail=teacher.has_tail)


OBJECTIVES: dict[str, Objective] = {
    "bucket": bucket,
    "truncated": truncated,
    "renormalised": renormalised,
    "sampled": drawn,
    "head_tail": drawn,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_kl": skewed_kl,
}

NEED_DRAWS = frozenset({"sampled", "head_tail"})
"""Objectives on ids drawn from the teacher; the others take its exact top k."""


def bucket_kl(
    logits_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, log_tail_N: Tensor, temperature: float = 1.0
) -> Tensor:
    """`bucket` on plain tensors.

    Args:
        logits_NV: student logits before the temperature, float32 or float64.
        ids_NK: int64 kept ids.
        logprobs_NK: teacher's log-probabilities, already at `temperature`.
        log_tail_N: teacher's log tail mass, already at `temperature`.
        temperature: divides the student's logits.

    Returns:
        [N] nats.
    """
    vocab_size, kind = logits_NV.shape[1], logits_NV.dtype
    ids = RowIds.of(ids_NK, ids_NK[:, 0], vocab_size)
    teacher = TeacherRows(logprobs_NK.to(kind), log_tail_N.to(kind), has_tail=ids.has_tail)
    return bucket(split_logits(logits_NV, ids, temperature), teacher, LossSpec(vocab_size))
