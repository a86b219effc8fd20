"""Hidden states of a step → target rows, tile by tile, on every tensor-parallel rank at once.

Across ranks go the logit of the actual next token, then K pairs and a few numbers a row, then what was drawn; never the
vocabulary.

Legend: R rows, D model width, W columns of a shard, K kept.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from distill_ray.teacher.draws import DrawSpec, OwnShard, draw_words
from distill_ray.teacher.head import ShardHead
from distill_ray.teacher.reduction import ShardRows, candidates, from_words, merge, reduce_tile, to_words
from distill_ray.teacher.scratch import Scratch
from distill_ray.teacher.wire import row_words

_TILE_BYTES = {"cpu": 2**27, "cuda": 2**28}
"""Most bytes of logits that exist at once: enough rows for each look at the head's weights, and no more, since on a GPU
they are outside vLLM's memory profile."""


class TileReducer:
    """All prompt rows of one step in one pass over the head.

    Args:
        head: this rank's shard of the head.
        group: vLLM's tensor-parallel `GroupCoordinator`.
        top_k: K.
        temperatures: the T ≠ 1.
        draws: what is drawn at every row, if anything.
    """

    def __init__(
        self,
        head: ShardHead,
        group: Any,
        top_k: int,
        temperatures: tuple[float, ...],
        draws: DrawSpec | None = None,
    ) -> None:
        self._head, self._group = head, group
        self._top_k, self._temperatures, self._draws = top_k, temperatures, draws
        self._kept = [top_k if c.kept else 0 for c in head.columns]
        most = _TILE_BYTES.get(head.device.type, _TILE_BYTES["cpu"])
        # As many rows on every rank: shards are padded to one width.
        self._rows = max(1, most // (head.width * head.dtype.itemsize))
        # A GPU's allocator keeps memory by itself.
        self._memory = Scratch(self._rows, head.width, head.dtype) if head.device.type == "cpu" else nullcontext()

    def reduce(
        self,
        hidden_ND: torch.Tensor,
        rows_R: np.ndarray,
        actual_R: torch.Tensor,
        keys_R: np.ndarray | None = None,
    ) -> torch.Tensor:
        """[R, words] int32, the rows in the layout of `wire`; the same on every rank.

        Args:
            hidden_ND: hidden states of the whole step.
            rows_R: int64 which of them are prompt rows.
            actual_R: int64 actual next token of each.
            keys_R: int64 seed of each, where there are draws.
        """
        words = row_words(self._top_k, self._temperatures, self._draws.count if self._draws else 0)
        out = torch.empty(len(rows_R), words, dtype=torch.int32, device=hidden_ND.device)
        unbroken = int(rows_R[-1] - rows_R[0]) == len(rows_R) - 1
        index_R = None if unbroken else torch.from_numpy(rows_R).to(hidden_ND.device, non_blocking=True)
        keys = None if keys_R is None else torch.from_numpy(keys_R).to(hidden_ND.device, non_blocking=True)
        for a in range(0, len(rows_R), self._rows):
            b = min(a + self._rows, len(rows_R))
            first = int(rows_R[a])
            tile_RD = hidden_ND[first : first + b - a] if index_R is None else hidden_ND[index_R[a:b]]
            with self._memory:
                logits_RW = self._head.logits(tile_RD)
            out[a:b] = self._tile(logits_RW, actual_R[a:b], None if keys is None else keys[a:b])
        return out

    def _tile(self, logits_RW: torch.Tensor, actual_R: torch.Tensor, keys_R: torch.Tensor | None) -> torch.Tensor:
        logit_R = self._actual_logit(logits_RW, actual_R)
        own = shards = [
            reduce_tile(logits_RW[:, c.start : c.stop], c.first_id, logit_R, k, self._temperatures)
            for c, k in zip(self._head.columns, self._kept, strict=True)
        ]
        if self._head.tp_size > 1:
            shards = self._gathered(shards)
        if self._draws is None or keys_R is None:
            return merge(shards, logit_R, self._temperatures)
        found = candidates(shards)
        words = merge(shards, logit_R, self._temperatures, found)
        top_logprob_R = words[:, self._top_k].contiguous().view(torch.float32)
        drawn = draw_words(
            self._draws,
            keys_R,
            shards,
            found,
            self._own_shards(logits_RW, own),
            top_logprob_R,
            self._temperatures,
            self._combined,
        )
        return torch.cat([words, drawn], 1)

    def _own_shards(self, logits_RW: torch.Tensor, rows: list[ShardRows]) -> list[OwnShard]:
        ranks = self._head.tp_size
        rank = self._group.rank_in_group if ranks > 1 else 0
        return [
            OwnShard(i * ranks + rank, logits_RW[:, c.start : c.stop], c.first_id, shard)
            for i, (c, shard) in enumerate(zip(self._head.columns, rows, strict=True))
        ]

    def _combined(self, words: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks. Gathered: not every device's all-reduce takes integers."""
        if self._head.tp_size == 1:
            return words
        return self._of_ranks(words).sum(0, dtype=torch.int32)

    def _of_ranks(self, words: torch.Tensor) -> torch.Tensor:
        """[ranks, …] int32 of every rank. They travel as float32: vLLM's shared memory on CPUs gathers no integers."""
        return self._group.all_gather(words[None].view(torch.float32), dim=0).view(torch.int32)

    def _actual_logit(self, logits_RW: torch.Tensor, actual_R: torch.Tensor) -> torch.Tensor:
        """[R] float32 logit of the actual next token, from the rank that holds it."""
        own_R = torch.full(actual_R.shape, float("-inf"), dtype=torch.float32, device=actual_R.device)
        for c in self._head.columns:
            at_R = actual_R - c.first_id
            inside_R = (at_R >= 0) & (at_R < c.stop - c.start)
            value_R = logits_RW.gather(1, torch.where(inside_R, at_R + c.start, 0)[:, None])[:, 0].float()
            own_R = torch.where(inside_R, value_R, own_R)
        if self._head.tp_size > 1:
            own_R = self._group.all_gather(own_R[None], dim=0).amax(0)
        return own_R

    def _gathered(self, shards: list[ShardRows]) -> list[ShardRows]:
        """The shards of all ranks, in ascending order of ids: base vocabularies, added ones, what is never kept."""
        own = [to_words(s) for s in shards]
        ranks = self._of_ranks(torch.cat(own, 1))
        parts = ranks.split([words.shape[1] for words in own], dim=2)
        return [from_words(one, k) for part, k in zip(parts, self._kept, strict=True) for one in part]
