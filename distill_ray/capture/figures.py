"""What a capture's progress shows beside its units."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from distill_ray.config import Recipe
from distill_ray.cost import TimeSum
from distill_ray.schema import UnitSummary
from distill_ray.telemetry import Pace, Value
from distill_ray.units import HASH, Units


class Figures:
    """Running figures of one command's capture; `spent` takes the teachers' times.

    Args:
        recipe: with its prices.
        pending: the units to capture.
        clock: seconds, never going back.
    """

    def __init__(self, recipe: Recipe, pending: Units, clock: Callable[[], float] = time.monotonic) -> None:
        self.spent = TimeSum()
        self.bytes_left = int(pending.rows["bytes"].sum())
        """Source bytes of what is not captured yet."""
        self.tokens = 0
        """Captured so far."""
        self._pending, self._clock = pending, clock
        self._rows, self._bytes, self._pace = 0, 0, Pace(None, clock())
        price = recipe.cost.teacher_gpu_hour
        self._dollars_hour = None if price is None else price * recipe.teacher.gpus

    def add(self, summary: UnitSummary) -> int:
        """A unit is captured; returns its source bytes."""
        place = np.searchsorted(self._pending.hashes, np.array(summary.unit.encode(), HASH))
        size = int(self._pending.rows["bytes"][place])
        self.bytes_left -= size
        self._bytes += size
        self._rows += summary.rows
        self.tokens += int(summary.lengths.sum())
        self._pace.add(summary.rows, self._clock())
        return size

    def shown(self) -> dict[str, Value]:
        """Rows/s of all teachers together, rows left as bytes left × rows a byte so far, the teachers' hours, the
        share of their working time that they waited, the seconds that their starts took, and dollars where the recipe
        states a price."""
        spent, hours = self.spent.to_json(), self.spent.seconds / 3600
        working = spent["busy_s"] + spent["idle_s"]
        found: dict[str, Value] = {
            "rows_per_s": _rounded(self._pace.rate, 1),
            "rows_left": round(self._rows / self._bytes * self.bytes_left) if self._bytes else None,
            "teacher_hours": round(hours, 4),
            "teacher_start_s": spent["start_s"],
            "teacher_idle_share": round(spent["idle_s"] / working, 4) if working else None,
            "teacher_dollars": None if self._dollars_hour is None else round(hours * self._dollars_hour, 2),
        }
        return {name: value for name, value in found.items() if value is not None}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
