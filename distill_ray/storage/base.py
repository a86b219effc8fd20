"""The storage interface: a flat key space under one URI, on a local folder or S3.

Keys use `/` and never start with one. Every write is atomic: a reader sees the old object, the new one, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from distill_ray.errors import DistillError, UserError


class NotFoundError(DistillError):
    """No object has this key."""


class ConflictError(DistillError):
    """A conditional write lost: the object is not at the expected version."""


class StorageError(UserError):
    """The store cannot be used: wrong bucket, wrong keys, endpoint down, no permission, disk full."""


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    size: int
    version: str
    """ETag on S3; size and modification time locally. Changes when the object does."""
    modified: float
    """Unix seconds."""


class Storage(Protocol):
    """Picklable; opens its client lazily in each process."""

    @property
    def uri(self) -> str: ...

    def get(self, key: str) -> bytes:
        """Raises NotFoundError."""
        ...

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """The bytes and a version for `put_if`. Raises NotFoundError."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length), shorter at the end of the object. Raises NotFoundError."""
        ...

    def put(self, key: str, data: bytes) -> None: ...

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Write only if the object is still at `version` (None: only if there is none); returns the new version.

        Raises ConflictError.
        """
        ...

    def upload(self, path: Path, key: str) -> None: ...

    def download(self, key: str, path: Path) -> None:
        """To a temporary name, then renamed. Raises NotFoundError."""
        ...

    def head(self, key: str) -> ObjectInfo | None: ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, page by page. Temporary files are not shown.

        In key order locally and on AWS; other servers may list folder by folder, so sort where order matters.
        """
        ...

    def delete(self, key: str) -> None:
        """No error when there is none."""
        ...

    def half_written(self) -> Iterator[ObjectInfo]:
        """What interrupted writes left, and what is being written now: nothing lists or reads it.

        `modified` is when the write last went on, as far as the store knows; for `discard`.
        """
        ...

    def discard(self, info: ObjectInfo) -> None:
        """Remove one of `half_written`. No error when it is gone."""
        ...

    def open_input(self, key: str) -> IO[bytes]:
        """A seekable binary stream with ranged reads, for pyarrow and decompressors. Raises NotFoundError."""
        ...
