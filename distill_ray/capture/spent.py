"""How long teachers started, worked and waited: measured in each actor, summed by the driver.

The seconds travel beside the targets and never inside them: their bytes must not depend on speed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Doing = Literal["staging", "loading", "busy", "idle"]


@dataclass(frozen=True)
class ActorTime:
    """Seconds of one teacher's actor from its construction to the end of its latest unit; together all there were."""

    actor: str
    """Name of the actor's process, made up by it."""
    staging_s: float
    """Until the weights lay on its machine."""
    loading_s: float
    """Until the engine was open."""
    busy_s: float
    """In which the engine had a unit."""
    idle_s: float
    """In which the open engine had none."""


class Stopwatch:
    """Gives every second of an actor to one of four doings. All laps but the first two are of the engine's thread.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since, self._actor = clock, clock(), uuid.uuid4().hex
        self._seconds: dict[Doing, float] = {"staging": 0.0, "loading": 0.0, "busy": 0.0, "idle": 0.0}

    def lap(self, doing: Doing) -> None:
        """What was done since the lap before."""
        now = self._clock()
        self._seconds[doing] += now - self._since
        self._since = now

    def read(self) -> ActorTime:
        """As of the latest lap."""
        return ActorTime(self._actor, **{f"{doing}_s": s for doing, s in self._seconds.items()})


class TeacherTime:
    """The sum over all actors of one command.

    Unknown, and so not in it: what an actor spent after its last finished unit (waiting for the others at the end,
    or on a unit during which it died), all of one that finished none, and what earlier commands spent.
    """

    def __init__(self) -> None:
        self._latest: dict[str, ActorTime] = {}

    def add(self, spent: ActorTime) -> None:
        """What came with a unit; units of one actor may come in any order."""
        known = self._latest.get(spent.actor)
        if known is None or known.busy_s + known.idle_s < spent.busy_s + spent.idle_s:
            self._latest[spent.actor] = spent

    @property
    def seconds(self) -> float:
        """Of all actors, whatever they did."""
        return sum(t.staging_s + t.loading_s + t.busy_s + t.idle_s for t in self._latest.values())

    def to_json(self) -> dict[str, Any]:
        """`actors`, and seconds: `start_s` (`staging_s` is a part of it), `busy_s` and `idle_s`."""
        times = self._latest.values()
        staging, loading, busy, idle = (
            round(sum(getattr(t, name) for t in times), 3) for name in ("staging_s", "loading_s", "busy_s", "idle_s")
        )
        return {
            "actors": len(times),
            "start_s": round(staging + loading, 3),
            "staging_s": staging,
            "busy_s": busy,
            "idle_s": idle,
        }
