"""The student's distribution seen as K kept tokens and one tail bucket."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Split:
    """A distribution over the vocabulary, reduced to kept tokens and tail, at one temperature."""

    log_q_NK: Tensor
    """Log-probabilities of the kept ids."""
    log_tail_N: Tensor
    """log(1 − S), S the kept mass; −inf only where no token is outside the kept ones."""
    log_q_label_N: Tensor
    """Log-probability of the actual next token."""
    log_z_N: Tensor
    """LSE of the logits divided by the temperature."""


class _GatherAndTail(torch.autograd.Function):
    """(kept logits, label's logit, LSE of all but the kept logits), all of logits / temperature.

    One function, so that the gradient is written into one [N, V] buffer: plain autograd makes a zero-filled one for
    every gather and adds them up, which costs more than the matrix products at small hidden sizes.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, ids_NK: Tensor, labels_N1: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept_NK, label_N1 = logits_NV.gather(1, ids_NK), logits_NV.gather(1, labels_N1)
        weight_NV = logits_NV.clone() if temperature == 1.0 else logits_NV / temperature
        weight_NV.scatter_(1, ids_NK, -math.inf)
        top_N1 = weight_NV.amax(1, keepdim=True)
        sum_N1 = weight_NV.sub_(top_N1).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(weight_NV, sum_N1, ids_NK, labels_N1)
        ctx.temperature = temperature
        return kept_NK / temperature, label_N1[:, 0] / temperature, (top_N1 + sum_N1.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_NV, sum_N1, ids_NK, labels_N1 = ctx.saved_tensors
        kept_NK, label_N, tail_N = (g / ctx.temperature for g in grads)
        grad_NV = weight_NV * (tail_N[:, None] / sum_N1)
        grad_NV.scatter_(1, ids_NK, kept_NK)
        grad_NV.scatter_add_(1, labels_N1, label_N[:, None])
        return grad_NV, None, None, None


class StudentChunk:
    """Student logits of a chunk of rows; each temperature's split is computed once and shared.

    Args:
        logits_NV: [N, V], float32 or float64, real vocabulary only.
        ids_NK: int64 kept ids, distinct within a row.
        labels_N: int64 actual next tokens.
    """

    def __init__(self, logits_NV: Tensor, ids_NK: Tensor, labels_N: Tensor) -> None:
        self.logits_NV = logits_NV
        self.ids_NK = ids_NK
        self.labels_N = labels_N
        self._splits: dict[float, Split] = {}

    def split(self, temperature: float) -> Split:
        """The kept and tail log-probabilities of softmax(logits / temperature), differentiable once."""
        if temperature not in self._splits:
            self._splits[temperature] = self._split(temperature)
        return self._splits[temperature]

    def _split(self, temperature: float) -> Split:
        if self.ids_NK.shape[1] == self.logits_NV.shape[1]:
            return self._whole(temperature)
        # log(1 − S) from the tail's own LSE: 1 − S itself cancels to 0 or to a negative number as S → 1.
        kept_NK, label_N, tail_lse_N = _GatherAndTail.apply(
            self.logits_NV, self.ids_NK, self.labels_N[:, None], temperature
        )  # type: ignore[misc]
        log_z_N = torch.logaddexp(kept_NK.logsumexp(1), tail_lse_N)
        return Split(kept_NK - log_z_N[:, None], tail_lse_N - log_z_N, label_N - log_z_N, log_z_N)

    def _whole(self, temperature: float) -> Split:
        logq_NV = (self.logits_NV / temperature).log_softmax(1)
        return Split(
            logq_NV.gather(1, self.ids_NK),
            torch.full_like(logq_NV[:, 0], -math.inf),
            logq_NV.gather(1, self.labels_N[:, None])[:, 0],
            (self.logits_NV / temperature).logsumexp(1),
        )
