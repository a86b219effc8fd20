"""What a source object is made of: containers, decompression, and records cut out of a byte range."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from typing import IO, Protocol

from distill_ray.corpus.spool import open_copy
from distill_ray.errors import UserError
from distill_ray.storage import Storage, open_storage, split_uri

CONTAINERS = {
    **{f".{name}": "jsonl" for name in ("jsonl", "ndjson", "json")},
    **{f".{name}.{packed}": f"jsonl.{packed}" for packed in ("gz", "zst") for name in ("jsonl", "ndjson", "json")},
    ".parquet": "parquet",
    ".txt": "txt",
}
PIECE_BYTES = 4 * 2**20
"""Stored bytes of one ranged read."""
_FEED_BYTES = 256 * 2**10
"""Compressed bytes fed at once: a high ratio must not turn one ranged read into gigabytes."""


def container_of(uri: str) -> str:
    """The container that the extension names.

    Raises:
        UserError: the extension is not a known one.
    """
    name = uri.rpartition("/")[2].lower()
    for extension, container in CONTAINERS.items():
        if name.endswith(extension):
            return container
    raise UserError(
        f"corpus source {uri}: its extension names no known format; use one of {', '.join(CONTAINERS)} "
        "or narrow the glob in corpus.sources"
    )


def check_lines(uri: str, beginning: bytes) -> None:
    """Raises UserError where a source of lines begins with a JSON array: no line of it is a record."""
    if beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        raise UserError(
            f"corpus source {uri} begins with '[': it is a JSON array, and one record a line is read; "
            "write it as JSON lines (jq -c '.[]')"
        )


def locate(uri: str) -> tuple[Storage, str]:
    """The store and key of one source object."""
    folder, key = split_uri(uri)
    return open_storage(folder), key


def stored_pieces(uri: str, start: int, size: int, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """The stored bytes [start, size) of an object, in pieces of at most `piece_bytes`.

    Raises:
        UserError: the object ends before `size`; it was replaced while it was read.
    """
    store, key = locate(uri)
    while start < size:
        piece = store.get_range(key, start, min(piece_bytes, size - start))
        if not piece:
            raise UserError(
                f"corpus source {uri} ended at byte {start:,} of {size:,}: it changed while it was read; run again"
            )
        start += len(piece)
        yield piece


class _OneStream(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class Decompressor:
    """Bytes of concatenated gzip members or zstd frames; the identity for plain containers.

    zstandard's own stream reader takes a truncated file for a short one, without an error: hence one object a frame,
    and its `eof`.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._kind = container_of(uri).rpartition(".")[2]
        self._stream: _OneStream | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Uncompressed pieces of the next stored bytes. Raises UserError where they are damaged."""
        import zstandard

        if self._kind not in ("gz", "zst"):
            yield data
            return
        for start in range(0, len(data), _FEED_BYTES):
            try:
                yield self._feed(data[start : start + _FEED_BYTES])
            except (zlib.error, zstandard.ZstdError) as error:
                raise UserError(f"corpus source {self._uri} is damaged: {error}; make it again") from None

    def _feed(self, data: bytes) -> bytes:
        found = []
        while data:
            if self._stream is None:
                # Tools that write to tape blocks pad a gzip file with zeros.
                data = data.lstrip(b"\0") if self._kind == "gz" else data
                if not data:
                    break
                self._stream = self._open()
            found.append(self._stream.decompress(data))
            data = b""
            if self._stream.eof:
                data, self._stream = self._stream.unused_data, None
        return b"".join(found)

    def _open(self) -> _OneStream:
        if self._kind == "gz":
            return zlib.decompressobj(wbits=31)
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    def finish(self) -> None:
        """Raises UserError where the last member or frame is cut off."""
        if self._stream is not None:
            raise UserError(
                f"corpus source {self._uri} is truncated: its last {self._kind} stream has no end; upload it again"
            )


def uncompressed_pieces(uri: str, size: int, start: int = 0) -> Iterator[bytes]:
    """Uncompressed bytes of a source from offset `start` to its end.

    A compressed source is decompressed from its beginning, so only a reader of its first bytes should come here; see
    `plain_copy`.
    """
    decompressor = Decompressor(uri)
    if container_of(uri) in ("jsonl", "txt"):
        yield from stored_pieces(uri, start, size)
        return
    skip = start
    for stored in stored_pieces(uri, 0, size):
        for piece in decompressor.feed(stored):
            if len(piece) <= skip:
                skip -= len(piece)
                continue
            yield piece[skip:]
            skip = 0
    decompressor.finish()


def plain_copy(uri: str, size: int, sha256: str) -> IO[bytes] | None:
    """This machine's decompressed copy of a compressed source, as an open file; None where it cannot be kept.

    Raises:
        UserError: the source is damaged, or its stored bytes are not those of `sha256`.
    """

    def write(out: IO[bytes]) -> None:
        digest, decompressor = hashlib.sha256(), Decompressor(uri)
        for stored in stored_pieces(uri, 0, size):
            digest.update(stored)
            for piece in decompressor.feed(stored):
                out.write(piece)
        decompressor.finish()
        if digest.hexdigest() != sha256:
            raise UserError(f"corpus source {uri} changed since the run was planned; run again to plan it anew")

    return open_copy(sha256, write)


def _pieces_of(copy: IO[bytes], start: int) -> Iterator[bytes]:
    copy.seek(start)
    return iter(lambda: copy.read(_FEED_BYTES), b"")


def read_lines(uri: str, size: int, start: int, stop: int, sha256: str = "") -> list[bytes]:
    """The lines whose first byte lies in [start, stop) of the uncompressed bytes, without their line ends.

    Args:
        uri: a JSONL source.
        size: its stored bytes.
        start: first byte of the range.
        stop: one past its last byte; the last line is read to its own end, wherever that lies.
        sha256: of the stored bytes; with it, a compressed source is read by its plain copy.
    """
    if start >= stop:
        return []
    begin = max(0, start - 1)  # The byte before tells whether a line begins at `start`.
    # The first slice alone needs no copy, and most sources have one slice.
    copy = plain_copy(uri, size, sha256) if start > 0 and sha256 and container_of(uri) != "jsonl" else None
    if copy is None:
        return lines_of(uncompressed_pieces(uri, size, begin), begin, start, stop)
    with copy:
        return lines_of(_pieces_of(copy, begin), begin, start, stop)


def lines_of(pieces: Iterator[bytes], begin: int, start: int, stop: int) -> list[bytes]:
    """`read_lines` of pieces whose first byte lies at `begin`: the one before `start`, or 0."""
    buffer, whole = bytearray(), False
    for piece in pieces:
        seen = len(buffer)
        buffer += piece
        # Searched from what is new, so that one line of many megabytes stays linear.
        end = buffer.find(b"\n", max(seen, stop - 1 - begin))
        if end >= 0:
            del buffer[end:]
            whole = True
            break
    data = bytes(buffer)
    if start > 0:
        first = data.find(b"\n")
        if first < 0 or begin + first + 1 >= stop:
            return []
        data = data[first + 1 :]
    lines = data.split(b"\n")
    if not whole and not lines[-1]:
        lines.pop()  # What follows the last newline of the source is no line.
    return lines
