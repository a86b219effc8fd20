"""Which version of a model is the latest: `models/<name>/latest.json`, moved by conditional PUT."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from typing import Any

from distill_ray.errors import IntegrityError
from distill_ray.storage import ConflictError, NotFoundError, Storage, StorageError

_CONFLICTS = 50


@dataclass(frozen=True)
class Latest:
    """The content of `latest.json`."""

    name: str
    version: str
    published_at: float
    """Unix seconds."""
    entry: dict[str, Any]
    """What export says of the model: key, checksum, figures."""


def publish_latest(storage: Storage, name: str, version: str, entry: dict[str, Any]) -> Latest:
    """Make `version` the latest of model `name`, unless a newer version is already; returns the record in force.

    Versions are compared piece by piece, numbers as numbers (2026-W9 < 2026-W10), so that last week's run, ended
    late, does not take this week's place. The same version may be published again.

    Raises StorageError.
    """
    wanted = Latest(name, version, time.time(), entry)
    data = json.dumps(asdict(wanted), indent=1, sort_keys=True).encode()
    for _ in range(_CONFLICTS):
        current, at = _read(storage, name)
        if current is not None and version_order(current.version) > version_order(version):
            return current
        try:
            storage.put_if(_key(name), data, at)
            return wanted
        except ConflictError:
            continue
    raise StorageError(f"{storage.uri}/{_key(name)}: {_CONFLICTS} writes in a row met another writer's; run again")


def read_latest(storage: Storage, name: str) -> Latest | None:
    """The latest version of model `name`, or None if none was published. Raises IntegrityError if it is damaged."""
    return _read(storage, name)[0]


def version_order(version: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key: runs of digits by value, all else as text; a number sorts before text."""
    pieces = re.findall(r"\d+|\D+", version)
    return tuple((0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces)


def _key(name: str) -> str:
    return f"models/{name}/latest.json"


def _read(storage: Storage, name: str) -> tuple[Latest | None, str | None]:
    try:
        data, at = storage.get_versioned(_key(name))
    except NotFoundError:
        return None, None
    try:
        fields = json.loads(data)
        latest = Latest(
            str(fields["name"]), str(fields["version"]), float(fields["published_at"]), dict(fields["entry"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{storage.uri}/{_key(name)} ({len(data)} bytes) is no registry record: {error}; delete it and export again"
        ) from error
    return latest, at
