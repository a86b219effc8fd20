"""URIs, globs and staged folders."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.corpus.containers import locate
from distill_ray.errors import UserError
from distill_ray.storage import (
    find_sources,
    open_storage,
    split_uri,
    stage_folder,
)
from distill_ray.storage.sources import glob_to_regex, matching
from distill_ray.storage.uris import join_s3, split_s3


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri")


def test_split_uri() -> None:
    assert split_uri("s3://bucket/p/q/x.parquet") == ("s3://bucket/p/q", "x.parquet")
    assert split_uri("s3://bucket/x") == ("s3://bucket", "x")
    assert split_uri("/a/b/c.txt") == ("/a/b", "c.txt")
    assert split_uri("c.txt") == (".", "c.txt")
    assert split_uri("s3://bucket/d//x") == ("s3://bucket/d//", "x")
    assert split_uri("s3://bucket//x") == ("s3://bucket//", "x")
    assert split_uri("s3://bucket/d/x/") == ("s3://bucket/d", "x")
    for uri in ("s3://bucket", "s3://bucket/", "s3://bucket/d//", "/"):
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
    found = find_sources([f"{root}/{pattern}"])
    assert list(found) == [f"{root}/{name}" for name in expected]
    for uri, info in found.items():
        folder, name = split_uri(uri)
        assert open_storage(folder).head(name) == info
    with pytest.raises(UserError, match="no file matches"):
        find_sources([f"{root}/{pattern}x-none"])


@given(st.text("ab/[+% é", min_size=1).filter(lambda key: not key.endswith("/")))
def test_a_key_of_any_slashes_comes_back_from_its_uri(key: str) -> None:
    folder, name = split_uri(f"s3://bucket/{key}")
    assert split_s3(folder)[1] + name == key
    assert split_s3(join_s3(*split_s3(folder))) == split_s3(folder)


def test_a_root_means_one_prefix_with_a_slash_at_its_end_or_without(s3_uri: str) -> None:
    open_storage(f"{s3_uri}/").put("k", b"1")
    assert open_storage(s3_uri).get("k") == b"1"
    assert open_storage(f"{s3_uri}/").uri == open_storage(s3_uri).uri == s3_uri


AWKWARD = (
    "a+b.jsonl",
    "100%25.jsonl",
    "a b.jsonl",
    "part[1].jsonl",
    "what?.jsonl",
    "st*r.jsonl",
    "é 漢.jsonl",
    "&<#.jsonl",
)


@pytest.mark.parametrize("name", AWKWARD)
def test_a_name_written_exactly_is_that_object_alone(root: str, name: str) -> None:
    storage = open_storage(root)
    decoys = ("part1.jsonl", "whatx.jsonl", "stxr.jsonl", "a%2Bb.jsonl", "100%.jsonl", "a%20b.jsonl")
    for each in {*AWKWARD, *decoys}:
        storage.put(f"d/{each}", each.encode())
    (uri,) = find_sources([f"{root}/d/{name}"])
    assert uri == f"{root}/d/{name}"
    store, key = locate(uri)
    assert store.get(key) == name.encode()
    with store.open_input(key) as stream:
        assert stream.read() == name.encode()
    assert set(find_sources([f"{root}/d/*"])) == {f"{root}/d/{each}" for each in {*AWKWARD, *decoys}}


def test_a_pattern_without_an_object_of_its_name_is_a_glob(root: str) -> None:
    open_storage(root).put("d/part1.jsonl", b"1")
    open_storage(root).put("e/[x]/y.jsonl", b"a folder's name is none of a file")
    open_storage(root).put("e/x", b"1")
    assert list(find_sources([f"{root}/d/part[1].jsonl"])) == [f"{root}/d/part1.jsonl"]
    assert list(find_sources([f"{root}/e/[x]"])) == [f"{root}/e/x"]


def test_an_object_that_several_patterns_name_is_there_once_in_their_order(root: str) -> None:
    for name in ("a", "b", "c"):
        open_storage(root).put(name, b"1")
    assert list(find_sources([f"{root}/c", f"{root}/*", f"{root}/b"])) == [f"{root}/{name}" for name in "cab"]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """`2024/a`, `2024/sub/b` and links to them before and after them in the alphabet; `far` lies elsewhere."""
    data = tmp_path / "data"
    (data / "2024/sub").mkdir(parents=True)
    (data / "2024/a").write_bytes(b"a")
    (data / "2024/sub/b").write_bytes(b"b")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/c").write_bytes(b"c")
    for link, target in {"0": "2024", "latest": "2024", "x": "../far", "y": "../far", "a": "2024/a"}.items():
        (data / link).symlink_to(target)
    return data


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["**"], ["2024/a", "2024/sub/b", "x/c"]),
        (["*/*"], ["2024/a", "x/c"]),
        (["*"], ["a"]),
        (["latest/*"], ["latest/a"]),
        (["latest/**"], ["latest/a", "latest/sub/b"]),
        (["**/latest/*"], ["latest/a"]),
        (["latest/a"], ["latest/a"]),
        (["latest/a", "2024/*"], ["2024/a"]),
        (["y/*", "latest/sub/*", "x/c", "0/*/b"], ["0/sub/b", "x/c"]),
    ],
)
def test_a_file_that_links_lead_to_is_there_once(linked: Path, patterns: list[str], expected: list[str]) -> None:
    assert sorted(find_sources(f"{linked}/{each}" for each in patterns)) == [f"{linked}/{name}" for name in expected]


def test_a_folder_over_a_link_keeps_the_path_as_it_is_written(linked: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("data")
    assert list(find_sources([f"{tmp_path}/link/**"])) == [
        f"{tmp_path}/link/{n}" for n in ("2024/a", "2024/sub/b", "x/c")
    ]


def test_links_that_lead_upwards_end(linked: Path) -> None:
    for i in range(3):  # each more of them is a power more of paths
        (linked / f"2024/up{i}").symlink_to("..")
        (linked / f"2024/sub/up{i}").symlink_to(linked)
    assert list(find_sources([f"{linked}/**/*"])) == [f"{linked}/{n}" for n in ("2024/a", "2024/sub/b", "x/c")]


def test_two_hard_links_are_two_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert len(find_sources([f"{tmp_path}/**"])) == 2


def test_globs_do_not_cross_folders_on_a_bucket_of_awkward_names() -> None:
    assert re.fullmatch(glob_to_regex("a*b"), "a.b")
    assert not re.fullmatch(glob_to_regex("a*b"), "a/b")
    assert not re.fullmatch(glob_to_regex("a.b"), "axb")
    assert re.fullmatch(glob_to_regex("[]x]y"), "]y")
    assert re.fullmatch(glob_to_regex("[^a]"), "^")
    assert re.fullmatch(glob_to_regex("a["), "a[")


def test_a_name_with_brackets_is_itself_where_it_is_known_and_else_a_glob() -> None:
    known = ["d/part[1].jsonl", "d/part1.jsonl", "d/part2.jsonl"]
    assert matching("d/part[1].jsonl", known) == {"d/part[1].jsonl"}
    assert matching("d/part[1].jsonl", known[1:]) == {"d/part1.jsonl"}
    assert matching("d/part?.jsonl", known) == set(known[1:])


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
