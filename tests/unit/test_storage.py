"""The storage contract, the same over a local folder and a real S3 server."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill_ray.errors import IntegrityError
from distill_ray.storage import (
    ConflictError,
    NotFoundError,
    Storage,
    check_access,
    open_storage,
)
from distill_ray.storage.atomic import replace_durably
from distill_ray.storage.local import local_version
from distill_ray.storage.s3_input import RangeStream


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri")


@pytest.fixture
def storage(root: str) -> Storage:
    return open_storage(root)


def test_round_trip_and_overwrite(storage: Storage) -> None:
    storage.put("a/b.bin", b"one")
    storage.put("a/b.bin", b"three")
    storage.put("empty", b"")
    assert storage.get("a/b.bin") == b"three"
    assert storage.get("empty") == b""
    data, version = storage.get_versioned("a/b.bin")
    info = storage.head("a/b.bin")
    assert info is not None
    assert (info.key, info.size, info.version) == ("a/b.bin", len(data), version)
    assert abs(info.modified - time.time()) < 60


def test_ranges_end_where_the_object_ends(storage: Storage) -> None:
    storage.put("r", b"0123456789")
    assert storage.get_range("r", 2, 3) == b"234"
    assert storage.get_range("r", 8, 100) == b"89"
    assert storage.get_range("r", 10, 5) == b""
    assert storage.get_range("r", 50, 5) == b""
    assert storage.get_range("r", 3, 0) == b""


def test_absent_objects(storage: Storage, tmp_path: Path) -> None:
    storage.put("folder/x", b"x")
    for key in ("none", "folder", "folder/x/below", "no/such/folder"):
        assert storage.head(key) is None
        for read in (storage.get, storage.get_versioned, storage.open_input):
            with pytest.raises(NotFoundError, match=key):
                read(key)
        with pytest.raises(NotFoundError, match=key):
            storage.get_range(key, 0, 1)
        with pytest.raises(NotFoundError, match=key):
            storage.download(key, tmp_path / "out")
        storage.delete(key)
    assert not (tmp_path / "out").exists()
    assert storage.get("folder/x") == b"x"


@pytest.mark.parametrize("key", ["", "/a", "a//b", "a/../b", ".", "a/.tmp-1", "a/"])
def test_keys_that_could_leave_the_store_are_refused(storage: Storage, key: str) -> None:
    with pytest.raises(ValueError, match="bad storage key"):
        storage.put(key, b"")


def test_listing_is_by_prefix_in_key_order(storage: Storage) -> None:
    keys = ["t/a-b", "t/a.b", "t/a/b", "t/a0", "t/a/b.c", "t/ab", "t/é +%#?", "u"]
    for key in reversed(keys):
        storage.put(key, key.encode())
    listed = list(storage.list(""))
    assert {each.key for each in listed} == set(keys)
    if not storage.uri.startswith("s3://"):  # SeaweedFS lists folder by folder: "a/b" before "a-b"
        assert [each.key for each in listed] == sorted(keys, key=str.encode)
    assert [each.key for each in storage.list("t/a/")] == ["t/a/b", "t/a/b.c"]
    assert sorted(each.key for each in storage.list("t/a")) == sorted(keys[:6])
    assert list(storage.list("none/")) == []
    for each in listed:
        assert storage.head(each.key) == each


def test_listing_goes_past_one_page(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.put(f"p/{i:04}", b""), range(1010)))
    assert [each.key for each in storage.list("p/")] == [f"p/{i:04}" for i in range(1010)]


def test_deleted_is_gone_and_its_folder_writable_again(storage: Storage) -> None:
    storage.put("d/e/f", b"1")
    storage.delete("d/e/f")
    storage.delete("d/e/f")
    assert storage.head("d/e/f") is None
    assert list(storage.list("")) == []
    storage.put("d/e/f", b"2")
    assert storage.get("d/e/f") == b"2"


def test_conditional_writes(storage: Storage) -> None:
    first = storage.put_if("c", b"1", None)
    assert storage.get_versioned("c") == (b"1", first)
    with pytest.raises(ConflictError, match="nothing was written"):
        storage.put_if("c", b"2", None)
    second = storage.put_if("c", b"2", first)
    assert second != first
    with pytest.raises(ConflictError):
        storage.put_if("c", b"3", first)
    storage.put("c", b"4")
    with pytest.raises(ConflictError):
        storage.put_if("c", b"5", second)
    assert storage.get("c") == b"4"
    with pytest.raises(ConflictError):
        storage.put_if("never", b"1", first)
    assert storage.head("never") is None


def test_eight_threads_race_and_one_wins_each_round(storage: Storage) -> None:
    version: str | None = None
    # SeaweedFS holds losers back for a second each.
    for turn in range(2 if storage.uri.startswith("s3://") else 8):
        barrier = threading.Barrier(8)

        def attempt(
            i: int, at: str | None = version, turn: int = turn, barrier: threading.Barrier = barrier
        ) -> tuple[bytes, str] | None:
            data = f"{turn}-{i}".encode()
            barrier.wait()
            try:
                return data, storage.put_if("race", data, at)
            except ConflictError:
                return None

        with ThreadPoolExecutor(8) as pool:
            won = [each for each in pool.map(attempt, range(8)) if each]
        assert len(won) == 1
        assert storage.get_versioned("race") == won[0]
        version = won[0][1]


def test_local_versions_of_equal_size_differ_within_one_clock_tick(tmp_path: Path) -> None:
    old, new = tmp_path / "k", tmp_path / "new"
    for path in (old, new):
        path.write_bytes(b"same size")
        os.utime(path, ns=(10**18, 10**18))
    before = local_version(old.stat())
    replace_durably(new, old)
    assert local_version(old.stat()) != before


def test_pickled_storage_works_in_another_process(storage: Storage) -> None:
    storage.put("k", b"v")
    blob = pickle.dumps(storage)
    assert b"tester" not in blob
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).get('k').decode())"
    done = subprocess.run([sys.executable, "-c", code], input=blob, capture_output=True, check=True)
    assert done.stdout.strip() == b"v"


def test_upload_and_download(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_bytes(os.urandom(100_000))
    storage.upload(source, "f/x")
    storage.download("f/x", target)
    storage.download("f/x", target)
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_large_objects_go_in_parts(s3_uri: str, tmp_path: Path) -> None:
    storage, path = open_storage(s3_uri), tmp_path / "big"
    data = os.urandom(1 << 20) * 65
    path.write_bytes(data)
    storage.upload(path, "big")
    info = storage.head("big")
    assert info is not None
    assert info.version.endswith("-5")  # five parts of 16 MiB
    storage.download("big", path)
    assert path.read_bytes() == data


def test_open_input_seeks_and_reads(storage: Storage) -> None:
    lines = [b"line %d\n" % i for i in range(200_000)]
    data = b"".join(lines)
    storage.put("text", data)
    with storage.open_input("text") as stream:
        assert stream.readable()
        assert stream.seekable()
        assert stream.seek(-7, io.SEEK_END) == len(data) - 7
        assert stream.read() == data[-7:]
        stream.seek(1_000_000)
        assert stream.read(300_000) == data[1_000_000:1_300_000]
        assert stream.tell() == 1_300_000
        stream.seek(0)
        assert stream.read(5) == data[:5]
        stream.seek(0)
        assert list(stream) == lines
        assert stream.read(1) == b""


def test_a_scan_costs_few_requests_and_a_jump_few_bytes() -> None:
    data, asked = os.urandom(1 << 20) * 40, []

    def fetch(start: int, length: int) -> bytes:
        asked.append(length)
        return data[start : start + length]

    with io.BufferedReader(RangeStream(fetch, len(data)), 256 << 10) as stream:
        assert b"".join(iter(lambda: stream.read(100_000), b"")) == data
        assert sum(asked) == len(data)
        assert len(asked) <= 10
        asked.clear()
        for start in (30_000_000, 5_000_000, 20_000_000, 12_345):
            stream.seek(start)
            assert stream.read(1000) == data[start : start + 1000]
        assert asked == [256 << 10] * 4
        asked.clear()
        stream.seek(10_000_000)
        assert stream.read(20_000_000) == data[10_000_000:30_000_000]
        assert len(asked) <= 2


def test_open_input_serves_pyarrow(storage: Storage) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"n": list(range(50_000)), "t": [f"text {i}" for i in range(50_000)]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=10_000)
    storage.put("x.parquet", sink.getvalue())
    with storage.open_input("x.parquet") as stream:
        file = pq.ParquetFile(stream)
        assert file.read_row_group(3).equals(table.slice(30_000, 10_000))
        assert file.read(columns=["n"]).num_rows == 50_000


def test_an_object_overwritten_under_a_reader(storage: Storage) -> None:
    """S3 refuses the mixture; a local reader goes on with the old file. Neither sees a mixture."""
    old, new = b"a" * 2_000_000, b"b" * 2_000_000
    storage.put("k", old)
    with storage.open_input("k") as stream:
        assert stream.read(10) == b"a" * 10
        storage.put("k", new)
        if storage.uri.startswith("s3://"):
            with pytest.raises(IntegrityError, match=r"k was overwritten while it was being read"):
                stream.read()
        else:
            assert stream.read() == old[10:]


def test_readers_see_whole_objects_only(storage: Storage) -> None:
    """A writer that replaces an object again and again, killed in the middle, never shows a mixture."""
    size = 300_000
    storage.put("k", b"0" * size)
    code = (
        "import sys, itertools\nfrom distill_ray.storage import open_storage\ns = open_storage(sys.argv[1])\n"
        "for i in itertools.count():\n    s.put('k', b'%d' % (i % 10) * int(sys.argv[2]))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, storage.uri, str(size)])
    try:
        seen: set[int] = set()
        until = time.monotonic() + 120
        while len(seen) < 4 and time.monotonic() < until:
            data = storage.get("k")
            assert len(data) == size
            assert len(set(data)) == 1
            seen.add(data[0])
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert len(seen) == 4
    assert len(set(storage.get("k"))) == 1
    assert [each.key for each in storage.list("")] == ["k"]


def test_check_access_passes_and_leaves_nothing(root: str) -> None:
    check_access(root)
    assert list(open_storage(root).list("")) == []
