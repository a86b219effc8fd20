"""Holding the lease: taking it, renewing it in the background, noticing its loss, giving it back."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import TracebackType
from typing import Self

from distill_ray.errors import LeaseHeldError, LeaseLostError
from distill_ray.lease.owner import this_process
from distill_ray.lease.record import CONFLICTS, LeaseRecord, LeaseToken, is_live, pause, read, swap, update, where
from distill_ray.storage import Storage, StorageError


class Lease:
    """A held lease; a daemon thread renews it until the end of the `with` block.

    with Lease.acquire(storage, "runs/support-triage/2026-W47") as lease:
        publish(storage, lease.token, "targets", entry)
    """

    def __init__(self, storage: Storage, token: LeaseToken, ttl_s: float, expires_at: float) -> None:
        """Use `acquire`."""
        self.token = token
        self._storage, self._ttl_s, self._expires_at = storage, ttl_s, expires_at
        self._lost: str | None = None
        self._trouble = ""
        self._renewing, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, storage: Storage, run_prefix: str, *, ttl_s: float = 60.0) -> Self:
        """Take the run's lease, or take it over from an owner that expired, released it or is dead.

        Args:
            storage: the run's store.
            run_prefix: `runs/<name>/<version>`.
            ttl_s: seconds after which other machines may take over from a driver that went silent.

        Raises LeaseHeldError naming the owner, StorageError.
        """
        owner = this_process()
        for _ in range(CONFLICTS):
            record, version = read(storage, run_prefix)
            now = time.time()
            if record is None:
                taken = LeaseRecord(owner, 1, now + ttl_s, {})
            else:
                _require_takeable(record, run_prefix, now)
                taken = LeaseRecord(owner, record.epoch + 1, now + ttl_s, record.published)
            if swap(storage, run_prefix, taken, version):
                return cls(storage, LeaseToken(run_prefix, owner, taken.epoch), ttl_s, taken.expires_at)
            pause()
        raise StorageError(f"{where(storage, run_prefix)}: {CONFLICTS} writes in a row met another writer's")

    def check(self) -> None:
        """Raises LeaseLostError if another driver took over, or the lease ran out and cannot be renewed now."""
        if self._lost is None and time.time() >= self._expires_at:
            # A driver that was paused past its expiry goes on only if it can still renew.
            self._renew()
            if self._lost is None and time.time() >= self._expires_at:
                raise LeaseLostError(
                    f"the lease on {self.token.run_prefix} (epoch {self.token.epoch}) ran out "
                    f"{time.time() - self._expires_at:.0f} s ago and cannot be renewed ({self._trouble}); "
                    "run the same command again, it goes on from what is published"
                )
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    def release(self) -> None:
        """Stop renewing and let any other driver take over at once; the record stays. Does nothing the second time."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        try:
            update(self._storage, self.token, lambda record: replace(record, expires_at=0.0))
        except (LeaseLostError, StorageError):
            # Lost: nothing to give back. Store away: the lease runs out by itself, and a dead process is seen dead.
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def _keep(self) -> None:
        while not self._stop.wait(self._ttl_s / 3) and self._lost is None:
            self._renew()

    def _renew(self) -> None:
        with self._renewing:
            if self._stop.is_set():
                return
            try:
                record = update(
                    self._storage,
                    self.token,
                    # Counted from before the write: its own duration must not lengthen the lease.
                    lambda found: replace(found, expires_at=time.time() + self._ttl_s),
                )
                self._expires_at = record.expires_at
            except LeaseLostError as error:
                self._lost = str(error)
            except StorageError as error:
                self._trouble = str(error)


def _require_takeable(record: LeaseRecord, run_prefix: str, now: float) -> None:
    if is_live(record):
        left = max(record.expires_at - now, 0.0)
        raise LeaseHeldError(
            f"run {run_prefix} is being worked on by {record.owner} (epoch {record.epoch}, lease good for "
            f"{left:.0f} s more); wait for it, stop it, or run under another --version. If that driver is "
            f"gone, its lease runs out by itself: run again in {left:.0f} s"
        )
