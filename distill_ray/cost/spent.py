"""How long processes that hold devices started, worked and waited: measured in each, summed for a command.

The seconds travel beside the targets and never inside them: their bytes must not depend on speed.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Doing = Literal["staging", "loading", "busy", "idle"]

UNLABELLED = "local"
"""Node type of a node that has no label `ray.io/node-group`."""


@dataclass(frozen=True)
class ActorTime:
    """Seconds of one process (a teacher's actor, a training worker, the scorer) since its code began to run."""

    actor: str
    """Name of the process, made up by it."""
    staging_s: float
    """Until the weights lay on its machine."""
    loading_s: float
    """Until the engine was open."""
    busy_s: float
    """In which it had work."""
    idle_s: float
    """In which it was ready and had none."""
    node_type: str = UNLABELLED
    """Of its node."""
    done: int = 0
    """Units, steps or batches that it has finished."""
    tokens: int = 0
    """In them."""

    @property
    def seconds(self) -> float:
        """Whatever it did."""
        return self.staging_s + self.loading_s + self.busy_s + self.idle_s


class Stopwatch:
    """Gives every second of a process to one of four doings, the first of which is staging. Any thread may read it.

    Args:
        clock: seconds, never going back.
        node_type: of the process's node.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, node_type: str = UNLABELLED) -> None:
        self._clock, self._since, self._actor, self._node_type = clock, clock(), uuid.uuid4().hex, node_type
        self._seconds: dict[Doing, float] = {"staging": 0.0, "loading": 0.0, "busy": 0.0, "idle": 0.0}
        self._doing: Doing = "staging"
        self._done = self._tokens = 0
        self._lock = threading.Lock()

    def enter(self, doing: Doing) -> None:
        """What is done from now on."""
        with self._lock:
            self._lap()
            self._doing = doing

    def did(self, done: int, tokens: int) -> None:
        """Work is finished."""
        with self._lock:
            self._done += done
            self._tokens += tokens

    def read(self) -> ActorTime:
        """As of now."""
        with self._lock:
            self._lap()
            seconds = {f"{doing}_s": s for doing, s in self._seconds.items()}
            return ActorTime(self._actor, **seconds, node_type=self._node_type, done=self._done, tokens=self._tokens)

    def _lap(self) -> None:
        now = self._clock()
        self._seconds[self._doing] += now - self._since
        self._since = now


class TimeSum:
    """The sum over all processes of one command, each at its latest."""

    def __init__(self) -> None:
        self._latest: dict[str, ActorTime] = {}

    def add(self, spent: ActorTime) -> None:
        """What a process has spent by now; news of one process may come in any order."""
        known = self._latest.get(spent.actor)
        if known is None or known.seconds <= spent.seconds:
            self._latest[spent.actor] = spent

    @property
    def latest(self) -> Iterable[ActorTime]:
        """One of each process."""
        return self._latest.values()

    @property
    def seconds(self) -> float:
        """Of all processes, whatever they did."""
        return sum(t.seconds for t in self._latest.values())

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
