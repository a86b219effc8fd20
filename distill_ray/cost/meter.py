"""How the seconds of many processes come into one object: each posts its own to an actor that writes their sum.

The actor runs beside the driver and dies with it, so a SIGKILL loses what came since the last write.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distill_ray.config import Recipe
from distill_ray.cost.spent import UNLABELLED, ActorTime, Stopwatch, TimeSum
from distill_ray.cost.usage import Device, Usage, sum_by_node, write_usage
from distill_ray.errors import DistillError, LeaseLostError
from distill_ray.lease import LeaseToken
from distill_ray.session import died, on_this_node
from distill_ray.storage import Storage, StorageError

POST_EVERY_S = 2.5
"""Seconds between two posts of one process."""
STORE_EVERY_S = 5.0
"""Seconds between two writes of a stage's object."""
_CLOSE_S = 60.0


@dataclass(frozen=True)
class Held:
    """The devices that each process of a stage holds."""

    device: Device
    count: int


def held(recipe: Recipe, stage: str) -> Held:
    """GPUs, or without them processes, of one teacher, training worker or scorer."""
    teacher = recipe.teacher
    if stage in ("capture", "audit"):
        return Held("GPU" if teacher.use_gpu else "CPU process", teacher.tensor_parallel * teacher.pipeline_parallel)
    return Held("GPU" if recipe.train.use_gpu else "CPU process", 1)


class Meter:
    """The actor's class.

    Args:
        storage: the run's root.
        token: of the run's lease.
        stage: whose processes post.
        holds: each of them.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        storage: Storage,
        token: LeaseToken,
        stage: str,
        holds: Held,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._token, self._stage, self._holds, self._clock = storage, token, stage, holds, clock
        self._sum, self._stored_at = TimeSum(), -STORE_EVERY_S + clock()
        self._starts: Counter[str] = Counter()

    def post(self, spent: ActorTime) -> None:
        """What a process has spent by now."""
        self._sum.add(spent)
        if self._clock() - self._stored_at >= STORE_EVERY_S:
            self._store(ended=False)  # what hinders it is told by `close`, unless a later write succeeds

    def starting(self, actor: str) -> int:
        """An actor of Ray begins to start: how often it has begun since it was last ready."""
        self._starts[actor] += 1
        return self._starts[actor]

    def ready(self, actor: str) -> None:
        """It has started."""
        del self._starts[actor]

    def seconds(self) -> dict[str, float]:
        """Of every process that ever posted, by its name."""
        return {each.actor: each.seconds for each in self._sum.latest}

    def close(self) -> DistillError | None:
        """The stage is over; returns what hindered the last write."""
        return self._store(ended=True)

    def _store(self, *, ended: bool) -> DistillError | None:
        self._stored_at = self._clock()
        nodes = sum_by_node(self._sum.latest, self._holds.count)
        usage = Usage(self._stage, self._token.epoch, self._holds.device, self._holds.count, ended, nodes)
        try:
            write_usage(self._storage, self._token, usage)
        except (LeaseLostError, StorageError) as error:
            return error
        return None


@contextmanager
def metered(recipe: Recipe, storage: Storage, token: LeaseToken, stage: str) -> Iterator[Any]:
    """Handle of the actor while the stage runs. Ray is connected.

    Raises LeaseLostError, StorageError: what the stage spent could not be written at its end.
    """
    import ray

    meter: Any = ray.remote(Meter).options(**on_this_node()).remote(storage, token, stage, held(recipe, stage))
    try:
        yield meter
    except BaseException:
        _end(meter)  # what ended the stage is what the user has to know
        raise
    if (error := _end(meter)) is not None:
        raise error


def _end(meter: Any) -> DistillError | None:
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(meter.close.remote(), timeout=_CLOSE_S)
    except RayError as error:
        return died("the process that keeps what the command spends died", error)
    finally:
        ray.kill(meter)


class Beat:
    """Posts a process's stopwatch every few seconds, whatever the process does meanwhile.

    Args:
        watch: of this process.
        meter: handle of the actor; None: nobody wants to know.
    """

    def __init__(self, watch: Stopwatch, meter: Any) -> None:
        self._watch, self._meter, self._over = watch, meter, threading.Event()
        if meter is not None:
            threading.Thread(target=self._keep, name="usage", daemon=True).start()

    def post(self) -> None:
        """Now, beside the regular ones."""
        if self._meter is not None:
            self._meter.post.remote(self._watch.read())

    def close(self) -> None:
        """The last word, as `deliver`."""
        self._over.set()
        self.deliver()

    def deliver(self) -> None:
        """Now; on return it has arrived, unless the actor is dead, which the driver tells."""
        if self._meter is not None:
            import ray

            ray.wait([self._meter.post.remote(self._watch.read())], timeout=_CLOSE_S)

    def starting(self) -> int:
        """How often this actor's process has died while it was starting, one time after the other; 0 without a meter.

        Ray restarts such an actor for ever, and tells nobody.
        """
        if self._meter is None:
            return 0
        import ray

        begun: Any = ray.get(self._meter.starting.remote(ray.get_runtime_context().get_actor_id()))
        return begun - 1

    def ready(self) -> None:
        """This actor has started."""
        if self._meter is not None:
            import ray

            self._meter.ready.remote(ray.get_runtime_context().get_actor_id())

    def _keep(self) -> None:
        while not self._over.is_set():
            self.post()
            self._over.wait(POST_EVERY_S)


def node_type() -> str:
    """Type of this process's node, as `cost.device_hour` names it; `local` where Ray is not connected or knows none."""
    import ray

    if not ray.is_initialized():
        return UNLABELLED
    labels: Any = ray.get_runtime_context().get_node_labels()
    group = labels.get("ray.io/node-group") or UNLABELLED
    return f"{group}/spot" if labels.get("ray.io/market-type") == "spot" else group
