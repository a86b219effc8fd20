"""Target objects, fetched whole once and kept within a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from distill_ray.ingest.plan import PlanUnit


class StoredSequence(Protocol):
    """A sequence and its encoded target rows, N = n − 1."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def loss_mask(self) -> np.ndarray: ...
    @property
    def packed_NB(self) -> np.ndarray: ...
    @property
    def actual_logprob_N(self) -> np.ndarray: ...
    @property
    def actual_rank_N(self) -> np.ndarray: ...
    @property
    def log_tail_at(self) -> dict[float, np.ndarray]: ...


class UnitTargets(Protocol):
    def sequence(self, i: int) -> StoredSequence: ...


class UnitCache:
    """The units used last, least recently used out first.

    Args:
        fetch: (unit) → its verified targets; called once for each unit that is not held.
        units: the units of the plan, whose object sizes the bound counts.
        max_bytes: bound on the objects held; one unit is always kept, however large.
    """

    def __init__(
        self, fetch: Callable[[PlanUnit], UnitTargets], units: Iterable[PlanUnit], max_bytes: int = 2 * 2**30
    ) -> None:
        self._fetch = fetch
        self._units = {u.hash: u for u in units}
        self._max_bytes = max_bytes
        self._held: OrderedDict[str, UnitTargets] = OrderedDict()
        self._bytes = 0
        self.fetched = 0
        """Fetches so far; more than the number of units means that the bound is too small."""

    def get(self, unit: str) -> UnitTargets:
        """The unit's targets. Raises what `fetch` raises."""
        if unit in self._held:
            self._held.move_to_end(unit)
            return self._held[unit]
        size = self._units[unit].bytes
        while self._held and self._bytes + size > self._max_bytes:
            out, _ = self._held.popitem(last=False)
            self._bytes -= self._units[out].bytes
        found = self._fetch(self._units[unit])
        self._held[unit] = found
        self._bytes += size
        self.fetched += 1
        return found
