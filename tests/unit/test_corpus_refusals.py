"""Refused documents: counted by kind of reason, and held against a bound."""

import random

import pytest

from distill_ray.corpus.refusals import Refusals

REASONS = ["message 1: 'a' is int", "empty: no text", "message 12: 'b' is int", "1,204 tokens with its prompt"]


def test_reasons_that_differ_in_numbers_and_quotes_are_one_kind():
    found = Refusals.of(6, REASONS)
    assert found.reasons[0] == ("message 1: 'a' is int", 2)
    assert (found.documents, found.refused) == (10, 4)
    assert str(found).startswith("4 of 10 documents (40.00%) are refused: 2 × message 1: 'a' is int; 1 × empty")
    assert str(Refusals.of(6, [*REASONS, "x", "y"])).endswith("and 2 other reason(s)")
    assert str(Refusals.of(6, [])) == "0 of 6 documents (0.00%) are refused"


@pytest.mark.parametrize(("taken", "refused", "beyond"), [(99, 1, False), (98, 2, True), (0, 1, True), (100, 0, False)])
def test_all_documents_are_judged_exactly(taken, refused, beyond):
    assert Refusals.of(taken, ["x"] * refused).beyond(0.01, of_all=True) is beyond


def test_a_sample_is_beyond_the_bound_only_where_chance_would_hardly_give_as_many():
    assert not Refusals.of(96, ["x"] * 4).beyond(0.01, of_all=False)  # chance of 4 or more: 0.018
    assert Refusals.of(93, ["x"] * 7).beyond(0.01, of_all=False)  # 1e-4
    assert Refusals.of(999, ["x"]).beyond(0.0, of_all=False)
    assert not Refusals.of(0, ["x"] * 9).beyond(1.0, of_all=False)
    # Of samples of a corpus that keeps the bound exactly, no more than so many are taken for one that does not.
    rng = random.Random(0)
    counts = [sum(rng.random() < 0.01 for _ in range(400)) for _ in range(4000)]
    assert sum(Refusals.of(400 - n, ["x"] * n).beyond(0.01, of_all=False) for n in counts) <= 12
    assert Refusals.of(950_000, ["x"] * 50_000).beyond(0.01, of_all=False)
