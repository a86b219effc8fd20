"""From stored target objects to micro-batches: exact rows, any world size, resume, errors, cache."""

import os
import resource
import shutil
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill_ray.errors import CannotCaptureError, IntegrityError
from distill_ray.ingest import BatchPlan, build_plan, open_cache
from distill_ray.ingest.loader import PackLoader
from distill_ray.schema import Sequence, SourceSlice, TargetRows, Unit
from distill_ray.storage import NotFoundError, open_storage, verified
from distill_ray.storage.local import LocalStorage
from distill_ray.targets import CaptureIdentity, ManifestUnit, RunManifest, encode_unit, unit_key, writer

V, K, T = 90, 4, 2.0
IDENTITY = CaptureIdentity({"weights": "w"}, "tok", V, K, (1.0, T), 1)


def _rows(rng, tokens):
    """Rows of a random dense teacher, and its dense log-probabilities."""
    z = rng.normal(size=(len(tokens) - 1, V)) * 2
    logp = {t: z / t - np.log(np.exp(z / t).sum(1, keepdims=True)) for t in (1.0, T)}
    ids = np.argsort(-z, axis=1)[:, :K]
    tail = {t: np.log1p(-np.exp(np.take_along_axis(x, ids, 1)).sum(1)).astype(np.float32) for t, x in logp.items()}
    actual = np.take_along_axis(logp[1.0], tokens[1:, None], 1)
    rows = TargetRows(
        ids_NK=ids.astype(np.int32),
        logprobs_NK=np.take_along_axis(logp[1.0], ids, 1).astype(np.float32),
        log_tail_N=tail[1.0],
        actual_logprob_N=actual[:, 0].astype(np.float32),
        actual_rank_N=(1 + (logp[1.0] > actual).sum(1)).astype(np.int32),
        log_tail_at={T: tail[T]},
    )
    return rows, logp


class Corpus:
    """Three captured units in a local store, with what the teacher said."""

    def __init__(self, root, seed=0, lengths=(3, 12)):
        rng = np.random.default_rng(seed)
        self.storage = open_storage(str(root))
        self.sequences: dict[tuple[str, int], Sequence] = {}
        self.rows: dict[tuple[str, int], TargetRows] = {}
        units = []
        for name in (f"{i:032x}" for i in range(3)):
            sequences, rows = [], []
            for i in range(6):
                tokens = rng.integers(0, V, rng.integers(*lengths)).astype(np.int32)
                mask = rng.random(len(tokens)) < 0.6
                mask[0], mask[1 + i % (len(tokens) - 1)] = False, True
                sequences.append(Sequence(tokens, mask, int(rng.integers(0, 2**63))))
                rows.append(_rows(rng, tokens)[0])
                self.sequences[name, i], self.rows[name, i] = sequences[-1], rows[-1]
            unit = Unit(name, SourceSlice("u", "c" * 64, "file", 0, 1), 1)
            data, summary = encode_unit(IDENTITY, unit, sequences, rows, [], 0.0)
            self.storage.put(unit_key(IDENTITY, name), data)
            units.append(ManifestUnit(summary, 1, "u"))
        self.manifest = RunManifest(IDENTITY, tuple(units))

    def plan(self, **changes) -> BatchPlan:
        values = {"holdout": 0.0, "split": "train", "pack_tokens": 24, "packs_per_batch": 4, "seed": 1, "epochs": 2}
        return build_plan(self.manifest, **{**values, **changes})

    def load(self, plan, **options):
        with PackLoader(self.storage, IDENTITY, plan, **options) as loader:
            return list(loader)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp("store"))


def _tensors(batch):
    t = batch.targets
    return [
        *(batch.input_ids, batch.position_ids, batch.document_ids, batch.rows),
        *(t.ids_NK, t.logprobs_NK, t.log_tail_N, t.labels_N, batch.actual_logprob_N, batch.actual_rank_N),
    ]


def _same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a.step, a.micro, a.micro_steps, a.supervised) == (b.step, b.micro, b.micro_steps, b.supervised)
        assert all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def test_row_t_stands_for_token_t_plus_one(corpus):
    """The mask trap: a row is supervised where the mask of the *next* token says so, and its label is that token."""
    plan = corpus.plan()
    for batch in corpus.load(plan, temperature=T, micro_batch_packs=2):
        row = 0
        width = batch.input_ids.shape[1]
        packs = plan.batch(batch.step)[2 * batch.micro : 2 * batch.micro + 2]
        for b, pack in enumerate(packs):
            at = b * width
            for ref in pack:
                s, rows = corpus.sequences[ref.unit, ref.index], corpus.rows[ref.unit, ref.index]
                flat = batch.input_ids.flatten()[at : at + ref.length]
                assert flat.tolist() == s.tokens.tolist()
                for t in range(ref.length - 1):
                    if not s.loss_mask[t + 1]:
                        continue
                    assert batch.rows[row] == at + t
                    assert batch.targets.labels_N[row] == s.tokens[t + 1]
                    assert batch.targets.ids_NK[row].tolist() == rows.ids_NK[t].tolist()
                    assert batch.targets.log_tail_N[row] == pytest.approx(rows.log_tail_N[t], abs=0.02)
                    assert batch.targets.log_tail_T[row] == pytest.approx(rows.log_tail_at[T][t], abs=0.02)
                    assert batch.actual_logprob_N[row] == pytest.approx(rows.actual_logprob_N[t], abs=0.01)
                    assert batch.actual_rank_N[row] == rows.actual_rank_N[t]
                    row += 1
                at += ref.length
        assert row == len(batch.rows) == len(batch.targets)


def test_decoded_targets_sum_to_one_at_both_temperatures(corpus):
    for batch in corpus.load(corpus.plan(epochs=1), temperature=T):
        for t in (1.0, T):
            logp, tail = batch.targets.at(t)
            torch.testing.assert_close(logp.exp().sum(1) + tail.exp(), torch.ones(len(tail)), rtol=0, atol=1e-5)


def test_positions_restart_and_documents_are_numbered(corpus):
    for batch in corpus.load(corpus.plan()):
        for ids, positions in zip(batch.document_ids.tolist(), batch.position_ids.tolist(), strict=True):
            for i, (document, position) in enumerate(zip(ids, positions, strict=True)):
                same = i > 0 and ids[i - 1] == document and document >= 0
                assert position == (positions[i - 1] + 1 if same else 0)
        assert batch.tokens == (batch.document_ids >= 0).sum()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_world_size_reads_the_same_rows(corpus, world):
    plan = corpus.plan(packs_per_batch=3)
    whole = corpus.load(plan)
    parts = [corpus.load(plan, rank=r, world=world) for r in range(world)]
    assert len({len(p) for p in parts}) == 1
    for step in range(plan.steps):
        seen = [
            sorted(b.targets.labels_N.tolist() for b in bs if b.step == step and len(b.rows))
            for bs in (whole, [b for p in parts for b in p])
        ]
        assert seen[0] == seen[1]
        assert sum(len(b.rows) for p in parts for b in p if b.step == step) == plan.supervised(step)
    assert all(b.supervised == plan.supervised(b.step) for p in parts for b in p)


def test_an_empty_pack_is_padding_without_rows(corpus):
    plan = corpus.plan(packs_per_batch=1)
    empty = corpus.load(plan, rank=1, world=2, temperature=T)
    assert len(empty) == plan.steps
    for batch in empty:
        assert (batch.document_ids == -1).all()
        assert len(batch.rows) == len(batch.targets) == batch.tokens == 0
        assert batch.targets.ids_NK.shape == (0, K)
        assert batch.last


def test_a_resume_goes_on_with_the_very_next_batch(corpus):
    plan = corpus.plan()
    whole = corpus.load(plan, micro_batch_packs=2)
    for start in (1, plan.steps - 1):
        rest = corpus.load(corpus.plan(), micro_batch_packs=2, start_step=start)
        _same(rest, [b for b in whole if b.step >= start])
    assert corpus.load(plan, start_step=plan.steps) == []


def test_memory_and_disk_give_the_same_batches_and_keep_each_unit(corpus, tmp_path):
    plan = corpus.plan()
    caches = [open_cache(corpus.storage, IDENTITY, plan.units, memory_bytes=m, folder=tmp_path) for m in (2**30, 0)]
    one, two = (corpus.load(plan, cache=c) for c in caches)
    _same(one, two)
    assert [c.kept for c in caches] == [3, 3]
    assert not list(tmp_path.iterdir()), "copies have no name, so that a killed process leaves none"


def _first_of_each(plan):
    return [
        next(r for step in range(plan.steps) for p in plan.batch(step) for r in p if r.unit == u.hash)
        for u in plan.units
    ]


def _is_stored(corpus, ref, stored):
    return np.array_equal(stored.tokens, corpus.sequences[ref.unit, ref.index].tokens)


def test_what_finds_no_room_is_read_by_range_and_that_is_said_once(corpus):
    plan = corpus.plan()
    size = max(u.bytes for u in plan.units)
    said: list[str] = []
    cache = open_cache(corpus.storage, IDENTITY, plan.units, memory_bytes=0, disk_bytes=2 * size, say=said.append)
    refs = _first_of_each(plan)
    for order in (refs, refs[::-1], refs):
        assert all(_is_stored(corpus, r, s) for r, s in zip(order, cache.read(order), strict=True))
    assert cache.kept == 2
    assert len(said) == 1
    assert "room for 2 of 3" in said[0]
    cache.close()


class Counting(LocalStorage):
    """Counts requests, and refuses to read a whole object."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.ranges = Counter[tuple[str, int]]()

    def get(self, key: str) -> bytes:
        raise AssertionError(f"{key} was read whole")

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.ranges[key, start] += 1
        return super().get_range(key, start, length)


@pytest.fixture(scope="module")
def many_groups(tmp_path_factory):
    """Units of several row groups each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "GROUP_BYTES", 100)
        return Corpus(tmp_path_factory.mktemp("groups"))


@pytest.mark.parametrize("memory", [2**30, 0])
def test_a_batch_fetches_only_the_row_groups_it_needs_and_each_once(many_groups, memory):
    plan, storage = many_groups.plan(), Counting(many_groups.storage.uri)
    cache = open_cache(storage, IDENTITY, plan.units, memory_bytes=memory)
    with PackLoader(storage, IDENTITY, plan, cache=cache, prefetch=1) as loader:
        first = next(loader)
        begun = len(storage.ranges)
        _same([first, *loader], many_groups.load(plan))
    assert begun < len(storage.ranges)
    assert set(storage.ranges.values()) == {1}


@pytest.mark.parametrize("memory", [2**30, 0])
@pytest.mark.parametrize("which", ["corpus", "many_groups"])
def test_a_unit_that_is_not_the_recorded_one_ends_the_reading(request, which, memory):
    corpus = request.getfixturevalue(which)
    plan = corpus.plan()
    units = tuple(replace(u, sha256="0" * 64) for u in plan.units)
    cache = open_cache(corpus.storage, IDENTITY, units, memory_bytes=memory)
    with pytest.raises(IntegrityError, match="manifest says 0000"):
        corpus.load(replace(plan, units=units), cache=cache)


class Damaging(LocalStorage):
    """Two of three reads have one byte changed on their way, another one every time."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._rng = np.random.default_rng(0)
        self.damaged = 0

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data = bytearray(super().get_range(key, start, length))
        if self._rng.random() < 2 / 3:
            self.damaged += 1
            data[self._rng.integers(len(data))] ^= 1
        return bytes(data)


@pytest.mark.parametrize("room", [{"memory_bytes": 2**30}, {"memory_bytes": 0}, {"memory_bytes": 0, "disk_bytes": 0}])
def test_what_was_damaged_on_its_way_is_read_again(many_groups, room, monkeypatch):
    monkeypatch.setattr(verified, "_RANGE_ATTEMPTS", 100)
    plan, storage = many_groups.plan(), Damaging(many_groups.storage.uri)
    cache = open_cache(storage, IDENTITY, plan.units, **room)
    _same(many_groups.load(plan, cache=cache), many_groups.load(plan))
    assert storage.damaged > 10


def test_a_disk_that_takes_a_part_of_a_write_is_given_the_rest(many_groups, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[: max(1, len(data) // 2)], at))
    plan = many_groups.plan()
    cache = open_cache(many_groups.storage, IDENTITY, plan.units, memory_bytes=0)
    _same(many_groups.load(plan, cache=cache), many_groups.load(plan))


def test_processes_of_a_node_share_its_disk_and_may_open_all_the_files_they_are_allowed(corpus, monkeypatch):
    units = corpus.plan().units
    size = max(u.bytes for u in units)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 4 * size))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        for sharers, held in ((1, 2), (2, 1)):
            cache = open_cache(corpus.storage, IDENTITY, units, memory_bytes=0, sharers=sharers)
            cache.read(_first_of_each(corpus.plan()))
            assert cache.kept == held
            cache.close()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("memory", [2**30, 0])
def test_what_the_thread_raises_reaches_the_consumer(tmp_path, memory):
    corpus = Corpus(tmp_path / "store")
    plan = corpus.plan()
    key = unit_key(IDENTITY, plan.units[1].hash)
    data = bytearray(corpus.storage.get(key))
    data[len(data) // 2] ^= 1
    corpus.storage.put(key, bytes(data))
    with pytest.raises(IntegrityError, match=plan.units[1].hash):
        corpus.load(plan, cache=open_cache(corpus.storage, IDENTITY, plan.units, memory_bytes=memory))
    corpus.storage.delete(key)
    with pytest.raises(NotFoundError):
        corpus.load(plan, cache=open_cache(corpus.storage, IDENTITY, plan.units, memory_bytes=memory))
    assert not _threads()


def test_a_manifest_that_disagrees_with_the_object_is_refused(corpus):
    plan = corpus.plan()
    more = replace(plan.sequences, supervised_S=plan.sequences.supervised_S + 1)
    with pytest.raises(IntegrityError, match="but the manifest says"):
        corpus.load(replace(plan, sequences=more))
    longer = replace(plan.sequences, length_S=plan.sequences.length_S + 1)
    with pytest.raises(IntegrityError, match="tokens, but the manifest says"):
        corpus.load(replace(plan, sequences=longer))


def test_the_temperature_may_change_with_the_step(corpus):
    plan = corpus.plan()
    for batch in corpus.load(plan, temperature=lambda step: T if step % 2 else 1.0):
        assert batch.targets.temperature == (T if batch.step % 2 else 1.0)


def test_a_temperature_that_was_not_captured_is_refused(corpus):
    with pytest.raises(CannotCaptureError, match=r"temperatures \[1.0, 2.0\], not 3.0"):
        corpus.load(corpus.plan(), temperature=3.0)


def _threads():
    return [t for t in threading.enumerate() if t.name.startswith(("pack-loader", "unit-"))]


def test_closing_stops_the_thread(corpus):
    loader = PackLoader(corpus.storage, IDENTITY, corpus.plan(), prefetch=2)
    next(loader)
    assert _threads()
    loader.close()
    assert not _threads()
    assert list(loader) == []


def test_a_short_batch_is_not_padded_to_the_whole_budget(corpus):
    (batch,) = corpus.load(corpus.plan(pack_tokens=4096, epochs=1))
    assert batch.tokens <= batch.input_ids.shape[1] <= 512
