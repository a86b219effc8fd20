"""Target rows as 32-bit words: how they lie in a worker and travel to the front end. Pure numpy.

One row is `2 K + 4 + #T` words: K ids | K log-probabilities | log tail | actual token's log-probability | its rank |
entropy | log tail at each extra temperature. Ids and rank are int32, the others float32 bits.
"""

from __future__ import annotations

import numpy as np

from distill_ray.schema import TargetRows


def row_words(top_k: int, temperatures: tuple[float, ...]) -> int:
    """Words of one row."""
    return 2 * top_k + 4 + len(temperatures)


def rows_from_words(words_NW: np.ndarray, top_k: int, temperatures: tuple[float, ...]) -> TargetRows:
    """Sort out one sequence's words.

    Args:
        words_NW: [N, W] int32.
        top_k: K.
        temperatures: the T ≠ 1, in the order they were captured in.
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
    )
