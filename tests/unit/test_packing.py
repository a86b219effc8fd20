"""Packing: whole sequences, once each, within the budget, near the best fill."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.ingest import pack_lengths


@given(
    lengths=st.lists(st.integers(1, 50), max_size=300),
    budget=st.integers(50, 90),
    window=st.sampled_from([1, 7, 4096]),
)
@settings(max_examples=150, deadline=None)
def test_every_sequence_once_and_never_over_the_budget(lengths, budget, window):
    order, offsets = pack_lengths(np.array(lengths, dtype=np.int64), budget, window)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert offsets[0] == 0
    assert offsets[-1] == len(lengths)
    for first, last in pairwise(offsets):
        assert first < last, "an empty pack"
        assert sum(lengths[i] for i in order[first:last]) <= budget


@pytest.mark.parametrize(("mean", "budget"), [(5.0, 1024), (6.5, 4096), (6.0, 2048)])
def test_fill_on_log_normal_lengths(mean, budget):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(mean, 1.0, 20_000).astype(np.int64), 2, budget)
    _, offsets = pack_lengths(lengths, budget)
    assert lengths.sum() / ((len(offsets) - 1) * budget) >= 0.95


def test_a_pack_is_a_local_sample_of_the_order():
    """A window sorted by length must not turn the shuffled order into an order by length."""
    lengths = np.random.default_rng(1).integers(2, 400, 40_000)
    order, offsets = pack_lengths(lengths, 2048, window=1000)
    spread = [np.ptp(order[a:b]) for a, b in pairwise(offsets)]
    assert np.median(spread) < 2500


def test_a_sequence_longer_than_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"3 … 9 do not fit packs of 8 tokens; raise train.pack_tokens"):
        pack_lengths(np.array([3, 9]), 8)
