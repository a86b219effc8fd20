"""Long documents as windows in which every token is supervised exactly once."""

from __future__ import annotations

import numpy as np

from distill_ray.schema import Sequence


def windows(
    tokens: np.ndarray,
    supervised: np.ndarray,
    doc_key: int,
    window_tokens: int,
    window_overlap: int,
    opening: int = 0,
) -> list[Sequence]:
    """Cut one document into sequences of at most `window_tokens`.

    What opens the document (BOS) opens every window, as context only: a model that was trained behind it is lost
    without. A later window goes on with the last `window_overlap` tokens of the one before, as context, too. So each
    token but the opening, or the document's first, which nothing predicts, is in exactly one window's loss mask where
    `supervised` says so. A window without a supervised token is left out: it carries no target.

    Args:
        tokens: [n] int32, n ≥ 2.
        supervised: [n] bool.
        doc_key: key of the document, shared by all its windows.
        window_tokens: most tokens of a window, ≥ 2.
        window_overlap: repeated tokens, 1 … window_tokens − opening − 1.
        opening: how many of the first tokens open the document.

    Returns:
        The windows in order; each has at least 2 tokens.
    """
    found = []
    n, room = len(tokens), window_tokens - opening
    context = np.zeros(opening, bool)
    # A window that starts at n − overlap or later would hold repeated tokens only.
    for start in range(opening, max(opening + 1, n - window_overlap), room - window_overlap):
        stop = min(start + room, n)
        mask = np.concatenate([context, supervised[start:stop]])
        mask[: opening + window_overlap if start > opening else max(1, opening)] = False
        if mask.any():
            kept = np.concatenate([tokens[:opening], tokens[start:stop]]).astype(np.int32)
            found.append(Sequence(kept, mask, doc_key))
    return found
