"""vLLM's public forms of prompt log-probabilities: built by its own code, and read into rows as fast as they allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np

from distill_ray.schema import TargetRows
from distill_ray.teacher.flat import log_tail


def public_logprobs(tensors: Any, top_k: int, *, flat: bool) -> Any:
    """What vLLM's front end makes of one request's `LogprobsTensors`: `FlatLogprobs`, or a list of dicts."""
    from vllm.logprobs import create_prompt_logprobs
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.logprobs import LogprobsProcessor

    processor = LogprobsProcessor(
        tokenizer=None,
        logprobs=None,
        prompt_logprobs=create_prompt_logprobs(flat),
        cumulative_logprob=None,
        num_logprobs=None,
        num_prompt_logprobs=top_k,
    )
    processor.update_from_output(EngineCoreOutput("bench", [], new_prompt_logprobs_tensors=tensors))
    return processor.pop_prompt_logprobs()


def rows_from_dicts(positions: Sequence[Any], tokens: np.ndarray, top_k: int, vocab_size: int) -> TargetRows:
    """Rows from vLLM's list of `{id: Logprob}`, without a loop of ours over entries.

    Args:
        positions: of one prompt; the first, of token 0, is None.
        tokens: [N + 1] the prompt.
        top_k: K.
        vocab_size: V.
    """
    dicts = positions[1:]
    counts_N = np.fromiter(map(len, dicts), np.int64, len(dicts))
    total = int(counts_N.sum())
    entries = list(chain.from_iterable(map(dict.values, dicts)))
    ids = np.fromiter(chain.from_iterable(dicts), np.int32, total)
    logprobs = np.fromiter(map(attrgetter("logprob"), entries), np.float64, total)
    ranks = np.fromiter(map(attrgetter("rank"), entries), np.int32, total)
    # The actual token comes first; where it is not among the k best it is one entry more, of a rank beyond k.
    first_N = np.cumsum(counts_N) - counts_N
    if (ids[first_N] != tokens[1:]).any():
        raise AssertionError("an entry's first token is not the prompt's next one")
    kept = ranks <= top_k
    place = np.repeat(np.arange(len(dicts)), counts_N)[kept], ranks[kept] - 1
    ids_NK, logprobs_NK = np.empty((len(dicts), top_k), np.int32), np.empty((len(dicts), top_k))
    ids_NK[place], logprobs_NK[place] = ids[kept], logprobs[kept]
    return TargetRows(
        ids_NK,
        logprobs_NK.astype(np.float32),
        log_tail(logprobs_NK, vocab_size),
        logprobs[first_N].astype(np.float32),
        ranks[first_N],
    )
