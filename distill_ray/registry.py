"""Which version of a model is the latest: `models/<name>/latest.json`, moved by conditional PUT."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from distill_ray.errors import IntegrityError
from distill_ray.storage import ConflictError, NotFoundError, Storage, StorageError

_CONFLICTS = 50


@dataclass(frozen=True)
class Latest:
    """The content of `latest.json`; its version is null where the only one was taken back."""

    name: str
    version: str
    published_at: float
    """Unix seconds."""
    entry: dict[str, Any]
    """What export says of the model: key, checksum, figures."""


def publish_latest(
    storage: Storage,
    name: str,
    version: str,
    entry: dict[str, Any],
    *,
    others: Callable[[], Iterable[Latest]] = tuple,
    guard: Callable[[], None] = lambda: None,
) -> Latest:
    """Make `version` the latest of model `name`, unless a newer version is already; returns the record in force.

    Versions are compared as `version_order` says, so that last week's run, ended late, does not take this week's
    place. The same version may be published again.

    Args:
        storage: of the models.
        name: of the model.
        version: to publish.
        entry: what the record says of it.
        others: gives the other versions that could be the latest; asked where the record is missing or damaged.
        guard: raises where the caller may not publish any more; called between reading and writing the record.

    Raises StorageError.
    """
    wanted = Latest(name, version, time.time(), entry)

    def move(current: Latest | None) -> Latest:
        current = current or _newest(others())
        if current is None:
            return wanted
        newer = version_order(current.version) > version_order(version)
        return current if newer or (current.version, current.entry) == (version, entry) else wanted

    found = _swap(storage, name, move, guard)
    assert found is not None
    return found


def retract_latest(
    storage: Storage,
    name: str,
    version: str,
    *,
    others: Callable[[], Iterable[Latest]] = tuple,
    guard: Callable[[], None] = lambda: None,
) -> Latest | None:
    """Take `version` back as the latest of model `name`; returns the latest now: the newest of `others`, if any.

    Where another version is the latest already, it stays. Arguments as for `publish_latest`.

    Raises StorageError.
    """

    def move(current: Latest | None) -> Latest | None:
        if current is not None and current.version != version:
            return current
        return _newest(other for other in others() if other.version != version)

    return _swap(storage, name, move, guard)


def read_latest(storage: Storage, name: str) -> Latest | None:
    """The latest version of model `name`, or None if there is none. Raises IntegrityError if the record is damaged."""
    data, _ = _read(storage, name)
    return _parse(storage, name, data)


def version_order(version: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key: runs of digits by value (2026-W9 < 2026-W10), all else as text; text sorts before a number.

    So a trial under a name (`demo`, `v2`) neither takes the place of a version by date nor keeps it.
    """
    pieces = re.findall(r"\d+|\D+", version)
    return tuple((1, int(piece), "") if piece.isdecimal() else (0, 0, piece) for piece in pieces)


def _key(name: str) -> str:
    return f"models/{name}/latest.json"


def _newest(found: Iterable[Latest]) -> Latest | None:
    return max(found, key=lambda each: version_order(each.version), default=None)


def _swap(
    storage: Storage, name: str, move: Callable[[Latest | None], Latest | None], guard: Callable[[], None]
) -> Latest | None:
    """Replace the record by what `move` makes of it; no write where that is the record itself."""
    for _ in range(_CONFLICTS):
        data, at = _read(storage, name)
        try:
            current, damaged = _parse(storage, name, data), False
        except IntegrityError:
            current, damaged = None, True
        wanted = move(current)
        if wanted == current and not damaged:
            return wanted
        # A record is never deleted: storage has no conditional delete, and a newer version could be lost.
        fields = {"name": name, "version": None, "published_at": time.time()} if wanted is None else asdict(wanted)
        # After the read: whoever takes over from now on finds another record, or writes after this one.
        guard()
        try:
            storage.put_if(_key(name), json.dumps(fields, indent=1, sort_keys=True).encode(), at)
            return wanted
        except ConflictError:
            continue
    raise StorageError(f"{storage.uri}/{_key(name)}: {_CONFLICTS} writes in a row met another writer's; run again")


def _read(storage: Storage, name: str) -> tuple[bytes | None, str | None]:
    try:
        return storage.get_versioned(_key(name))
    except NotFoundError:
        return None, None


def _parse(storage: Storage, name: str, data: bytes | None) -> Latest | None:
    if data is None:
        return None
    try:
        fields = json.loads(data)
        if fields["version"] is None:
            return None
        return Latest(str(fields["name"]), str(fields["version"]), float(fields["published_at"]), dict(fields["entry"]))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{storage.uri}/{_key(name)} ({len(data)} bytes) is no registry record: {error}; `distill-ray run` of the "
            "newest version writes it anew"
        ) from error
