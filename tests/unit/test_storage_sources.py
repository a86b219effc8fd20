"""URIs, globs and staged folders."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill_ray.errors import UserError
from distill_ray.storage import (
    glob_sources,
    open_storage,
    split_uri,
    stage_folder,
)
from distill_ray.storage.sources import glob_to_regex


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri")


def test_split_uri() -> None:
    assert split_uri("s3://bucket/p/q/x.parquet") == ("s3://bucket/p/q", "x.parquet")
    assert split_uri("s3://bucket/x") == ("s3://bucket", "x")
    assert split_uri("/a/b/c.txt") == ("/a/b", "c.txt")
    assert split_uri("c.txt") == (".", "c.txt")
    for uri in ("s3://bucket", "s3://bucket/", "/"):
        with pytest.raises(UserError, match="no object"):
            split_uri(uri)


FILES = ("a.txt", "b.txt", "b.json", "d/c.txt", "d/e/f.txt", "d/e/g[1].txt", ".h.txt", ".i/j.txt")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("[!a]*", ["b.json", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "d/c.txt", "d/e/f.txt", "d/e/g[1].txt"]),
        ("**", ["a.txt", "b.json", "b.txt", "d/c.txt", "d/e/f.txt", "d/e/g[1].txt"]),
        ("d/**/f.txt", ["d/e/f.txt"]),
        ("d/*/*.txt", ["d/e/f.txt", "d/e/g[1].txt"]),
        ("d/e/g[[]1].txt", ["d/e/g[1].txt"]),
        (".h*", [".h.txt"]),
        ("d/c.txt", ["d/c.txt"]),
    ],
)
def test_globs_mean_the_same_locally_and_on_s3(root: str, pattern: str, expected: list[str]) -> None:
    storage = open_storage(root)
    for name in FILES:
        storage.put(name, name.encode())
    found = glob_sources(f"{root}/{pattern}")
    assert [uri for uri, _ in found] == [f"{root}/{name}" for name in expected]
    for uri, info in found:
        folder, name = split_uri(uri)
        assert open_storage(folder).head(name) == info
    with pytest.raises(UserError, match="no file matches"):
        glob_sources(f"{root}/{pattern}x-none")


def test_globs_do_not_cross_folders_on_a_bucket_of_awkward_names() -> None:
    assert re.fullmatch(glob_to_regex("a*b"), "a.b")
    assert not re.fullmatch(glob_to_regex("a*b"), "a/b")
    assert not re.fullmatch(glob_to_regex("a.b"), "axb")
    assert re.fullmatch(glob_to_regex("[]x]y"), "]y")
    assert re.fullmatch(glob_to_regex("[^a]"), "^")
    assert re.fullmatch(glob_to_regex("a["), "a[")


def test_local_folder_is_staged_as_it_is(tmp_path: Path) -> None:
    assert stage_folder(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="no such folder"):
        stage_folder(str(tmp_path / "none"))


def test_s3_folder_is_staged_once_per_content(s3_uri: str, tmp_path: Path) -> None:
    storage, cache = open_storage(s3_uri), tmp_path / "cache"
    with pytest.raises(UserError, match="no object"):
        stage_folder(s3_uri, cache)
    storage.put("config.json", b"{}")
    storage.put("w.bin", b"12345")
    first = stage_folder(s3_uri, cache)
    assert (first / "w.bin").read_bytes() == b"12345"
    written = (first / "config.json").stat().st_mtime_ns
    assert stage_folder(s3_uri, cache) == first
    assert (first / "config.json").stat().st_mtime_ns == written
    storage.put("w.bin", b"54321")
    second = stage_folder(s3_uri, cache)
    assert (second / "w.bin").read_bytes() == b"54321"
    assert (first / "w.bin").read_bytes() == b"12345"


def test_staging_goes_on_after_a_kill_and_in_parallel(s3_uri: str, tmp_path: Path) -> None:
    storage, cache = open_storage(s3_uri), tmp_path / "cache"
    for i in range(6):
        storage.put(f"{i}.bin", bytes([i]) * 1000)
    folder = stage_folder(s3_uri, cache)
    # As a kill leaves it: no manifest, one file missing, a temporary file.
    (cache / f"{folder.name}.json").unlink()
    (folder / "3.bin").unlink()
    (folder / ".tmp-dead").write_bytes(b"half")
    kept = (folder / "1.bin").stat().st_mtime_ns
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: stage_folder(s3_uri, cache), range(4))) == {folder}
    assert (folder / "3.bin").read_bytes() == bytes([3]) * 1000
    assert (folder / "1.bin").stat().st_mtime_ns == kept


@pytest.mark.parametrize("damage", ["removed", "cut short", "folder removed"])
def test_a_staged_file_that_was_lost_since_is_fetched_again(s3_uri: str, tmp_path: Path, damage: str) -> None:
    storage, cache = open_storage(s3_uri), tmp_path / "cache"
    for name in ("a.bin", "b.bin"):
        storage.put(name, name.encode() * 100)
    folder = stage_folder(s3_uri, cache)
    if damage == "removed":
        (folder / "a.bin").unlink()
    elif damage == "cut short":
        (folder / "a.bin").write_bytes(b"a")
    else:
        shutil.rmtree(folder)
    assert stage_folder(s3_uri, cache) == folder
    assert [(folder / name).read_bytes() for name in ("a.bin", "b.bin")] == [b"a.bin" * 100, b"b.bin" * 100]
