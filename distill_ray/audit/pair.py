"""One sequence, stored and scored again, and what checks on it share.

Legend of shapes: N rows, K kept tokens, R ≥ K re-scored tokens of each row, the most likely first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill_ray.codec import Interval, Unrounded
from distill_ray.schema import TargetRows
from distill_ray.targets import StoredSequence

_ABOVE_ALL_IDS = 1 << 24
"""The codec has no room for such an id, whatever its bytes: one row's keys never run into the next one's."""


@dataclass(frozen=True)
class Difference:
    """The first thing in a sequence that is not as it should be."""

    position: int
    """Row t, the distribution over token t + 1; or token t, where `what` speaks of a token."""
    what: str


@dataclass(frozen=True)
class Pair:
    """One sequence, stored and scored again."""

    stored: StoredSequence
    decoded: TargetRows
    """What training reads."""
    bounds: Unrounded
    again: TargetRows
    """R ids a row."""
    vocab_size: int
    kept_below: int
    """Ids from it on are in no row, whatever their log-probability."""
    slack: float
    """Nats on each log-probability."""
    value_NK: np.ndarray
    """Re-scored log-probability of each stored id; of one beyond rank R the R-th, which it does not exceed."""
    found_NK: np.ndarray
    """Whether the stored id is among the R."""
    kept_NR: np.ndarray
    """Whether the re-scored id is stored."""

    @property
    def last_N1(self) -> np.ndarray:
        """The R-th re-scored log-probability."""
        return self.again.logprobs_NK[:, -1:].astype(np.float64)

    @property
    def gap_NK(self) -> np.ndarray:
        """Re-scored nats from each stored id up to the first."""
        return self.value_NK[:, :1] - self.value_NK


@dataclass(frozen=True)
class Check:
    """One thing looked at in every row."""

    bad_N: NDArray[np.bool_]
    say: Callable[[int], str]
    """A bad row → what is wrong there, with its numbers."""


def look_up(ids_NK: np.ndarray, rows: TargetRows) -> tuple[np.ndarray, np.ndarray]:
    """The rows' log-probability of each id (the last one's where it is not among them), and whether it is."""
    order_NR = np.argsort(rows.ids_NK, axis=1)
    base_N1 = np.arange(len(ids_NK))[:, None] * _ABOVE_ALL_IDS
    keys = (base_N1 + np.take_along_axis(rows.ids_NK, order_NR, 1)).ravel()
    values = np.take_along_axis(rows.logprobs_NK, order_NR, 1).ravel().astype(np.float64)
    wanted_NK = base_N1 + ids_NK
    at_NK = np.minimum(np.searchsorted(keys, wanted_NK), len(keys) - 1)
    found_NK = keys[at_NK] == wanted_NK
    return np.where(found_NK, values[at_NK], rows.logprobs_NK[:, -1:].astype(np.float64)), found_NK


def anywhere(bad_NK: np.ndarray) -> NDArray[np.bool_]:
    """[N] whether any entry of the row is True."""
    return np.logical_or.reduce(bad_NK, axis=1)


def span(interval: Interval, at: tuple[int, ...], slack: float) -> str:
    """What one stored number allows, for a message."""
    low, high = interval.low[at] - slack, interval.high[at] + slack
    return f"the stored bytes and ± {slack:g} allow {low:.4f} to {high:.4f}"
