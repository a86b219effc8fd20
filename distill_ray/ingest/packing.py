"""Packing sequences into rows of a fixed budget: best fit over a bounded window of the given order."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

_OPEN_PACKS = 64
"""Partly filled packs carried from one window to the next."""
_ID_BITS = 40


def pack_lengths(lengths_S: np.ndarray, budget: int, window: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Put every sequence whole into exactly one pack.

    Within a window of the given order the longest goes first, each into the pack it fills best; a few open packs
    carry over to the next window. So the fill is near the best possible while a pack stays a local sample of the
    order, and the result depends on nothing but the arguments.

    Args:
        lengths_S: [S] tokens of each sequence, 1 … budget.
        budget: tokens of one pack.
        window: sequences sorted together.

    Returns:
        (order [S], offsets [P + 1]): pack p holds the sequences order[offsets[p] : offsets[p + 1]].

    Raises:
        ValueError: a sequence longer than the budget, or shorter than 1.
    """
    lengths_S = np.asarray(lengths_S, dtype=np.int64)
    if len(lengths_S) and not (lengths_S.min() >= 1 and lengths_S.max() <= budget):
        raise ValueError(
            f"lengths {lengths_S.min()} … {lengths_S.max()} do not fit packs of {budget} tokens; "
            "raise train.pack_tokens"
        )
    pack_of_S = np.empty(len(lengths_S), dtype=np.int64)
    open_packs: list[int] = []  # room << _ID_BITS | pack, ascending
    packs = 0
    for start in range(0, len(lengths_S), window):
        part = lengths_S[start : start + window]
        longest_first = np.argsort(-part, kind="stable")
        chosen: list[int] = []
        for length in part[longest_first].tolist():
            at = bisect_left(open_packs, length << _ID_BITS)
            if at < len(open_packs):
                room, pack = divmod(open_packs.pop(at), 1 << _ID_BITS)
            else:
                room, pack, packs = budget, packs, packs + 1
            chosen.append(pack)
            if room > length:
                insort(open_packs, (room - length) << _ID_BITS | pack)
        pack_of_S[start + longest_first] = chosen
        del open_packs[: max(0, len(open_packs) - _OPEN_PACKS)]  # the fullest are closed
    order = np.argsort(pack_of_S, kind="stable")
    counts = np.bincount(pack_of_S, minlength=packs) if packs else np.zeros(0, dtype=np.int64)
    return order, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
