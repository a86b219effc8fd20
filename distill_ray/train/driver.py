"""The driver's side of training: start the worker group, relay its progress, stop it, name its error."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
import uuid
from typing import Any

from distill_ray.config import Recipe
from distill_ray.cost import metered
from distill_ray.errors import DistillError, StoppedError, UserError
from distill_ray.lease import LeaseToken
from distill_ray.metrics import Meters
from distill_ray.session import died, is_death, on_this_node
from distill_ray.storage import Storage
from distill_ray.targets import RunManifest
from distill_ray.telemetry import Progress
from distill_ray.train.bad_loss import BadStepError
from distill_ray.train.board import Board, News, start_board
from distill_ray.train.emitting import TrainMeters
from distill_ray.train.job import Job, make_plan
from distill_ray.train.placement import describe, is_elastic, is_waiting, worker_resources
from distill_ray.train.preemption import POLL_S, POLL_VARIABLE
from distill_ray.train.restoring import check_newest
from distill_ray.train.result import published_student
from distill_ray.train.worker import work

_SHOWN = ("loss", "kl_t1", "lr", "tokens_per_s", "mfu")
_SAY_WAITING_S = 10.0
_UNPLACED_S = 30.0
"""Seconds that workers which no node has room for yet are waited for after a stop."""
_GROUP_STARTS = 60
"""Attempts of Ray Train to place a worker group again after a node was lost; each waits 60 s by its default."""


def run(
    recipe: Recipe,
    storage: Storage,
    manifest: RunManifest,
    token: LeaseToken,
    stop: threading.Event,
    progress: type[Progress] = Progress,
    *,
    stop_grace_s: float = 300.0,
    placement_wait_s: float = 900.0,
    board_class: type[Board] = Board,
) -> dict[str, Any]:
    """Train the student and publish it; goes on from the newest whole checkpoint. Ray is already connected.

    Args:
        recipe: the run.
        storage: under the recipe's root.
        manifest: the targets of this run.
        token: of the run's lease; every checkpoint and the result are published against it.
        stop: set it to save a checkpoint and stop.
        progress: makes the progress display.
        board_class: what driver and workers talk through; tests give one that stops or kills at a chosen step.
        stop_grace_s: seconds that workers get to finish their step and save, after `stop`.
        placement_wait_s: seconds that the cluster gets to come up with room for the first worker.

    Returns:
        The lease record's entry "student" {key, sha256, step, plan, history {key, sha256, steps}}; at once if it is
        already published and whole.

    Raises:
        StoppedError: `stop` was set; the run goes on from its last checkpoint.
        LeaseLostError: another driver took the run over.
        UserError: the recipe does not fit the targets, the hardware or the checkpoint; the cluster has no room.
        DistillError: the worker group failed more than `train.max_failures` times.
    """
    found = published_student(storage, token.run_prefix)
    if found is not None:
        return found
    plan = make_plan(recipe, manifest)
    check_newest(recipe, storage, plan.digest)
    board = start_board(board_class)
    with metered(recipe, storage, token, "train") as meter:
        fit = _Fit(Job(recipe, storage, manifest, token, board, meter))
        try:
            with progress("train", plan.steps, "steps") as shown:
                wait = _Wait(recipe, board, shown, placement_wait_s)
                relay = _Relay(shown, TrainMeters(Meters(recipe.name, recipe.version, "train"), recipe, plan.steps))
                ended = _watch(fit, board, relay, stop, stop_grace_s, wait)
            return _outcome(recipe, storage, token, board, fit.error() if ended else None, stop)
        finally:
            fit.close()


class _Fit:
    """`TorchTrainer.fit` in an actor of its own, which can be ended at any moment.

    A thread of this process could not: it would wait in Ray's core worker beyond `ray.shutdown()` and crash the process
    at a later `ray.init()` or a second after (ray-project/ray#31145).
    """

    def __init__(self, job: Job) -> None:
        import ray

        self._actor: Any = ray.remote(_Trainer).options(**on_this_node()).remote()
        self._end = self._actor.fit.remote(job)

    def wait(self, seconds: float) -> bool:
        """Whether the trainer ended within `seconds`."""
        import ray

        return bool(ray.wait([self._end], timeout=seconds)[0])

    def error(self) -> Exception | None:
        """What the trainer, once it ended, failed with."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(self._end)
        except RayError as error:
            return error

    def close(self) -> None:
        """End the trainer; its controller and workers die with it."""
        import ray

        ray.kill(self._actor)


class _Trainer:
    def fit(self, job: Job) -> Exception | None:
        """Train to the end; returns what Ray Train or Ray failed with."""
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError

        with tempfile.TemporaryDirectory(prefix="distill-ray-train-") as folder:
            try:
                _trainer(job, folder).fit()
            except (TrainingFailedError, RayError) as error:
                return error
        return None


def _trainer(job: Job, folder: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from distill_ray.train.callbacks import Leave, Settle

    train = job.recipe.train
    elastic = is_elastic(train)
    selector = job.recipe.cluster.selector("student")
    callbacks: Any = [Leave()] + ([Settle(train, selector, job.board)] if elastic else [])
    os.environ.setdefault(POLL_VARIABLE, str(POLL_S))  # of this actor's own process; Ray Train hands it on
    # Ray Train keeps only its own notes here; checkpoints go to storage by our manifests. A fresh name each time: the
    # notes of a killed driver must not speak to this one.
    name = f"{job.recipe.name}-{job.recipe.version}-e{job.token.epoch}-{uuid.uuid4().hex[:8]}"
    return TorchTrainer(
        work,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=(train.workers.min, train.workers.max) if elastic else train.workers.max,
            use_gpu=train.use_gpu,
            resources_per_worker=worker_resources(train),
            label_selector=selector or None,
            elastic_resize_monitor_interval_s=math.inf,
        ),
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            worker_runtime_env=job.recipe.cluster.environments.student.runtime_env(),
            failure_config=FailureConfig(
                max_failures=train.max_failures,
                max_preemption_failures=train.max_preemption_failures,
                controller_failure_limit=_GROUP_STARTS,
            ),
            callbacks=callbacks,
        ),
    )


class _Wait:
    """Patience with a cluster that has no room for the workers: Ray Train by itself would try for ever, silently."""

    def __init__(self, recipe: Recipe, board: Any, shown: Progress, limit_s: float) -> None:
        self._train, self._board, self._shown, self._limit_s = recipe.train, board, shown, limit_s
        self._selector = recipe.cluster.selector("student")
        self._begun = time.monotonic()
        self._since: float | None = None
        self._over = False

    def check(self) -> None:
        """Raises UserError once workers have waited for room longer than the limit, the first time they are placed."""
        import ray

        now = time.monotonic()
        if self._over or now - self._begun < _SAY_WAITING_S:
            return
        self._over = ray.get(self._board.placed.remote())
        if self._over or not is_waiting(self._train, self._selector, ray.get(self._board.sized.remote())):
            return
        if self._since is None:
            self._since = now
            self._shown.note(f"waiting for resources: {describe(self._train, self._selector)}")
        elif now - self._since > self._limit_s:
            raise UserError(
                f"no room for the training workers after {now - self._since:.0f} s: "
                f"{describe(self._train, self._selector)}; lower it, add nodes, or end what else runs on the cluster; "
                "the same command goes on from here"
            )


def _watch(fit: _Fit, board: Any, relay: _Relay, stop: threading.Event, grace_s: float, wait: _Wait) -> bool:
    """Relay news until the trainer is done, or, False, until workers asked to stop have had their time."""
    import ray

    asked_at = None
    while not fit.wait(0.2):
        relay.take(ray.get(board.drain.remote()))
        if not stop.is_set():
            wait.check()
            continue
        ray.get(board.ask_stop.remote())
        asked_at = asked_at or time.monotonic()
        if time.monotonic() - asked_at > (grace_s if ray.get(board.placed.remote()) else _UNPLACED_S):
            return False
    relay.take(ray.get(board.drain.remote()))
    relay.end(ray.get(board.error.remote())[0])
    return True


class _Relay:
    """Passes the workers' news on to progress and metrics."""

    def __init__(self, shown: Progress, meters: TrainMeters) -> None:
        self._shown, self._meters, self._position = shown, meters, 0

    def take(self, news: News) -> None:
        """What came since the last call."""
        for text in news.notes:
            self._shown.note(text)
        for line in news.steps:
            if "start" in line:
                # A restarted group goes back to its checkpoint; so does the bar.
                self._shown.skip(int(line["start"]) - self._position)
                self._position = int(line["start"])
                self._meters.start(self._position)
            else:
                self._shown.advance(1, **{name: line[name] for name in _SHOWN if name in line})
                self._position += 1
                self._meters.step(line)
        for step in news.saved:
            self._meters.saved(step)
        self._meters.tick()

    def end(self, error: Exception | None) -> None:
        """The trainer has ended; `error` is the last one that a worker posted."""
        if isinstance(error, BadStepError):
            self._meters.bad_end()
        self._meters.close()


def _outcome(
    recipe: Recipe, storage: Storage, token: LeaseToken, board: Any, failed: Exception | None, stop: threading.Event
) -> dict[str, Any]:
    import ray

    error, final = ray.get(board.error.remote())
    if error is not None and final:
        raise error
    found = published_student(storage, token.run_prefix)
    if found is not None:
        return found
    if stop.is_set():
        raise StoppedError("training was stopped; the same command goes on from the last checkpoint")
    if error is not None:
        raise error
    from ray.train import ControllerError
    from ray.train.v2.api.exceptions import PreemptionError

    if isinstance(failed, ControllerError):
        room = describe(recipe.train, recipe.cluster.selector("student"))
        raise DistillError(
            f"the worker group could not be started again: {room}; run the same command when there is room, it goes on "
            f"from the last checkpoint ({failed.controller_failure})"
        ) from failed
    if failed is not None and is_death(failed):
        raise died("the process that directs the training died", failed) from failed
    if isinstance(failed, PreemptionError):
        raise DistillError(
            f"nodes were taken away with notice more than {recipe.train.max_preemption_failures} time(s) "
            f"(train.max_preemption_failures); the same command goes on from the last checkpoint ({failed})"
        ) from failed
    raise DistillError(
        f"training failed {recipe.train.max_failures + 1} time(s) (train.max_failures={recipe.train.max_failures}): "
        f"{failed}"
    ) from failed
