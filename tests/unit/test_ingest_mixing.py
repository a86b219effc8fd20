"""Mixing weights: exact counts, an order that nothing but the recipe moves, and patterns that mean something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from distill_ray.config import fingerprint, identity_of
from distill_ray.errors import UserError
from distill_ray.ingest import BatchPlan, build_plan, check_mix
from distill_ray.ingest.loader import rank_micro_batches
from distill_ray.targets import RunManifest
from tests.unit.test_config import minimal, parse_recipe
from tests.unit.test_ingest_plan import IDENTITY, _unit

EACH = 400
UNITS = [
    replace(_unit(f"u{name}", np.full(EACH, 9), seed=i), source=f"s3://data/{name}/x.jsonl")
    for i, name in enumerate("abcd")
]


def _plan(mix: Mapping[str, float], **changes) -> BatchPlan:
    values = {"holdout": 0.0, "split": "train", "pack_tokens": 64, "packs_per_batch": 8, "seed": 3, "epochs": 2}
    return build_plan(RunManifest(IDENTITY, tuple(UNITS)), mix=mix, **{**values, **changes})


def _taken(plan: BatchPlan) -> dict[str, Counter[int]]:
    """Unit → how often each of its sequences occurs."""
    found = {unit.unit: Counter[int]() for unit in UNITS}
    for step in range(plan.steps):
        for pack in plan.batch(step):
            for ref in pack:
                found[ref.unit][ref.index] += 1
    return found


def test_whole_weights_count_exactly_and_halves_take_each_document_in_one_of_two_epochs():
    taken = _taken(_plan({"s3://data/a/*": 2.0, "s3://data/b/*.jsonl": 0.5, "s3://data/c/x.jsonl": 0.0}))
    assert taken["ua"] == dict.fromkeys(range(EACH), 4)
    assert taken["ub"] == dict.fromkeys(range(EACH), 1)
    assert taken["uc"] == {}
    assert taken["ud"] == dict.fromkeys(range(EACH), 2)
    once = _taken(_plan({"s3://data/b/*": 0.5}, epochs=1))["ub"]
    assert set(once.values()) == {1}
    assert abs(len(once) - EACH / 2) < 5 * (EACH / 4) ** 0.5
    assert once != _taken(_plan({"s3://data/b/*": 0.5}, epochs=1, seed=4))["ub"]


def test_a_fraction_is_rounded_down_or_up_and_a_weight_multiplies_the_multiplicity():
    mix, epochs = {"s3://data/a/*": 0.7}, 3
    assert set(_taken(_plan(mix, epochs=epochs))["ua"].values()) == {2, 3}
    twice = [replace(UNITS[0], multiplicity=2), *UNITS[1:]]
    values = {"holdout": 0.0, "pack_tokens": 64, "packs_per_batch": 8, "epochs": 1}
    plan = build_plan(RunManifest(IDENTITY, tuple(twice)), split="train", mix={"s3://data/a/*": 1.5}, **values)
    assert set(_taken(plan)["ua"].values()) == {3}


def test_windows_of_one_document_are_taken_together():
    keys = np.repeat(np.random.default_rng(0).integers(0, 2**64, 50, np.uint64), 4)
    unit = replace(_unit("u", np.full(200, 9), keys=keys), source="s3://data/a/x")
    values = {"holdout": 0.0, "pack_tokens": 64, "packs_per_batch": 8}
    plan = build_plan(RunManifest(IDENTITY, (unit,)), split="train", mix={"s3://data/a/x": 0.5}, **values)
    windows = Counter(r.index // 4 for step in range(plan.steps) for pack in plan.batch(step) for r in pack)
    assert set(windows.values()) == {4}


def test_weights_of_one_are_the_plan_without_any_and_others_another_plan():
    plain = _plan({})
    assert plain.digest == _plan({"s3://data/*/*": 1.0}).digest
    assert plain.digest != _plan({"s3://data/a/*": 2.0}).digest
    assert (
        _plan({}, split="held_out", holdout=0.5).digest
        == _plan({"s3://data/a/*": 0.0}, split="held_out", holdout=0.5).digest
    )


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_world_size_and_any_resume_see_the_same_mixed_batches(world: int):
    mix = {"s3://data/a/*": 1.7, "s3://data/b/*": 0.3}
    plan, resumed = _plan(mix), _plan(dict(reversed(mix.items())))
    for step in range(plan.steps):
        ranks = [rank_micro_batches(resumed.batch(step), rank, world, 2) for rank in range(world)]
        seen = [pack for parts in ranks for micro in parts for pack in micro if pack]
        assert sorted(map(str, seen)) == sorted(map(str, plan.batch(step)))


def test_patterns_that_match_nothing_or_each_other_are_refused():
    with pytest.raises(UserError, match=r"'s3://data/A/\*' matches none of the 4 source"):
        _plan({"s3://data/A/*": 2.0})
    with pytest.raises(UserError, match=r"'s3://data/\*/x.jsonl' and 's3://data/a/\*' both match s3://data/a/x.jsonl"):
        _plan({"s3://data/a/*": 2.0, "s3://data/*/x.jsonl": 2.0})
    with pytest.raises(UserError, match="leaves nothing of 1600 training sequences"):
        _plan({"s3://data/*/*": 0.0})


def test_a_pattern_that_is_a_source_as_it_is_written_is_that_one_alone():
    exact, beside = "s3://data/part[1].jsonl", "s3://data/part1.jsonl"
    assert check_mix({exact: 2.0}, [exact, beside]) == {exact: 2.0, beside: 1.0}
    assert check_mix({exact: 2.0}, [beside]) == {beside: 2.0}


def test_the_recipe_states_weights_and_without_any_keeps_its_fingerprint():
    plain = fingerprint(identity_of(parse_recipe(minimal())))
    assert fingerprint(identity_of(parse_recipe(minimal(train={"mix": {}})))) == plain
    recipe = parse_recipe(minimal(train={"mix": {"s3://data/a/*": 2, "s3://data/b/*": 0.5}}))
    assert recipe.train.mix == {"s3://data/a/*": 2.0, "s3://data/b/*": 0.5}
    assert fingerprint(identity_of(recipe)) != plain
    with pytest.raises(UserError, match="greater than or equal to 0"):
        parse_recipe(minimal(train={"mix": {"s3://data/a/*": -1.0}}))
