"""A worker's head without vLLM, tensor-parallel ranks without processes, and what draws are judged by."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from distill_ray.schema import Draws
from distill_ray.teacher.draws import DrawSpec
from distill_ray.teacher.head import Columns, ShardHead
from distill_ray.teacher.seeds import row_keys
from distill_ray.teacher.tiles import TileReducer
from distill_ray.teacher.wire import draws_from_words, row_words


@dataclass
class FakeHead:
    """A shard whose logits are a table: hidden state i is row i of it."""

    table_NW: torch.Tensor
    columns: list[Columns]
    tp_size: int = 1

    def __post_init__(self) -> None:
        self.width, self.dtype, self.device = self.table_NW.shape[1], self.table_NW.dtype, self.table_NW.device

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return self.table_NW[hidden_RD[:, 0].long()].clone()


@dataclass
class Ranks:
    """What ranks of one tensor-parallel group exchange."""

    size: int
    barrier: threading.Barrier = field(init=False)
    boxes: list[torch.Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier, self.boxes = threading.Barrier(self.size), [None] * self.size


@dataclass
class FakeGroup:
    """One rank's `GroupCoordinator`."""

    ranks: Ranks
    rank_in_group: int

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        assert tensor.is_floating_point(), "vLLM's shared memory between the ranks of a CPU gathers no integers"
        self.ranks.boxes[self.rank_in_group] = tensor
        self.ranks.barrier.wait(30)
        found = torch.cat([box for box in self.ranks.boxes if box is not None], dim)
        self.ranks.barrier.wait(30)
        return found


def padded(logits_NV: torch.Tensor, columns: list[Columns], width: int) -> torch.Tensor:
    """A shard's table: its columns of the whole, and in its padding logits that would win every row."""
    table = torch.full((len(logits_NV), width), 99.0, dtype=logits_NV.dtype)
    for c in columns:
        table[:, c.start : c.stop] = logits_NV[:, c.first_id : c.first_id + c.stop - c.start]
    return table


def reduced(
    heads: list[FakeHead],
    top_k: int,
    temperatures: tuple[float, ...],
    spec: DrawSpec,
    keys_N: np.ndarray,
    rows_N: np.ndarray | None = None,
) -> np.ndarray:
    """[N, words] of each rank, which must all be the same, by one `TileReducer` a rank."""
    rows_N = np.arange(len(heads[0].table_NW)) if rows_N is None else rows_N
    hidden = torch.arange(len(heads[0].table_NW), dtype=torch.float64)[:, None]
    ranks = Ranks(len(heads))

    def run(rank: int) -> np.ndarray:
        group = FakeGroup(ranks, rank)
        reducer = TileReducer(cast(ShardHead, heads[rank]), group, top_k, temperatures, spec)
        return reducer.reduce(hidden, rows_N, torch.zeros(len(rows_N), dtype=torch.long), keys_N).numpy()

    with ThreadPoolExecutor(len(heads)) as pool:
        found = list(pool.map(run, range(len(heads))))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    return found[0]


def draws_of(words_NW: np.ndarray, top_k: int, temperatures: tuple[float, ...]) -> Draws:
    return draws_from_words(words_NW[:, row_words(top_k, temperatures) :])


def keys(n: int, sequence: int = 1) -> np.ndarray:
    return row_keys(sequence, 0, n)


def probabilities(logits_V: torch.Tensor, top_k: int, spec: DrawSpec, token_ids: int | None = None) -> np.ndarray:
    """[V] float64: what the draws of a row must be distributed like."""
    z = logits_V.double()
    p = (z / spec.temperature).softmax(0).numpy()
    if spec.tail_only:
        best = np.lexsort((np.arange(len(p)), -z.numpy()))
        p[best[best < (token_ids or len(p))][:top_k]] = 0
    return p / p.sum()


def p_value(draws: Draws, p_V: np.ndarray) -> float:
    """Pearson's chi-square test that all draws come from `p_V`; ids expected fewer than 10 times are one class.

    Raises:
        AssertionError: an id of probability 0 was drawn.
    """
    seen_V = np.bincount(draws.ids_M, draws.counts_M, len(p_V))
    assert not seen_V[p_V == 0].any()
    want_V = p_V * seen_V.sum()
    rare = want_V < 10
    seen, want = seen_V[~rare], want_V[~rare]
    if want_V[rare].sum() > 0:
        seen, want = np.append(seen, seen_V[rare].sum()), np.append(want, want_V[rare].sum())
    assert len(want) > 5
    half = torch.tensor([len(want) - 1, float(((seen - want) ** 2 / want).sum())], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1]))
