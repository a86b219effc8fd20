"""The lease's record, which is the run's commit log: reading it and changing it by compare-and-swap."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from distill_ray.errors import IntegrityError, LeaseLostError
from distill_ray.lease.owner import Owner, is_dead
from distill_ray.storage import ConflictError, NotFoundError, Storage, StorageError

CONFLICTS = 200  # attempts at one compare-and-swap


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

    update(storage, token, add)


def put_owned(storage: Storage, token: LeaseToken, key: str, data: bytes) -> None:
    """Write `key` so that a driver that lost its lease cannot overwrite its successor's object.

    The object's version is read before the ownership: a successor that writes after the check changes the version.

    Raises LeaseLostError, StorageError.
    """
    for _ in range(CONFLICTS):
        info = storage.head(key)
        require_owned(storage, token)
        try:
            storage.put_if(key, data, None if info is None else info.version)
        except ConflictError:
            pause()
        else:
            return
    raise StorageError(f"{storage.uri}/{key}: {CONFLICTS} writes in a row met another writer's; run again")


def require_owned(storage: Storage, token: LeaseToken) -> None:
    """Raises LeaseLostError if another driver owns the run by now."""
    _require_owned(read_record(storage, token.run_prefix), token)


def read_published(storage: Storage, run_prefix: str) -> dict[str, dict[str, Any]]:
    """Everything that the run has published, by name; {} before its first start."""
    record = read_record(storage, run_prefix)
    return {} if record is None else record.published


def read_record(storage: Storage, run_prefix: str) -> LeaseRecord | None:
    """The lease's record, or None before the run's first start. Raises IntegrityError if it is damaged."""
    return read(storage, run_prefix)[0]


def lease_written_at(storage: Storage, run_prefix: str) -> float | None:
    """Unix seconds, by the store's clock, of the record's last write: a renewal or a publication."""
    info = storage.head(_key(run_prefix))
    return None if info is None else info.modified


def is_live(record: LeaseRecord) -> bool:
    """True while the record's owner may still be working: not released, not expired, not known to be dead."""
    return time.time() < record.expires_at and not is_dead(record.owner)


def update(storage: Storage, token: LeaseToken, change: Callable[[LeaseRecord], LeaseRecord]) -> LeaseRecord:
    """Apply `change` to the record by compare-and-swap while the token owns it; returns what was written."""
    for _ in range(CONFLICTS):
        record, version = read(storage, token.run_prefix)
        _require_owned(record, token)
        assert record is not None
        changed = change(record)
        if swap(storage, token.run_prefix, changed, version):
            return changed
        pause()
    raise StorageError(f"{where(storage, token.run_prefix)}: {CONFLICTS} writes in a row met another writer's")


def _require_owned(record: LeaseRecord | None, token: LeaseToken) -> None:
    lost = f"epoch {token.epoch} of run {token.run_prefix}, held by {token.owner}, is over"
    remedy = "nothing more was published from it; run the same command again if no other driver does"
    if record is None:
        raise LeaseLostError(f"{lost}: the lease's record is gone; {remedy}")
    if (record.epoch, record.owner) != (token.epoch, token.owner):
        raise LeaseLostError(f"{lost}: {record.owner} took over with epoch {record.epoch}; {remedy}")
    if record.expires_at == 0.0:
        raise LeaseLostError(f"{lost}: it was released; {remedy}")


def swap(storage: Storage, run_prefix: str, record: LeaseRecord, version: str | None) -> bool:
    """Write `record` if the stored one is still at `version`; False if it is not."""
    data = json.dumps(asdict(record), indent=1, sort_keys=True).encode()
    try:
        storage.put_if(_key(run_prefix), data, version)
    except ConflictError:
        return False
    return True


def read(storage: Storage, run_prefix: str) -> tuple[LeaseRecord | None, str | None]:
    """The record and its version for `swap`; (None, None) before the run's first start. Raises IntegrityError."""
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
            f"{where(storage, run_prefix)} ({len(data)} bytes) is no lease record: {error}; restore it, or delete "
            "it to begin the run anew (captured targets are kept)"
        ) from error
    return record, version


def _key(run_prefix: str) -> str:
    return f"{run_prefix}/lease.json"


def where(storage: Storage, run_prefix: str) -> str:
    """The record's URI, for messages."""
    return f"{storage.uri}/{_key(run_prefix)}"


def pause() -> None:
    """A random moment between two attempts, so that rivals do not stay in step."""
    time.sleep(random.uniform(0.002, 0.05))
