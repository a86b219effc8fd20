"""Target objects: what goes in comes back, by whole read and by range, and the bytes do not depend on chance."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_ray import targets
from distill_ray.errors import IntegrityError, UserError
from distill_ray.storage import NotFoundError, open_storage
from tests.unit.targets_fakes import captured, dead_letter, identity, unit


@pytest.fixture
def storage(tmp_path):
    return open_storage(str(tmp_path))


def stored(storage, of, u, *args, **kwargs):
    sequences, rows = captured(of, *args, **kwargs)
    data, summary = targets.encode_unit(of, u, sequences, rows, [dead_letter(u)], 1.5)
    storage.put(targets.unit_key(of, u.hash), data)
    return sequences, rows, data, summary


def assert_same(sequence, row, got, got_row, entropy=True):
    np.testing.assert_array_equal(got.tokens, sequence.tokens)
    np.testing.assert_array_equal(got.loss_mask, sequence.loss_mask)
    assert got.doc_key == sequence.doc_key
    np.testing.assert_array_equal(got_row.ids_NK, row.ids_NK)
    np.testing.assert_allclose(got_row.logprobs_NK, row.logprobs_NK, atol=0.1)
    np.testing.assert_allclose(got_row.log_tail_N, row.log_tail_N, atol=0.05)
    np.testing.assert_allclose(got_row.actual_logprob_N, row.actual_logprob_N, atol=0.02)
    np.testing.assert_array_equal(got_row.actual_rank_N, row.actual_rank_N)
    for t, tail in row.log_tail_at.items():
        np.testing.assert_allclose(got_row.log_tail_at[t], tail, atol=0.01)
    if entropy:
        np.testing.assert_allclose(got_row.entropy_N, row.entropy_N, atol=0.01)
    else:
        assert got_row.entropy_N is None


def test_only_ids_that_no_token_has_change_the_fingerprint_of_a_capture():
    of = identity()
    assert dataclasses.replace(of, token_ids=of.vocab_size) == of
    assert "token_ids" not in of.to_dict()
    padded = dataclasses.replace(of, token_ids=of.vocab_size - 3)
    assert (of.kept_below, padded.kept_below) == (of.vocab_size, of.vocab_size - 3)
    assert padded.fingerprint != of.fingerprint
    assert targets.CaptureIdentity.from_dict(padded.to_dict()) == padded
    sequences, rows = captured(of, (12,))
    low = dataclasses.replace(of, token_ids=int(rows[0].ids_NK[3].max()))
    with pytest.raises(IntegrityError, match=rf"row 0: id \d+ is kept.*below {low.token_ids} only"):
        targets.encode_unit(low, unit(), sequences, rows, [], 0.0)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("temperatures", [(1.0,), (0.5, 1.0, 2.0)])
def test_a_unit_comes_back_whole(storage, entropy, temperatures):
    of, u = identity(temperatures=temperatures), unit()
    sequences, rows, data, summary = stored(storage, of, u, entropy=entropy)
    read = targets.read_unit(storage, of, u.hash, expect_sha256=summary.object_sha256)
    assert len(read) == len(sequences)
    for i, (sequence, row) in enumerate(zip(sequences, rows, strict=True)):
        assert_same(sequence, row, read.sequence(i), read.rows(i), entropy)
    assert read.identity == of
    nowhere = dataclasses.replace(u.source, uri="", version="")
    assert read.info.unit == dataclasses.replace(u, source=nowhere)
    assert read.dead == (dataclasses.replace(dead_letter(u), source=""),)
    assert summary.object_sha256 == hashlib.sha256(data).hexdigest()
    assert summary.rows == sum(len(r.ids_NK) for r in rows)
    np.testing.assert_array_equal(summary.supervised, [s.loss_mask.sum() for s in sequences])
    kept = sum(np.exp(r.logprobs_NK.astype(float)).sum() for r in rows)
    assert summary.kept_mass_sum == pytest.approx(kept)
    again = read.summary()
    for field in dataclasses.fields(summary):
        want = 0.0 if field.name == "teacher_seconds" else getattr(summary, field.name)
        np.testing.assert_array_equal(getattr(again, field.name), want)


def test_rows_at_a_captured_temperature_have_its_exact_tail(storage):
    of, u = identity(temperatures=(1.0, 2.0)), unit()
    _, rows, _, _ = stored(storage, of, u)
    at_2 = targets.read_unit(storage, of, u.hash).rows(0, 2.0)
    np.testing.assert_allclose(at_2.log_tail_N, rows[0].log_tail_at[2.0], atol=1e-3)
    np.testing.assert_allclose(np.exp(at_2.logprobs_NK).sum(1) + np.exp(at_2.log_tail_N), 1, atol=1e-6)


def test_a_temperature_that_was_not_captured_is_refused(storage):
    of, u = identity(temperatures=(1.0,)), unit()
    stored(storage, of, u)
    with pytest.raises(UserError, match=r"temperature 2.0 was not captured \(captured: \[1.0\]\)"):
        targets.read_unit(storage, of, u.hash).rows(0, 2.0)


def test_the_bytes_depend_on_the_content_alone():
    of, u = identity(), unit()
    sequences, rows = captured(of)
    first, _ = targets.encode_unit(of, u, sequences, rows, [], 1.0)
    wide = [dataclasses.replace(r, ids_NK=r.ids_NK.astype(np.int64)[:, :]) for r in rows]
    elsewhere = dataclasses.replace(u.source, uri="s3://other/b.jsonl", version="etag")
    other = dataclasses.replace(u, multiplicity=3, source=elsewhere)
    second, _ = targets.encode_unit(of, other, sequences, wide, [], 9.0)
    assert first == second


def test_a_unit_of_dead_letters_only_is_an_object_too(storage):
    of, u = identity(), unit()
    stored(storage, of, u, lengths=())
    read = targets.read_unit(storage, of, u.hash)
    assert len(read) == 0
    assert read.dead == (dataclasses.replace(dead_letter(u), source=""),)
    assert targets.open_unit(storage, of, u.hash).sequences(0, 0) == []


def test_any_parquet_reader_can_read_the_plain_columns(storage, tmp_path):
    of, u = identity(), unit()
    sequences, _, _, _ = stored(storage, of, u)
    table = pq.read_table(tmp_path / targets.unit_key(of, u.hash))
    assert table.column("tokens").to_pylist() == [s.tokens.tolist() for s in sequences]


class CountingStorage:
    """Counts the bytes of range reads."""

    def __init__(self, storage):
        self._storage, self.uri, self.ranges = storage, storage.uri, []

    def head(self, key):
        return self._storage.head(key)

    def get_range(self, key, start, length):
        self.ranges.append((start, length))
        return self._storage.get_range(key, start, length)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A unit of several row groups: 512 kept tokens make rows of 1,540 bytes."""
    storage = open_storage(str(tmp_path_factory.mktemp("grouped")))
    of, u = identity(vocab=1000, k=512, temperatures=(1.0,)), unit()
    return storage, of, u, stored(storage, of, u, lengths=(400, 300, 250, 200, 500, 3, 350), entropy=False)


def test_a_range_read_fetches_the_row_groups_it_needs(grouped):
    storage, of, u, (sequences, rows, data, _) = grouped
    counting = CountingStorage(storage)
    reader = targets.open_unit(counting, of, u.hash, object_bytes=len(data))
    regions = reader.info.regions
    assert [r.stop - r.start > 2**20 for r in regions] == [True, True, False]
    for start, stop, groups in [(0, 1, 1), (2, 3, 1), (1, 4, 2), (4, 7, 2), (0, 7, 3), (6, 7, 1)]:
        counting.ranges.clear()
        got = reader.sequences(start, stop)
        assert len(got) == stop - start
        for i, s in enumerate(got, start=start):
            assert_same(sequences[i], rows[i], s, targets.decode_rows(of, s), entropy=False)
        assert len(counting.ranges) == 1
        assert counting.ranges[0][1] in {
            sum(r.stop - r.start for r in regions[a : a + groups]) for a in range(len(regions) - groups + 1)
        }
    assert_same(sequences[5], rows[5], reader.sequences(5, 6)[0], reader.rows(5), entropy=False)
    with pytest.raises(IndexError, match="which holds 7"):
        reader.sequences(5, 8)


def test_targets_of_another_teacher_are_refused(storage):
    ours, theirs, u = identity(teacher="ours"), identity(teacher="theirs"), unit()
    _, _, data, _ = stored(storage, theirs, u)
    storage.put(targets.unit_key(ours, u.hash), data)
    for read in (targets.read_unit, targets.open_unit):
        with pytest.raises(
            IntegrityError, match=f"of capture {theirs.fingerprint} .*theirs.* not of {ours.fingerprint}"
        ):
            read(storage, ours, u.hash)


def test_another_unit_renamed_into_place_is_refused(storage):
    of, a, b = identity(), unit("a"), unit("b")
    _, _, data, _ = stored(storage, of, b)
    storage.put(targets.unit_key(of, a.hash), data)
    for read in (targets.read_unit, targets.open_unit):
        with pytest.raises(IntegrityError, match=f"holds unit {b.hash}, not {a.hash}"):
            read(storage, of, a.hash)


def test_a_unit_captured_again_is_not_the_recorded_one(storage):
    of, u = identity(), unit()
    _, _, _, old = stored(storage, of, u, seed=1)
    stored(storage, of, u, seed=2)
    with pytest.raises(IntegrityError, match="whole, but captured again since it was recorded"):
        targets.read_unit(storage, of, u.hash, expect_sha256=old.object_sha256)


def test_a_missing_object_is_not_found(storage):
    for read in (targets.read_unit, targets.open_unit):
        with pytest.raises(NotFoundError):
            read(storage, identity(), unit().hash)


def test_the_fingerprint_is_of_the_values():
    base = identity(temperatures=(1.0, 2.0))
    assert base.fingerprint == identity(temperatures=(2, 1)).fingerprint == identity(temperatures=(2.0,)).fingerprint
    assert targets.CaptureIdentity.from_dict(base.to_dict()) == base
    others = [identity(teacher="x"), identity(k=9), identity(vocab=998), identity(temperatures=())]
    others += [dataclasses.replace(base, tokenizer="tok-2"), dataclasses.replace(base, codec=2)]
    assert len({base.fingerprint, *(o.fingerprint for o in others)}) == 7


def test_what_computed_the_rows_is_recorded_and_shown(storage):
    of, put = identity(), {}
    for name, engine in (("a", "vllm 9.9, inside its workers"), ("b", "")):
        u = unit(name)
        data, put[name] = targets.encode_unit(of, u, *captured(of), [], 1.0, engine)
        storage.put(targets.unit_key(of, u.hash), data)
        assert targets.read_unit(storage, of, u.hash).info.engine == engine
    targets.append_index(storage, of, list(put.values()))
    found = targets.inspect(f"{storage.uri}/targets/{of.fingerprint}", verify=True)
    assert found.problems == ()
    assert "computed by     not recorded (1 read); vllm 9.9, inside its workers (1 read)\n" in found.render()
