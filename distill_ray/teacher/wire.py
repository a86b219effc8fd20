"""Target rows as 32-bit words: how they lie in a worker and travel to the front end. Pure numpy.

One row is `2 K + 4 + #T + 2 D` words: K ids | K log-probabilities | log tail | actual token's log-probability | its
rank | entropy | log tail at each extra temperature | D drawn ids with their counts | D log-probabilities of them. Ids
and rank are int32, a drawn id is id | count << 20, the others are float32 bits. D is the number of draws; a row with
fewer distinct ids ends in zeros, which no drawn word is.
"""

from __future__ import annotations

import numpy as np

from distill_ray.schema import COUNT_SHIFT, Draws, TargetRows


def row_words(top_k: int, temperatures: tuple[float, ...], draws: int = 0) -> int:
    """Words of one row."""
    return 2 * top_k + 4 + len(temperatures) + 2 * draws


def rows_from_words(words_NW: np.ndarray, top_k: int, temperatures: tuple[float, ...], draws: int = 0) -> TargetRows:
    """Sort out one sequence's words.

    Args:
        words_NW: [N, W] int32.
        top_k: K.
        temperatures: the T ≠ 1, in the order they were captured in.
        draws: D.
    """
    floats_NW = words_NW.view(np.float32)
    rest = 2 * top_k
    return TargetRows(
        # Views: check and codec read rows where they lie.
        ids_NK=words_NW[:, :top_k],
        logprobs_NK=floats_NW[:, top_k:rest],
        log_tail_N=floats_NW[:, rest].copy(),
        actual_logprob_N=floats_NW[:, rest + 1].copy(),
        actual_rank_N=words_NW[:, rest + 2].copy(),
        entropy_N=floats_NW[:, rest + 3].copy(),
        log_tail_at={t: floats_NW[:, rest + 4 + i].copy() for i, t in enumerate(temperatures)},
        draws=draws_from_words(words_NW[:, row_words(top_k, temperatures) :]) if draws else None,
    )


def draws_from_words(words_ND: np.ndarray) -> Draws:
    """The draws of one sequence, from the last 2 D words of its rows."""
    draws = words_ND.shape[1] // 2
    words_ND, logprobs_ND = words_ND[:, :draws].view(np.uint32), words_ND[:, draws:].view(np.float32)
    used_ND = words_ND >> np.uint32(COUNT_SHIFT) > 0
    return Draws.of_words(words_ND[used_ND], logprobs_ND[used_ND], used_ND.sum(1).astype(np.uint16))
