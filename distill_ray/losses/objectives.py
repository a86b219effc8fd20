"""Objectives on sparse targets: each maps student logits and targets to one loss a row, at a temperature.

A new objective is a function of type `Objective` entered in `OBJECTIVES`; `head_loss` needs no change. T² is applied
by the caller, to the objective itself, so value and gradient both carry it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill_ray.losses.partition import StudentChunk
from distill_ray.losses.types import SparseTargets

Objective = Callable[[StudentChunk, SparseTargets, float], Tensor]
"""(student, targets, temperature) → loss [N] in nats, differentiable in the student's logits."""


def bucket(student: StudentChunk, targets: SparseTargets, temperature: float) -> Tensor:
    """Kullback-Leibler divergence on the partition {kept tokens, tail}: never negative, at most the full KL.

    Σ_K p log(p/q) + (1 − P) log((1 − P)/(1 − S)), P and S the kept mass of teacher and student.
    Gradient in the logits (times 1/T): q_j − p_j on K, q_j·(1 − (1 − P)/(1 − S)) off K.

    Args:
        student: logits [N, V] of the rows.
        targets: N rows that hold `temperature`.
        temperature: T; both distributions stand at it.

    Returns:
        [N] nats, in the type of the logits.
    """
    log_p_NK, log_tail_N = (x.to(student.logits_NV.dtype) for x in targets.at(temperature))
    split = student.split(temperature)
    has_tail = targets.ids_NK.shape[1] < student.logits_NV.shape[1]
    return partition_kl(log_p_NK, log_tail_N, split.log_q_NK, split.log_tail_N, has_tail=has_tail)


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
    p_NK, tail_N = log_p_NK.exp(), log_p_tail_N.exp()
    # 0·log 0 = 0; where() keeps the 0·(−inf) of an underflowed probability out of the sum.
    kl_N = torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), 0).sum(1)
    if not has_tail:
        return kl_N
    return kl_N + torch.where(tail_N > 0, tail_N * (log_p_tail_N - log_q_tail_N), 0)


OBJECTIVES: dict[str, Objective] = {"bucket": bucket}


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
    targets = SparseTargets(
        ids_NK,
        logprobs_NK,
        log_tail_N,
        labels_N=ids_NK[:, 0],
        temperature=temperature,
        logprobs_T=logprobs_NK,
        log_tail_T=log_tail_N,
    )
    return bucket(StudentChunk(logits_NV, ids_NK, targets.labels_N), targets, temperature)
