"""One writer per run: a lease with an epoch, whose record is also the run's only commit log.

`lease.json` names the owner, the epoch, the expiry and everything that the run has published. Publishing is a
compare-and-swap on that very record, so a driver that wakes up after a takeover can publish nothing: there is no
moment between "am I still the owner?" and "write". Anything that the record does not name does not exist.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distill_ray.errors import IntegrityError, LeaseHeldError, LeaseLostError
from distill_ray.storage import ConflictError, NotFoundError, Storage, StorageError

_CONFLICTS = 200


@dataclass(frozen=True)
class Owner:
    """A driver process, told apart from every other one that was or will be."""

    id: str
    """Random; two leases of one process differ."""
    host: str
    pid: int
    boot_id: str
    """The kernel's; shared by all containers of a machine, new after a reboot. Empty where there is none."""
    pid_namespace: str
    """What `pid` is counted in. Empty where there is none."""
    started: str
    """Start of the process in clock ticks since boot: a number of another process that took over the same pid."""

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"


@dataclass(frozen=True)
class LeaseToken:
    """The right to publish, sent to the run's workers."""

    run_prefix: str
    owner: Owner
    epoch: int


@dataclass(frozen=True)
class LeaseRecord:
    """The content of `lease.json`."""

    owner: Owner
    epoch: int
    """1 for the first owner, one more at each takeover."""
    expires_at: float
    """Unix seconds; 0 once released."""
    published: dict[str, dict[str, Any]]
    """What the run has published, by name."""


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
        for _ in range(_CONFLICTS):
            record, version = _read(storage, run_prefix)
            now = time.time()
            if record is None:
                taken = LeaseRecord(owner, 1, now + ttl_s, {})
            else:
                _require_takeable(record, run_prefix, now)
                taken = LeaseRecord(owner, record.epoch + 1, now + ttl_s, record.published)
            if _swap(storage, run_prefix, taken, version):
                return cls(storage, LeaseToken(run_prefix, owner, taken.epoch), ttl_s, taken.expires_at)
            _pause()
        raise StorageError(f"{_where(storage, run_prefix)}: {_CONFLICTS} writes in a row met another writer's")

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
            _update(self._storage, self.token, lambda record: replace(record, expires_at=0.0))
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
                record = _update(
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


def publish(storage: Storage, token: LeaseToken, name: str, entry: dict[str, Any] | None) -> None:
    """Make `entry` the run's published `name`, or remove that name where `entry` is None; atomic.

    What the entry points to must be stored already. Only the lease's holder of that epoch can.

    Raises LeaseLostError, StorageError.
    """

    def add(record: LeaseRecord) -> LeaseRecord:
        published = {key: value for key, value in record.published.items() if key != name}
        if entry is not None:
            published[name] = entry
        return replace(record, published=published)

    _update(storage, token, add)


def read_published(storage: Storage, run_prefix: str) -> dict[str, dict[str, Any]]:
    """Everything that the run has published, by name; {} before its first start."""
    record = read_record(storage, run_prefix)
    return {} if record is None else record.published


def read_record(storage: Storage, run_prefix: str) -> LeaseRecord | None:
    """The lease's record, or None before the run's first start. Raises IntegrityError if it is damaged."""
    return _read(storage, run_prefix)[0]


def is_live(record: LeaseRecord) -> bool:
    """True while the record's owner may still be working: not released, not expired, not known to be dead."""
    return time.time() < record.expires_at and not is_dead(record.owner)


def this_process() -> Owner:
    """A new identity for this process."""
    pid = os.getpid()
    return Owner(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=pid,
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        started=_start_of(pid) or "",
    )


def is_dead(owner: Owner) -> bool:
    """True only where it can be known: same boot, same pid namespace, and that process is gone."""
    if not owner.boot_id or not owner.pid_namespace:
        return False
    if (owner.boot_id, owner.pid_namespace) != (_boot_id(), _pid_namespace()):
        return False
    return _start_of(owner.pid) != owner.started


def _require_takeable(record: LeaseRecord, run_prefix: str, now: float) -> None:
    if is_live(record):
        left = max(record.expires_at - now, 0.0)
        raise LeaseHeldError(
            f"run {run_prefix} is being worked on by {record.owner} (epoch {record.epoch}, lease good for "
            f"{left:.0f} s more); wait for it, stop it, or run under another --version. If that driver is "
            f"gone, its lease runs out by itself: run again in {left:.0f} s"
        )


def _update(storage: Storage, token: LeaseToken, change: Callable[[LeaseRecord], LeaseRecord]) -> LeaseRecord:
    """Apply `change` to the record by compare-and-swap while the token owns it; returns what was written."""
    for _ in range(_CONFLICTS):
        record, version = _read(storage, token.run_prefix)
        _require_owned(record, token)
        assert record is not None
        changed = change(record)
        if _swap(storage, token.run_prefix, changed, version):
            return changed
        _pause()
    raise StorageError(f"{_where(storage, token.run_prefix)}: {_CONFLICTS} writes in a row met another writer's")


def _require_owned(record: LeaseRecord | None, token: LeaseToken) -> None:
    lost = f"epoch {token.epoch} of run {token.run_prefix}, held by {token.owner}, is over"
    remedy = "nothing more was published from it; run the same command again if no other driver does"
    if record is None:
        raise LeaseLostError(f"{lost}: the lease's record is gone; {remedy}")
    if (record.epoch, record.owner) != (token.epoch, token.owner):
        raise LeaseLostError(f"{lost}: {record.owner} took over with epoch {record.epoch}; {remedy}")
    if record.expires_at == 0.0:
        raise LeaseLostError(f"{lost}: it was released; {remedy}")


def _swap(storage: Storage, run_prefix: str, record: LeaseRecord, version: str | None) -> bool:
    data = json.dumps(asdict(record), indent=1, sort_keys=True).encode()
    try:
        storage.put_if(_key(run_prefix), data, version)
    except ConflictError:
        return False
    return True


def _read(storage: Storage, run_prefix: str) -> tuple[LeaseRecord | None, str | None]:
    try:
        data, version = storage.get_versioned(_key(run_prefix))
    except NotFoundError:
        return None, None
    try:
        fields = json.loads(data)
        record = LeaseRecord(
            Owner(**fields["owner"]), int(fields["epoch"]), float(fields["expires_at"]), dict(fields["published"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{_where(storage, run_prefix)} ({len(data)} bytes) is no lease record: {error}; restore it, or delete "
            "it to begin the run anew (captured targets are kept)"
        ) from error
    return record, version


def _key(run_prefix: str) -> str:
    return f"{run_prefix}/lease.json"


def _where(storage: Storage, run_prefix: str) -> str:
    return f"{storage.uri}/{_key(run_prefix)}"


def _pause() -> None:
    time.sleep(random.uniform(0.002, 0.05))


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux: expiry alone decides
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name is in parentheses and may hold spaces and parentheses itself.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]
