"""Planning: what a unit's hash covers, and what it does not."""

import gzip
import itertools
import json
import os
import shutil
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus import plan_units
from distill_ray.corpus.containers import read_lines
from distill_ray.corpus.documents import read_documents
from distill_ray.corpus.index import index_source
from distill_ray.corpus.units import check_unit_bytes, most_unit_bytes
from distill_ray.errors import UserError
from distill_ray.storage import ObjectInfo, open_storage


def section(*sources, **changes):
    return CorpusSection(sources=tuple(map(str, sources)), **{"unit_bytes": 1024, **changes})


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(start, count):
    return [f"document {number} " + "word " * 30 for number in range(start, start + count)]


def hashes(units):
    return [unit.hash for unit in units]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(0, 40))
    jsonl(tmp_path / "b.jsonl", texts(40, 40))
    return tmp_path


def test_units_are_sorted_and_cover_every_byte(folder):
    units = plan_units(section(folder / "*.jsonl"), "tok", None)
    assert hashes(units) == sorted(hashes(units))
    assert len(set(hashes(units))) == len(units) > 10
    for name in ("a.jsonl", "b.jsonl"):
        slices = sorted((u.source.start, u.source.stop) for u in units if u.source.uri.endswith(name))
        assert slices[0][0] == 0
        assert slices[-1][1] == (folder / name).stat().st_size
        assert all(x[1] == y[0] for x, y in itertools.pairwise(slices))


def test_adding_a_file_leaves_the_other_units_alone(folder):
    before = plan_units(section(folder / "*.jsonl"), "tok", None)
    jsonl(folder / "0-new.jsonl", texts(80, 20))
    after = plan_units(section(folder / "*.jsonl"), "tok", None)
    assert set(hashes(before)) < set(hashes(after))


def test_the_path_and_the_holdout_do_not_count(folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(folder / "a.jsonl", moved / "renamed.ndjson")
    here = plan_units(section(folder / "a.jsonl"), "tok", None)
    there = plan_units(section(moved / "*", holdout=0.3), "tok", None)
    assert hashes(here) == hashes(there)


@pytest.mark.parametrize(
    "change",
    [
        {"window_tokens": 128},
        {"window_overlap": 5},
        {"unit_bytes": 1025},
        {"text_column": "body"},
    ],
)
def test_everything_that_changes_the_sequences_changes_the_hash(tmp_path, change):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "body": "y"}) + "\n")
    base = plan_units(section(path), "tok", None)
    assert not set(hashes(base)) & set(hashes(plan_units(section(path, **change), "tok", None)))
    assert not set(hashes(base)) & set(hashes(plan_units(section(path), "other tokenizer", None)))


def test_equal_content_is_one_unit_with_a_multiplicity(folder):
    shutil.copy(folder / "a.jsonl", folder / "copy.jsonl")
    units = plan_units(section(folder / "*.jsonl"), "tok", None)
    assert {u.multiplicity for u in units if not u.source.uri.endswith("b.jsonl")} == {2}
    assert {u.multiplicity for u in units if u.source.uri.endswith("b.jsonl")} == {1}


def test_a_file_named_by_two_globs_counts_once(folder):
    units = plan_units(section(folder / "*.jsonl", folder / "a.jsonl"), "tok", None)
    assert {u.multiplicity for u in units} == {1}


def test_sources_are_read_once_and_again_when_they_change(folder, tmp_path_factory):
    cache = open_storage(str(tmp_path_factory.mktemp("root")))
    first = plan_units(section(folder / "*.jsonl"), "tok", cache)
    status = (folder / "a.jsonl").stat()
    # Same size and time, other bytes: only a read could tell, and nothing is read.
    garbled = (folder / "a.jsonl").read_bytes().replace(b"word", b"WORD")
    (folder / "a.jsonl").write_bytes(garbled)
    os.utime(folder / "a.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert plan_units(section(folder / "*.jsonl"), "tok", cache) == first
    os.utime(folder / "a.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    again = plan_units(section(folder / "*.jsonl"), "tok", cache)
    assert hashes(again) != hashes(first)
    assert hashes(again) == hashes(plan_units(section(folder / "*.jsonl"), "tok", None))


def test_a_broken_cache_entry_is_only_a_miss(folder, tmp_path_factory):
    cache = open_storage(str(tmp_path_factory.mktemp("root")))
    first = plan_units(section(folder / "*.jsonl"), "tok", cache)
    entries = [info.key for info in cache.list("cache/sources/")]
    assert len(entries) == 2
    cache.put(entries[0], b"\x00")
    cache.put(entries[1], b'{"about": {}}')
    assert plan_units(section(folder / "*.jsonl"), "tok", cache) == first


def test_compressed_sources_are_cut_in_uncompressed_bytes(folder):
    data = (folder / "a.jsonl").read_bytes()
    half = len(data) // 2
    # Two members and two frames, as tools that append or compress in parallel write them.
    (folder / "z.jsonl.gz").write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]) + bytes(512))
    one = zstandard.ZstdCompressor()
    (folder / "z.jsonl.zst").write_bytes(one.compress(data[:half]) + one.compress(data[half:]))
    plain = sorted((u.source.start, u.source.stop) for u in plan_units(section(folder / "a.jsonl"), "tok", None))
    for name in ("z.jsonl.gz", "z.jsonl.zst"):
        units = plan_units(section(folder / name), "tok", None)
        assert sorted((u.source.start, u.source.stop) for u in units) == plain
        size = (folder / name).stat().st_size
        lines = [line for s in plain for line in read_lines(str(folder / name), size, *s)]
        assert lines == data.splitlines()


@pytest.mark.parametrize(("name", "pack"), [("c.jsonl.gz", gzip.compress), ("c.jsonl.zst", zstandard.compress)])
def test_a_truncated_or_damaged_compressed_source_is_refused(folder, name, pack):
    data = pack((folder / "a.jsonl").read_bytes())
    (folder / name).write_bytes(data[:-9])
    with pytest.raises(UserError, match=r"c\.jsonl.*truncated"):
        plan_units(section(folder / name), "tok", None)
    (folder / name).write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match="damaged"):
        plan_units(section(folder / name), "tok", None)


def test_parquet_units_are_runs_of_row_groups(tmp_path):
    table = pa.table({"text": texts(0, 60)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2, use_dictionary=False, compression="none")
    corpus = section(tmp_path / "*.parquet", unit_bytes=2048)
    units = sorted(plan_units(corpus, "tok", None), key=lambda u: u.source.start)
    assert units[0].source.start == 0
    assert units[-1].source.stop == 30
    assert 1 < len(units) < 30
    assert all(x.source.stop == y.source.start for x, y in itertools.pairwise(units))
    assert all(u.source.kind == "row_groups" and u.bytes <= 2048 for u in units)


def test_a_large_row_group_is_cut_into_runs_of_rows(tmp_path):
    def planned(groups):
        path = tmp_path / "t.parquet"
        schema = pa.schema({"text": pa.string()})
        with pq.ParquetWriter(path, schema, use_dictionary=False, compression="none") as writer:
            for group in groups:
                writer.write_table(pa.table({"text": group}), row_group_size=len(group))
        units = plan_units(section(path, unit_bytes=2048), "tok", None)
        return sorted((u.source.kind, u.source.start, u.source.stop, u.bytes) for u in units)

    small, large = texts(0, 4), texts(0, 60)
    assert planned([small, small, small])[0][0] == "row_groups"
    found = planned([small, large, small, small])
    rows = [u for u in found if u[0] == "rows"]
    assert [u[1] for u in rows] == [4, *(u[2] for u in rows[:-1])]
    assert rows[-1][2] == 64
    assert len(rows) > 3
    assert max(u[3] for u in rows) <= 2048
    # What lies around it is cut as if the large group were a unit of its own.
    assert [u[:3] for u in found if u[0] == "row_groups"] == [("row_groups", 0, 1), ("row_groups", 2, 4)]


def test_what_would_give_a_huge_target_object_is_refused(tmp_path):
    corpus = section("none", unit_bytes=2**22, window_tokens=4096)
    most = most_unit_bytes(corpus, 64)
    assert 2 * 2**22 <= most < 2**24  # the defaults pass, row groups of twice unit_bytes too
    check_unit_bytes(corpus, 64)
    assert most_unit_bytes(corpus, 64, draws=50) < most / 1.5
    with pytest.raises(UserError, match=r"capture\.top_k=64 and capture\.draws=4095 .*use at most"):
        check_unit_bytes(corpus, 64, draws=4095)
    with pytest.raises(UserError, match=r"capture\.top_k=512.*use at most"):
        check_unit_bytes(corpus, 512)
    # A context repeated almost whole in each window is stored each time.
    with pytest.raises(UserError, match="use at most"):
        check_unit_bytes(section("none", unit_bytes=2**22, window_tokens=4096, window_overlap=4000), 64)

    (tmp_path / "a.txt").write_bytes(b"one " * (most // 4))
    plan_units(section(tmp_path / "a.txt", window_tokens=4096), "tok", None, top_k=64)
    with pytest.raises(UserError, match=r"capture\.top_k=64 and capture\.draws=9 one unit may have"):
        plan_units(section(tmp_path / "a.txt", window_tokens=4096), "tok", None, top_k=64, draws=9)
    (tmp_path / "a.txt").write_bytes(b"one " * (most // 4 + 1))
    with pytest.raises(UserError, match=r"a\.txt.*split the file, or write JSONL"):
        plan_units(section(tmp_path / "a.txt", window_tokens=4096), "tok", None, top_k=64)
    jsonl(tmp_path / "a.jsonl", ["x", "one " * (most // 4 + 1)])
    with pytest.raises(UserError, match=r"a\.jsonl.*split its longest document"):
        plan_units(section(tmp_path / "a.jsonl", window_tokens=4096), "tok", None, top_k=64)


def test_text_files_are_one_unit_each(tmp_path):
    (tmp_path / "a.txt").write_text("one " * 2000)
    (tmp_path / "b.txt").write_text("two")
    units = plan_units(section(tmp_path / "*.txt"), "tok", None)
    assert sorted(u.bytes for u in units) == [3, 8000]


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"corpus is empty: 2 source\(s\)"):
        plan_units(section(tmp_path / "*"), "tok", None)
    with pytest.raises(UserError, match="nothing-here"):
        plan_units(section(tmp_path / "nothing-here-*.jsonl"), "tok", None)


def test_a_source_without_the_column_names_those_it_has(tmp_path):
    jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match=r"needs \['prompt', 'completion'\].*\['text'\]"):
        plan_units(section(tmp_path / "a.jsonl", format="prompt_completion"), "tok", None)
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"needs \['text'\].*\['body', 'id'\]"):
        plan_units(section(tmp_path / "a.parquet"), "tok", None)


def test_wrong_kinds_of_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="plain text"):
        plan_units(section(tmp_path / "a.txt", format="messages"), "tok", None)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"a\.csv.*\.jsonl"):
        plan_units(section(tmp_path / "a.csv"), "tok", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        plan_units(section(tmp_path / "a.parquet"), "tok", None)
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"several columns \['text'\]"):
        plan_units(section(tmp_path / "a.parquet"), "tok", None)


@pytest.mark.parametrize("seed", range(2))
def test_any_damage_to_a_parquet_file_is_a_clear_message(tmp_path, seed):
    path, random = tmp_path / "a.parquet", Random(seed)
    pq.write_table(pa.table({"text": texts(0, 200)}), path, row_group_size=50)
    whole, corpus = path.read_bytes(), section(path, unit_bytes=random.choice((2**12, 2**20)))
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(random.choice((1, 3, 20))):
            data[random.randrange(random.choice((4, footer)), len(data) - 8)] = random.randrange(256)
        path.write_bytes(data)
        try:
            for unit in plan_units(corpus, "tok", None):
                list(read_documents(unit, corpus))
        except UserError:  # anything else fails the test
            refused += 1
    assert refused > 10


def test_a_source_that_changes_while_it_is_read_is_refused(folder, tmp_path_factory):
    cache = open_storage(str(tmp_path_factory.mktemp("root")))
    path = folder / "a.jsonl"
    listed = ObjectInfo(path.name, path.stat().st_size - 5, "the version that was listed", 0.0)
    with pytest.raises(UserError, match="changed while it was read"):
        index_source(str(path), listed, 1024, cache)
    assert not list(cache.list("cache/"))


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=12).filter(lambda b: b"\n" not in b), max_size=12),
    ended=st.booleans(),
    unit=st.integers(1, 30),
    cuts=st.lists(st.integers(0, 160), max_size=4),
)
def test_slices_hold_each_line_once_whole_wherever_they_are_cut(tmp_path_factory, lines, ended, unit, cuts):
    data = b"\n".join(lines) + (b"\n" if ended else b"")
    assume(not lines or not lines[0].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))  # a JSON array
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    path = tmp_path_factory.getbasetemp() / "property.jsonl"
    path.write_bytes(data)
    info = open_storage(str(path.parent)).head(path.name)
    assert info is not None
    index = index_source(str(path), info, unit, None)
    planned = [*index.cuts, len(data)]
    assert all(at == 0 or data[at - 1 : at] == b"\n" for at in index.cuts)
    assert all(b >= a // unit * unit + unit for a, b in zip(index.cuts, index.cuts[1:], strict=False))
    anywhere = sorted({0, len(data), *(at for at in cuts if at < len(data))})
    for bounds in (planned, anywhere):
        ranges = itertools.pairwise(bounds)
        assert [x for r in ranges for x in read_lines(str(path), len(data), *r)] == expected
