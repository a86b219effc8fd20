"""The batched index, resume from it, the run manifest and `inspect`."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from distill_ray import targets
from distill_ray.config import fingerprint
from distill_ray.errors import IntegrityError, LeaseLostError, UserError
from distill_ray.lease import Lease, publish
from distill_ray.schema import UnitSummary
from distill_ray.storage import NotFoundError, open_storage
from distill_ray.storage.local import LocalStorage
from distill_ray.targets.index import MERGE_AT, UNITS_PER_OBJECT, summaries_table, table_summaries
from distill_ray.units import HASH, Units, texts
from tests.unit.targets_fakes import captured, dead_letter, identity, unit

OF = identity(temperatures=(1.0,))
FP = OF.fingerprint


@pytest.fixture
def storage(tmp_path):
    return open_storage(str(tmp_path))


def capture(storage, name: str, of=OF, seed: int = 0, **shape) -> UnitSummary:
    u = unit(name, uri=f"corpus/{name}.jsonl")
    data, summary = targets.encode_unit(of, u, *captured(of, seed=seed, **shape), [dead_letter(u)], 2.0)
    storage.put(targets.unit_key(of, u.hash), data)
    return summary


def summary(i: int, **changes) -> UnitSummary:
    arrays = {
        "lengths": np.array([i + 2, 3], np.int32),
        "supervised": np.array([1, 2], np.int32),
        "doc_keys": np.array([2**64 - 1 - i, i], np.uint64),
    }
    scalars = {"object_bytes": 10 + i, "object_sha256": f"{i:064x}", "kept_mass_sum": i / 3, "dead": i % 2}
    return dataclasses.replace(UnitSummary(unit=f"{i:032x}", teacher_seconds=i / 7, **arrays, **scalars), **changes)


def assert_equal(a: UnitSummary, b: UnitSummary):
    for field in dataclasses.fields(UnitSummary):
        x, y = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_array_equal(x, y)
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)


def index_keys(storage):
    return [o.key for o in storage.list(f"targets/{FP}/index/")]


def keys(summaries) -> set[str]:
    return {s.unit for s in summaries}


def test_summaries_come_back_from_the_index(storage):
    none = summary(7, lengths=np.zeros(0, np.int32), supervised=np.zeros(0, np.int32), doc_keys=np.zeros(0, np.uint64))
    added = [summary(i) for i in range(5)] + [none]
    targets.append_index(storage, OF, added[:2])
    targets.append_index(storage, FP, added[2:])
    targets.append_index(storage, FP, [])
    loaded = targets.load_index(storage, FP)
    assert len(index_keys(storage)) == 2
    assert loaded.keys() == keys(added)
    for s in added:
        assert_equal(loaded[s.unit], s)


def test_an_empty_capture_has_an_empty_index(storage):
    assert targets.load_index(storage, FP) == targets.done_units(storage, FP) == {}


def test_of_a_unit_captured_twice_the_later_entry_counts(storage):
    for sha in ("a" * 64, "b" * 64, "c" * 64):
        targets.append_index(storage, FP, [summary(1, object_sha256=sha)])
        assert targets.load_index(storage, FP)[summary(1).unit].object_sha256 == sha


def test_small_index_objects_are_merged_and_large_ones_left_alone(storage):
    large = [summary(i) for i in range(UNITS_PER_OBJECT)]
    targets.append_index(storage, FP, large)
    (large_key,) = index_keys(storage)
    small = [summary(UNITS_PER_OBJECT + i) for i in range(3 * MERGE_AT)]
    for s in small:
        targets.append_index(storage, FP, [s])
        assert len(index_keys(storage)) <= MERGE_AT
    assert large_key in index_keys(storage)
    loaded = targets.load_index(storage, FP)
    assert loaded.keys() == keys(large + small)
    assert_equal(loaded[small[0].unit], small[0])


def test_merging_keeps_the_later_entry_of_a_unit(storage):
    targets.append_index(storage, FP, [summary(1, object_sha256="a" * 64)])
    big = [summary(i) for i in range(2, UNITS_PER_OBJECT + 2)]
    targets.append_index(storage, FP, [summary(1, object_sha256="b" * 64), *big])
    for i in range(MERGE_AT):  # rewrites the old entry into an object younger than the one of the new entry
        targets.append_index(storage, FP, [summary(10_000 + i)])
    assert targets.load_index(storage, FP)[summary(1).unit].object_sha256 == "b" * 64


class VanishingStorage:
    """Another driver merges the index between this one's listing and its reads."""

    def __init__(self, storage, merge):
        self._storage, self._merge, self.uri = storage, merge, storage.uri

    def list(self, prefix):
        return self._storage.list(prefix)

    def get(self, key):
        if self._merge:
            self._merge.pop()()
        return self._storage.get(key)


def test_a_merge_by_another_driver_while_loading_loses_nothing(storage):
    first = [summary(i) for i in range(MERGE_AT - 1)]
    for s in first:
        targets.append_index(storage, FP, [s])
    racing = VanishingStorage(storage, [lambda: targets.append_index(storage, FP, [summary(99)])])
    assert targets.load_index(racing, FP).keys() == keys([*first, summary(99)])


def test_units_done_are_those_indexed_and_there(storage):
    a, b = capture(storage, "a"), capture(storage, "b")
    targets.append_index(storage, FP, [a, b])
    problems = []
    done = targets.done_units(storage, OF, report=problems.append)
    assert done.keys() == {a.unit, b.unit}
    assert_equal(done[a.unit], a)
    assert not problems


def test_an_object_that_no_index_names_is_verified_and_added(storage):
    a, b = capture(storage, "a"), capture(storage, "b")
    targets.append_index(storage, FP, [a])
    done = targets.done_units(storage, FP)
    assert_equal(done[b.unit], dataclasses.replace(b, teacher_seconds=0.0))
    assert targets.load_index(storage, FP).keys() == {a.unit, b.unit}
    before = index_keys(storage)
    targets.done_units(storage, FP)
    assert index_keys(storage) == before


def test_vanished_truncated_and_flipped_objects_are_not_done(storage):
    names = "gone", "cut", "unindexed-cut", "unindexed-flipped", "sound"
    units = {name: capture(storage, name) for name in names}
    targets.append_index(storage, FP, [units[n] for n in ("gone", "cut", "sound")])
    storage.delete(targets.unit_key(FP, units["gone"].unit))
    for name in ("cut", "unindexed-cut"):
        key = targets.unit_key(FP, units[name].unit)
        storage.put(key, storage.get(key)[:-100])
    key = targets.unit_key(FP, units["unindexed-flipped"].unit)
    data = bytearray(storage.get(key))
    data[1000] ^= 1
    storage.put(key, bytes(data))
    problems = []
    assert targets.done_units(storage, FP, report=problems.append).keys() == {units["sound"].unit}
    assert len(problems) == 4
    for name in names[:-1]:
        assert sum(units[name].unit in p for p in problems) == 1


def test_an_object_written_since_it_was_indexed_is_verified_again(storage):
    size = capture(storage, "a", seed=2).object_bytes
    a = dataclasses.replace(capture(storage, "a", seed=1), object_bytes=size)  # the size alone would not tell
    targets.append_index(storage, FP, [a])
    again = capture(storage, "a", seed=2)
    assert targets.done_units(storage, FP)[a.unit].object_sha256 == again.object_sha256
    assert targets.load_index(storage, FP)[a.unit].object_sha256 == again.object_sha256


def test_an_object_copied_anew_keeps_its_entry(storage):
    a = capture(storage, "a")
    targets.append_index(storage, FP, [a])
    key = targets.unit_key(FP, a.unit)
    storage.put(key, storage.get(key))
    assert_equal(targets.done_units(storage, FP)[a.unit], a)


def test_a_broken_index_object_is_reported_and_made_anew(storage):
    a = capture(storage, "a")
    targets.append_index(storage, FP, [a])
    (key,) = index_keys(storage)
    storage.put(key, storage.get(key)[:-1])
    problems = []
    assert targets.load_index(storage, FP, report=problems.append) == {}
    assert "truncated or altered" in problems[0]
    assert targets.done_units(storage, FP, report=problems.append).keys() == {a.unit}
    assert key not in index_keys(storage)
    assert targets.load_index(storage, FP).keys() == {a.unit}


RUN = "runs/demo/2026-W47"


def manifest(storage, names=("a", "b"), publish_it=True):
    units = [unit(n, uri=f"corpus/{n}.jsonl", multiplicity=i + 1) for i, n in enumerate(names)]
    summaries = {s.unit: s for s in (capture(storage, n) for n in names)}
    targets.append_index(storage, FP, summaries.values())
    with Lease.acquire(storage, RUN) as lease:
        entry = targets.write_run_manifest(storage, lease.token, OF, units, summaries)
        if publish_it:
            publish(storage, lease.token, "targets", entry)
    return units, summaries, entry


def test_a_run_manifest_comes_back(storage):
    units, summaries, entry = manifest(storage, publish_it=False)
    read = targets.read_run_manifest(storage, entry)
    assert read.identity == OF
    assert [u.unit for u in read.units] == sorted(summaries)
    for u in read.units:
        assert_equal(u.summary, summaries[u.unit])
        (planned,) = [p for p in units if p.hash == u.unit]
        assert (u.multiplicity, u.source) == (planned.multiplicity, planned.source.uri)
    assert entry["rows"] == read.rows == sum(s.rows for s in summaries.values())
    assert entry["sequences"] == read.sequences == 10
    assert read.dead == entry["dead"] == 2
    assert 0 < read.mean_kept_mass < 1


def test_a_manifest_of_units_not_captured_is_refused(storage):
    with Lease.acquire(storage, RUN) as lease, pytest.raises(UserError, match="1 of 1 units are not captured"):
        targets.write_run_manifest(storage, lease.token, OF, [unit()], {})


def test_a_driver_whose_lease_is_over_does_not_overwrite_the_manifest(storage):
    with Lease.acquire(storage, RUN) as lease:
        old = lease.token
    units, summaries, entry = manifest(storage)
    before = storage.get(entry["key"])
    with pytest.raises(LeaseLostError):
        targets.write_run_manifest(storage, old, OF, units[:1], summaries)
    assert storage.get(entry["key"]) == before


def test_an_altered_or_missing_manifest_is_refused(storage):
    _, _, entry = manifest(storage, publish_it=False)
    storage.put(entry["key"], storage.get(entry["key"])[:-3])
    with pytest.raises(IntegrityError, match=r"SHA-256 .* published was"):
        targets.read_run_manifest(storage, entry)
    storage.delete(entry["key"])
    with pytest.raises(IntegrityError, match="published but missing"):
        targets.read_run_manifest(storage, entry)


def test_the_corpus_of_a_manifest_is_the_fingerprint_of_its_units_whatever_their_order(storage):
    units, _, entry = manifest(storage, names="dcba")
    pairs = sorted([u.hash, u.multiplicity] for u in units)
    assert len({multiplicity for _, multiplicity in pairs}) == 4
    read = targets.read_run_manifest(storage, entry)
    assert entry["corpus"] == read.corpus == fingerprint({"units": pairs})
    assert targets.RunManifest(OF, tuple(read.units)[::-1]).corpus == read.corpus


def test_the_units_of_a_lost_manifest_are_told_though_the_corpus_has_grown(storage):
    units, _, entry = manifest(storage, names="abcd")
    later = [unit(n) for n in "efgh"]
    storage.delete(entry["key"])
    want = Units.of(units)
    assert targets.units_of_lost_manifest(storage, entry, [*later, *units]) == want, "none of them captured yet"
    targets.append_index(storage, FP, [capture(storage, n) for n in "efgh"])
    assert targets.units_of_lost_manifest(storage, entry, [*later, *units]) == want
    assert targets.units_of_lost_manifest(storage, entry, units) == want


def test_the_units_of_a_lost_manifest_are_never_guessed(storage):
    units, _, entry = manifest(storage, names="abcd")
    assert targets.units_of_lost_manifest(storage, entry, units[:3]) is None
    assert targets.units_of_lost_manifest(storage, entry, [*units[:3], unit("e")]) is None
    twice = [dataclasses.replace(units[0], multiplicity=7), *units[1:]]
    assert targets.units_of_lost_manifest(storage, entry, twice) is None
    (key,) = index_keys(storage)
    storage.delete(key)
    assert targets.units_of_lost_manifest(storage, entry, units) == Units.of(units)
    assert targets.units_of_lost_manifest(storage, entry, [*units, unit("e")]) is None


@pytest.mark.parametrize("verify", [False, True])
def test_inspect_describes_capture_unit_and_run(storage, tmp_path, verify):
    _, summaries, _ = manifest(storage)
    (first, *_) = summaries
    rows = {"capture": 94, "unit": 47, "run": 94}
    uris = {"capture": f"targets/{FP}", "unit": targets.unit_key(FP, first), "run": RUN}
    for kind, uri in uris.items():
        for form in (f"{tmp_path}/{uri}", f"{tmp_path}/{uri}/")[: 1 if kind == "unit" else 2]:
            report = targets.inspect(form, verify)
            assert (report.kind, report.rows, report.identity, report.problems) == (kind, rows[kind], OF, ())
            assert report.verified == (verify or kind == "unit")
            assert report.bytes_per_row == report.bytes / report.rows
    text = report.render()
    assert FP in text
    assert "top 8, temperatures 1.0, codec 1" in text
    assert "packed 28" in text
    assert "problems        none" in text


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_inspect_says_how_many_units_hold_the_entropy(storage, tmp_path, verify, indexed):
    mixed = [capture(storage, "a"), capture(storage, "b", entropy=False), capture(storage, "empty", lengths=())]
    if indexed:
        targets.append_index(storage, FP, mixed)
    report = targets.inspect(f"{tmp_path}/targets/{FP}", verify)
    assert (report.entropy_units, report.filled_units, report.entropy_rows, report.entropy_unknown) == (1, 2, 47, 0)
    assert "entropy         in 1 of 2 units (47 of 94 rows)\n" in report.render()


def test_an_index_from_before_entropy_was_noted_is_read_and_says_so(storage, tmp_path):
    a, b = capture(storage, "a"), capture(storage, "b")
    old = summaries_table([a, b]).drop_columns("entropy")
    assert [s.entropy for s in table_summaries(old)] == [None, None]
    targets.append_index(storage, FP, table_summaries(old))
    report = targets.inspect(f"{tmp_path}/targets/{FP}")
    # The first object is opened for its identity.
    assert "entropy         in 1 of 2 units (47 of 94 rows), 1 not known (--verify reads them)\n" in report.render()
    full = targets.inspect(f"{tmp_path}/targets/{FP}", verify=True)
    assert "entropy         in 2 of 2 units (94 of 94 rows)\n" in full.render()


def test_what_an_index_object_lacks_is_unknown_or_zero_and_stays_so_in_the_manifest(storage):
    of = [(None, 0), (True, 7), (False, 9)]
    units = Units.of(unit(name) for name in "abc")
    added = [
        summary(i, unit=u.hash, entropy=entropy, distinct_draws=draws)
        for i, (u, (entropy, draws)) in enumerate(zip(units, of, strict=True))
    ]
    targets.append_index(storage, FP, table_summaries(summaries_table(added[:1]).drop_columns("entropy")))
    targets.append_index(storage, FP, added[1:])
    for i in range(MERGE_AT):
        loaded = targets.load_index(storage, FP)
        assert [(loaded[u.hash].entropy, loaded[u.hash].distinct_draws) for u in units] == of
        targets.append_index(storage, FP, [summary(i)])
    table, _ = targets.load_table(storage, FP, only=units.hashes)
    with Lease.acquire(storage, RUN) as lease:
        entry = targets.write_run_manifest(storage, lease.token, OF, units, table)
    read = targets.read_run_manifest(storage, entry).units
    assert [(u.summary.entropy, u.summary.distinct_draws) for u in read] == of


def test_inspect_says_of_how_many_units_the_teachers_time_is_not_known(storage, tmp_path):
    targets.append_index(storage, FP, [capture(storage, "a")])
    capture(storage, "killed before the index")
    targets.done_units(storage, FP)
    assert "teacher time    2.0 s, of 1 units not known\n" in targets.inspect(f"{tmp_path}/targets/{FP}").render()


def test_inspect_lists_every_problem(storage, tmp_path):
    _, summaries, _ = manifest(storage, names="abcd")
    gone, cut, flipped, sound = sorted(summaries)
    storage.delete(targets.unit_key(FP, gone))
    data = storage.get(targets.unit_key(FP, cut))
    storage.put(targets.unit_key(FP, cut), data[:-7])
    data = bytearray(storage.get(targets.unit_key(FP, flipped)))
    data[700] ^= 4
    storage.put(targets.unit_key(FP, flipped), bytes(data))
    for uri in (f"{tmp_path}/targets/{FP}", f"{tmp_path}/{RUN}"):
        quick, full = targets.inspect(uri), targets.inspect(uri, verify=True)
        assert [sum(u in p for p in quick.problems) for u in (gone, cut, flipped, sound)] == [1, 1, 0, 0]
        assert [sum(u in p for p in full.problems) for u in (gone, cut, flipped, sound)] == [1, 1, 1, 0]
        assert all(p in full.render() for p in full.problems)
        assert full.identity == OF
    capture(storage, "later")
    assert any("1 objects are not in the index" in p for p in targets.inspect(f"{tmp_path}/targets/{FP}").problems)


def test_capture_resume_ranges_and_inspect_on_s3(s3_uri):
    s3 = open_storage(s3_uri)
    _, summaries, entry = manifest(s3)
    later = capture(s3, "later")
    assert targets.done_units(s3, OF).keys() == {*summaries, later.unit}
    before = index_keys(s3)
    assert targets.done_units(s3, OF).keys() == {*summaries, later.unit}
    assert index_keys(s3) == before
    assert len(targets.open_unit(s3, OF, later.unit).sequences(1, 3)) == 2
    assert targets.read_run_manifest(s3, entry).rows == 94
    report = targets.inspect(f"{s3_uri}/targets/{FP}", verify=True)
    assert (report.units, report.problems) == (3, ())
    key = targets.unit_key(OF, later.unit)
    s3.put(key, s3.get(key)[:-1])
    assert targets.done_units(s3, OF, report=lambda _: None).keys() == summaries.keys()


def test_inspect_says_what_is_wrong_with_the_uri(storage, tmp_path):
    u = unit()
    for uri, says in [
        ("somewhere/else", "is neither <root>/targets/<fingerprint>"),
        (f"targets/{FP}", "holds nothing"),
        (f"targets/{FP}/{u.hash}.parquet", "check the URI"),
        (RUN, "has published no targets"),
    ]:
        with pytest.raises(UserError, match=says):
            targets.inspect(f"{tmp_path}/{uri}")


def test_a_missing_object_is_told_from_a_broken_one(storage):
    with pytest.raises(NotFoundError):
        targets.open_unit(storage, FP, unit().hash, object_bytes=500)


class CountingStorage(LocalStorage):
    """Counts what is asked for."""

    def __init__(self, uri):
        super().__init__(uri)
        self.listed, self.got = [], 0

    def list(self, prefix):
        self.listed.append(prefix)
        return super().list(prefix)

    def get_versioned(self, key):
        self.got += 1
        return super().get_versioned(key)


def test_adding_to_the_index_never_lists_the_targets(tmp_path):
    storage = CountingStorage(str(tmp_path))
    capture(storage, "a")
    for i in range(2 * MERGE_AT):
        targets.append_index(storage, FP, [summary(i)])
    assert set(storage.listed) == {f"targets/{FP}/index/"}


def test_a_resume_lists_once_and_reads_no_target_object(tmp_path):
    storage = CountingStorage(str(tmp_path))
    found = [capture(storage, name) for name in "abc"]
    targets.append_index(storage, FP, found)
    storage.listed.clear()
    storage.got = 0
    hashes = targets.done_hashes(storage, FP)
    assert texts(hashes) == sorted(keys(found))
    assert storage.listed == [f"targets/{FP}/index/", f"targets/{FP}/"]
    assert storage.got == 1


def test_a_table_of_some_units_and_columns(storage):
    added = [summary(i) for i in range(6)]
    targets.append_index(storage, FP, added[3:])
    targets.append_index(storage, FP, added[:4])
    only = np.array([f"{i:032x}".encode() for i in (1, 3, 9)], HASH)
    table, broken = targets.load_table(storage, FP, only=only, columns=("dead",))
    assert table.column_names == ["unit", "indexed_at", "dead"]
    assert table["unit"].to_pylist() == [added[1].unit, added[3].unit]
    assert table["dead"].to_pylist() == [1, 1]
    assert broken == []
    table, _ = targets.load_table(storage, FP)
    assert table["unit"].to_pylist() == [s.unit for s in added]


def test_an_index_object_that_lacks_a_later_column_counts_as_zero(storage, monkeypatch):
    from distill_ray.targets import index

    whole = index.summaries_table
    monkeypatch.setattr(index, "summaries_table", lambda s: whole(s).drop_columns(["dead"]))
    targets.append_index(storage, FP, [summary(1)])
    monkeypatch.undo()
    targets.append_index(storage, FP, [summary(3)])
    assert [s.dead for s in targets.load_index(storage, FP).values()] == [0, 1]


def test_units_of_a_manifest_are_made_when_they_are_looked_at(storage):
    _, _, entry = manifest(storage, names="dcba")
    units = targets.read_run_manifest(storage, entry).units
    every = list(units)
    assert [u.unit for u in every] == texts(units.hashes) == sorted(u.unit for u in every)
    assert [units[i].unit for i in (0, 3, -1)] == [every[i].unit for i in (0, 3, -1)]
    assert [u.unit for u in units[1:3]] == [u.unit for u in every[1:3]]
    assert [u.unit for u in pickle.loads(pickle.dumps(units[2:]))] == [u.unit for u in every[2:]]
    assert units == targets.read_run_manifest(storage, entry).units
    assert targets.ManifestUnits.of(every) == units
    assert units.sum_of("object_bytes") == sum(u.object_bytes for u in every)
    assert (units.sequences, units.tokens) == (20, 208)
    with pytest.raises(IndexError):
        units[4]
