"""What Ray Train's controller asks of us: a lost group's next size, and whether one that ended is to go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo

from distill_ray.config.student import TrainSection
from distill_ray.train.placement import room
from distill_ray.train.preemption import LEFT

_LOOK_S = 0.5
_PATIENCE_S = 60.0
"""Seconds beyond the settling time; then Ray Train tries, waits and asks again, which ends by its own limits."""


class Leave(WorkerGroupCallback):
    """A group that returned `LEFT` is started again, on the budget of preemptions."""

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Raises PreemptionError once all workers of such a group have returned."""
        statuses = worker_group_status.worker_statuses.values()
        if worker_group_status.finished and all(s.return_value == LEFT and not s.error for s in statuses):
            raise PreemptionError(worker_group_status.get_preemption_info() or PreemptionInfo(None, {}))


class Settle(ControllerCallback, WorkerGroupCallback):
    """Gives an elastic group the size that there is room for, once nodes have stopped coming and going.

    Ray Train 2.60 by itself starts a group again at once, with as many workers as its count of nodes says. That count
    is up to 20 s old and includes nodes that are being drained, so a lost node would be counted, the group would wait
    a minute for it, and every node of a wave would cost a restart and a conversion of the checkpoint. Hence this,
    which is called right before a group is started. Ray Train's resizing of a running group is off: it kills the
    workers wherever they are, and all steps since the last checkpoint with them.
    """

    def __init__(self, train: TrainSection, selector: Mapping[str, str], board: Any) -> None:
        self._train, self._selector, self._board = train, selector, board
        self._held: Counter[str] = Counter()
        self._workers: int | None = None
        self._started = 0.0
        self._room_since: float | None = None

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Wait until nodes have settled; then correct the number of workers."""
        workers, settled_s = self._settled()
        self._board.size.remote()
        if self._workers is not None:
            text = f"the worker group is started again with {workers} workers (before: {self._workers})"
            self._board.note.remote(f"{text}, {settled_s:.0f} s after the last one ended")
        self._workers = resize_decision.num_workers = workers

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember what is reserved: a lost group's reservation is given back only after the next size is chosen."""
        self._started = time.monotonic()
        self._room_since = None
        self._held = Counter(worker.metadata.node_id for worker in worker_group.get_workers())

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Nothing is reserved any more."""
        self._held.clear()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Have the group save and leave once there has been room for more workers for the settling time."""
        now, train = time.monotonic(), self._train
        if now - self._started < train.grow_after_s or not self._held:
            return
        if min(train.workers.max, sum(self._room().values())) <= self._held.total():
            self._room_since = None
        elif self._room_since is None:
            self._room_since = now
        elif now - self._room_since >= train.settle_s:
            self._board.ask_leave.remote()

    def _room(self) -> dict[str, int]:
        return room(self._train, self._selector, self._held)

    def _settled(self) -> tuple[int, float]:
        import ray

        workers = self._train.workers
        begun = since = time.monotonic()
        seen = self._room()
        while True:
            now, total = time.monotonic(), sum(seen.values())
            # At the first start nothing was lost, and a full cluster has nothing to wait for.
            calm = now - since >= self._train.settle_s or (self._workers is None and total >= workers.max)
            over = now - begun > self._train.settle_s + _PATIENCE_S or ray.get(self._board.stopping.remote())
            if over or (calm and total >= workers.min):
                return max(workers.min, min(workers.max, total)), now - begun
            time.sleep(_LOOK_S)
            if (found := self._room()) != seen:
                seen, since = found, time.monotonic()
