"""Drawn tokens in target objects: what goes in comes back, damage is seen, and faulty draws never get in."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from distill_ray import targets
from distill_ray.errors import IntegrityError
from distill_ray.schema import Draws, Sequence, TargetRows
from distill_ray.storage import open_storage
from distill_ray.targets import CaptureIdentity
from distill_ray.targets.index import summaries_table, table_summaries
from distill_ray.teacher.draws import DrawSpec, draw_from_logits
from distill_ray.teacher.seeds import row_keys, sequence_hash
from distill_ray.teacher.wire import draws_from_words
from tests.unit.targets_fakes import captured, identity, unit

N = 40


def drawing(draws_from: str = "all", temperature: float = 2.0, **changes: Any) -> CaptureIdentity:
    return replace(identity(**changes), draws=N, draws_from=draws_from, draws_temperature=temperature)


def taught(
    of: CaptureIdentity, lengths: tuple[int, ...] = (12, 2, 30, 1, 7)
) -> tuple[list[Sequence], list[TargetRows]]:
    """Sequences, their exact rows, and draws of the same distributions."""
    sequences, rows = captured(of, lengths, seed=3)
    spec = DrawSpec(of.draws, of.draws_from == "tail", of.draws_temperature)
    return sequences, [replace(r, draws=_draws(of, spec, s, r)) for s, r in zip(sequences, rows, strict=True)]


def _draws(of: CaptureIdentity, spec: DrawSpec, sequence: Sequence, rows: TargetRows) -> Draws:
    """Logits of which the row's kept tokens are the greatest, and of the rest every one alike."""
    n, (_, k) = len(rows.ids_NK), rows.ids_NK.shape
    z = np.repeat(rows.log_tail_N[:, None] - np.log(of.vocab_size - k), of.vocab_size, 1).astype(np.float32)
    np.put_along_axis(z, rows.ids_NK.astype(np.int64), rows.logprobs_NK, 1)
    keys = torch.from_numpy(row_keys(sequence_hash(sequence.tokens), 0, n))
    top = torch.from_numpy(rows.logprobs_NK[:, 0])
    return draws_from_words(draw_from_logits(spec, torch.from_numpy(z), k, keys, top).numpy())


@pytest.mark.parametrize("draws_from", ["all", "tail"])
def test_draws_come_back_from_the_store(tmp_path, draws_from):
    of, u, storage = drawing(draws_from), unit(), open_storage(str(tmp_path))
    sequences, rows = taught(of)
    data, summary = targets.encode_unit(of, u, sequences, rows, [], 1.0)
    storage.put(targets.unit_key(of, u.hash), data)
    read = targets.read_unit(storage, of, u.hash, expect_sha256=summary.object_sha256)
    for i, row in enumerate(rows):
        for got in (read.rows(i).draws, targets.open_unit(storage, of, u.hash).rows(i, 2.0).draws):
            for name in ("ids_M", "counts_M", "distinct_N"):
                np.testing.assert_array_equal(getattr(got, name), getattr(row.draws, name))
            np.testing.assert_allclose(got.logprobs_M, row.draws.logprobs_M, rtol=2**-11)
    distinct = sum(len(r.draws.ids_M) for r in rows)
    assert read.summary().distinct_draws == summary.distinct_draws == distinct > 0
    table = pq.read_table(tmp_path / targets.unit_key(of, u.hash))
    flat = table.column("draws").combine_chunks().values.to_numpy()
    assert (flat >> 20).sum() == N * summary.rows
    assert table.schema.field("draw_logprob").type.value_type == "halffloat"
    assert table.schema.field("draw_counts").type.value_type == "uint16"


def test_a_capture_without_draws_is_what_it_was_before_there_were_any():
    """Fingerprint and columns of old stores, which must stay readable."""
    of = identity()
    assert of.fingerprint == "50ed66b0807f257cf92fdb88d88b7ce4"
    assert sorted(of.to_dict()) == ["codec", "teacher", "temperatures", "tokenizer", "top_k", "vocab_size"]
    assert CaptureIdentity.from_dict(json.loads(json.dumps(of.to_dict()))) == of
    data, summary = targets.encode_unit(of, unit(), *captured(of), [], 0.0)
    read = targets.UnitTargets(data, of.fingerprint, unit().hash, "memory")
    assert read.rows(0).draws is None
    assert b"draw" not in data
    assert "distinct_draws" not in summaries_table([summary]).column_names


def test_every_draw_setting_is_identity():
    of = drawing()
    others = [replace(of, draws=41), drawing("tail"), drawing(temperature=1.0), identity()]
    assert len({of.fingerprint, *(o.fingerprint for o in others)}) == 5
    assert CaptureIdentity.from_dict(json.loads(json.dumps(of.to_dict()))) == of


def test_the_index_keeps_the_count_beside_entries_without():
    of = drawing()
    _, with_draws = targets.encode_unit(of, unit(), *taught(of), [], 0.0)
    _, without = targets.encode_unit(identity(), unit("b"), *captured(identity()), [], 0.0)
    for summaries in ([with_draws, without], [without]):
        got = table_summaries(summaries_table(summaries))
        assert [s.distinct_draws for s in got] == [s.distinct_draws for s in summaries]


def test_inspect_shows_what_was_drawn(tmp_path):
    of, storage = drawing("tail"), open_storage(str(tmp_path))
    data, summary = targets.encode_unit(of, unit(), *taught(of), [], 0.0)
    storage.put(targets.unit_key(of, unit().hash), data)
    targets.append_index(storage, of, [summary])
    mean = summary.distinct_draws / summary.rows
    for uri in (f"{tmp_path}/targets/{of.fingerprint}", f"{tmp_path}/{targets.unit_key(of, unit().hash)}"):
        line = next(x for x in targets.inspect(uri).render().splitlines() if x.startswith("draws "))
        assert "40 a row from outside the kept tokens at T = 2;" in line
        assert f"mean {mean:.1f} distinct, {6 * mean + 4:.1f} bytes a row" in line


def test_damage_to_each_column_of_draws_is_seen():
    of = drawing()
    sequences, rows = taught(of)
    data, _ = targets.encode_unit(of, unit(), sequences, rows, [], 0.0)
    stored = targets.UnitTargets(data, of.fingerprint, unit().hash, "memory").sequence(2)
    assert stored.draws is not None
    for column in (stored.draws.words_M, stored.draws.logprobs_M, stored.draws.distinct_N.astype("<i4")):
        at = data.index(np.ascontiguousarray(column).tobytes()[:40])
        changed = bytearray(data)
        changed[at + 5] ^= 1
        with pytest.raises(IntegrityError, match="memory, row group 0"):
            targets.UnitTargets(bytes(changed), of.fingerprint, unit().hash, "memory")
    sums = {targets.layout.checksum(of.fingerprint, unit().hash, 2, s) for s in _one_draw_changed(stored)}
    assert len(sums) == 5


def _one_draw_changed(stored: targets.StoredSequence) -> list[targets.StoredSequence]:
    """The sequence, and it with one value of each column changed, and without draws."""
    assert stored.draws is not None
    changed = [stored, replace(stored, draws=None)]
    for name in ("words_M", "logprobs_M", "distinct_N"):
        column = getattr(stored.draws, name).copy()
        column[3] += 1
        changed.append(replace(stored, draws=replace(stored.draws, **{name: column})))
    return changed


def _put(name: str, at: int, value: float):
    def change(draws: Draws) -> Draws:
        column = getattr(draws, name).copy()
        column[at] = value
        return replace(draws, **{name: column})

    return change


def _double(draws: Draws) -> Draws:
    ids = draws.ids_M.copy()
    ids[1] = ids[0]
    return replace(draws, ids_M=ids)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_put("ids_M", 0, -1), "row 0: id -1 was drawn, outside 0 … 996"),
        (_put("ids_M", 0, 997), "row 0: id 997 was drawn, outside"),
        (_double, r"row 0: drawn ids (\d+), \1 are not distinct"),
        (_put("counts_M", 0, 0), r"row 0: id \d+ was drawn 0 times"),
        (_put("counts_M", 0, 9), r"row 0: \d+ draws, the capture needs 40"),
        (_put("logprobs_M", 0, np.nan), r"row 0: drawn id \d+ has logprob nan"),
        (_put("logprobs_M", 0, -np.inf), r"row 0: drawn id \d+ has logprob -inf"),
        (_put("logprobs_M", 0, 0.1), r"row 0: drawn id \d+ has logprob 0.1"),
        (lambda d: replace(d, logprobs_M=d.logprobs_M - 0.01), r"row 0: drawn id \d+ has logprob .*, but is kept with"),
        (lambda d: replace(d, logprobs_M=d.logprobs_M * 0), r"row 0: drawn id \d+ (has|is not)"),
        (lambda d: replace(d, ids_M=d.ids_M[1:]), r"draws have shapes \[\d+, \d+, \d+\] for \d+ ids of 19 rows"),
        (lambda d: replace(d, distinct_N=d.distinct_N[1:]), "draws have shapes .* of 18 rows, and there are 19"),
        (lambda d: None, "rows hold no draws, the capture needs 40 a row"),
    ],
)
def test_faulty_draws_are_refused(change, says):
    _refused(drawing(), change, says)


def test_tail_draws_among_the_kept_are_refused():
    of = drawing("tail")
    _, (_, whole) = taught(drawing(), lengths=(6, 20))
    _refused(of, lambda _: whole.draws, r"row \d+: id \d+ was drawn from the tail, but is kept at rank \d")


def test_a_row_without_draws_is_refused_unless_its_tail_is_empty():
    def none_at_4(draws: Draws) -> Draws:
        a, b = targets.offsets_of(draws.distinct_N)[4:6]
        left = [np.delete(x, slice(a, b)) for x in (draws.ids_M, draws.counts_M, draws.logprobs_M)]
        return Draws(*left, np.where(np.arange(19) == 4, 0, draws.distinct_N))

    of = drawing("tail")
    _refused(of, none_at_4, "row 4: 0 draws, the capture needs 40, and its log tail mass is -")
    sequences, rows = taught(of, lengths=(20,))
    draws = none_at_4(rows[0].draws)
    kept = rows[0].logprobs_NK.copy()
    kept[4] -= np.log(np.exp(kept[4]).sum())
    tail = np.where(np.arange(19) == 4, -np.inf, rows[0].log_tail_N).astype(np.float32)
    actual = np.where(np.arange(19) == 4, kept[:, 0], rows[0].actual_logprob_N).astype(np.float32)
    tokens = sequences[0].tokens.copy()
    tokens[5] = rows[0].ids_NK[4, 0]
    rank = np.where(np.arange(19) == 4, 1, rows[0].actual_rank_N).astype(np.int32)
    empty = replace(
        rows[0], logprobs_NK=kept, log_tail_N=tail, actual_logprob_N=actual, actual_rank_N=rank, draws=draws
    )
    data, _ = targets.encode_unit(of, unit(), [replace(sequences[0], tokens=tokens)], [empty], [], 0.0)
    got = targets.UnitTargets(data, of.fingerprint, unit().hash, "memory").rows(0).draws
    assert got is not None
    assert got.distinct_N[4] == 0


def test_draws_that_the_capture_does_not_keep_are_refused():
    sequences, rows = taught(drawing())
    with pytest.raises(IntegrityError, match="rows hold draws, the capture needs 0 a row"):
        targets.encode_unit(identity(), unit(), sequences, rows, [], 0.0)


def _refused(of: CaptureIdentity, change, says: str) -> None:
    sequences, rows = taught(of, lengths=(6, 20))
    rows[1] = replace(rows[1], draws=change(rows[1].draws))
    with pytest.raises(IntegrityError, match=f"sequence 1: {says}"):
        targets.encode_unit(of, unit(), sequences, rows, [], 0.0)


def test_many_draws_make_small_row_groups():
    """A row group is closed by all of its bytes, or one of few kept tokens would grow past what a column can hold."""
    of = replace(drawing(k=1, vocab=5000), draws=4000)
    sequences, rows = taught(of, lengths=(60,) * 3)
    data, summary = targets.encode_unit(of, unit(), sequences, rows, [], 0.0)
    read = targets.UnitTargets(data, of.fingerprint, unit().hash, "memory")
    assert len(read.info.regions) > 1
    assert summary.object_bytes > 6 * summary.distinct_draws
    assert [len(read.rows(i).draws.ids_M) for i in range(3)] == [len(r.draws.ids_M) for r in rows]
