"""Long documents as windows in which every token is supervised exactly once."""

from __future__ import annotations

import numpy as np

from distill_ray.schema import Sequence


def windows(
    tokens: np.ndarray, supervised: np.ndarray, doc_key: int, window_tokens: int, window_overlap: int
) -> list[Sequence]:
    """Cut one document into sequences of at most `window_tokens`.

    A later window begins with the last `window_overlap` tokens of the one before, as context only. So each token but
    the document's first, which nothing predicts, is in exactly one window's loss mask where `supervised` says so. A
    window without a supervised token is left out: it carries no target.

    Args:
        tokens: [n] int32, n ≥ 2.
        supervised: [n] bool.
        doc_key: key of the document, shared by all its windows.
        window_tokens: most tokens of a window, ≥ 2.
        window_overlap: repeated tokens, 1 … window_tokens − 1.

    Returns:
        The windows in order; each has at least 2 tokens.
    """
    found = []
    n, step = len(tokens), window_tokens - window_overlap
    # A window that starts at n − overlap or later would hold repeated tokens only.
    for start in range(0, max(1, n - window_overlap), step):
        stop = min(start + window_tokens, n)
        mask = supervised[start:stop].copy()
        mask[: window_overlap if start else 1] = False
        if mask.any():
            found.append(Sequence(tokens[start:stop].astype(np.int32), mask, doc_key))
    return found
