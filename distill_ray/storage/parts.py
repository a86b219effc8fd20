"""A folder of large objects brought to disk in parts, many at once; a killed download goes on with the parts it had."""

from __future__ import annotations

import hashlib
import math
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from distill_ray.storage.atomic import TEMPORARY, free_bytes, replace_durably, write_at
from distill_ray.storage.base import ObjectInfo, StorageError

if TYPE_CHECKING:
    from distill_ray.storage.s3 import S3Storage

PART_BYTES = 16 << 20
_AT_ONCE = 16
_MIB = 1 << 20
_UPLOAD_PARTS = tuple(n * _MIB for n in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512, 1024))
"""Part sizes that upload programs use."""


def download_folder(storage: S3Storage, objects: list[ObjectInfo], folder: Path) -> None:
    """Bring objects to `folder`, each under its key; files that are there are whole and stay.

    One process at a time may do this to one folder. Every object is read at the version it was listed at.

    Raises:
        StorageError: too little room on the disk (found before anything is read), or the store refuses.
        IntegrityError: an object was overwritten meanwhile.
    """
    files = [_PartialFile(folder / o.key, o) for o in objects if not is_there(folder / o.key, o.size)]
    _require_room(files, folder)
    with ThreadPoolExecutor(_AT_ONCE, "stage") as pool:
        # A stop is raised inside wait(): without the cancellation, leaving the block would first fetch all the rest.
        try:
            waiting = [pool.submit(file.fetch, storage, part) for file in files for part in file.missing()]
            for future in wait(waiting, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        list(pool.map(lambda file: file.finish(storage), files))


def is_there(path: Path, size: int) -> bool:
    """Whether the file is there at that size."""
    return path.exists() and path.stat().st_size == size


def _require_room(files: list[_PartialFile], folder: Path) -> None:
    wanted = sum(file.missing_bytes() for file in files)
    free = free_bytes(folder)
    if wanted > free:
        raise StorageError(
            f"{folder} needs {wanted:,} more bytes and its disk has {free:,} free; free some space, or put the cache "
            "on another disk (XDG_CACHE_HOME), then run again"
        )


class _PartialFile:
    """A file that grows part by part, with a journal of the parts that are in it and their SHA-256."""

    def __init__(self, path: Path, info: ObjectInfo) -> None:
        self._path, self._info = path, info
        self._partial = path.with_name(f"{TEMPORARY}part-{path.name}")
        self._journal = path.with_name(f"{TEMPORARY}done-{path.name}")
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._done = set(self._recorded())

    def missing(self) -> list[int]:
        """Indices of the parts that are still to be read."""
        return [i for i in range(math.ceil(self._info.size / PART_BYTES)) if i not in self._done]

    def missing_bytes(self) -> int:
        return sum(self._span(part)[1] for part in self.missing())

    def fetch(self, storage: S3Storage, part: int) -> None:
        """Read one part, put it in its place, and only then into the journal."""
        start, length = self._span(part)
        data = storage.get_range(self._info.key, start, length, self._info.version)
        if len(data) != length:
            raise StorageError(f"{storage.uri}/{self._info.key}: {len(data)} of {length} bytes came; run again")
        descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            write_at(descriptor, data, start, self._partial)
        finally:
            os.close(descriptor)
        line = f"{part} {hashlib.sha256(data).hexdigest()}\n"
        with self._lock, self._journal.open("a") as journal:
            journal.write(line)

    def finish(self, storage: S3Storage) -> None:
        """Check the whole file against the store's ETag where that is a checksum, and give it its name.

        Raises:
            StorageError: it is not; the next attempt reads it anew.
        """
        if not self._info.size:
            self._partial.touch()
        etag = self._info.version
        if agrees(self._partial, etag, storage.encrypted_by_key(self._info.key)) is False:
            self._journal.unlink(missing_ok=True)
            raise StorageError(
                f"{storage.uri}/{self._info.key}: what came does not have its MD5 {etag}; it was damaged on its way or "
                "on this disk: run again"
            )
        replace_durably(self._partial, self._path)
        self._journal.unlink(missing_ok=True)

    def _span(self, part: int) -> tuple[int, int]:
        start = part * PART_BYTES
        return start, min(PART_BYTES, self._info.size - start)

    def _recorded(self) -> Iterator[int]:
        """Parts of a killed attempt that are on disk as they came: a power cut may have lost some."""
        if not (self._journal.exists() and self._partial.exists()):
            return
        with self._partial.open("rb") as stream:
            # A power cut may leave half a line, or zeros.
            for number, digest in re.findall(r"^(\d+) ([0-9a-f]{64})$", self._journal.read_text(), re.MULTILINE):
                stream.seek(int(number) * PART_BYTES)
                if hashlib.sha256(stream.read(PART_BYTES)).hexdigest() == digest:
                    yield int(number)


def agrees(path: Path, etag: str, encrypted_by_key: bool) -> bool | None:
    """Whether a file has the content that an ETag stands for; None where the ETag does not tell.

    It is the MD5 of an object written in one piece, and of one written in n parts the MD5 of their MD5s, and "-n": then
    the size of the parts is found by trying. Encrypted by a key of KMS, it is neither.
    """
    digest, _, count = etag.partition("-")
    if encrypted_by_key or not re.fullmatch("[0-9a-f]{32}", digest):
        return None
    size = path.stat().st_size
    if not count:
        return _piece_md5(path, 0, size).hex() == digest
    for part in _UPLOAD_PARTS:
        if math.ceil(size / part) == int(count):
            pieces = b"".join(_piece_md5(path, start, part) for start in range(0, size, part))
            if hashlib.md5(pieces, usedforsecurity=False).hexdigest() == digest:
                return True
    return None


def _piece_md5(path: Path, start: int, length: int) -> bytes:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        stream.seek(start)
        while length > 0 and (data := stream.read(min(length, _MIB))):
            digest.update(data)
            length -= len(data)
    return digest.digest()
