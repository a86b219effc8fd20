"""The student's distribution seen as K kept tokens and one tail bucket."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """A distribution over the vocabulary, reduced to kept tokens and tail, at one temperature."""

    log_q_NK: Tensor
    """Log-probabilities of the kept ids."""
    log_tail_N: Tensor
    """log(1 − S), S the kept mass; −inf only where no token is outside the kept ones."""
    log_z_N: Tensor
    """LSE of the logits divided by the temperature."""


class StudentChunk:
    """Student logits of a chunk of rows; each temperature's split is computed once and shared.

    Args:
        logits_NV: [N, V], float32 or float64, real vocabulary only.
        ids_NK: int64 kept ids.
    """

    def __init__(self, logits_NV: Tensor, ids_NK: Tensor) -> None:
        self.logits_NV = logits_NV
        self.ids_NK = ids_NK
        self._splits: dict[float, Split] = {}

    def split(self, temperature: float) -> Split:
        """The kept and tail log-probabilities of softmax(logits / temperature), differentiable."""
        if temperature not in self._splits:
            self._splits[temperature] = self._split(temperature)
        return self._splits[temperature]

    def _split(self, temperature: float) -> Split:
        z_NV = self.logits_NV if temperature == 1.0 else self.logits_NV / temperature
        kept_NK = z_NV.gather(1, self.ids_NK)
        kept_lse_N = kept_NK.logsumexp(1)
        if self.ids_NK.shape[1] == z_NV.shape[1]:
            empty_N = torch.full_like(kept_lse_N, -math.inf)
            return Split(kept_NK - kept_lse_N[:, None], empty_N, kept_lse_N)
        # log(1 − S) from the tail's own LSE: 1 − S itself cancels to 0 or to a negative number as S → 1.
        tail_lse_N = z_NV.scatter(1, self.ids_NK, -math.inf).logsumexp(1)
        log_z_N = torch.logaddexp(kept_lse_N, tail_lse_N)
        return Split(kept_NK - log_z_N[:, None], tail_lse_N - log_z_N, log_z_N)

    def log_prob(self, ids_N: Tensor) -> Tensor:
        """Log-probability of one token a row at T = 1, [N]."""
        return self.logits_NV.gather(1, ids_N[:, None])[:, 0] - self.split(1.0).log_z_N
