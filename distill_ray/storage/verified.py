"""Reads held against a checksum that was recorded before the upload."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distill_ray.errors import IntegrityError
from distill_ray.storage.base import Storage

T = TypeVar("T")

_ATTEMPTS = 3
_RANGE_ATTEMPTS = 8
"""Of a read of some MiB. A whole file of a checkpoint costs more, and an older checkpoint stands behind it."""


def read_verified(read: Callable[[], T]) -> T:
    """`read`'s result; called again, eight times at most, while what it fetches is found damaged.

    Ranged reads have no checksum in S3: what was only damaged on its way must not count as a damaged object.

    Raises IntegrityError, the last one, and what else `read` raises.
    """
    for _ in range(_RANGE_ATTEMPTS - 1):
        try:
            return read()
        except IntegrityError:
            continue
    return read()


def download_verified(storage: Storage, key: str, path: Path, sha256: str) -> str:
    """Download until the file has the SHA-256 that was recorded, three times at most; returns what it has.

    The parts of a large object come by ranged reads, for which S3 has no checksum: what was only damaged on its way
    must not count as a damaged object. The caller compares, and says what a damaged object means.

    Raises NotFoundError, StorageError.
    """
    found = ""
    for _ in range(_ATTEMPTS):
        storage.download(key, path)
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found == sha256:
            break
    return found
