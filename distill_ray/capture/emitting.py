"""A capture's metrics, emitted by its driver."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from distill_ray.capture.figures import Figures
from distill_ray.config import Recipe
from distill_ray.metrics import Meters
from distill_ray.schema import UnitSummary

_LOOK_S = 5.0
"""Seconds between two counts of the teachers: twice as often as Ray's agents are told."""


class CaptureMeters:
    """Follows one command's capture.

    Args:
        meters: of the stage "capture".
        recipe: with its price and its budget.
        figures: that progress shows; kept up by somebody else.
        units: of the run.
        done: of them captured before.
        teachers: counts those alive.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        meters: Meters,
        recipe: Recipe,
        figures: Figures,
        units: int,
        done: int,
        teachers: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meters, self._figures, self._done = meters, figures, done
        self._teachers, self._clock = teachers, clock
        self._looked: float | None = None
        meters.set("capture_units", units)
        meters.set("capture_units_done", done)
        self._dollars_hour = recipe.cost.teacher_gpu_hour if recipe.teacher.gpus else None
        if self._dollars_hour is not None and recipe.capture.max_gpu_hours is not None:
            meters.set("budget_dollars", self._dollars_hour * recipe.capture.max_gpu_hours)

    def unit(self, summary: UnitSummary) -> None:
        """A unit is captured, and the figures know it."""
        meters, shown, spent = self._meters, self._figures.shown(), self._figures.spent.to_json()
        self._done += 1
        meters.set("capture_units_done", self._done)
        meters.add("capture_rows", summary.rows)
        meters.add("capture_documents", len(np.unique(summary.doc_keys)))
        meters.add("capture_dead_letters", summary.dead)
        for doing in ("start", "busy", "idle"):
            meters.reach(f"teacher_{doing}_seconds", spent[f"{doing}_s"])
        if isinstance(rate := shown.get("rows_per_s"), int | float):
            meters.set("capture_rows_per_second", rate)

    def hold(self, hours: float) -> None:
        """GPU-hours that teachers have held so far, those of earlier commands too where there is a budget."""
        if self._dollars_hour is not None:
            self._meters.set("cost_dollars", self._dollars_hour * hours)

    def tick(self) -> None:
        """To be called often, also while no unit ends: looks now and then how many teachers there are, and says all."""
        now = self._clock()
        if self._looked is None or now - self._looked >= _LOOK_S:
            self._looked = now
            self._meters.set("teacher_actors", self._teachers())
            self._meters.refresh()

    def close(self) -> None:
        """The capture has ended, and its teachers with it."""
        self._meters.set("teacher_actors", 0)
        self._meters.set("capture_rows_per_second", 0.0)


def live_teachers() -> int:
    """Actors of this job's pool of teachers that are alive. Ray is connected."""
    import ray
    from ray._private import state

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return sum("(Teacher)" in actor["ActorClassName"] for actor in state.state.actor_table(None, job, "ALIVE").values())
