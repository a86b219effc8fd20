"""A seekable stream over one version of an S3 object."""

from __future__ import annotations

import io
from collections.abc import Callable

_SMALLEST, _LARGEST = 256 << 10, 8 << 20


class RangeStream(io.RawIOBase):
    """Raw reads become ranged requests; wrapped in `io.BufferedReader` by `open_input`.

    A read that goes on where the last request ended doubles the request up to 8 MiB; a read elsewhere starts again
    at 256 KiB. So a scan costs few requests and a Parquet reader that jumps about does not pay for bytes it skips.

    Args:
        fetch: (start, length) → exactly those bytes, or an error if the object has changed since it was opened.
        size: bytes of the object.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch, self._size = fetch, size
        self._position = 0
        self._start, self._held = 0, b""
        self._window = _SMALLEST

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        at = self._position - self._start
        if not 0 <= at < len(self._held):
            self._fill(len(buffer), sequential=at == len(self._held))
            at = 0
        piece = memoryview(self._held)[at : at + wanted]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _fill(self, wanted: int, *, sequential: bool) -> None:
        # The very first read is at 0 = the end of nothing held: a footer reader never makes it, a scan does.
        self._window = min(self._window * 2, _LARGEST) if sequential else _SMALLEST
        length = min(max(wanted, self._window), self._size - self._position)
        self._start, self._held = self._position, self._fetch(self._position, length)
