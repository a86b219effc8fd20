"""Checkpoints that do not stop training: copied in memory between two steps, written and uploaded beside the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from distill_ray import checkpoints
from distill_ray.checkpoints import StoredFile
from distill_ray.lease import LeaseToken
from distill_ray.storage import Storage
from distill_ray.train.meeting import patiently
from distill_ray.train.scratch import Scratch, writing_under

Stage = Callable[[Path], Callable[[], list[Path]]]
"""Copies this rank's state; what it returns writes the copy's files under the folder, in a thread, and returns them."""
Publish = Callable[[list[StoredFile]], None]
"""Makes the checkpoint count, given every rank's files."""


@dataclass
class _Flight:
    files: Future[list[StoredFile]]
    publish: Publish


class Saver:
    """One rank's side of saving. Every rank calls `begin` and `land` at the same steps.

    At most one checkpoint is on its way: another doubles the disk that is needed, and is older when it counts.
    """

    def __init__(self, storage: Storage, token: LeaseToken) -> None:
        self._storage, self._token = storage, token
        self._uploads = ThreadPoolExecutor(1, "upload")
        self._publications = ThreadPoolExecutor(1, "publish")
        self._flight: _Flight | None = None
        self._published: Future[None] | None = None
        self._seconds = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint is on its way; the same on every rank."""
        return self._flight is not None

    @property
    def arrived(self) -> bool:
        """Whether this rank's files of it are stored, or cannot be."""
        return self._flight is not None and self._flight.files.done()

    def take(self) -> float:
        """Seconds that the training thread spent here since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def check(self) -> None:
        """Raise what a publication failed with: where the lease is lost, every further step is for nothing."""
        if self._published is not None and self._published.done():
            self._wait_published()

    def begin(self, step: int, stage: Stage, publish: Publish) -> None:
        """Copy the state now, write and upload it beside training.

        Args:
            step: optimizer steps done.
            stage: called at once: what it copies is the state between two steps.
            publish: called on rank 0, in a thread, once the files of all ranks are stored.
        """
        assert self._flight is None, "one at a time"
        started = time.perf_counter()
        folder = Scratch("save")
        files = self._uploads.submit(self._store, step, folder, stage(Path(folder.name)))
        self._flight = _Flight(files, publish)
        self._seconds += time.perf_counter() - started

    def _store(self, step: int, folder: Scratch, write: Callable[[], list[Path]]) -> list[StoredFile]:
        with folder:  # removed here: taking gigabytes off a disk takes a while, too
            with writing_under(Path(folder.name)):
                paths = write()
            return checkpoints.upload(self._storage, self._token, step, paths)

    def land(self) -> None:
        """Wait for all ranks' files and have them published; nothing where none is on its way. A collective.

        Raises whatever upload or the publication before raised.
        """
        import torch.distributed as dist

        if self._flight is None:
            return
        started = time.perf_counter()
        flight, self._flight = self._flight, None
        everyone = patiently(flight.files.result)
        self._wait_published()
        if dist.get_rank() == 0:
            self._published = self._publications.submit(flight.publish, [f for files in everyone for f in files])
        self._seconds += time.perf_counter() - started

    def drain(self) -> None:
        """Until nothing is on its way any more and the last checkpoint counts. A collective."""
        self.land()
        started = time.perf_counter()
        self._wait_published()
        self._seconds += time.perf_counter() - started

    def _wait_published(self) -> None:
        published, self._published = self._published, None
        if published is not None:
            published.result()
