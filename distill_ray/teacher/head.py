"""The model's output head, one vocabulary shard at a time.

The model's own `compute_logits` is called, so whatever a model does before its head (scaling of hidden states, a bias,
another head type) stays; only the step that gathers the shards is left out while capture runs. Soft-cap and scale are
element by element and are applied by vLLM after that step, to the shard.

Legend: R rows of hidden states, D model width, W columns of a shard, V real vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class UnknownEngineError(Exception):
    """This vLLM, runner or model is not laid out as the source that capture was written against."""


@dataclass(frozen=True)
class Columns:
    """Columns [start, stop) of a shard's logits hold the ids first_id, first_id + 1, …"""

    start: int
    stop: int
    first_id: int
    kept: bool = True
    """Whether these ids may be among the K of a row."""


def shard_columns(indices: Any, vocab_size: int, token_ids: int) -> list[Columns]:
    """Where the real ids of one shard lie: first its part of the base vocabulary, then of the added one.

    Each part is padded on its own in vLLM's layout, and ids from `vocab_size` on are not of the model. Where the model
    has ids that its tokenizer lacks, both parts end before these, and what they have of them follows.

    Args:
        indices: vLLM's `VocabParallelEmbeddingShardIndices` of this rank.
        vocab_size: V.
        token_ids: ids below it are the tokenizer's; at most V.
    """
    parts = (
        (0, indices.org_vocab_start_index, indices.org_vocab_end_index),
        (indices.num_org_elements_padded, indices.added_vocab_start_index, indices.added_vocab_end_index),
    )
    kept = [Columns(at, at + max(0, min(stop, token_ids) - start), start) for at, start, stop in parts]
    if token_ids == vocab_size:
        return kept
    ends = [at + max(0, min(stop, vocab_size) - start) for at, start, stop in parts]
    rows = [Columns(c.stop, end, c.first_id + c.stop - c.start, kept=False) for c, end in zip(kept, ends, strict=True)]
    return kept + rows


class ShardHead:
    """Hidden states → this rank's logits, padding columns included.

    Raises:
        UnknownEngineError: the head is not one `LogitsProcessor` over one `VocabParallelEmbedding`, or the model
            changes its logits afterwards in a way that does not act on a shard alone.
    """

    def __init__(
        self, model: Any, vocab_size: int, token_ids: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        found = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
        if len(found) != 1:
            raise UnknownEngineError(f"the model has {len(found)} logits processors, not 1")
        self._model, self._processor, self._lm_head = model, found[0], None
        probe_RD = torch.linspace(-1, 1, 3 * hidden_size, dtype=torch.float32, device=device).view(3, -1).to(dtype)
        whole_RV = model.compute_logits(probe_RD)
        try:
            own_RW = self.logits(probe_RD)
        except (IndexError, RuntimeError) as error:
            raise UnknownEngineError(f"the model's compute_logits fails on one vocabulary shard: {error}") from error
        if self._lm_head is None:
            raise UnknownEngineError("the model's compute_logits does not go through its logits processor")
        narrowest = min(found[0].org_vocab_size, self._lm_head.num_embeddings)
        if narrowest < vocab_size:
            raise UnknownEngineError(f"the head gives {narrowest} ids, the model's config states {vocab_size}")
        columns = shard_columns(self._lm_head.shard_indices, vocab_size, token_ids)
        # As many on every rank, so it goes by what none of them has.
        self.columns = columns if vocab_size > self._lm_head.org_vocab_size else columns[::2]
        self.width: int = own_RW.shape[1]
        self.tp_size: int = self._lm_head.tp_size
        self.dtype, self.device = own_RW.dtype, own_RW.device
        for c in self.columns:
            if not torch.equal(own_RW[:, c.start : c.stop], whole_RV[:, c.first_id : c.first_id + c.stop - c.start]):
                raise UnknownEngineError("one vocabulary shard of the head differs from the same ids of the whole head")

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """[R, W] logits of this rank, in the head's own type."""
        with self._ungathered():
            return self._model.compute_logits(hidden_RD)

    @contextmanager
    def _ungathered(self) -> Iterator[None]:
        # An attribute of the instance hides the class's method; sampling, outside, still gathers.
        self._processor._get_logits = self._local
        try:
            yield
        finally:
            del self._processor._get_logits

    def _local(
        self, hidden_states: torch.Tensor, lm_head: Any, embedding_bias: torch.Tensor | None, skip_gather: bool = False
    ) -> torch.Tensor:
        del skip_gather
        self._lm_head = lm_head
        return self._processor._apply_head(lm_head, hidden_states, embedding_bias)
