"""The output head fused with the loss: logits exist for one chunk of rows, gradients come out of the forward.

Three products of hidden states, weight and logits' gradient, as many as plain training takes, and none is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_ray.losses import triton_pass
from distill_ray.losses.objectives import NEED_DRAWS, OBJECTIVES, TeacherRows, bucket, drawn
from distill_ray.losses.partition import RowIds, split
from distill_ray.losses.passes import HeadInputs, HeadPass, RowSums, accumulate_type
from distill_ray.losses.tiles import Tiling, TorchTiles
from distill_ray.losses.types import LossSpec, LossSums, SparseTargets


def project(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    vocab_size: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Logits over the real vocabulary, [N, vocab_size], in float32 (float64 for float64 input).

    The product is taken in the type of `hidden_ND`, as the model's own head would; scale and soft-cap follow in
    float32.
    """
    # Rows past vocab_size are padding of the embedding: they would take probability from real tokens.
    logits_NV = hidden_ND @ weight_VD[:vocab_size].to(hidden_ND.dtype).T
    logits_NV = logits_NV.to(accumulate_type(hidden_ND))
    if bias_V is not None:
        logits_NV = logits_NV + bias_V[:vocab_size].to(logits_NV.dtype)
    if logit_scale != 1.0:
        logits_NV = logits_NV * logit_scale
    if softcap is not None:
        logits_NV = torch.tanh(logits_NV / softcap) * softcap
    return logits_NV


def _backend(inputs: HeadInputs, tiling: Tiling | None) -> HeadPass:
    on_cuda = inputs.hidden_ND.is_cuda and inputs.kind == torch.float32
    if on_cuda and tiling is None and triton_pass.AVAILABLE:
        return triton_pass.TritonPass(inputs)
    return TorchTiles(inputs, tiling)


def _inputs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: SparseTargets,
    spec: LossSpec,
    needs: tuple[bool, bool, bool],
) -> HeadInputs:
    drawn = targets.weights_NK is not None
    # Parts of weight 0 are left out, not multiplied by 0: their gradient over the vocabulary costs as much.
    weight_of = {spec.temperature: 1 - spec.hard_label_weight}
    weight_of[1.0] = weight_of.get(1.0, 0.0) + spec.hard_label_weight
    return HeadInputs(
        hidden_ND,
        weight_VD,
        bias_V,
        RowIds.of(targets.ids_NK, targets.labels_N, spec.vocab_size, repeats=drawn),
        spec.vocab_size,
        tuple(weight_of),
        tuple(t for t, w in weight_of.items() if w > 0 and any(needs)),
        needs,
        spec.logit_scale,
        spec.softcap,
    )


@dataclass(frozen=True)
class _Scored:
    objective: Tensor
    """Σ over the chunk, float64, differentiable in the leaves."""
    parts: Tensor
    """float64 [6]: kl_t, kl_t1, ce, kept, agree, count."""


def _objective(sums: RowSums, ids: RowIds, targets: SparseTargets, spec: LossSpec) -> _Scored:
    """The mixed objective and its parts, from the few numbers that a row is reduced to."""
    alpha, T = spec.hard_label_weight, spec.temperature
    student = {t: split(sums.logits_NE, rest_N, ids, t) for t, rest_N in sums.rest.items()}
    kl_t_N = OBJECTIVES[spec.objective](student[T], _teacher(targets, T, ids), spec)
    ce_N = -student[1.0].log_q_label_N
    parts = [w * x for w, x in (((1 - alpha) * T * T, kl_t_N), (alpha, ce_N)) if w != 0]
    objective = sum(parts[1:], parts[0]).sum()
    with torch.no_grad():
        comparable = drawn if targets.weights_NK is not None else bucket
        kl_t1_N = comparable(student[1.0], _teacher(targets, 1.0, ids), spec)
        kept_N = -torch.expm1(targets.log_tail_N.double())
        others_N = torch.maximum(sums.logits_NE[:, 1:].amax(1), sums.top_N)
        agree_N = sums.logits_NE[:, 0] >= others_N
        rows = (kl_t_N, kl_t1_N, ce_N, kept_N, agree_N, torch.ones_like(kept_N))
        return _Scored(objective, torch.stack([x.double().sum() for x in rows]))


def _teacher(targets: SparseTargets, temperature: float, ids: RowIds) -> TeacherRows:
    log_p_NK, log_tail_N = targets.at(temperature)
    weights_NK = targets.weights_at(temperature)
    return TeacherRows(
        log_p_NK.double(),
        log_tail_N.double(),
        None if weights_NK is None else weights_NK.double(),
        ids.has_tail,
    )


def run_pass(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: SparseTargets,
    spec: LossSpec,
    needs: tuple[bool, bool, bool],
    backend: Callable[[HeadInputs], HeadPass],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """(objective, its parts as float64 [6], gradients of hidden states, weight and bias) on one device's pass."""
    inputs = _inputs(hidden_ND, weight_VD, bias_V, targets, spec, needs)
    head = backend(inputs)
    total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
    parts = torch.zeros(6, dtype=torch.float64, device=hidden_ND.device)
    for chunk, rows in enumerate(head.chunks):
        sums = head.score(chunk)
        leaves = [sums.logits_NE, *(sums.rest[t] for t in inputs.kept)]
        with torch.set_grad_enabled(any(needs)):
            for leaf in leaves:
                leaf.requires_grad_(any(needs))
            scored = _objective(sums, inputs.ids.select(rows), targets.select(rows), spec)
        total += scored.objective.detach()
        parts += scored.parts
        if any(needs):
            dlogits_NE, *drest = torch.autograd.grad(scored.objective, leaves, materialize_grads=True)
            head.differentiate(chunk, dlogits_NE, dict(zip(inputs.kept, drest, strict=True)))
    return total.to(inputs.kind), parts, head.gradients()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets: SparseTargets,
        spec: LossSpec,
        tiling: Tiling | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        total, parts, gradients = run_pass(
            hidden_ND, weight_VD, bias_V, targets, spec, needs, lambda inputs: _backend(inputs, tiling)
        )
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        # In place: the weight's gradient is the largest tensor of the step, and a scaled copy would double it. A second
        # backward through a retained graph is refused by autograd, which sees the change.
        scaled = (None if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.saved_tensors)
        return (*scaled, None, None, None, None)


def head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: SparseTargets,
    spec: LossSpec,
    *,
    tiling: Tiling | None = None,
) -> LossSums:
    """The distillation loss from hidden states, without ever holding [N, V] logits.

    Each chunk of rows is projected, scored and differentiated at once; the backward pass only scales the gradients
    found in the forward, in place: it runs once. The weight gets no gradient where it asks for none (LoRA). With N = 0
    the loss is 0 and the gradients are zeros that still flow, so that every rank of a ZeRO group runs the same hooks.
    Memory beyond the inputs and gradients: one chunk of logits (about 128 MiB) and, for bf16, the weight's gradient
    in float32.

    Args:
        hidden_ND: final hidden states of the rows that `targets` describe, any float type.
        weight_VD: head weight; rows ≥ spec.vocab_size are padding: excluded, with zero gradient.
        bias_V: head bias or None.
        targets: N rows; those with mask_N False are dropped.
        spec: objective, temperature, mix, head.
        tiling: rows and vocabulary at a time, by torch operations; by default what suits the device.

    Returns:
        Sums over supervised rows; only `objective_sum` carries a gradient.

    Raises:
        ValueError: shapes or temperatures that do not fit each other.
    """
    if len(hidden_ND) != len(targets):
        raise ValueError(f"{len(hidden_ND)} hidden rows for {len(targets)} targets; select the same rows of both")
    if len(weight_VD) < spec.vocab_size:
        raise ValueError(f"the head has {len(weight_VD)} rows, fewer than the vocabulary's {spec.vocab_size}")
    if spec.temperature not in (1.0, targets.temperature):
        raise ValueError(f"loss temperature {spec.temperature}, but targets stand at {targets.temperature}")
    if (spec.objective in NEED_DRAWS) != (targets.weights_NK is not None):
        held = "the exact top k" if targets.weights_NK is None else "draws"
        raise ValueError(
            f"objective {spec.objective!r}, but these targets hold {held}; capture what the objective needs"
        )
    if targets.mask_N is not None:
        keep = targets.mask_N.nonzero()[:, 0]
        hidden_ND, targets = hidden_ND[keep], targets.select(keep)
    leaves = (hidden_ND, weight_VD, bias_V)
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in leaves)
    total, sums = _HeadLoss.apply(*leaves, targets, spec, tiling, needs)  # type: ignore[misc]
    return LossSums(total, *sums.unbind())
