"""What a stored number can have been before it was rounded: exact intervals, from the format's own table and float16.

Legend of shapes: N rows, K kept tokens (k), V real vocabulary, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_ray.codec.format import HEAD, LOG_FLOOR, MAX_GAP, check_packed_shape

_EDGES = MAX_GAP * ((np.arange(257) - 0.5) / 255.0) ** 2
"""q came from a gap between `_EDGES[q]` and `_EDGES[q + 1]`: q = round(255·√(Δ/24)) turned round."""
_EDGES[0] = 0.0
_EDGES[256] = np.inf  # clipped: at q = 255 a gap of 23.9 and one of 60 are the same


@dataclass(frozen=True)
class Interval:
    """Elementwise bounds, float64, both inclusive."""

    low: np.ndarray
    high: np.ndarray

    def distance(self, values: np.ndarray, slack: float | np.ndarray = 0.0) -> np.ndarray:
        """How far each value lies outside the interval widened by `slack`; 0 inside, NaN for NaN."""
        return np.maximum(np.maximum(self.low - values, values - self.high) - slack, 0.0)


@dataclass(frozen=True)
class Unrounded:
    """Bounds on what was packed into each row."""

    top_N: Interval
    """Log-probability of the first id."""
    gap_NK: Interval
    """Nats from each kept log-probability up to the first; no upper bound where it was clipped."""
    log_tail_N: Interval


def unrounded_half(stored: np.ndarray) -> Interval:
    """Bounds on the numbers that float16 `stored` came from: half a step to either side."""
    exact = stored.astype(np.float64)
    below, above = (np.nextafter(stored, np.float16(to)).astype(np.float64) for to in (-np.inf, np.inf))
    return Interval((exact + below) / 2, (exact + above) / 2)


def unrounded_log(stored: np.ndarray) -> Interval:
    """The same for logarithms of masses, which were held between LOG_FLOOR and 0."""
    interval = unrounded_half(stored)
    low = np.where(stored <= LOG_FLOOR, -np.inf, interval.low)
    return Interval(low, np.where(stored >= 0, np.inf, interval.high))


def unrounded(packed_NB: np.ndarray, k: int, vocab_size: int) -> Unrounded:
    """Bounds on the rows that pack to these bytes.

    Half a step of q is 24·(q + ¼)/255² nats: 4e-4·q, so 0.006 at a gap of 0.1 nats, 0.02 at 1, 0.09 at 24.

    Args:
        packed_NB: uint8 [N, row_bytes(k, V)].
        k: kept tokens per row.
        vocab_size: V at encoding.

    Raises:
        IntegrityError: the stride is not that of (k, V).
    """
    check_packed_shape(packed_NB, k, vocab_size)
    head_N2 = np.ascontiguousarray(packed_NB[:, :HEAD]).view("<f2")
    q_NK = packed_NB[:, HEAD : HEAD + k].astype(np.intp)
    return Unrounded(
        unrounded_log(head_N2[:, 0]), Interval(_EDGES[q_NK], _EDGES[q_NK + 1]), unrounded_log(head_N2[:, 1])
    )
