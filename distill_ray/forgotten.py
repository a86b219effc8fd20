"""Which source contents were withdrawn: `targets/forgotten.json`, read by whoever plans a capture.

Written before the first object of a withdrawn source is removed, so that no capture puts it back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

from distill_ray.errors import IntegrityError
from distill_ray.storage import ConflictError, NotFoundError, Storage, StorageError

KEY = "targets/forgotten.json"
_CONFLICTS = 50


@dataclass(frozen=True)
class Withdrawn:
    """One source content."""

    at: float
    """Unix seconds."""
    uris: tuple[str, ...]
    """Where it was known to lie."""


@dataclass(frozen=True)
class Forgotten:
    """The content of `forgotten.json`."""

    contents: Mapping[str, Withdrawn] = field(default_factory=dict)
    """SHA-256 of a source object → what is known of it."""
    runs: Mapping[str, int] = field(default_factory=dict)
    """`runs/<name>/<version>` → units of its manifest that are gone on purpose."""


def read_forgotten(storage: Storage) -> Forgotten:
    """Everything withdrawn so far. Raises IntegrityError if the record is damaged: it is never taken for empty."""
    return _read(storage)[0]


def record_forgotten(storage: Storage, contents: Mapping[str, Iterable[str]], runs: Mapping[str, int]) -> None:
    """Add contents (SHA-256 → URIs) and runs (prefix → units) to the record; by compare-and-swap.

    Raises IntegrityError, StorageError.
    """
    for _ in range(_CONFLICTS):
        found, version = _read(storage)
        added = dict(found.contents)
        for content, uris in contents.items():
            before = added.get(content, Withdrawn(time.time(), ()))
            added[content] = replace(before, uris=tuple(sorted({*before.uris, *uris})))
        # A second pass finds fewer objects than the first one removed.
        counts = {run: max(n, found.runs.get(run, 0)) for run, n in {**found.runs, **runs}.items()}
        data = json.dumps(asdict(Forgotten(added, counts)), indent=1, sort_keys=True).encode()
        try:
            storage.put_if(KEY, data, version)
            return
        except ConflictError:
            continue
    raise StorageError(f"{storage.uri}/{KEY}: {_CONFLICTS} writes in a row met another writer's; run again")


def _read(storage: Storage) -> tuple[Forgotten, str | None]:
    try:
        data, version = storage.get_versioned(KEY)
    except NotFoundError:
        return Forgotten(), None
    try:
        fields = json.loads(data)
        contents = {c: Withdrawn(float(w["at"]), tuple(w["uris"])) for c, w in fields["contents"].items()}
        return Forgotten(contents, {run: int(n) for run, n in fields["runs"].items()}), version
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{storage.uri}/{KEY} ({len(data)} bytes) is no record of withdrawn sources: {error}; restore it: without "
            "it withdrawn text would be captured again"
        ) from error
