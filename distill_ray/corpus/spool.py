"""Plain copies of what can only be read from its beginning: compressed lines, and rows inside a Parquet row group.

A node keeps them in the user's cache folder, named by content. So a source of U units costs each node about two passes
over it instead of U/2. The copies are optional: where none can be kept, readers go the slow way.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from distill_ray.errors import UserError
from distill_ray.storage import StorageError, user_cache
from distill_ray.storage.atomic import locked

MOST_BYTES = 64 * 2**30
"""Of all copies on one machine; the ones used longest ago go first."""
_WAIT_S = 3600.0
_COPY = ".copy"


_too_large: set[str] = set()
"""Copies that this process found too large, so that it does not try again for each unit."""


class _TooLargeError(Exception):
    pass


class _Bounded(io.RawIOBase):
    """A file that refuses to grow beyond `most` bytes."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self._stream, self._left = stream, most

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        self._left -= size
        if self._left < 0:
            raise _TooLargeError("it takes more than half of the free disk, or than all copies may take")
        self._stream.write(data)
        return size


def open_copy(name: str, write: Callable[[IO[bytes]], None]) -> IO[bytes] | None:
    """Open the copy `name`, made by `write` if this machine has none; None where it cannot be kept.

    Processes of one machine wait for each other's copy. An open one stays readable when it is thrown out.

    Args:
        name: says the content, so that equal names mean equal bytes.
        write: writes the whole copy to the stream it is given; what it raises passes through, and nothing is kept.
    """
    if name in _too_large:
        return None
    try:
        folder = user_cache("spooled")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, UserError) as error:
        return _without(name, error)
    path = folder / f"{name}{_COPY}"
    try:
        with locked(folder / f".lock-{name}", _WAIT_S):
            if not path.exists():
                _make(path, write)
                _make_room(folder, path)
            os.utime(path)
            return path.open("rb")
    except _TooLargeError as error:
        _too_large.add(name)
        return _without(name, error)
    except (OSError, StorageError) as error:
        return _without(name, error)


def _without(name: str, error: Exception) -> None:
    print(f"warning: no plain copy {name} of a source can be kept, so it is read slowly: {error}", file=sys.stderr)


def _make(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    # One name for a copy in the making: what a killed process left is written over.
    temporary = path.with_name(f".tmp-{path.name}")
    most = min(MOST_BYTES, shutil.disk_usage(path.parent).free // 2)
    try:
        with temporary.open("wb") as stream:
            write(_Bounded(stream, most))  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_room(folder: Path, newest: Path) -> None:
    with locked(folder / ".lock", _WAIT_S):
        found = []
        for path in folder.glob(f"*{_COPY}"):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= MOST_BYTES:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size
