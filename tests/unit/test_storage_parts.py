"""Folders staged in parts, on a real S3 server: a killed download goes on, damage and a full disk are seen."""

from __future__ import annotations

import hashlib
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from distill_ray.errors import IntegrityError
from distill_ray.storage import StorageError, open_storage, parts, stage_folder
from distill_ray.storage.s3 import S3Storage

PART = 10_000
DATA = np.random.default_rng(0).integers(0, 256, 95_000, np.uint8).tobytes()


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", PART)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Starts of the ranges that were read."""
    found, original = list[int](), S3Storage.get_range

    def counted(self: S3Storage, key: str, start: int, length: int, version: str | None = None) -> bytes:
        found.append(start)
        return original(self, key, start, length, version)

    monkeypatch.setattr(S3Storage, "get_range", counted)
    return found


@contextmanager
def reading_by(function: Callable[..., bytes]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Storage, "get_range", function)
        yield


def test_parts_make_the_object_and_an_empty_one(s3_uri: str, tmp_path: Path, reads: list[int]) -> None:
    storage = open_storage(s3_uri)
    storage.put("model.safetensors", DATA)
    storage.put("empty", b"")
    folder = stage_folder(s3_uri, tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == DATA
    assert (folder / "empty").read_bytes() == b""
    assert sorted(reads) == list(range(0, len(DATA), PART))
    assert [p.name for p in folder.rglob(".tmp-*")] == []


def test_a_download_that_broke_off_reads_only_what_is_missing_or_damaged(
    s3_uri: str, tmp_path: Path, reads: list[int]
) -> None:
    open_storage(s3_uri).put("w.bin", DATA)
    original = S3Storage.get_range

    def failing(self: S3Storage, key: str, start: int, length: int, version: str | None = None) -> bytes:
        if start == 50_000:
            raise StorageError("the store is away")
        return original(self, key, start, length, version)

    with reading_by(failing), pytest.raises(StorageError, match="the store is away"):
        stage_folder(s3_uri, tmp_path / "cache")
    (partial,) = (tmp_path / "cache").rglob(".tmp-part-w.bin")
    (journal,) = (tmp_path / "cache").rglob(".tmp-done-w.bin")
    lines = journal.read_text().splitlines()
    assert lines
    # As a power cut leaves it: a part that never reached the disk, and half a line.
    lost = int(lines[0].split()[0])
    with partial.open("r+b") as stream:
        stream.seek(lost * PART)
        stream.write(bytes(10))
    journal.write_text("\n".join(lines) + "\n\0\0\n7 abc")
    reads.clear()
    folder = stage_folder(s3_uri, tmp_path / "cache")
    assert (folder / "w.bin").read_bytes() == DATA
    kept = {int(line.split()[0]) for line in lines[1:]}
    assert sorted(reads) == [i * PART for i in range(10) if i not in kept]


def test_what_differs_from_its_checksum_is_read_anew(s3_uri: str, tmp_path: Path) -> None:
    open_storage(s3_uri).put("w.bin", DATA)
    original = S3Storage.get_range
    zeros = reading_by(lambda *a: bytes(len(original(*a))))
    with zeros, pytest.raises(StorageError, match="does not have its MD5"):
        stage_folder(s3_uri, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("w.bin"))
    assert (stage_folder(s3_uri, tmp_path / "cache") / "w.bin").read_bytes() == DATA


def test_an_object_overwritten_meanwhile_is_refused(s3_uri: str, tmp_path: Path) -> None:
    storage = open_storage(s3_uri)
    storage.put("w.bin", DATA)
    original = S3Storage.get_range

    def overwriting(self: S3Storage, key: str, start: int, length: int, version: str | None = None) -> bytes:
        storage.put("w.bin", DATA[::-1])
        return original(self, key, start, length, version)

    with reading_by(overwriting), pytest.raises(IntegrityError, match="was overwritten"):
        stage_folder(s3_uri, tmp_path / "cache")
    assert (stage_folder(s3_uri, tmp_path / "cache") / "w.bin").read_bytes() == DATA[::-1]


def test_too_little_room_is_found_before_anything_is_read(
    s3_uri: str, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_storage(s3_uri).put("w.bin", DATA)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100_000, 5_001, 94_999))
    with pytest.raises(StorageError, match=r"needs 95,000 more bytes and its disk has 94,999 free"):
        stage_folder(s3_uri, tmp_path / "cache")
    assert reads == []


def test_etags_of_uploads_in_parts_are_understood(tmp_path: Path) -> None:
    data = DATA * 200  # 19 MB
    path = tmp_path / "w"
    path.write_bytes(data)
    pieces = [data[i : i + (8 << 20)] for i in range(0, len(data), 8 << 20)]
    sums = b"".join(hashlib.md5(piece).digest() for piece in pieces)
    etag = f"{hashlib.md5(sums).hexdigest()}-{len(pieces)}"
    assert parts.agrees(path, etag, encrypted_by_key=False) is True
    assert parts.agrees(path, etag, encrypted_by_key=True) is None
    assert parts.agrees(path, f"{'0' * 32}-3", encrypted_by_key=False) is None, "parts of another size, perhaps"
    assert parts.agrees(path, hashlib.md5(data).hexdigest(), encrypted_by_key=False) is True
    assert parts.agrees(path, "0" * 32, encrypted_by_key=False) is False
    assert parts.agrees(path, "no-md5", encrypted_by_key=False) is None
