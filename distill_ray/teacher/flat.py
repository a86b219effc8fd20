"""vLLM's flat prompt log-probabilities → target rows. Pure numpy, so tests reach it without vLLM.

Legend: N rows, K kept, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from distill_ray.errors import IntegrityError
from distill_ray.schema import TargetRows

MASS_RESOLUTION = 1e-7
"""1 − Σp is known no better than this from float32 log-probabilities."""


def rows_from_flat(
    token_ids: np.ndarray,
    logprobs: np.ndarray,
    ranks: np.ndarray,
    tokens: np.ndarray,
    top_k: int,
    vocab_size: int,
) -> TargetRows:
    """Sort out one prompt's entries.

    vLLM gives k + 1 entries a row: first the actual next token with its rank over the vocabulary, then ranks 1 … k.
    The first is always an extra: it repeats one of the others when the token is among the k best, and is a (k+1)th
    entry when it is not. So the kept set is the entries 1 … k and never the first k entries.

    Args:
        token_ids: [N·(k+1)] ids, as stored in `FlatLogprobs.token_ids`.
        logprobs: [N·(k+1)] log-probabilities, T = 1.
        ranks: [N·(k+1)] ranks, the best being 1.
        tokens: [N+1] the prompt.
        top_k: K.
        vocab_size: V.

    Raises:
        IntegrityError: the arrays do not have that layout (another vLLM version?), so nothing can be trusted.
    """
    n_rows = len(tokens) - 1
    shape = (n_rows, top_k + 1)
    if not len(token_ids) == len(logprobs) == len(ranks) == n_rows * (top_k + 1):
        raise IntegrityError(
            f"vLLM returned {len(token_ids)} prompt log-probabilities for {n_rows} rows of top_k={top_k}; expected "
            f"{n_rows * (top_k + 1)}. Use the vLLM version of the project's lock file"
        )
    ids = np.asarray(token_ids, np.int32).reshape(shape)
    values = np.asarray(logprobs, np.float64).reshape(shape)
    rank = np.asarray(ranks, np.int32).reshape(shape)
    if (ids[:, 0] != tokens[1:]).any() or (rank[:, 1:] != np.arange(1, top_k + 1)).any():
        raise IntegrityError(
            "vLLM's prompt log-probabilities are not laid out as actual token, rank 1 … k; use the vLLM version of the "
            "project's lock file"
        )
    kept_ids, kept = _rank_order(ids[:, 1:], values[:, 1:])
    return TargetRows(
        ids_NK=kept_ids,
        logprobs_NK=kept.astype(np.float32),
        log_tail_N=log_tail(kept, vocab_size),
        actual_logprob_N=values[:, 0].astype(np.float32),
        actual_rank_N=_actual_rank(ids[:, 0], rank[:, 0], values[:, 0], kept_ids, kept),
    )


def log_tail(logprobs_NK: np.ndarray, vocab_size: int) -> np.ndarray:
    """[N] float32 log(1 − P) from the kept log-probabilities alone.

    The subtraction cancels: 1 − Σp is noise below ~1e-7 and may come out negative. It is therefore held between that
    resolution and the one exact bound at hand: no token outside the K best is likelier than the last of them, so the
    tail is at most (V − K)·p_K. With V = K it is exactly zero, log −inf.
    """
    kept = logprobs_NK.astype(np.float64)
    tail = np.maximum(1.0 - np.exp(kept).sum(axis=1), MASS_RESOLUTION)
    outside = vocab_size - kept.shape[1]
    with np.errstate(divide="ignore"):
        return np.minimum(np.log(tail), np.log(float(outside)) + kept[:, -1]).astype(np.float32)


def _rank_order(ids_NK: np.ndarray, values_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most likely first; equal values by ascending id, so that two captures agree (bfloat16 heads tie often)."""
    order = np.lexsort((ids_NK, -values_NK), axis=1)
    return np.take_along_axis(ids_NK, order, 1), np.take_along_axis(values_NK, order, 1)


def _actual_rank(
    actual_N: np.ndarray, rank_N: np.ndarray, value_N: np.ndarray, ids_NK: np.ndarray, values_NK: np.ndarray
) -> np.ndarray:
    """Rank as 1 + the number of strictly likelier tokens.

    vLLM counts ≥, so with ties its rank is that of the last of the equals and may exceed k for a kept token. For kept
    tokens it is counted anew; outside the k best only vLLM's figure is known.
    """
    kept = (ids_NK == actual_N[:, None]).any(axis=1)
    return np.where(kept, 1 + (values_NK > value_N[:, None]).sum(axis=1), rank_N).astype(np.int32)
