"""Which version of a model is the latest: `models/<name>/latest.json`, moved by conditional PUT."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
    previous: dict[str, Any] | None = None
    """The fields of the record that another version had here before, without its own previous one."""


def publish_latest(storage: Storage, name: str, version: str, entry: dict[str, Any]) -> Latest:
    """Make `version` the latest of model `name`, unless a newer version is already; returns the record in force.

    Versions are compared as `version_order` says, so that last week's run, ended late, does not take this week's
    place. The same version may be published again. A damaged record names no version and is replaced.

    Raises StorageError.
    """
    wanted = Latest(name, version, time.time(), entry)

    def move(current: Latest | None) -> Latest:
        if current is None:
            return wanted
        if version_order(current.version) > version_order(version):
            return current
        if (current.version, current.entry) == (version, entry):
            return current
        if current.version == version:
            return replace(wanted, previous=current.previous)
        return replace(wanted, previous={**asdict(current), "previous": None})

    found = _swap(storage, name, move)
    assert found is not None
    return found


def retract_latest(storage: Storage, name: str, version: str) -> Latest | None:
    """Take `version` back as the latest of model `name`; returns what is the latest now.

    That is the version before it, where its folder's manifest still stands, else none. Where another version is the
    latest already, it stays.

    Raises StorageError.
    """

    def move(current: Latest | None) -> Latest | None:
        if current is None or current.version != version:
            return current
        before = None if current.previous is None else Latest(**current.previous)
        return before if before is not None and _stands(storage, before.entry) else None

    return _swap(storage, name, move)


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


def _swap(storage: Storage, name: str, move: Callable[[Latest | None], Latest | None]) -> Latest | None:
    """Replace the record by what `move` makes of it; no write where that is the record itself."""
    for _ in range(_CONFLICTS):
        data, at = _read(storage, name)
        try:
            current = _parse(storage, name, data)
            damaged = False
        except IntegrityError:
            current, damaged = None, True
        wanted = move(current)
        if wanted == current and not damaged:
            return wanted
        # A record is never deleted: storage has no conditional delete, and a newer version could be lost.
        fields = {"name": name, "version": None, "published_at": time.time()} if wanted is None else asdict(wanted)
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
        previous = fields.get("previous")
        return Latest(
            str(fields["name"]),
            str(fields["version"]),
            float(fields["published_at"]),
            dict(fields["entry"]),
            None if previous is None else dict(previous),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{storage.uri}/{_key(name)} ({len(data)} bytes) is no registry record: {error}; `distill-ray run` of the "
            "newest version writes it anew"
        ) from error


def _stands(storage: Storage, entry: dict[str, Any]) -> bool:
    try:
        return hashlib.sha256(storage.get(entry["key"])).hexdigest() == entry["sha256"]
    except (NotFoundError, KeyError):
        return False
