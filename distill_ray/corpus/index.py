"""What planning needs of one source object, read once and cached in the root storage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from distill_ray.config import fingerprint
from distill_ray.corpus.containers import Decompressor, check_lines, container_of, locate, stored_pieces
from distill_ray.corpus.parquet import layout
from distill_ray.errors import UserError
from distill_ray.storage import NotFoundError, ObjectInfo, Storage

CACHE_PREFIX = "cache/sources/"
_FORMAT = 2
_READERS = 16
_MOST_FIRST_LINE = 64 * 2**20
"""Bytes of a first line beyond which its keys are not looked at."""


@dataclass(frozen=True)
class SourceIndex:
    """One source object: its content identity and where it can be cut."""

    sha256: str
    """Of the stored bytes, hex."""
    raw_bytes: int
    """Bytes before compression."""
    columns: list[str] | None
    """Keys of the first record, or columns of the schema; None where the first line is no JSON object, and for text."""
    cuts: list[int]
    """JSONL: first byte of each slice, every one the beginning of a line; the last slice ends at `raw_bytes`."""
    groups: list[int]
    """Parquet: uncompressed bytes of each row group."""
    group_rows: list[int]
    """Parquet: rows of each row group."""


class _LineScanner:
    """Finds in one pass the first line start at or after each multiple of `unit_bytes`, and the first line."""

    def __init__(self, unit_bytes: int) -> None:
        self._unit = unit_bytes
        self._want = unit_bytes
        self._first: bytearray | None = bytearray()
        self.cuts: list[int] = []
        self.raw_bytes = 0
        self.first_line = b""

    def feed(self, piece: bytes) -> None:
        if piece and not self.raw_bytes:
            self.cuts.append(0)
        while (newline := piece.find(b"\n", max(0, self._want - 1 - self.raw_bytes))) >= 0:
            cut = self.raw_bytes + newline + 1
            self.cuts.append(cut)
            self._want = (cut // self._unit + 1) * self._unit
        self.raw_bytes += len(piece)
        if self._first is not None:
            end = piece.find(b"\n")
            self._first += piece if end < 0 else piece[:end]
            if end >= 0:
                self.first_line, self._first = bytes(self._first), None
            elif len(self._first) > _MOST_FIRST_LINE:
                self._first = None

    def finish(self) -> None:
        if self._first is not None:
            self.first_line = bytes(self._first)
        if self.cuts and self.cuts[-1] == self.raw_bytes:
            self.cuts.pop()


def columns_of_line(line: bytes) -> list[str] | None:
    """Keys of a JSONL line; None where it is no JSON object."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # a dead letter when it is read
        return None
    return list(record) if isinstance(record, dict) else None


def _read(uri: str, info: ObjectInfo, unit_bytes: int) -> SourceIndex:
    digest = hashlib.sha256()
    container = container_of(uri)
    if container in ("parquet", "txt"):
        for stored in stored_pieces(uri, 0, info.size):
            digest.update(stored)
        columns, groups, rows = layout(uri) if container == "parquet" else (None, [], [])
        return SourceIndex(digest.hexdigest(), sum(groups) or info.size, columns, [], groups, rows)
    decompressor, scanner = Decompressor(uri), _LineScanner(unit_bytes)
    for stored in stored_pieces(uri, 0, info.size):
        digest.update(stored)
        for piece in decompressor.feed(stored):
            scanner.feed(piece)
    decompressor.finish()
    scanner.finish()
    check_lines(uri, scanner.first_line)
    columns = columns_of_line(scanner.first_line)
    return SourceIndex(digest.hexdigest(), scanner.raw_bytes, columns, scanner.cuts, [], [])


def _cache_key(uri: str, info: ObjectInfo) -> str:
    return f"{CACHE_PREFIX}{fingerprint({'uri': uri, 'version': info.version, 'size': info.size})}.json"


def _cached(cache: Storage, key: str, about: dict[str, Any]) -> SourceIndex | None:
    try:
        stored = json.loads(cache.get(key))
        if stored["about"] == about:
            return SourceIndex(**stored["index"])
    except NotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        pass  # A cache entry of another shape is only a miss: the source itself is at hand.
    return None


def index_source(
    uri: str, info: ObjectInfo, unit_bytes: int, cache: Storage | None, *, cached_only: bool = False
) -> SourceIndex:
    """The index of one source, from the cache where (uri, version, size) is known, else read in one pass.

    Raises:
        UserError: the source is damaged, or changed while it was read; or it is not cached, and it must be.
    """
    found = cached_index(uri, info, unit_bytes, cache) if cache else None
    if found is None and cached_only:
        raise UserError(f"corpus source {uri} is new or changed, and no capture has read it yet")
    if found is None:
        found = _read(uri, info, unit_bytes)
        store, name = locate(uri)
        after = store.head(name)
        if after is None or after.version != info.version:
            # Pieces of two versions would be cached as one content.
            raise UserError(f"corpus source {uri} changed while it was read; run again when it is whole")
        if cache:
            keep_index(cache, uri, info, unit_bytes, found)
    return found


def cached_index(uri: str, info: ObjectInfo, unit_bytes: int, cache: Storage) -> SourceIndex | None:
    """The index of one source version from the cache; None where it is not there, and nothing is read for it."""
    return _cached(cache, _cache_key(uri, info), _about(uri, info, unit_bytes))


def keep_index(cache: Storage, uri: str, info: ObjectInfo, unit_bytes: int, index: SourceIndex) -> None:
    """Put the index of one source version into the cache."""
    text = json.dumps({"about": _about(uri, info, unit_bytes), "index": asdict(index)})
    cache.put(_cache_key(uri, info), text.encode())


def indexed_sources(cache: Storage) -> Iterator[tuple[str, str]]:
    """URI and SHA-256 of every version of every source that was ever indexed; nothing of a damaged entry."""

    def one(info: ObjectInfo) -> tuple[str, str] | None:
        try:
            stored = json.loads(cache.get(info.key))
            return stored["about"]["uri"], stored["index"]["sha256"]
        except (NotFoundError, ValueError, KeyError, TypeError):
            return None  # planning takes such an entry for a miss, too

    with ThreadPoolExecutor(_READERS) as pool:
        yield from filter(None, pool.map(one, cache.list(CACHE_PREFIX)))


def _about(uri: str, info: ObjectInfo, unit_bytes: int) -> dict[str, Any]:
    about: dict[str, Any] = {"format": _FORMAT, "uri": uri, "version": info.version, "size": info.size}
    return about | {"unit_bytes": unit_bytes} if container_of(uri).startswith("jsonl") else about
