"""Files on their way to the store and back, several at once; each is moved in parts, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from distill_ray.checkpoints.manifest import StoredFile
from distill_ray.lease import file_sha256
from distill_ray.storage import Storage

S = TypeVar("S")
T = TypeVar("T")
_FILES_AT_ONCE = 8


def at_once(act: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """`act` on every item, in threads; after the first one that raises, no other is begun, and it is raised."""
    with ThreadPoolExecutor(_FILES_AT_ONCE, "checkpoint-file") as pool:
        begun = [pool.submit(act, item) for item in items]
        try:
            done, _ = wait(begun, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for future in done:
            future.result()
        return [future.result() for future in begun]


def store_file(storage: Storage, prefix: str, named: tuple[str, Path]) -> StoredFile:
    """Store a (name, file) under `prefix`."""
    name, path = named
    # Hashed before it leaves the local disk: a body corrupted on its way is found when it is restored.
    file = StoredFile(name, path.stat().st_size, file_sha256(path))
    storage.upload(path, f"{prefix}/{name}")
    return file
