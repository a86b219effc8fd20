"""The teachers' work, seen from the driver as a stream of summaries: a few hundred bytes a unit and its lengths."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from distill_ray import session
from distill_ray.capture.stages import EngineFactory
from distill_ray.config import Recipe
from distill_ray.cost import ActorTime
from distill_ray.errors import DistillError, StoppedError
from distill_ray.schema import UnitSummary
from distill_ray.session import died, is_death, on_this_node
from distill_ray.storage import Storage
from distill_ray.targets import CaptureIdentity
from distill_ray.teacher import needed_resources
from distill_ray.units import Units

if TYPE_CHECKING:
    from distill_ray.capture.dataset import Captured

_POLL_S = 0.2
_READ_S = 1.0
_ENV = {
    # Ray Data asks the autoscaler for nothing by itself. By default it would ask for nodes by the pipeline's speed,
    # whatever is left to do, without the labels that teachers are pinned by, and to the very end, so that no node goes
    # before.
    "RAY_DATA_CLUSTER_AUTOSCALER": "V2",
    "RAY_DATA_CLUSTER_SCALING_UP_UTIL_THRESHOLD": "inf",
    # Until a busy head node has noticed that a teacher's process is gone, each attempt to reach it takes one of the
    # unit's few retries (seen: all four for one death). This is the first wait between two, and each doubles it.
    "RAY_task_actor_unavailable_retry_delay_base_ms": "5000",
}
TASK_CPUS = 0.25
"""CPUs that a reading or writing task asks for."""


@dataclass(frozen=True)
class Work:
    """What a capture needs; travels to its actor once."""

    recipe: Recipe
    storage: Storage
    identity: CaptureIdentity
    tokenizer: Any
    pending: Units
    engine_factory: EngineFactory
    meter: Any = None
    """Actor to which teachers post their seconds (`cost.metered`); without it nothing is known of what they hold."""


@dataclass(frozen=True)
class _Failed:
    error: DistillError


class _Held:
    """What teachers hold, seen from the driver's loop."""

    def __init__(self, work: Work, note: Callable[[str], None], hold: Callable[[Mapping[str, float]], None]):
        self._meter, self._note, self._hold = work.meter, note, hold
        needed = needed_resources(work.recipe.teacher)
        self._needed = {**needed, "CPU": needed.get("CPU", 0) + 2 * TASK_CPUS}
        self._selector = work.recipe.cluster.selector("teacher")
        self._begun = self._asked_at = time.monotonic()
        self._answer: Any = None
        self._held: Mapping[str, float] = {}
        self._waiting = True

    def look(self) -> None:
        """About once a second: what is held; and a word, once, where the cluster had no room for some seconds."""
        now = time.monotonic()
        if self._meter is None or now - self._asked_at < _READ_S:
            return
        self._asked_at = now
        # The meter answers nothing while it writes, and a store may be away for minutes: the driver goes on.
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._held, self._answer = ray.get(self._answer), None
            self._hold(self._held)
        if self._answer is None:
            self._answer = self._meter.seconds.remote()
        if self._waiting and (self._held or session.has_room(self._needed, self._selector)):
            self._waiting = False
        if self._waiting and now - self._begun > session.SAY_FULL_S:
            self._waiting = False
            self._note(f"waiting for resources: a teacher {session.describe_room(self._needed, self._selector)}")


class _Pump:
    """Iterates Ray Data in an actor, which can be ended while the teacher works.

    Threads of Ray Data in the driver would wait in Ray's core worker beyond `ray.shutdown()` and crash the process at a
    later `ray.init()` or a second after (ray-project/ray#31145).
    """

    def captured(self, work: Work) -> Iterator[Captured | _Failed]:
        from distill_ray.capture.dataset import iter_captured

        try:
            yield from iter_captured(work)
        except DistillError as error:
            yield _Failed(error)  # as a value: raised, it would arrive in Ray's wrapping


def summaries(
    work: Work,
    stop: threading.Event,
    note: Callable[[str], None] = lambda _: None,
    spend: Callable[[ActorTime], None] = lambda _: None,
    hold: Callable[[Mapping[str, float]], None] = lambda _: None,
    tick: Callable[[], None] = lambda: None,
) -> Generator[UnitSummary, None, None]:
    """Capture what is pending; yields each unit's summary once its object is written, in order of completion.

    Ray must be initialised.

    Args:
        work: what to capture.
        stop: ends it when set.
        note: called once with each thing that a teacher has to say.
        spend: called before each summary with all that the unit's teacher has spent by then.
        hold: called about once a second with the seconds that each teacher has held its resources; what it raises ends
            the capture.
        tick: called several times a second.

    Raises:
        StoppedError: `stop` was set; units already yielded are stored.
        DistillError: an error of ours in any stage, as it was raised there; a process died too often.
    """
    held = _Held(work, note, hold)
    pump: Any = ray.remote(_Pump).options(**_pump_options()).remote()
    stream = pump.captured.options(num_returns="streaming").remote(work)
    noted: set[str] = set()
    try:
        while True:
            if stop.is_set():
                raise StoppedError("capture stopped; every finished unit is kept, the same command goes on from there")
            held.look()
            tick()
            if not ray.wait([stream], timeout=_POLL_S)[0]:
                continue
            try:
                found: Any = ray.get(next(stream))
            except StopIteration:
                return
            except RayError as error:
                if not is_death(error):
                    raise
                raise died("the process that directs the capture died", error) from error
            if isinstance(found, _Failed):
                raise found.error
            for text in set(found.notes) - noted:
                note(f"teacher: {text}")
            noted.update(found.notes)
            if found.spent is not None:
                spend(found.spent)
            yield found.summary
    finally:
        ray.kill(pump)


def _pump_options() -> dict[str, Any]:
    options = on_this_node()
    env = options.get("runtime_env", {}).get("env_vars", {})
    return options | {"runtime_env": {"env_vars": _ENV | env}}
