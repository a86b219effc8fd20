"""The teachers' work, seen from the driver as a stream of summaries: a few hundred bytes a unit and its lengths."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from distill_ray.capture.spent import ActorTime
from distill_ray.capture.stages import EngineFactory
from distill_ray.config import Recipe
from distill_ray.errors import DistillError, StoppedError
from distill_ray.schema import UnitSummary
from distill_ray.session import died, is_death, note_full, on_this_node
from distill_ray.storage import Storage
from distill_ray.targets import CaptureIdentity
from distill_ray.teacher import needed_resources
from distill_ray.units import Units

if TYPE_CHECKING:
    from distill_ray.capture.dataset import Captured

_POLL_S = 0.2
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


@dataclass(frozen=True)
class _Failed:
    error: DistillError


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
) -> Generator[UnitSummary, None, None]:
    """Capture what is pending; yields each unit's summary once its object is written, in order of completion.

    Ray must be initialised.

    Args:
        work: what to capture.
        stop: ends it when set.
        note: called once with each thing that a teacher has to say.
        spend: called before each summary with all that the unit's teacher has spent by then.

    Raises:
        StoppedError: `stop` was set; units already yielded are stored.
        DistillError: an error of ours in any stage, as it was raised there; a process died too often.
    """
    needed = needed_resources(work.recipe.teacher)
    note_full("a teacher", {**needed, "CPU": needed.get("CPU", 0) + 2 * TASK_CPUS}, note, stop)
    pump: Any = ray.remote(_Pump).options(**on_this_node()).remote()
    stream = pump.captured.options(num_returns="streaming").remote(work)
    noted: set[str] = set()
    try:
        while True:
            if stop.is_set():
                raise StoppedError("capture stopped; every finished unit is kept, the same command goes on from there")
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
