import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.corpus import held_out
from distill_ray.corpus.windows import windows


@st.composite
def cut(draw):
    window = draw(st.integers(2, 40))
    return draw(st.integers(2, 300)), window, draw(st.integers(1, window - 1))


@settings(max_examples=200, deadline=None)
@given(cut())
def test_every_token_but_the_first_is_supervised_once_in_its_place(case):
    n, window, overlap = case
    found = windows(np.arange(n), np.ones(n, dtype=bool), 7, window, overlap)
    supervised = np.concatenate([s.tokens[s.loss_mask] for s in found])
    np.testing.assert_array_equal(supervised, np.arange(1, n))
    for sequence in found:
        assert 2 <= len(sequence.tokens) <= window
        assert not sequence.loss_mask[0]
        assert sequence.doc_key == 7
        # Contiguous: nothing is lost inside a window either.
        np.testing.assert_array_equal(np.diff(sequence.tokens), 1)
    for before, after in itertools.pairwise(found):
        assert len(before.tokens) == window
        np.testing.assert_array_equal(after.tokens[:overlap], before.tokens[-overlap:])


@settings(max_examples=100, deadline=None)
@given(cut(), st.randoms(use_true_random=False))
def test_the_mask_travels_with_its_tokens(case, random):
    n, window, overlap = case
    mask = np.array([random.random() < 0.2 for _ in range(n)])
    found = windows(np.arange(n), mask, 0, window, overlap)
    supervised = np.concatenate([s.tokens[s.loss_mask] for s in found] or [np.empty(0, int)])
    np.testing.assert_array_equal(supervised, np.flatnonzero(mask[1:]) + 1)
    assert all(s.loss_mask.any() for s in found)


@settings(max_examples=200, deadline=None)
@given(cut(), st.integers(1, 3))
def test_what_opens_a_document_opens_every_window_and_the_rest_is_cut_as_without_it(case, opening):
    n, window, overlap = case
    plain = windows(np.arange(n), np.ones(n, dtype=bool), 7, window, overlap)
    tokens = np.concatenate([-1 - np.arange(opening), np.arange(n)])
    found = windows(tokens, np.ones(opening + n, dtype=bool), 7, window + opening, overlap, opening)
    assert len(found) == len(plain)
    for i, (opened, bare) in enumerate(zip(found, plain, strict=True)):
        np.testing.assert_array_equal(opened.tokens[:opening], -1 - np.arange(opening))
        assert not opened.loss_mask[:opening].any()
        np.testing.assert_array_equal(opened.tokens[opening:], bare.tokens)
        # Behind an opening the document's first token is predicted, too.
        np.testing.assert_array_equal(opened.loss_mask[opening + (i == 0) :], bare.loss_mask[i == 0 :])
        assert opened.loss_mask[opening] == (i == 0)


def test_a_document_that_fits_is_one_window():
    (only,) = windows(np.arange(8), np.ones(8, dtype=bool), 0, 8, 3)
    assert len(only.tokens) == 8
    assert only.tokens.dtype == np.int32


def test_windowing_does_not_write_into_the_document():
    mask = np.ones(10, dtype=bool)
    windows(np.arange(10), mask, 0, 4, 2)
    assert mask.all()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5])
def test_held_out_takes_its_share_and_only_grows_with_it(share):
    keys = np.random.default_rng(0).integers(0, 2**64, 40_000, dtype=np.uint64, endpoint=False)
    chosen = held_out(keys, share)
    assert chosen.mean() == pytest.approx(share, abs=0.01)
    assert not (chosen & ~held_out(keys, share + 0.1)).any()
