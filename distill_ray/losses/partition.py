"""A student's distribution seen as the kept tokens and one tail bucket, from their logits alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LOWEST = -1e30
"""Stands in for the maximum of no logits at all: −inf − (−inf) would be NaN."""


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


@dataclass(frozen=True)
class RowIds:
    """The K kept ids of a row and its label, and which of these K + 1 entries name a token for the first time."""

    ids_NE: Tensor
    """int64 [N, K + 1], the label last."""
    first_NE: Tensor
    """bool: False where an earlier entry of the row is the same token."""
    has_tail: bool
    """False where all of the vocabulary is kept, so that there is no bucket."""

    @classmethod
    def of(cls, ids_NK: Tensor, labels_N: Tensor, vocab_size: int, *, repeats: bool = False) -> RowIds:
        """Args:
        ids_NK: int64 kept ids.
        labels_N: int64 actual next tokens.
        vocab_size: real vocabulary.
        repeats: an id may stand twice in a row (draws do).
        """
        first_NE = torch.ones(len(ids_NK), ids_NK.shape[1] + 1, dtype=torch.bool, device=ids_NK.device)
        first_NE[:, -1] = (ids_NK != labels_N[:, None]).all(1)
        if repeats:
            order_NK = ids_NK.argsort(dim=1, stable=True)
            sorted_NK = ids_NK.gather(1, order_NK)
            again_NK = torch.zeros_like(sorted_NK, dtype=torch.bool)
            again_NK[:, 1:] = sorted_NK[:, 1:] == sorted_NK[:, :-1]
            first_NE[:, :-1] = ~torch.zeros_like(again_NK).scatter(1, order_NK, again_NK)
        return cls(torch.cat([ids_NK, labels_N[:, None]], 1), first_NE, repeats or ids_NK.shape[1] < vocab_size)

    def select(self, rows: slice) -> RowIds:
        """The ids of some rows."""
        return RowIds(self.ids_NE[rows], self.first_NE[rows], self.has_tail)


def split(logits_NE: Tensor, rest_N: Tensor, ids: RowIds, temperature: float) -> Split:
    """The student at one temperature, differentiable in the K + 1 logits and in the rest's LSE.

    1 − S comes from the tail's own LSE: as a difference it cancels to 0 or to a negative number as S → 1.

    Args:
        logits_NE: logits of `ids.ids_NE`, before the temperature.
        rest_N: LSE of logits / temperature over all tokens that are not among the ids.
        ids: of the same rows.
        temperature: divides the logits.
    """
    scaled_NE = logits_NE / temperature
    counted_NE = scaled_NE.masked_fill(~ids.first_NE, -math.inf)
    log_z_N = torch.cat([counted_NE, rest_N[:, None]], 1).logsumexp(1)
    # The label is outside the kept ids where it is named for the first time, and is then part of the tail.
    tail_N = (
        torch.logaddexp(counted_NE[:, -1], rest_N) - log_z_N if ids.has_tail else torch.full_like(rest_N, -math.inf)
    )
    return Split(scaled_NE[:, :-1] - log_z_N[:, None], tail_N, scaled_NE[:, -1] - log_z_N, log_z_N)


def rest_of(logits_NV: Tensor, ids: RowIds, temperature: float) -> Tensor:
    """LSE of logits / temperature over the tokens outside `ids`, [N]; −inf where there are none."""
    rest_NV = (logits_NV / temperature).scatter(1, ids.ids_NE, -math.inf)
    top_N1 = rest_NV.amax(1, keepdim=True).clamp_min(_LOWEST)
    return (rest_NV - top_N1).exp().sum(1).log() + top_N1[:, 0]


def split_logits(logits_NV: Tensor, ids: RowIds, temperature: float = 1.0) -> Split:
    """`split` of whole logits [N, V], differentiable; for evaluation and reference."""
    return split(logits_NV.gather(1, ids.ids_NE), rest_of(logits_NV, ids, temperature), ids, temperature)
