"""Files that appear whole or not at all, and what an operating system's refusal means to the user."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_ray.storage.base import StorageError

TEMPORARY, LOCK = ".tmp-", ".lock-"
_ATTEMPTS = 100


def is_hidden(name: str) -> bool:
    """True for the temporary and lock files that storage keeps beside its objects."""
    return name.startswith((TEMPORARY, LOCK))


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A fresh empty file with a hidden name in `path`'s folder, made too; what is still there at the end goes.

    A killed process leaves its temporary file behind; nothing lists or reads it.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    for attempt in range(_ATTEMPTS):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            break
        except FileNotFoundError:
            # A delete removed the folder, empty, in between; not once this file is in it. Some file systems (/proc,
            # a stale mount) answer so for ever.
            if attempt == _ATTEMPTS - 1:
                raise
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def replace_durably(temporary: Path, path: Path) -> None:
    """fsync, rename over `path`, fsync the folder, so that a power cut leaves the old file or the new one."""
    _sync(temporary)
    try:
        old = path.stat().st_mtime_ns
    except FileNotFoundError:
        old = 0
    if temporary.stat().st_mtime_ns <= old:
        # The kernel's clock ticks every 4 ms: two writes within one tick would have one version.
        os.utime(temporary, ns=(old + 1, old + 1))
    os.replace(temporary, path)
    _sync(path.parent)


def create_durably(temporary: Path, path: Path) -> None:
    """Like `replace_durably`, but raises FileExistsError where there is a `path`: a link never replaces."""
    _sync(temporary)
    os.link(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made if needed), against threads and processes alike.

    The kernel drops it when the holder dies, but not when it is paused: StorageError after `wait_s` seconds. The
    file stays: removing it would let two holders lock two inodes.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _flock(descriptor, path, wait_s)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, path: Path, wait_s: float) -> None:
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise StorageError(
                    f"another process has held {path} locked for {wait_s:.0f} s; it may be paused: resume or kill "
                    f"it (`fuser -v {path}` names it), then run again"
                ) from None
            time.sleep(random.uniform(0.001, 0.02))


def explain_os(error: OSError, path: Path, action: str, size: int | None = None) -> StorageError:
    """A StorageError with the fact, the numbers and the remedy for `error`, met on `action` at `path`."""
    wanted = "" if size is None else f" ({size:,} bytes)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        usage = shutil.disk_usage(_existing(path))
        return StorageError(
            f"disk full: cannot {action} {path}{wanted}; {usage.free:,} of {usage.total:,} bytes are free there "
            "(a quota may allow less); free some space or choose another folder, then run again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            f"cannot {action} {path}{wanted}: {error.strerror}; "
            f"give user {os.geteuid()} access to it or choose another folder"
        )
    return StorageError(
        f"cannot {action} {path}{wanted}: {error.strerror or error} (errno {error.errno}); "
        "mend the path or choose another folder"
    )


def write_at(descriptor: int, data: bytes, offset: int, path: Path) -> None:
    """All of `data` into an open file at `offset`; `path` is for messages. Raises StorageError.

    A disk that is nearly full takes a part of it, and says so by a number alone.
    """
    left = memoryview(data)
    try:
        while left:
            written = os.pwrite(descriptor, left, offset)
            left, offset = left[written:], offset + written
    except OSError as error:
        raise explain_os(error, path, "write", len(data)) from error


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that `path` lies, or will lie, on."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
