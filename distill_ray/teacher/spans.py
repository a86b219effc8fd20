"""Which rows of a step's hidden states are prompt rows, and of what: for vLLM's two model runners.

Row t of a sequence speaks of token t + 1, so a prompt of n tokens has n − 1 rows; the hidden state of its last token is
for sampling. A preempted prompt is computed again from the start: its rows come a second time, at the same positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distill_ray.teacher.seeds import hash_in_name, row_keys


@dataclass(frozen=True)
class Span:
    """Consecutive prompt rows of one request in one step."""

    request: str
    offset: int
    """First of them in the step's hidden states."""
    start: int
    """First of them in the sequence."""
    count: int
    total: int
    """Rows of the whole sequence, n − 1."""


def spans_v1(runner: Any, num_scheduled_tokens: dict[str, int]) -> list[Span]:
    """Of `GPUModelRunner` (V1; CPUs have it too). Requests whose prompt ends in this step leave the runner's list."""
    spans, done = list[Span](), list[str]()
    for request in runner.num_prompt_logprobs:
        scheduled = num_scheduled_tokens.get(request)
        if scheduled is None:  # preempted, or waiting for its next chunk
            continue
        state = runner.requests[request]
        start, total = state.num_computed_tokens, len(state.prompt_token_ids) - 1
        if start + scheduled > total:
            done.append(request)
        if (count := min(scheduled, total - start)) > 0:
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request]])
            spans.append(Span(request, offset, start, count, total))
    for request in done:
        del runner.num_prompt_logprobs[request]
    return spans


def actual_v1(runner: Any, spans: list[Span]) -> torch.Tensor:
    """[R] int64 next tokens of the rows of all spans, in order."""
    batch = runner.input_batch
    parts = [batch.token_ids_cpu[batch.req_id_to_index[s.request], s.start + 1 : s.start + 1 + s.count] for s in spans]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(runner.device, non_blocking=True)


def spans_v2(uses_prompt_logprobs: np.ndarray, batch: Any, prompt_lens: np.ndarray) -> list[Span]:
    """Of `vllm.v1.worker.gpu.model_runner.GPUModelRunner` (V2, the default on CUDA).

    Args:
        uses_prompt_logprobs: [slots] bool.
        batch: the step's `InputBatch`.
        prompt_lens: [slots] prompt tokens.
    """
    spans = list[Span]()
    for i, request in enumerate(batch.req_ids):
        slot = batch.idx_mapping_np[i]
        start, total = int(batch.num_computed_prefill_tokens_np[i]), int(prompt_lens[slot]) - 1
        # A request resumed with generated tokens had all its prompt rows before it was preempted.
        resumed = int(prompt_lens[slot]) < int(batch.prefill_len_np[i])
        count = min(int(batch.num_scheduled_tokens[i]), total - start)
        if uses_prompt_logprobs[slot] and not resumed and count > 0:
            spans.append(Span(request, int(batch.query_start_loc_np[i]), start, count, total))
    return spans


def actual_v2(spans: list[Span], batch: Any, all_token_ids: torch.Tensor) -> torch.Tensor:
    """[R] int64 next tokens of the rows of all spans, in order, from the runner's [slots, tokens] table."""
    slot_of = dict(zip(batch.req_ids, batch.idx_mapping_np, strict=True))
    slots = np.concatenate([np.full(s.count, slot_of[s.request], np.int64) for s in spans])
    columns = np.concatenate([np.arange(s.start + 1, s.start + 1 + s.count, dtype=np.int64) for s in spans])
    at = torch.from_numpy(np.stack([slots, columns])).to(all_token_ids.device, non_blocking=True)
    return all_token_ids[at[0], at[1]].long()


def rows_of(spans: list[Span]) -> np.ndarray:
    """[R] int64 rows of the step's hidden states, in the spans' order."""
    return np.concatenate([np.arange(s.offset, s.offset + s.count, dtype=np.int64) for s in spans])


def keys_of(spans: list[Span]) -> np.ndarray:
    """[R] int64 seeds of the rows of all spans, in order, from the requests' names."""
    return np.concatenate([row_keys(hash_in_name(s.request), s.start, s.count) for s in spans])
