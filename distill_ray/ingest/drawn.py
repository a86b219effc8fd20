"""Tokens drawn from the teacher at a micro-batch's supervised rows, from ragged columns to padded tensors.

Legend of shapes: N rows, M the most distinct ids that one of them drew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from distill_ray import targets
from distill_ray.losses import SparseTargets, drawn_targets, head_tail_targets
from distill_ray.schema import Draws
from distill_ray.targets import StoredDraws


@dataclass(frozen=True)
class PaddedDraws:
    """N rows; unused slots hold id 0 with count 0 and log-probability 0."""

    ids_NM: np.ndarray
    """int64."""
    counts_NM: np.ndarray
    """int64."""
    logprobs_NM: np.ndarray
    """float32, T = 1."""

    def targets(self, head: SparseTargets, draws_from: str) -> SparseTargets:
        """What the loss takes, at the temperature of `head`, which must be that of the draws.

        Args:
            head: the exact top k of the same rows.
            draws_from: "all" for `sampled`, "tail" for `head_tail`.
        """
        ids_NM, counts_NM, logprobs_NM = map(torch.from_numpy, (self.ids_NM, self.counts_NM, self.logprobs_NM))
        at_T = None
        if head.logprobs_T is not None:
            # log p_T = log p / T − a_T, and a_T from a kept token's log-probability at both.
            normaliser_N1 = head.logprobs_NK[:, :1] / head.temperature - head.logprobs_T[:, :1]
            at_T = logprobs_NM / head.temperature - normaliser_N1
        if draws_from == "tail":
            return head_tail_targets(head, ids_NM, logprobs_NM, at_T, counts_NM)
        T = head.temperature
        return drawn_targets(ids_NM, counts_NM, logprobs_NM, head.labels_N, temperature=T, logprobs_T=at_T, head=head)


@dataclass
class DrawnRows:
    """Draws of some rows of each document, gathered document by document."""

    _parts: list[Draws] = field(default_factory=list)

    def add(self, stored: StoredDraws, rows: np.ndarray) -> None:
        """The draws of `rows` [n] of one sequence."""
        offsets, distinct = targets.offsets_of(stored.distinct_N), stored.distinct_N[rows].astype(np.int64)
        within = np.arange(distinct.sum()) - np.repeat(np.cumsum(distinct) - distinct, distinct)
        at = np.repeat(offsets[rows], distinct) + within
        self._parts.append(
            targets.decode_draws(StoredDraws(stored.words_M[at], stored.logprobs_M[at], stored.distinct_N[rows]))
        )

    def padded(self) -> PaddedDraws:
        """All rows added so far, in order."""
        none = Draws(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.uint16))
        every = Draws.joined([none, *self._parts])
        distinct_N1 = every.distinct_N.astype(np.int64)[:, None]
        used_NM = np.arange(max(1, distinct_N1.max(initial=0))) < distinct_N1
        found = [np.zeros(used_NM.shape, kind) for kind in (np.int64, np.int64, np.float32)]
        for padded, flat in zip(found, (every.ids_M, every.counts_M, every.logprobs_M), strict=True):
            padded[used_NM] = flat
        return PaddedDraws(*found)
