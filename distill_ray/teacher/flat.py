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
    kept_below: int | None = None,
) -> TargetRows | None:
    """Sort out one prompt's entries.

    vLLM gives m + 1 entries a row: first the actual next token with its rank over the vocabulary, then ranks 1 … m.
    The first is always an extra: it repeats one of the others when the token is among the m best, and is an (m+1)th
    entry when it is not. So the kept set is of the entries 1 … m and never of the first m entries.

    Args:
        token_ids: [N·(m+1)] ids, as stored in `FlatLogprobs.token_ids`; m ≥ K.
        logprobs: [N·(m+1)] log-probabilities, T = 1.
        ranks: [N·(m+1)] ranks, the best being 1.
        tokens: [N+1] the prompt.
        top_k: K.
        vocab_size: V.
        kept_below: only ids below it are kept; None: any.

    Returns:
        The rows; None where one of them has fewer than K such ids among its m.

    Raises:
        IntegrityError: the arrays do not have that layout (another vLLM version?), so nothing can be trusted.
    """
    n_rows = len(tokens) - 1
    m = len(token_ids) // max(1, n_rows) - 1
    if m < top_k or not len(token_ids) == len(logprobs) == len(ranks) == n_rows * (m + 1):
        raise IntegrityError(
            f"vLLM returned {len(token_ids)} prompt log-probabilities for {n_rows} rows of top_k={top_k}; expected "
            f"{n_rows * (top_k + 1)} or more, as many of each. Use the vLLM version of the project's lock file"
        )
    ids = np.asarray(token_ids, np.int32).reshape(n_rows, m + 1)
    values = np.asarray(logprobs, np.float64).reshape(n_rows, m + 1)
    rank = np.asarray(ranks, np.int32).reshape(n_rows, m + 1)
    if (ids[:, 0] != tokens[1:]).any() or (rank[:, 1:] != np.arange(1, m + 1)).any():
        raise IntegrityError(
            "vLLM's prompt log-probabilities are not laid out as actual token, rank 1 … k; use the vLLM version of the "
            "project's lock file"
        )
    listed_ids, listed = _rank_order(ids[:, 1:], values[:, 1:])
    last_NM = np.zeros(listed.shape, bool) if kept_below is None else listed_ids >= kept_below
    if (m - last_NM.sum(axis=1) < top_k).any():
        return None
    order = np.argsort(last_NM, axis=1, kind="stable")
    (kept_ids, _), (kept, others) = (
        np.split(np.take_along_axis(a, order, 1), [top_k], axis=1) for a in (listed_ids, listed)
    )
    return TargetRows(
        ids_NK=kept_ids,
        logprobs_NK=kept.astype(np.float32),
        log_tail_N=log_tail(kept, vocab_size, others),
        actual_logprob_N=values[:, 0].astype(np.float32),
        actual_rank_N=_actual_rank(ids[:, 0], rank[:, 0], values[:, 0], listed_ids, listed, last_NM),
    )


def log_tail(logprobs_NK: np.ndarray, vocab_size: int, others_NM: np.ndarray | None = None) -> np.ndarray:
    """[N] float32 log(1 − P) from the log-probabilities of the kept ids and, where they are known, of the next M.

    The subtraction cancels: 1 − Σp is noise below ~1e-7 and may come out negative. It is therefore held between that
    resolution and the one exact bound at hand: none of the V − K − M tokens outside is likelier than the least known,
    so the tail is at most the others' mass and so many times that one's. With V = K it is exactly zero, log −inf.
    """
    kept = logprobs_NK.astype(np.float64)
    others = kept[:, :0] if others_NM is None else others_NM.astype(np.float64)
    known = np.concatenate([kept, others], axis=1)
    outside = vocab_size - known.shape[1]
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1.0 - np.exp(kept).sum(axis=1), MASS_RESOLUTION))
        unknown = np.log(float(outside)) + known.min(axis=1)
        mass = np.logaddexp.reduce(others, axis=1, initial=-np.inf)
        return np.clip(tail, mass, np.logaddexp(mass, unknown)).astype(np.float32)


def _rank_order(ids_NK: np.ndarray, values_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most likely first; equal values by ascending id, so that two captures agree (bfloat16 heads tie often)."""
    order = np.lexsort((ids_NK, -values_NK), axis=1)
    return np.take_along_axis(ids_NK, order, 1), np.take_along_axis(values_NK, order, 1)


def _actual_rank(
    actual_N: np.ndarray,
    rank_N: np.ndarray,
    value_N: np.ndarray,
    ids_NM: np.ndarray,
    values_NM: np.ndarray,
    last_NM: np.ndarray,
) -> np.ndarray:
    """Rank as 1 + the number of strictly likelier ids that may be kept.

    vLLM counts ≥, so with ties its rank is that of the last of the equals and may exceed k for a kept token, and it
    counts all ids. For listed tokens it is counted anew; for others only vLLM's figure is known, which lacks no more
    than what is listed of ids that may not be kept.
    """
    listed = (ids_NM == actual_N[:, None]).any(axis=1)
    anew_N = 1 + ((values_NM > value_N[:, None]) & ~last_NM).sum(axis=1)
    return np.where(listed, anew_N, rank_N - last_NM.sum(axis=1)).astype(np.int32)
