"""The batch plan: a pure function of manifest and recipe, the same for every world size."""

from dataclasses import replace

import numpy as np
import pytest

from distill_ray.errors import UserError
from distill_ray.ingest import BatchPlan, build_plan
from distill_ray.ingest.loader import rank_micro_batches
from distill_ray.schema import UnitSummary
from distill_ray.targets import CaptureIdentity, ManifestUnit, RunManifest

IDENTITY = CaptureIdentity({"weights": "w"}, "tok", 100, 4, (1.0,), 1)


def _unit(name, lengths, supervised=None, *, multiplicity=1, keys=None, seed=0):
    n = len(lengths)
    lengths = np.asarray(lengths, np.int32)
    if keys is None:
        keys = np.random.default_rng(seed).integers(0, 2**64, n, np.uint64)
    summary = UnitSummary(
        unit=name,
        lengths=lengths,
        supervised=lengths - 1 if supervised is None else np.asarray(supervised, np.int32),
        doc_keys=np.array(keys, np.uint64),
        object_bytes=10 * n,
        object_sha256=f"sha-{name}",
        kept_mass_sum=0.0,
        dead=0,
        teacher_seconds=0.0,
    )
    return ManifestUnit(summary, multiplicity, "source")


def _corpus(units=5, each=40, seed=0):
    rng = np.random.default_rng(seed)
    return [_unit(f"u{i}", rng.integers(2, 60, each), seed=i) for i in range(units)]


def _plan(units, **changes) -> BatchPlan:
    values = {"holdout": 0.1, "split": "train", "pack_tokens": 64, "packs_per_batch": 8, "seed": 3, "epochs": 2}
    return build_plan(RunManifest(IDENTITY, tuple(units)), **{**values, **changes})


def _refs(plan):
    return [ref for step in range(plan.steps) for pack in plan.batch(step) for ref in pack]


def test_the_order_of_units_in_the_manifest_does_not_matter():
    units = _corpus()
    one, two = _plan(units), _plan(units[::-1])
    assert one.digest == two.digest
    assert [one.batch(i) for i in range(one.steps)] == [two.batch(i) for i in range(two.steps)]
    assert one.digest != _plan(units, seed=4).digest


def test_a_plan_of_fewer_steps_is_the_beginning_of_the_whole_one():
    units = _corpus()
    whole, short = _plan(units), _plan(units, max_steps=3)
    assert short.steps == 3 < whole.steps
    assert [short.batch(i) for i in range(3)] == [whole.batch(i) for i in range(3)]
    assert short.tokens == sum(int(whole.lengths(i).sum()) for i in range(3))
    assert short.digest != whole.digest
    assert _plan(units, max_steps=10_000).digest == whole.digest


def _with(of, **changes):
    return replace(of, summary=replace(of.summary, **changes))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_object_captured_again_gives_the_same_digest(split):
    units = _corpus()
    again = [_with(u, object_sha256="other", object_bytes=7, teacher_seconds=9.0, kept_mass_sum=1.0) for u in units]
    assert _plan(units, split=split).digest == _plan(again, split=split).digest


def test_the_digest_says_nothing_of_the_other_split():
    units, bound = _corpus(), int(0.1 * 2**64)
    held = [u.doc_keys < bound for u in units]
    only_held = _unit("a-first", [5, 6], keys=[1, 2])
    assert _plan(units).digest == _plan([only_held, *units]).digest
    others = [_with(u, lengths=u.lengths + h.astype(np.int32)) for u, h in zip(units, held, strict=True)]
    assert _plan(units).digest == _plan(others).digest
    assert _plan(units, split="held_out").digest != _plan(others, split="held_out").digest


def test_the_digest_tells_other_batches_apart():
    units = [_unit("a", [5, 9, 3, 7], keys=[9, 2**63, 2**64 - 1, 2**63 + 9]), _unit("b", [4, 6], keys=[2**63, 2**62])]
    plans = {
        "as it is": _plan(units),
        "a renamed unit": _plan([units[0], _with(units[1], unit="c")]),
        "a longer sequence": _plan([units[0], _with(units[1], lengths=np.array([4, 7], np.int32))]),
        "other masks": _plan([units[0], _with(units[1], supervised=np.array([1, 5], np.int32))]),
        "a sequence that changed sides": _plan([units[0], _with(units[1], doc_keys=np.array([9, 2**63], np.uint64))]),
        "a unit twice": _plan([units[0], replace(units[1], multiplicity=2)]),
        "an epoch more": _plan(units, epochs=3),
        "larger batches": _plan(units, packs_per_batch=9),
        "larger packs": _plan(units, pack_tokens=65),
    }
    other_teacher = RunManifest(replace(IDENTITY, teacher={"weights": "v"}), tuple(units))
    settings = {"holdout": 0.1, "split": "train", "pack_tokens": 64, "packs_per_batch": 8, "seed": 3, "epochs": 2}
    plans["another teacher"] = build_plan(other_teacher, **settings)
    digests = {name: plan.digest for name, plan in plans.items()}
    assert len(set(digests.values())) == len(plans), digests


def test_a_pinned_order():
    """Resume depends on this order never changing: a new numpy or an edit that moves it must be noticed."""
    plan = _plan([_unit("a", [5, 9, 3, 7, 2, 8]), _unit("b", [4, 6])], holdout=0.0, pack_tokens=16, packs_per_batch=2)
    got = [[" ".join(f"{r.unit}{r.index}" for r in pack) for pack in plan.batch(step)] for step in range(plan.steps)]
    assert got == [["b1 a4 a5", "a1 a3"], ["b0 a2 a0", "a1 a3"], ["a4 a5 b1", "a2 a0 b0"]]


def test_every_epoch_holds_each_training_sequence_by_its_multiplicity():
    units = [*_corpus(2), _unit("twice", [7, 9], multiplicity=2, keys=[2**63, 2**63 + 5])]
    plan = _plan(units, epochs=3)
    counts: dict[tuple[str, int], int] = {}
    for ref in _refs(plan):
        counts[ref.unit, ref.index] = counts.get((ref.unit, ref.index), 0) + 1
    assert counts.pop(("twice", 0)) == 6
    assert counts.pop(("twice", 1)) == 6
    assert set(counts.values()) == {3}
    bound = int(0.1 * 2**64)
    want = {(u.unit, i) for u in units[:2] for i, key in enumerate(u.doc_keys.tolist()) if key >= bound}
    assert set(counts) == want


def test_epochs_are_ordered_differently():
    plan = _plan(_corpus(), epochs=2, packs_per_batch=1)
    refs = _refs(plan)
    half = len(refs) // 2
    assert refs[:half] != refs[half:]
    assert sorted(map(str, refs[:half])) == sorted(map(str, refs[half:]))


def test_splits_share_no_document_and_miss_none():
    units = _corpus(8)
    train, held = _plan(units, epochs=1), _plan(units, split="held_out")
    a, b = ({(r.unit, r.index) for r in _refs(p)} for p in (train, held))
    assert not a & b
    assert len(a | b) == sum(len(u.lengths) for u in units)


def test_windows_of_one_document_fall_on_one_side():
    keys = [5, 5, 2**64 - 1, 2**64 - 1, 5]
    held = _plan([_unit("u", [4] * 5, keys=keys)], split="held_out")
    assert {r.index for r in _refs(held)} == {0, 1, 4}


def test_held_out_is_the_first_by_document_hash_whatever_the_seed():
    units = _corpus(8)
    keys = {(u.unit, i): k for u in units for i, k in enumerate(u.doc_keys.tolist())}
    plan = _plan(units, split="held_out", max_sequences=7)
    got = sorted(keys[r.unit, r.index] for r in _refs(plan))
    assert got == sorted(keys.values())[:7]
    assert plan.digest == _plan(units, split="held_out", max_sequences=7, seed=9, epochs=4).digest


def test_sequences_without_supervision_are_left_out():
    plan = _plan([_unit("u", [5, 6, 7], supervised=[0, 2, 0])], holdout=0.0, epochs=1)
    assert [(r.index, r.supervised) for r in _refs(plan)] == [(1, 2)]


def test_supervised_is_the_sum_over_all_packs_and_the_short_last_batch_is_kept():
    plan = _plan(_corpus(), packs_per_batch=7)
    for step in range(plan.steps):
        assert plan.supervised(step) == sum(r.supervised for pack in plan.batch(step) for r in pack)
    sizes = [len(plan.batch(step)) for step in range(plan.steps)]
    assert set(sizes[:-1]) == {7}
    assert 0 < sizes[-1] <= 7
    assert sum(sizes) == plan.packs
    with pytest.raises(IndexError, match=f"step {plan.steps} is outside"):
        plan.batch(plan.steps)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_any_world_size_sees_the_same_batches(world, micro):
    plan = _plan(_corpus(), packs_per_batch=7)
    for step in (0, plan.steps - 1):
        batch = plan.batch(step)
        ranks = [rank_micro_batches(batch, rank, world, micro) for rank in range(world)]
        shapes = {tuple(len(m) for m in parts) for parts in ranks}
        assert len(shapes) == 1, "ranks with different numbers of micro-batches would wait for each other for ever"
        seen = [pack for parts in ranks for m in parts for pack in m if pack]
        assert sorted(map(str, seen)) == sorted(map(str, batch))


def test_a_split_without_supervision_says_what_to_do():
    with pytest.raises(UserError, match=r"0 of 2 sequences fall on it at corpus.holdout=0.0; change corpus.holdout"):
        _plan([_unit("u", [5, 6])], holdout=0.0, split="held_out")
    with pytest.raises(UserError, match="train split has no supervised token"):
        _plan([], holdout=0.0)
    with pytest.raises(UserError, match="has 65 tokens, more than pack_tokens=64"):
        _plan([_unit("u", [5, 65])], holdout=0.0)


def test_little_of_a_large_corpus_s_packs_is_empty():
    rng = np.random.default_rng(0)
    units = [_unit(f"u{i:04}", np.clip(rng.lognormal(6, 1, 10_000), 2, 4096), seed=i) for i in range(10)]
    plan = _plan(units, pack_tokens=4096, packs_per_batch=256, epochs=1, holdout=0.01)
    assert plan.fill > 0.99
