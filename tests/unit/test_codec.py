"""Codec v1: exact ids, bounded log-probabilities, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.codec import LOG_FLOOR, MAX_GAP, at_temperature, decode, encode, row_bytes
from distill_ray.errors import IntegrityError
from tests.unit.targets_fakes import log_softmax

GAP_BOUND = 0.0945  # half a step at q = 255, in float32
SHIFT_BOUND = 0.035  # renormalising moves a row by its mass-weighted gap error; worst: 511 ties at the worst gap


def top_k(logits_NV: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logp_NV = log_softmax(logits_NV)
    order = np.argsort(-logp_NV, axis=1, kind="stable")
    with np.errstate(divide="ignore"):
        tail_N = np.log(np.exp(np.take_along_axis(logp_NV, order[:, k:], 1)).sum(1))
    ids_NK = order[:, :k]
    return ids_NK.astype(np.int32), np.take_along_axis(logp_NV, ids_NK, 1), tail_N


def total(logprobs_NK: np.ndarray, tail_N: np.ndarray) -> np.ndarray:
    return np.exp(logprobs_NK.astype(np.float64)).sum(1) + np.exp(tail_N.astype(np.float64))


@pytest.mark.parametrize(
    ("k", "vocab", "size"),
    [(64, 128_256, 204), (16, 128_256, 54), (128, 128_256, 404), (64, 151_936, 212), (64, 65_536, 196), (1, 1, 7)],
)
def test_row_bytes_are_those_of_the_format(k, vocab, size):
    assert row_bytes(k, vocab) == size


def test_the_layout_byte_for_byte():
    ids = np.array([[65_537, 2, 131_074]])
    packed = encode(ids, np.array([[-0.5, -0.5, -6.5]]), np.array([-4.0]), 151_936)
    head = np.array([-0.5, -4.0], "<f2").tobytes()
    q = bytes([0, 0, round(255 * (6 / 24) ** 0.5)])
    low = np.array([1, 2, 2], "<u2").tobytes()
    assert packed.tobytes() == head + q + low + bytes([0b10000000, 0b00100000])


@st.composite
def rows(draw):
    vocab = draw(st.one_of(st.integers(1, 300), st.sampled_from([65_536, 65_537, 128_256, 151_936, 1 << 20])))
    k = draw(st.integers(1, min(512, vocab)))
    n = draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = np.stack([rng.choice(vocab, k, replace=False) for _ in range(n)]) if n else np.empty((0, k), int)
    if n and draw(st.booleans()):
        ids[:, -1], edge = vocab - 1, ids[:, -1].copy()  # the largest id must survive too
        for row, old in zip(ids, edge, strict=True):
            row[:-1][row[:-1] == vocab - 1] = old
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    steps = rng.integers(0, levels, (n, k)) * draw(st.sampled_from([0.0, 1e-4, 0.01, 0.3, 23.9 / 1000, 6.0]))
    logits = -np.sort(steps, axis=1)
    if draw(st.booleans()):
        logits[:, 1:][rng.random((n, k - 1)).cumsum(1) > 0.7 * k] = -np.inf
    tail = draw(st.sampled_from([-np.inf, -40.0, -8.0, -1.0, -0.01]))
    logprobs = log_softmax(logits) + np.log1p(-np.exp(tail)) if n else logits
    return ids, logprobs.astype(np.float32), np.full(n, tail, np.float32), vocab


@settings(max_examples=150, deadline=None)
@given(rows())
def test_any_row_round_trips_within_the_bounds(row):
    ids, logprobs, tail, vocab = row
    packed = encode(ids, logprobs, tail, vocab)
    assert packed.shape == (len(ids), row_bytes(ids.shape[1], vocab))
    got_ids, got, got_tail = decode(packed, ids.shape[1], vocab)
    assert got_ids.dtype == np.int32
    np.testing.assert_array_equal(got_ids, ids)
    assert np.isfinite(got).all()
    assert np.isfinite(got_tail).all()
    assert (np.diff(got, axis=1) <= 0).all()
    assert got.max(initial=0) <= 0 >= got_tail.max(initial=0)
    np.testing.assert_allclose(total(got, got_tail), 1, atol=1e-5)
    gap = np.minimum(logprobs[:, :1] - logprobs, MAX_GAP)
    np.testing.assert_allclose(got[:, :1] - got, gap, atol=GAP_BOUND)
    near = gap < MAX_GAP
    assert np.abs((got - logprobs)[near]).max(initial=0) <= GAP_BOUND + SHIFT_BOUND


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.01, 1.0, 3.0, 8.0]), st.integers(1, 512))
def test_a_softmax_row_is_within_a_tenth_of_a_nat(seed, scale, k):
    logits = np.random.default_rng(seed).normal(0, scale, (4, 2000))
    ids, logprobs, tail = top_k(logits, k)
    got_ids, got, got_tail = decode(encode(ids, logprobs, tail, 2000), k, 2000)
    np.testing.assert_array_equal(got_ids, ids)
    assert np.abs(got - logprobs)[logprobs[:, :1] - logprobs <= MAX_GAP].max() <= 0.1
    heavy = tail > LOG_FLOOR
    assert np.abs(got_tail - tail)[heavy].max(initial=0) <= 0.1


def test_kl_error_on_zipf_rows_at_k_64():
    rng = np.random.default_rng(1)
    for vocab in (49_152, 151_936):
        logits = -1.2 * np.log(rng.permutation(vocab) + 1.0) + rng.normal(0, 1, (12, vocab))
        ids, logprobs, tail = top_k(logits, 64)
        _, got, got_tail = decode(encode(ids, logprobs, tail, vocab), 64, vocab)
        kl = (np.exp(logprobs) * (logprobs - got)).sum(1) + np.exp(tail) * (tail - got_tail)
        assert kl.mean() <= 1e-4
        assert kl.max() <= 2e-4


def test_one_hot_rows_are_clipped_at_gap_24_and_stay_finite():
    logprobs = np.full((2, 5), -np.inf)
    logprobs[:, 0] = 0
    _, got, tail = decode(encode(np.array([[4, 1, 0, 2, 3]] * 2), logprobs, np.array([-np.inf] * 2), 5), 5, 5)
    np.testing.assert_allclose(got, [[0, -24, -24, -24, -24]] * 2, atol=1e-6)
    np.testing.assert_allclose(tail, LOG_FLOOR)


@pytest.mark.parametrize(("k", "vocab"), [(1, 1), (1, 1 << 20), (512, 512), (512, 1 << 20), (64, 151_936)])
def test_uniform_rows_stay_uniform(k, vocab):
    with np.errstate(divide="ignore"):
        tail = np.log(np.array([1 - k / vocab]))
    ids = np.arange(vocab - k, vocab)[None, ::-1]
    got_ids, got, got_tail = decode(encode(ids, np.full((1, k), -np.log(vocab)), tail, vocab), k, vocab)
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_allclose(got, -np.log(vocab), atol=5e-3)
    np.testing.assert_allclose(total(got, got_tail), 1, atol=1e-5)


def test_rows_far_beyond_one_block_keep_their_places():
    k, vocab, n = 512, 70_000, 400
    rng = np.random.default_rng(2)
    ids = (rng.integers(0, vocab, (n, 1)) + np.arange(k)) % vocab
    logprobs = log_softmax(-np.sort(rng.random((n, k)), axis=1)) - 1e-3
    got_ids, got, _ = decode(encode(ids, logprobs, np.full(n, np.log(1e-3)), vocab), k, vocab)
    np.testing.assert_array_equal(got_ids, ids)
    assert np.abs(got - logprobs).max() < 0.02


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_the_tail_is_exact_at_a_captured_temperature(temperature):
    logits = -1.5 * np.log(np.arange(1, 20_001)) + np.random.default_rng(3).normal(0, 1, (20, 20_000))
    ids, logprobs, tail = top_k(logits, 128)
    exact = log_softmax(logits / temperature)
    kept = np.take_along_axis(exact, ids.astype(np.int64), 1)
    tail_T = np.log1p(-np.exp(kept).sum(1)).astype(np.float16)
    _, got, _ = decode(encode(ids, logprobs, tail, 20_000), 128, 20_000)
    got_T = at_temperature(got, tail_T, temperature)
    assert got_T.dtype == np.float32
    np.testing.assert_allclose(total(got_T, tail_T), 1, atol=1e-6)
    assert np.abs(got_T - kept).max() <= 0.1 / min(1.0, temperature)


def test_a_tail_that_rounds_to_one_leaves_finite_kept_logprobs():
    assert np.isfinite(at_temperature(np.array([[-1.0, -2.0]]), np.array([0.0], np.float16), 20.0)).all()


GOOD = (np.array([[3, 1, 2], [7, 8, 9]]), np.array([[-1.0, -1.5, -2.0]] * 2), np.array([-1.0, -1.0]))


@pytest.mark.parametrize(
    ("which", "at", "value", "says"),
    [
        (1, (1, 1), np.nan, "row 1: logprob nan at rank 2"),
        (1, (1, 0), np.nan, "row 1: top-1 logprob is nan"),
        (1, (1, 0), -np.inf, "row 1: top-1 logprob is -inf"),
        (1, (0, 0), 0.5, "row 0: top-1 logprob is 0.5"),
        (1, (1, 2), -1.2, "row 1: logprob -1.2.* at rank 3 follows -1.5 at rank 2"),
        (2, (1,), np.nan, "row 1: log tail mass is nan"),
        (2, (1,), 0.5, "row 1: log tail mass is 0.5"),
        (0, (1, 2), 8, "row 1: id 8 occurs twice"),
        (0, (1, 2), 100, "row 1: id 100 at rank 3 is outside 0 … 99"),
        (0, (0, 1), -1, "row 0: id -1 at rank 2 is outside"),
    ],
)
def test_broken_rows_are_refused_with_row_and_numbers(which, at, value, says):
    arrays = [a.copy() for a in GOOD]
    arrays[which][at] = value
    with pytest.raises(IntegrityError, match=says):
        encode(*arrays, 100)


def test_the_refused_row_is_counted_over_blocks():
    n = 40_000
    ids = np.tile(np.arange(4), (n, 1))
    ids[n - 1, 3] = 0
    with pytest.raises(IntegrityError, match=f"row {n - 1}: id 0 occurs twice"):
        encode(ids, np.full((n, 4), -2.0), np.full(n, -1.0), 100)


def test_rows_of_another_k_or_vocabulary_are_refused():
    packed = encode(*GOOD, 100)
    for k, vocab in [(4, 100), (3, 70_000)]:
        with pytest.raises(IntegrityError, match="another k or vocabulary"):
            decode(packed, k, vocab)


@pytest.mark.parametrize(("k", "vocab"), [(0, 10), (11, 10), (513, 1000), (1, (1 << 20) + 1)])
def test_formats_that_do_not_exist_are_refused(k, vocab):
    with pytest.raises(ValueError, match="outside 1"):
        row_bytes(k, vocab)
