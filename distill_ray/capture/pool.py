"""The teachers' work, seen from the driver as a stream of summaries: a few hundred bytes a unit and its lengths."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from distill_ray.capture.stages import EngineFactory
from distill_ray.config import Recipe
from distill_ray.errors import DistillError, StoppedError
from distill_ray.schema import Unit, UnitSummary
from distill_ray.session import on_this_node
from distill_ray.storage import Storage
from distill_ray.targets import CaptureIdentity

_POLL_S = 0.2


@dataclass(frozen=True)
class _Failed:
    error: DistillError


class _Pump:
    """Iterates Ray Data in an actor, which can be ended while the teacher works.

    Threads of Ray Data in the driver would wait in Ray's core worker beyond `ray.shutdown()` and crash the process at a
    later `ray.init()` or a second after (ray-project/ray#31145).
    """

    def summaries(self, *args: Any) -> Iterator[UnitSummary | _Failed]:
        from distill_ray.capture.dataset import iter_summaries

        try:
            yield from iter_summaries(*args)
        except DistillError as error:
            yield _Failed(error)  # as a value: raised, it would arrive in Ray's wrapping


def summaries(
    recipe: Recipe,
    storage: Storage,
    identity: CaptureIdentity,
    tokenizer: Any,
    pending: list[Unit],
    engine_factory: EngineFactory,
    stop: threading.Event,
) -> Generator[UnitSummary, None, None]:
    """Capture `pending`; yields each unit's summary once its object is written, in order of completion.

    Ray must be initialised.

    Raises:
        StoppedError: `stop` was set; units already yielded are stored.
        DistillError: an error of ours in any stage, as it was raised there.
    """
    pump: Any = ray.remote(_Pump).options(**on_this_node()).remote()
    method = pump.summaries.options(num_returns="streaming")
    stream = method.remote(recipe, storage, identity, tokenizer, pending, engine_factory)
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
            if isinstance(found, _Failed):
                raise found.error
            yield found
    finally:
        ray.kill(pump)
