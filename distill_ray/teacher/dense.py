"""Rows from the whole distribution, in numpy and float64: the reference that shares no reduction with any engine.

Legend of shapes: N rows, R kept tokens of each, V real vocabulary.
"""

from __future__ import annotations

import numpy as np

from distill_ray.schema import TargetRows

_BLOCK = 2**24
"""Elements reduced at once: 128 MiB of float64."""


def rows_from_dense(
    logprobs_NV: np.ndarray,
    tokens: np.ndarray,
    kept: int,
    temperatures: tuple[float, ...],
    token_ids: int | None = None,
) -> TargetRows:
    """Everything a row holds.

    Args:
        logprobs_NV: log-softmax of the logits.
        tokens: [N + 1] the sequence.
        kept: R.
        temperatures: the T ≠ 1 whose log tail mass outside the R is wanted.
        token_ids: only ids below it are kept, and ranked; None: any.
    """
    n, vocab = logprobs_NV.shape
    step = max(1, _BLOCK // vocab)
    parts = [
        _block(
            logprobs_NV[a : a + step].astype(np.float64), tokens[1 + a : 1 + a + step], kept, temperatures, token_ids
        )
        for a in range(0, n, step)
    ]
    return TargetRows.joined(parts)


def _block(
    logprobs_NV: np.ndarray, next_N: np.ndarray, kept: int, temperatures: tuple[float, ...], token_ids: int | None
) -> TargetRows:
    ids_NR = np.argpartition(-logprobs_NV[:, :token_ids], kept - 1, axis=1)[:, :kept]
    values_NR = np.take_along_axis(logprobs_NV, ids_NR, 1)
    order_NR = np.lexsort((ids_NR, -values_NR), axis=1)
    ids_NR, values_NR = (np.take_along_axis(a, order_NR, 1) for a in (ids_NR, values_NR))
    actual_N1 = np.take_along_axis(logprobs_NV, next_N[:, None].astype(np.int64), 1)
    p_NV = np.exp(logprobs_NV)
    entropy_N = -(p_NV * np.where(p_NV > 0, logprobs_NV, 0.0)).sum(axis=1)
    rank_N = 1 + (logprobs_NV[:, :token_ids] > actual_N1).sum(axis=1)
    rest_NV = logprobs_NV.copy()
    np.put_along_axis(rest_NV, ids_NR, -np.inf, 1)
    return TargetRows(
        ids_NK=ids_NR.astype(np.int32),
        logprobs_NK=values_NR.astype(np.float32),
        log_tail_N=_log_share(rest_NV, logprobs_NV, 1.0),
        actual_logprob_N=actual_N1[:, 0].astype(np.float32),
        actual_rank_N=rank_N.astype(np.int32),
        entropy_N=entropy_N.astype(np.float32),
        log_tail_at={t: _log_share(rest_NV, logprobs_NV, t) for t in temperatures},
    )


def _log_share(rest_NV: np.ndarray, all_NV: np.ndarray, temperature: float) -> np.ndarray:
    """[N] float32 log of what `rest` has of softmax(z / T); −inf where it has nothing."""
    top_N1 = all_NV.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        rest_N, all_N = (np.exp((a - top_N1) / temperature).sum(axis=1) for a in (rest_NV, all_NV))
        return (np.log(rest_N) - np.log(all_N)).astype(np.float32)
