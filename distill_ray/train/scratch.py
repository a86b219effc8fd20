"""Local folders for gigabytes that are on their way, which outlive a killed worker by no more than the next one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from distill_ray.storage.atomic import explain_os, free_bytes

_PREFIX = "distill-ray-scratch-"
_SETTLED_S = 60.0
"""Age below which a folder is left alone: another process may have made it and not locked it yet."""

_FULL_BYTES = 1 << 20
"""Free bytes below which a failed write is put down to the disk."""


@contextmanager
def writing_under(folder: Path) -> Iterator[None]:
    """Raises StorageError where what is written under `folder` finds the disk full, in whatever words.

    torch's writers report it as a RuntimeError ("unexpected pos 576 vs 534"), safetensors by an error of its own,
    neither with an errno.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or free_bytes(folder) < _FULL_BYTES
        if not full:
            raise
        raise explain_os(OSError(errno.ENOSPC, "no space left"), folder, "write") from error


class Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary folder. What killed processes left of theirs is removed before this one is made.

    A worker that is killed leaves its share of a checkpoint behind, and a cluster that loses workers now and then would
    fill its disks. The kernel drops a process's lock however it ends, so a folder that can be locked is nobody's.

    Args:
        purpose: a word in the folder's name.
    """

    def __init__(self, purpose: str) -> None:
        _sweep()
        super().__init__(prefix=f"{_PREFIX}{purpose}-")
        self._lock = os.open(self.name, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def cleanup(self) -> None:
        super().cleanup()
        os.close(self._lock)


def _sweep() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(lock).st_mtime > _SETTLED_S:
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:  # its process lives
            continue
        finally:
            os.close(lock)
