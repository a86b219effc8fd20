"""metrics.jsonl in storage, kept up beside training: for whoever looks; a resume takes the checkpoint's own copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from distill_ray.storage import StorageError
from distill_ray.train.bad_loss import Line

_EVERY_S = 30.0
_SHARE = 20.0
"""At most a twentieth of the time is spent on storing: the file is written whole, and grows with the run."""


class HistoryUpload:
    """Stores a growing history now and then, in a thread; one store at a time.

    Args:
        store: writes the lines whole.
        say: told when a store failed; the next one makes up for it.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        store: Callable[[list[Line]], object],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._say, self._clock = store, say, clock
        self._thread = ThreadPoolExecutor(1, "history")
        self._running: Future[float] | None = None
        self._due = clock() + _EVERY_S

    def tick(self, history: list[Line]) -> None:
        """To be called after every step. Raises what a store failed with, but for a store that is away."""
        if self._running is not None and self._running.done():
            self.wait()
        if self._running is None and self._clock() >= self._due:
            self._running = self._thread.submit(self._timed, list(history))

    def wait(self) -> None:
        """Until nothing is being stored. Raises like `tick`."""
        running, self._running = self._running, None
        seconds = 0.0
        try:
            seconds = running.result() if running is not None else 0.0
        except StorageError as error:
            self._say(f"metrics.jsonl could not be stored now and will be later: {error}")
        self._due = self._clock() + max(_EVERY_S, _SHARE * seconds)

    def _timed(self, history: list[Line]) -> float:
        begun = self._clock()
        self._store(history)
        return self._clock() - begun
