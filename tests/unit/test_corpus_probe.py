"""The first look into the sources."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus import probe_sources
from distill_ray.errors import UserError
from distill_ray.storage import find_sources
from distill_ray.storage.local import LocalStorage


def probe(pattern, **changes):
    return probe_sources(CorpusSection(sources=(str(pattern),), **changes), find_sources([str(pattern)]))


def lines(records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def test_right_sources_pass_and_one_of_each_kind_is_opened(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": "x"}] * 30))
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines([{"text": "x"}])))
        (tmp_path / f"{name}.txt").write_text("x")
        pq.write_table(pa.table({"text": ["x"] * 30}), tmp_path / f"{name}.parquet")
    assert [uri.rpartition("/")[2] for uri in probe(tmp_path / "*")] == ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"]


def test_little_of_a_large_source_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "x" * 2**20}] * 50))
    counted = []
    original = LocalStorage.get_range
    monkeypatch.setattr(
        LocalStorage, "get_range", lambda self, *a: counted.append(len(data := original(self, *a))) or data
    )
    probe(tmp_path / "a.jsonl")
    assert sum(counted) <= 24 * 2**20


@pytest.mark.parametrize(
    ("name", "content", "changes", "expected"),
    [
        ("a.csv", b"text\nx\n", {}, r"a\.csv: its extension names no known format"),
        ("a.jsonl", lines([{"body": "x"}]), {}, r"needs \['text'\], and the first record has \['body'\]"),
        ("a.jsonl", lines([{"text": "x"}]), {"format": "messages"}, r"needs \['messages'\]"),
        ("a.jsonl", lines([{"messages": "hi"}] * 30), {"format": "messages"}, "none of its first 20.*not a list of"),
        ("a.jsonl", b"plain\n" * 30, {}, "none of its first 20 records.*bad JSON"),
        ("a.txt", b"x", {"format": "messages"}, "plain text"),
        ("a.parquet", lines([{"text": "x"}]), {}, "not a whole Parquet file"),
        ("a.jsonl.gz", lines([{"text": "x"}]), {}, "damaged"),
    ],
)
def test_wrong_sources_are_named(tmp_path, name, content, changes, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        probe(tmp_path / name, **changes)


def test_a_column_of_another_type_is_named(tmp_path):
    pq.write_table(pa.table({"text": range(30)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'text' is int, not text"):
        probe(tmp_path / "a.parquet")


def test_a_few_bad_documents_are_no_reason_to_refuse(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" * 19)
    probe(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"not json\n" * 19 + lines([{"text": "x"}]))
    probe(tmp_path / "a.jsonl")
