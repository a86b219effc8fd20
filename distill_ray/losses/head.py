"""The output head fused with the loss: logits exist for one chunk of rows, gradients come out of the forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_ray.losses.objectives import OBJECTIVES, bucket
from distill_ray.losses.partition import StudentChunk
from distill_ray.losses.types import LossSpec, LossSums, SparseTargets

_CHUNK_LOGITS = 2**24
"""Logits of one chunk: 64 MiB in float32, of which four or five copies live at once."""


def default_chunk(vocab_size: int) -> int:
    """Rows a chunk may have so that its logits take about 64 MiB in float32."""
    return max(16, _CHUNK_LOGITS // vocab_size)


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
    logits_NV = logits_NV.to(_accumulate_type(hidden_ND))
    if bias_V is not None:
        logits_NV = logits_NV + bias_V[:vocab_size].to(logits_NV.dtype)
    if logit_scale != 1.0:
        logits_NV = logits_NV * logit_scale
    if softcap is not None:
        logits_NV = torch.tanh(logits_NV / softcap) * softcap
    return logits_NV


def _accumulate_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _transform_gradient(dlogits_NV: Tensor, logits_NV: Tensor, spec: LossSpec) -> Tensor:
    """From the gradient in the final logits to that in the raw product of hidden states and weight."""
    if spec.softcap is not None:
        dlogits_NV = dlogits_NV * (1 - (logits_NV / spec.softcap) ** 2)
    return dlogits_NV if spec.logit_scale == 1.0 else dlogits_NV * spec.logit_scale


@dataclass
class _Gradients:
    """Accumulators of one forward pass; None where no gradient is asked for."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: list[bool]) -> _Gradients:
        # Float32 accumulators: in bf16 a sum over thousands of rows stops growing after a few hundred.
        kind = _accumulate_type(hidden_ND)
        return cls(
            torch.zeros_like(hidden_ND) if needs[0] else None,
            torch.zeros_like(weight_VD, dtype=kind) if needs[1] else None,
            torch.zeros_like(bias_V, dtype=kind) if needs[2] and bias_V is not None else None,
        )

    @property
    def wanted(self) -> bool:
        return any(x is not None for x in (self.hidden_ND, self.weight_VD, self.bias_V))

    def add(self, rows: slice, draw_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> None:
        vocab_size = draw_NV.shape[1]
        if self.bias_V is not None:
            self.bias_V[:vocab_size] += draw_NV.sum(0)
        draw_NV = draw_NV.to(hidden_ND.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = draw_NV @ weight_VD[:vocab_size].to(draw_NV.dtype)
        if self.weight_VD is not None and self.weight_VD.dtype == draw_NV.dtype:
            self.weight_VD[:vocab_size].addmm_(draw_NV.T, hidden_ND[rows])
        elif self.weight_VD is not None:
            self.weight_VD[:vocab_size] += draw_NV.T @ hidden_ND[rows]


def _chunk_losses(logits_NV: Tensor, targets: SparseTargets, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """(mixed objective sum, its parts as float64 [6] without the objective: kl_t, kl_t1, ce, kept, agree, count)."""
    student = StudentChunk(logits_NV, targets.ids_NK, targets.labels_N)
    alpha, T = spec.hard_label_weight, spec.temperature
    kl_t_N = OBJECTIVES[spec.objective](student, targets, T)
    ce_N = -student.split(1.0).log_q_label_N
    # Parts of weight 0 are left out, not multiplied by 0: their backward pass over the vocabulary costs as much.
    parts = [w * x for w, x in (((1 - alpha) * T * T, kl_t_N), (alpha, ce_N)) if w != 0]
    objective = sum(parts[1:], parts[0]).sum()
    with torch.no_grad():
        shared = spec.objective == "bucket" and T == 1.0
        kl_t1_N = kl_t_N if shared else bucket(student, targets, 1.0)
        kept_N = -torch.expm1(targets.log_tail_N.double())
        agree_N = logits_NV.argmax(1) == targets.ids_NK[:, 0]
        rows = (kl_t_N, kl_t1_N, ce_N, kept_N, agree_N, torch.ones_like(kept_N))
        return objective, torch.stack([x.double().sum() for x in rows])


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets: SparseTargets,
        spec: LossSpec,
        chunk: int,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor]:
        grads = _Gradients.zeros(hidden_ND, weight_VD, bias_V, needs)
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        sums = torch.zeros(6, dtype=torch.float64, device=hidden_ND.device)
        head = {"vocab_size": spec.vocab_size, "logit_scale": spec.logit_scale, "softcap": spec.softcap}
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits_NV = project(hidden_ND[rows], weight_VD, bias_V, **head)
            with torch.enable_grad():
                logits_NV.requires_grad_(grads.wanted)
                objective, parts = _chunk_losses(logits_NV, targets.select(rows), spec)
            total += objective.detach()
            sums += parts
            if grads.wanted:
                (dlogits_NV,) = torch.autograd.grad(objective, logits_NV)
                draw_NV = _transform_gradient(dlogits_NV, logits_NV.detach(), spec)
                grads.add(rows, draw_NV, hidden_ND, weight_VD)
        ctx.save_for_backward(
            grads.hidden_ND,
            None if grads.weight_VD is None else grads.weight_VD.to(weight_VD.dtype),
            None if grads.bias_V is None or bias_V is None else grads.bias_V.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(sums)
        return total.to(_accumulate_type(hidden_ND)), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        scaled = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None, None, None)


def head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: SparseTargets,
    spec: LossSpec,
    *,
    chunk: int | None = None,
) -> LossSums:
    """The distillation loss from hidden states, without ever holding [N, V] logits.

    Each chunk of rows is projected, scored and differentiated at once; the backward pass only scales the gradients
    found in the forward. The weight gets no gradient where it asks for none (LoRA). With N = 0 the loss is 0 and the
    gradients are zeros that still flow, so that every rank of a ZeRO group runs the same hooks.

    Args:
        hidden_ND: final hidden states of the rows that `targets` describe, any float type.
        weight_VD: head weight; rows ≥ spec.vocab_size are padding: excluded, with zero gradient.
        bias_V: head bias or None.
        targets: N rows; those with mask_N False are dropped.
        spec: objective, temperature, mix, head.
        chunk: rows at a time; by default about 64 MiB of float32 logits.

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
    if targets.mask_N is not None:
        keep = targets.mask_N.nonzero()[:, 0]
        hidden_ND, targets = hidden_ND[keep], targets.select(keep)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden_ND, weight_VD, bias_V)]
    total, sums = _HeadLoss.apply(
        hidden_ND, weight_VD, bias_V, targets, spec, chunk or default_chunk(spec.vocab_size), needs
    )  # type: ignore[misc]
    return LossSums(total, *sums.unbind())
