"""The bytes of a target object: a Parquet file in which every byte is covered by a digest.

    PAR1 │ row group 0 │ row group 1 │ … │ seal │ footer │ footer length │ PAR1

The seal (magic + digest) covers everything after itself; the footer's metadata holds the end and the digest of every
row group. So a range read checks exactly the bytes it fetched, and a whole read checks all of them. Parquet readers
find the footer from the end of the file and ignore the seal.
"""

from __future__ import annotations

import bisect
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_ray.errors import IntegrityError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"PAR1"
_SEAL_MAGIC = b"DRS1"
_DIGEST = 16
_SEAL = len(_SEAL_MAGIC) + _DIGEST
_END = 8  # footer length (4 bytes, little-endian) and magic
TAIL_GUESS = 128 * 1024
"""Bytes fetched from the end of an object in the hope that they hold its whole footer."""
Fetch = Callable[[int, int], "bytes | memoryview"]
"""(start, length) → those bytes of the object, fewer at its end."""
REMEDY = "delete the object and run capture again: only this unit is redone"


def digest(data: Buffer) -> str:
    """32 hex digits of SHA-256 over raw bytes; processors have instructions for it."""
    return hashlib.sha256(data).hexdigest()[: 2 * _DIGEST]


def footer_start(parquet: bytes) -> int:
    """Offset of the footer in a finished Parquet file."""
    return len(parquet) - _END - int.from_bytes(parquet[-_END:-4], "little")


def seal(parquet: bytes) -> bytes:
    """A finished Parquet file with the seal put before its footer. Offsets inside do not move."""
    at = footer_start(parquet)
    view = memoryview(parquet)
    return b"".join([view[:at], _SEAL_MAGIC, bytes.fromhex(digest(view[at:])), view[at:]])


@dataclass(frozen=True)
class Region:
    """Raw bytes of one row group."""

    start: int
    stop: int
    digest: str


class Window(io.RawIOBase):
    """A read-only file of which only some ranges have been fetched; reading outside them is an error."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._at = 0
        self._parts: dict[int, memoryview] = {}
        self._starts: list[int] = []

    def add(self, start: int, data: Buffer) -> None:
        """Make [start, start + len(data)) readable."""
        if start not in self._parts:
            bisect.insort(self._starts, start)
        self._parts[start] = memoryview(data)

    def drop(self, start: int) -> None:
        """Forget the range that was added at `start`."""
        del self._parts[start]
        self._starts.remove(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        out = memoryview(buffer).cast("B")
        i = bisect.bisect_right(self._starts, self._at) - 1
        part = self._parts[self._starts[i]] if i >= 0 else memoryview(b"")
        offset = self._at - self._starts[i] if i >= 0 else 0
        n = max(0, min(len(out), len(part) - offset))
        if n == 0 and len(out) and self._at < self._size:
            raise OSError(f"bytes from {self._at} were not fetched")
        out[:n] = part[offset : offset + n]
        self._at += n
        return n


def open_sealed(size: int, fetch: Fetch, where: str) -> tuple[bytes, int]:
    """Fetch and check an object's footer.

    Args:
        size: bytes of the whole object.
        fetch: reads ranges of it.
        where: the object's name for messages.

    Returns:
        The checked footer as a Parquet file without row groups' bytes, and the offset at which the row groups end.

    Raises:
        IntegrityError: truncated, altered, or not a target object.
    """
    least = len(MAGIC) + _SEAL + _END
    if size < least:
        raise IntegrityError(f"{where}: {size} bytes, fewer than the {least} of an empty object; {REMEDY}")
    start = max(0, size - TAIL_GUESS)
    tail = fetch(start, size - start)
    if len(tail) != size - start or tail[-4:] != MAGIC:
        raise IntegrityError(f"{where}: its {size} bytes do not end like a Parquet file: truncated; {REMEDY}")
    sealed = size - _END - int.from_bytes(tail[-_END:-4], "little") - _SEAL
    if sealed < len(MAGIC):
        raise IntegrityError(f"{where}: its footer claims to be longer than its {size} bytes; {REMEDY}")
    if sealed < start:
        tail = b"".join([fetch(sealed, start - sealed), tail])
        start = sealed
    view = memoryview(tail)[sealed - start :]
    found = bytes(view[:_SEAL])
    expected = _SEAL_MAGIC + bytes.fromhex(digest(view[_SEAL:]))
    if found != expected:
        raise IntegrityError(
            f"{where}: footer digest is {expected[4:].hex()}, its seal says {found[4:].hex()}: altered, or not a "
            f"target object; {REMEDY}"
        )
    return MAGIC + view[_SEAL:], sealed


def check_region(data: Buffer, region: Region, where: str) -> None:
    """Raises IntegrityError unless `data` are the region's bytes."""
    n = memoryview(data).nbytes
    if n != region.stop - region.start:
        raise IntegrityError(
            f"{where}: {n} of the {region.stop - region.start} bytes at {region.start}: truncated; {REMEDY}"
        )
    if (got := digest(data)) != region.digest:
        raise IntegrityError(
            f"{where}: bytes {region.start}…{region.stop} have digest {got}, the footer says {region.digest}: "
            f"altered after writing; {REMEDY}"
        )
