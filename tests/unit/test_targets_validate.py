"""Rows that are no distributions, or not of their tokens, never reach the store."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray import targets
from distill_ray.errors import IntegrityError
from distill_ray.schema import Sequence, TargetRows
from distill_ray.targets import validate
from distill_ray.targets.validate import check_rows, check_rows_plainly
from tests.unit.targets_fakes import captured, exact_rows, identity, unit

OF = identity()


def refused(match, change_rows=None, change_sequence=None, of=OF):
    sequences, rows = captured(of, lengths=(6, 20), seed=5)
    if change_rows:
        rows[1] = change_rows(rows[1])
    if change_sequence:
        sequences[1] = change_sequence(sequences[1])
    with pytest.raises(IntegrityError, match=f"unit {unit().hash} of corpus/a.jsonl, sequence 1: {match}"):
        targets.encode_unit(of, unit(), sequences, rows, [], 0.0)


def put(array, at, value):
    array = array.copy()
    array[at] = value
    return array


def test_rows_shifted_by_one_against_the_tokens_are_refused():
    def shift(r: TargetRows) -> TargetRows:
        def roll(a):
            return np.roll(a, 1, axis=0)

        tails = {t: roll(v) for t, v in r.log_tail_at.items()}
        return TargetRows(
            *(roll(a) for a in (r.ids_NK, r.logprobs_NK, r.log_tail_N, r.actual_logprob_N, r.actual_rank_N)),
            entropy_N=roll(r.entropy_N),
            log_tail_at=tails,
        )

    refused("row .* shifted", shift)


def test_actual_columns_shifted_against_the_rows_are_refused():
    refused(
        "row .* shifted",
        lambda r: replace(
            r, actual_logprob_N=np.roll(r.actual_logprob_N, 1), actual_rank_N=np.roll(r.actual_rank_N, 1)
        ),
    )


def test_ranks_shifted_alone_are_refused():
    refused("row .* disagrees with the row", lambda r: replace(r, actual_rank_N=np.roll(r.actual_rank_N, 1)))


def test_tokens_shifted_against_the_rows_are_refused():
    refused("row .* shifted", None, lambda s: replace(s, tokens=np.roll(s.tokens, 1)))


def test_one_row_too_many_or_too_few_is_refused():
    def cut(r, part):
        tails = {t: v[part] for t, v in r.log_tail_at.items()}
        arrays = (r.ids_NK, r.logprobs_NK, r.log_tail_N, r.actual_logprob_N, r.actual_rank_N, r.entropy_N)
        return TargetRows(*(a[part] for a in arrays), log_tail_at=tails)

    refused(r"rows have shape \(18, 8\), 20 tokens at top_k=8 need \(19, 8\)", lambda r: cut(r, slice(1, None)))
    refused("rows have shape", lambda r: cut(r, [*range(19), 18]))


@pytest.mark.parametrize(
    ("column", "at", "value", "says"),
    [
        ("logprobs_NK", (4, 3), np.nan, "row 4: kept logprobs … .* nan at rank 4"),
        ("logprobs_NK", (4, 7), -30.0, "row 4: kept mass .* not 1 within"),
        ("logprobs_NK", (4, 0), np.nan, "row 4: kept logprobs … nan, .* at rank 2"),
        ("logprobs_NK", (4, 0), 0.5, "row 4: kept mass"),
        ("log_tail_N", 4, np.nan, "row 4: kept mass"),
        ("log_tail_N", 4, -np.inf, "row 4: kept mass"),
        ("actual_logprob_N", 4, np.nan, "row 4: actual logprob is nan"),
        ("actual_logprob_N", 4, 0.1, "row 4: actual logprob is 0.1"),
        ("actual_rank_N", 4, 0, "row 4: actual rank 0 is outside 1 … 997"),
        ("actual_rank_N", 4, 998, "row 4: actual rank 998 is outside"),
        ("entropy_N", 4, np.inf, "row 4: entropy is inf"),
        ("ids_NK", (4, 7), 997, "row 4: id 997 at rank 8 is outside 0 … 996"),
        ("ids_NK", (4, 7), -1, "row 4: id -1 at rank 8"),
    ],
)
def test_broken_rows_are_refused(column, at, value, says):
    refused(says, lambda r: replace(r, **{column: put(getattr(r, column), at, value)}))


def test_unsorted_and_uninitialised_rows_are_refused():
    refused(
        "row 0: kept logprobs … .* at rank 2",
        lambda r: replace(r, logprobs_NK=r.logprobs_NK[:, ::-1], ids_NK=r.ids_NK[:, ::-1]),
    )
    refused("row .*", lambda r: replace(r, ids_NK=np.zeros_like(r.ids_NK)))


def test_missing_or_unknown_temperatures_are_refused():
    refused(r"rows hold log tails at T=\[\], the capture needs \[2.0\]", lambda r: replace(r, log_tail_at={}))
    refused("log tail at T=2.0 has shape", lambda r: replace(r, log_tail_at={2.0: r.log_tail_N[1:]}))
    refused(
        "row 2: log tail mass at T=2.0 is nan", lambda r: replace(r, log_tail_at={2.0: put(r.log_tail_N, 2, np.nan)})
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: replace(s, tokens=put(s.tokens, 3, 997)), "token 3 has id 997, outside 0 … 996"),
        (lambda s: replace(s, loss_mask=s.loss_mask[1:]), "loss mask is bool"),
        (lambda s: replace(s, loss_mask=put(s.loss_mask, 0, True)), "nothing predicts token 0"),
        (lambda s: replace(s, tokens=s.tokens[:0], loss_mask=s.loss_mask[:0]), "at least one token"),
    ],
)
def test_broken_sequences_are_refused(change, says):
    refused(says if says.startswith("token") else f".*{says}", None, change)


def test_entropy_for_some_sequences_only_is_refused():
    sequences, rows = captured(OF)
    rows[2] = replace(rows[2], entropy_N=None)
    with pytest.raises(IntegrityError, match="entropy given for some sequences only"):
        targets.encode_unit(OF, unit(), sequences, rows, [], 0.0)


def test_ties_may_be_ranked_either_way():
    of = identity(vocab=50, k=4, temperatures=(1.0,))
    tokens = np.array([1, 7, 3, 40], np.int32)
    rows = exact_rows(np.zeros((3, 50)), tokens[1:], 4)  # all 50 tie: rank 1 by "greater", 50 by "at least"
    sequence = Sequence(tokens, np.array([False, True, True, True]), 1)
    for rank in (1, 4, 50):
        ranked = replace(rows, actual_rank_N=np.full(3, rank, np.int32))
        assert targets.encode_unit(of, unit(), [sequence], [ranked], [], 0.0)


def test_a_one_hot_teacher_is_stored_finite():
    of = identity(vocab=50, k=4, temperatures=(1.0,))
    tokens = np.array([1, 7, 0, 40], np.int32)
    logits = np.full((3, 50), -np.inf)
    logits[:, 0] = 0
    with np.errstate(invalid="ignore"):
        rows = exact_rows(logits, tokens[1:], 4, entropy=False)
    assert rows.logprobs_NK[0, 1] == rows.actual_logprob_N[0] == rows.log_tail_N[0] == -np.inf
    sequence = Sequence(tokens, np.array([False, True, True, True]), 1)
    data, _ = targets.encode_unit(of, unit(), [sequence], [rows], [], 0.0)
    got = targets.UnitTargets(data, of.fingerprint, unit().hash, "memory").rows(0)
    assert all(np.isfinite(a).all() for a in (got.logprobs_NK, got.log_tail_N, got.actual_logprob_N))


def verdict(check, *arguments):
    try:
        return check(*arguments)
    except IntegrityError as error:
        return str(error)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_compiled_checks_judge_as_the_plain_ones(data):
    k = data.draw(st.sampled_from([1, 3, 8, 33]))
    of = identity(vocab=97, k=k)
    sequences, (rows,) = captured(of, lengths=(9,), seed=data.draw(st.integers(0, 1000)))
    tokens = sequences[0].tokens
    column = data.draw(
        st.sampled_from(
            ["none", "ids_NK", "logprobs_NK", "log_tail_N", "actual_logprob_N", "actual_rank_N", "entropy_N"]
        )
    )
    if column != "none":
        at = data.draw(st.integers(0, 7))
        place = (at, data.draw(st.integers(0, k - 1))) if column.endswith("K") else at
        values = (
            [-1, 0, 1, 2, 96, 97] if column in ("ids_NK", "actual_rank_N") else [np.nan, np.inf, -np.inf, 0.1, -1.0]
        )
        rows = replace(rows, **{column: put(getattr(rows, column), place, data.draw(st.sampled_from(values)))})
    want, got = (verdict(check, of, tokens, rows) for check in (check_rows_plainly, check_rows))
    if isinstance(want, str):
        assert got == want
    else:
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_sound_rows_need_no_second_judgement(monkeypatch):
    def plainly(*_):
        raise AssertionError("the compiled checks were not satisfied with sound rows")

    monkeypatch.setattr(validate, "check_rows_plainly", plainly)
    for k in (1, 5, 64):
        of = identity(vocab=300, k=k)
        for sequence, rows in zip(*captured(of, lengths=(40, 2, 1)), strict=True):
            check_rows(of, sequence.tokens, rows)
