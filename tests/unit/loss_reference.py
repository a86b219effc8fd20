"""Dense formulas of every objective in float64, from whole distributions: what the fused head is held against."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill_ray.losses import LossSpec, SparseTargets, drawn_targets, head_tail_targets

FLOOR = -80.0
EXACT = ("bucket", "truncated", "renormalised", "reverse_kl", "jsd", "skewed_kl")
DRAWN = ("sampled", "head_tail")


@dataclass
class Case:
    """Inputs of one comparison; the leaves are in the type under test."""

    hidden: Tensor
    weight: Tensor
    targets: SparseTargets


def teacher_logits(kind: str, n: int, vocab: int, generator: torch.Generator) -> Tensor:
    """[n, vocab] float64 logits of an edge case."""
    z = 2 * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    if kind == "uniform":
        return torch.zeros_like(z)
    if kind == "one_hot":  # p is 1 in float64 too, the tail e^-600
        return torch.zeros_like(z).scatter(1, z.argmax(1, keepdim=True), 600.0)
    if kind == "P→1":  # 1 − P ≈ 1e-9: 0 as a difference in float32
        return torch.where(z >= z.topk(4, 1).values[:, -1:], z + 25, z)
    return z


def exact_targets(z: Tensor, labels: Tensor, k: int, temperature: float) -> SparseTargets:
    """The top k of dense teacher logits, in float64, the empty tail at the codec's floor."""
    ids = z.topk(k, 1).indices
    both = []
    for T in (1.0, temperature):
        log_p = (z / T).log_softmax(1)
        rest = log_p.scatter(1, ids, -math.inf).logsumexp(1).clamp_min(FLOOR)
        both.append((log_p.gather(1, ids), rest))
    return SparseTargets(ids, *both[0], labels, None, temperature, *both[1])


def draw(z: Tensor, labels: Tensor, objective: str, temperature: float, k: int, m: int, g: torch.Generator):
    """Targets of m draws from the full distribution, or from the tail beside the top k."""
    log_p, log_p_T = z.log_softmax(1), (z / temperature).log_softmax(1)
    at_T = None if temperature == 1 else log_p_T
    if objective == "sampled":
        ids = torch.multinomial(log_p_T.exp(), m, replacement=True, generator=g)
        counts = torch.zeros_like(z, dtype=torch.long).scatter_add_(1, ids, torch.ones_like(ids))
        counts, ids = counts.topk(min(m, z.shape[1]), 1)
        got = at_T if at_T is None else at_T.gather(1, ids)
        return drawn_targets(ids, counts, log_p.gather(1, ids), labels, temperature=temperature, logprobs_T=got)
    head = exact_targets(z, labels, k, temperature)
    tail = log_p_T.scatter(1, head.ids_NK, -math.inf).softmax(1)
    ids = torch.multinomial(tail, m, replacement=True, generator=g)
    return head_tail_targets(head, ids, log_p.gather(1, ids), at_T if at_T is None else at_T.gather(1, ids))


def _parts(p_or_q: Tensor, kept: Tensor) -> Tensor:
    """[N, V] log-probabilities to [N, K + 1]: kept ones in order of their ids, then the tail."""
    tail = p_or_q.scatter(1, kept, -math.inf).logsumexp(1, keepdim=True) if kept.shape[1] < p_or_q.shape[1] else None
    chosen = p_or_q.gather(1, kept)
    return chosen if tail is None else torch.cat([chosen, tail], 1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0).sum(1)


def dense_rows(z: Tensor, targets: SparseTargets, spec: LossSpec) -> Tensor:
    """[N] nats of one objective from dense student logits, by its formula."""
    T, name = spec.temperature, spec.objective
    log_p, log_tail = (x.double() for x in targets.at(T))
    q = (z / T).log_softmax(1)
    kept = q.gather(1, targets.ids_NK)
    if name in DRAWN:
        assert targets.weights_NK is not None
        return (targets.weights_NK.double() * (log_p - kept)).sum(1)
    if name == "truncated":
        return _kl(log_p, kept)
    if name == "renormalised":
        return _kl(log_p.log_softmax(1), kept.log_softmax(1))
    student = _parts(q, targets.ids_NK)
    teacher = log_p if student.shape[1] == log_p.shape[1] else torch.cat([log_p, log_tail[:, None]], 1)
    if name == "reverse_kl":
        return _kl(student, teacher.clamp_min(FLOOR))
    share = {"bucket": 0.0, "jsd": spec.jsd_beta, "skewed_kl": spec.skew}[name]
    mixed = (share * teacher.exp() + (1 - share) * student.exp()).log() if share else student
    return (
        spec.jsd_beta * _kl(teacher, mixed) + (1 - spec.jsd_beta) * _kl(student, mixed)
        if name == "jsd"
        else _kl(teacher, mixed)
    )


def dense_loss(case: Case, spec: LossSpec) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Value and both gradients of the mixed loss by float64 autograd through full logits."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    z = hidden @ weight[: spec.vocab_size].T * spec.logit_scale
    z = z if spec.softcap is None else torch.tanh(z / spec.softcap) * spec.softcap
    ce = -z.log_softmax(1).gather(1, case.targets.labels_N[:, None])[:, 0]
    rows = (1 - spec.hard_label_weight) * spec.temperature**2 * dense_rows(z, case.targets, spec)
    rows = rows + spec.hard_label_weight * ce
    keep = case.targets.mask_N
    loss = (rows if keep is None else rows[keep]).sum()
    hidden_grad, weight_grad = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), (hidden_grad, weight_grad)


def masked(targets: SparseTargets, mask: Tensor) -> SparseTargets:
    """The targets with some rows unsupervised."""
    return replace(targets, mask_N=mask)
