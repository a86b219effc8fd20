"""The compiled codec against the numpy reference: the same bytes, the same values, the same refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray import codec
from distill_ray.codec import reference
from distill_ray.codec.format import MASS_ONE, MASSES, MAX_K
from distill_ray.errors import IntegrityError
from tests.unit.targets_fakes import log_softmax

VOCABULARIES = st.one_of(
    st.integers(1, 300), st.integers(1, 1 << 20), st.sampled_from([65_536, 65_537, 128_256, 151_936, 1 << 20])
)
SHAPES = ("gumbel", "ties", "uniform", "one-hot", "cut off")


@st.composite
def batches(draw, least_rows: int = 0):
    """(ids, logprobs, log tail, V) of rows that a teacher could give."""
    vocab = draw(VOCABULARIES)
    k = draw(st.integers(1, min(MAX_K, vocab)))
    n = draw(st.integers(least_rows, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = np.array([rng.choice(vocab, k, replace=False) for _ in range(n)], np.int64).reshape(n, k)
    shape = draw(st.sampled_from(SHAPES))
    logits = np.zeros((n, k))
    if shape in ("gumbel", "cut off"):
        logits = rng.gumbel(0, draw(st.sampled_from([0.1, 2.0, 20.0])), (n, k))
    elif shape == "ties":
        logits = rng.integers(0, 4, (n, k)) * draw(st.sampled_from([0.25, 6.0]))
    logits = -np.sort(-logits, axis=1)
    if shape == "one-hot":
        logits[:, 1:] = -np.inf
    elif shape == "cut off":
        logits[:, 1:][np.arange(1, k) >= rng.integers(1, k + 1, (n, 1))] = -np.inf
    tail = rng.choice([-np.inf, -90.0, -8.0, -1.0, -0.01, -1e-9], n)
    with np.errstate(divide="ignore"):
        logprobs = log_softmax(logits) + np.log(-np.expm1(tail))[:, None] if n else logits
    return ids, logprobs.astype(np.float32), tail.astype(np.float32), vocab


def assert_equal_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


@settings(max_examples=300, deadline=None)
@given(batches(), st.sampled_from([np.int32, np.int64, np.uint32]))
def test_the_same_bytes_and_the_same_values_back(batch, kind):
    ids, logprobs, tail, vocab = batch
    packed = codec.encode(ids.astype(kind), logprobs, tail, vocab)
    assert_equal_bits(packed, reference.encode(ids, logprobs, tail, vocab))
    got, want = (decode(packed, ids.shape[1], vocab) for decode in (codec.decode, reference.decode))
    for a, b in zip(got, want, strict=True):
        assert_equal_bits(a, b)


@settings(max_examples=100, deadline=None)
@given(batches(least_rows=1), st.integers(0, 2**32))
def test_any_bytes_decode_alike(batch, seed):
    ids, _, _, vocab = batch
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (len(ids), codec.row_bytes(ids.shape[1], vocab)), np.uint8)
    packed[:, 1:4:2] = 0xC0  # the two float16: between −2 and −4
    for a, b in zip(
        codec.decode(packed, ids.shape[1], vocab), reference.decode(packed, ids.shape[1], vocab), strict=True
    ):
        assert_equal_bits(a, b)


def refusal(encode, *arguments) -> str:
    with pytest.raises(IntegrityError) as caught:
        encode(*arguments)
    return str(caught.value)


@settings(max_examples=300, deadline=None)
@given(batches(least_rows=1), st.data())
def test_the_same_refusals(batch, data):
    ids, logprobs, tail, vocab = batch
    n, k = ids.shape
    row = data.draw(st.integers(0, n - 1))
    at = data.draw(st.integers(0, k - 1))
    fault = data.draw(st.sampled_from(["nan", "top", "order", "id", "twice", "tail"]))
    if fault == "nan":
        logprobs[row, at] = np.nan
    elif fault == "top":
        logprobs[row, 0] = data.draw(st.sampled_from([-np.inf, np.inf, 0.5]))
    elif fault == "order" and k > 1:
        logprobs[row, 1:] = logprobs[row, 0] + 1
    elif fault == "twice" and k > 1:
        ids[row, at] = ids[row, at - 1]
    elif fault == "tail":
        tail[row] = data.draw(st.sampled_from([np.nan, np.inf, 0.5]))
    else:
        ids[row, at] = data.draw(st.sampled_from([-1, vocab, -(2**31), 2**31 - 1]))
    kind = data.draw(st.sampled_from([np.int32, np.int64]))
    said = refusal(codec.encode, ids.astype(kind), logprobs, tail, vocab)
    assert said.startswith(f"row {row}: ")
    assert said == refusal(reference.encode, ids, logprobs, tail, vocab)


def test_an_id_is_not_refused_because_an_earlier_row_held_it():
    ids = np.tile(np.arange(64, dtype=np.int32), (3, 1))
    logprobs = np.full((3, 64), -5, np.float32)
    assert len(codec.encode(ids, logprobs, np.full(3, -1.0), 64)) == 3
    ids[1, 63] = 0
    assert "row 1: id 0 occurs twice" in refusal(codec.encode, ids, logprobs, np.full(3, -1.0), 64)


def test_ids_beyond_32_bits_do_not_wrap_into_the_vocabulary():
    ids = np.array([[3, 2**32 + 5]])
    logprobs = np.full((1, 2), -2.0)
    assert f"id {2**32 + 5} at rank 2 is outside" in refusal(codec.encode, ids, logprobs, np.array([-1.0]), 100)


def test_columns_of_a_wider_array_are_read_where_they_lie():
    """An engine gives k + 1 entries a row, the actual token first."""
    rng = np.random.default_rng(0)
    wide = np.stack([rng.permutation(70_000)[:9] for _ in range(50)]).astype(np.int32)
    logprobs = log_softmax(-np.sort(rng.random((50, 9)), axis=1)).astype(np.float32) - np.float32(0.5)
    tail = np.full(50, -0.9, np.float32)
    for part in (np.s_[:, 1:], np.s_[::2, :-1], np.s_[::-1, 1:], np.s_[:, 8:], np.s_[3:4, 2:5]):
        ids, values, tails = wide[part], logprobs[part], tail[part[0]]
        want = reference.encode(ids.copy(), values.copy(), tails, 70_000)
        assert_equal_bits(codec.encode(ids, values, tails, 70_000), want)
        out = np.empty_like(want)
        assert codec.encode(ids, values, tails, 70_000, out) is out
        assert_equal_bits(out, want)


def test_read_only_and_foreign_byte_orders_are_taken():
    ids = np.array([[3, 1, 2]])
    logprobs = np.array([[-1.0, -1.5, -2.0]])
    want = reference.encode(ids, logprobs, np.array([-1.0]), 100)
    for id_kind, kind in ((">i4", ">f4"), (">i8", "<f8"), ("<u2", "<f2")):
        arrays = [ids.astype(id_kind), logprobs.astype(kind)]
        for array in arrays:
            array.flags.writeable = False
        assert_equal_bits(codec.encode(*arrays, np.array([-1.0]), 100), want)


def test_an_output_that_does_not_fit_is_refused():
    ids, logprobs, tail = np.array([[3, 1]]), np.array([[-1.0, -1.5]]), np.array([-1.0])
    for out in (np.empty((1, 9), np.uint8), np.empty((1, 10), np.int8), np.empty((2, 10), np.uint8)[::2, ::-1]):
        with pytest.raises(ValueError, match="need contiguous uint8"):
            codec.encode(ids, logprobs, tail, 100, out)
    with pytest.raises(ValueError, match="not integers"):
        codec.encode(ids.astype(float), logprobs, tail, 100)


def test_every_sum_of_masses_is_exact_in_float64():
    assert MASSES.max() == MASS_ONE
    assert MAX_K * MASS_ONE <= 2**53
    assert (np.diff(MASSES) < 0).all()
