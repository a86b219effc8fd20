"""Plain copies of compressed sources and large row groups: the same documents, for a bounded number of bytes."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus import plan_units, spool
from distill_ray.corpus.documents import Document, read_documents
from distill_ray.errors import UserError
from distill_ray.storage.local import LocalStorage

TEXTS = [f"document {i} " + os.urandom(150).hex() for i in range(400)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distill_ray" / "spooled"


@pytest.fixture
def read_bytes(monkeypatch):
    """Bytes that ranged reads of sources gave, as they are counted."""
    counted = []
    original = LocalStorage.get_range

    def counting(self, key, start, length):
        data = original(self, key, start, length)
        counted.append(len(data))
        return data

    monkeypatch.setattr(LocalStorage, "get_range", counting)
    return counted


def source(folder, name):
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = folder / name
    if name.endswith("parquet"):
        table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
        pq.write_table(table, path, row_group_size=300, use_dictionary=False)
    else:
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else zstandard.compress(data))
    return path


def planned(path):
    section = CorpusSection(sources=(str(path),), unit_bytes=4096)
    return section, sorted(plan_units(section, "tok", None), key=lambda u: (u.source.start, u.source.kind))


def documents(section, units):
    found = [d for unit in units for d in read_documents(unit, section)]
    assert all(isinstance(d, Document) for d in found)
    return [d.content for d in found if isinstance(d, Document)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_reading_every_unit_of_a_compressed_source_costs_two_passes(tmp_path, cache, read_bytes, monkeypatch, name):
    path = source(tmp_path, name)
    size = path.stat().st_size
    section, units = planned(path)
    assert len(units) > 20
    read_bytes.clear()
    assert documents(section, units) == TEXTS
    assert sum(read_bytes) <= 2 * size
    assert len(list(cache.glob("*.copy"))) == 1

    # What it would cost without copies, and that it still works without.
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    read_bytes.clear()
    assert documents(section, units) == TEXTS
    assert sum(read_bytes) > 10 * size


def test_a_row_group_that_is_cut_gives_every_row_once(tmp_path, cache, monkeypatch):
    path = source(tmp_path, "a.parquet")
    section, units = planned(path)
    assert {u.source.kind for u in units} == {"rows"}
    assert len(units) > 20
    assert documents(section, units) == TEXTS
    assert len(list(cache.glob("*.copy"))) == 2  # one of each row group
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    assert documents(section, units) == TEXTS


def test_the_first_slice_alone_makes_no_copy(tmp_path, cache):
    section, units = planned(source(tmp_path, "a.jsonl.gz"))
    documents(section, units[:1])
    assert not list(cache.glob("*.copy"))


def test_a_copy_of_other_bytes_is_never_kept(tmp_path, cache, monkeypatch):
    path = source(tmp_path, "a.jsonl.gz")
    section, units = planned(path)
    info = LocalStorage(str(tmp_path)).head(path.name)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).swapcase()))
    # The swap is hidden from the version check, so that only the content can give it away.
    monkeypatch.setattr(LocalStorage, "head", lambda self, key: info)
    with pytest.raises(UserError, match=r"changed since|truncated|ended at"):
        documents(section, units[1:])
    assert not list(cache.glob("*.copy"))


def test_the_copies_used_longest_ago_make_room(cache, monkeypatch):
    monkeypatch.setattr(spool, "MOST_BYTES", 250)

    def touch(name):
        copy = spool.open_copy(name, lambda out: out.write(name.encode() * 100) and None)
        assert copy is not None
        with copy:
            assert copy.read() == name.encode() * 100

    for age, name in enumerate("ab"):
        touch(name)
        os.utime(cache / f"{name}.copy", ns=(age + 1, age + 1))
    touch("a")
    touch("c")
    assert sorted(p.stem for p in cache.glob("*.copy")) == ["a", "c"]


def test_a_copy_that_would_take_too_much_is_given_up_with_one_warning(cache, monkeypatch, capsys):
    monkeypatch.setattr(spool, "MOST_BYTES", 250)
    written = []

    def write(out):
        written.append(1)
        out.write(b"x" * 251)

    assert spool.open_copy("large", write) is None
    assert spool.open_copy("large", write) is None
    assert len(written) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not [p for p in cache.iterdir() if not p.name.startswith(".lock")]
