"""From drawn tokens in target objects to the loss: exact weights, unbiased gradients, clear refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill_ray.errors import CannotCaptureError, UserError
from distill_ray.ingest import build_plan
from distill_ray.ingest.drawn import DrawnRows
from distill_ray.ingest.loader import PackLoader
from distill_ray.losses import LossSpec, SparseTargets, head_loss
from distill_ray.schema import Draws, SourceSlice, Unit
from distill_ray.storage import open_storage
from distill_ray.targets import ManifestUnit, RunManifest, StoredDraws, encode_unit, unit_key
from distill_ray.teacher.draws import DrawSpec, draw_from_logits
from distill_ray.teacher.seeds import row_keys
from distill_ray.teacher.wire import draws_from_words
from tests.unit.loss_reference import Case, dense_loss, exact_targets, teacher_logits
from tests.unit.targets_fakes import captured, identity
from tests.unit.test_targets_draws import drawing, taught

FROM = {"sampled": "all", "head_tail": "tail"}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Store:
    """One captured unit, and its batches of two packs."""

    def __init__(self, root, of, make=taught):
        self.identity, self.storage = of, open_storage(str(root))
        self.sequences, self.rows = make(of, (9, 14, 5, 20, 11))
        for s in self.sequences:
            s.loss_mask[1] = True
        self.unit = Unit("0" * 32, SourceSlice("u", "c" * 64, "file", 0, 1), 1)
        data, summary = encode_unit(of, self.unit, self.sequences, self.rows, [], 0.0)
        self.storage.put(unit_key(of, self.unit.hash), data)
        self.manifest = RunManifest(of, (ManifestUnit(summary, 1, "u"),))

    def load(self, **options):
        plan = build_plan(self.manifest, holdout=0.0, split="train", pack_tokens=24, packs_per_batch=2)
        refs = [[ref.index for pack in plan.batch(i) for ref in pack] for i in range(plan.steps)]
        with PackLoader(self.storage, self.identity, plan, micro_batch_packs=2, **options) as loader:
            return list(loader), refs


def expected(store: Store, index: int, row: int) -> tuple[dict[int, int], dict[int, float]]:
    """Counts and log-probabilities of one row's draws, from what the engine gave."""
    draws = store.rows[index].draws
    ends = np.cumsum(draws.distinct_N)
    at = slice(ends[row] - draws.distinct_N[row], ends[row])
    ids = draws.ids_M[at].tolist()
    return (
        dict(zip(ids, draws.counts_M[at].tolist(), strict=True)),
        dict(zip(ids, draws.logprobs_M[at].tolist(), strict=True)),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("objective", FROM)
def test_each_supervised_row_gets_its_own_draws(tmp_path, objective, temperature):
    store = Store(tmp_path, drawing(FROM[objective], temperature))
    batches, refs = store.load(draws=True, temperature=temperature)
    exact, _ = store.load(temperature=temperature)
    for batch, kept, indices in zip(batches, exact, refs, strict=True):
        t, head = batch.targets, kept.targets
        where = [(i, r) for i in indices for r in np.flatnonzero(store.sequences[i].loss_mask[1:])]
        assert len(t) == len(where) == len(head)
        assert torch.equal(t.ids_NK[:, 0], head.ids_NK[:, 0])  # agreement is judged on the teacher's likeliest
        torch.testing.assert_close(t.weights_NK.sum(1), torch.ones(len(t)))
        log_p_T, log_tail_T = head.at(temperature)
        for n, (i, r) in enumerate(where):
            counts, logprobs = expected(store, i, r)
            weights: dict[int, float] = {}
            for id_, w in zip(t.ids_NK[n].tolist(), t.weights_NK[n].tolist(), strict=True):
                if w:
                    weights[id_] = weights.get(id_, 0.0) + w
            share = log_tail_T[n].exp().item() if objective == "head_tail" else 1.0
            want = {id_: share * count / 40 for id_, count in counts.items()}
            if objective == "head_tail":
                want |= dict(zip(head.ids_NK[n].tolist(), log_p_T[n].exp().tolist(), strict=True))
            assert weights == pytest.approx(want, rel=1e-5)
            at_1, at_T = t.logprobs_NK[n], t.at(temperature)[0][n]
            for id_, a, b in zip(t.ids_NK[n].tolist(), at_1.tolist(), at_T.tolist(), strict=True):
                if id_ in counts and id_ not in head.ids_NK[n]:
                    assert a == pytest.approx(logprobs[id_], rel=2**-11)
                    # log p_T = log p / T − a_T, a_T = LSE(z / T) − LSE(z) / T
                    top = store.rows[i].logprobs_NK[r, 0]
                    assert b - log_p_T[n, 0].item() == pytest.approx((a - top) / temperature, abs=0.02)


@pytest.mark.parametrize("objective", FROM)
def test_the_loss_takes_the_batches(tmp_path, objective):
    store = Store(tmp_path, drawing(FROM[objective]))
    batches, _ = store.load(draws=True, temperature=2.0)
    g = torch.Generator().manual_seed(0)
    for batch in batches:
        hidden = torch.randn(len(batch.targets), 6, generator=g, requires_grad=True)
        weight = torch.randn(997, 6, generator=g, requires_grad=True)
        sums = head_loss(hidden, weight, None, batch.targets, LossSpec(997, 2.0, 0.1, objective))
        sums.objective_sum.backward()
        assert torch.isfinite(sums.metrics()).all()
        assert torch.isfinite(weight.grad).all()
        assert sums.count == len(batch.targets)


def test_without_draws_the_batches_are_the_exact_top_k(tmp_path):
    """Evaluation reads the kept tokens of the very same store."""
    store = Store(tmp_path, drawing())
    batches, _ = store.load()
    for batch in batches:
        assert batch.targets.weights_NK is None
        assert batch.targets.ids_NK.shape[1] == 8


def test_a_row_whose_tail_is_empty_has_its_head_alone():
    rows = DrawnRows()
    distinct = np.array([2, 0, 1], np.uint16)
    rows.add(
        StoredDraws(np.array([3 | 1 << 20, 9 | 2 << 20, 7 | 3 << 20], "<u4"), np.zeros(3, "<f2"), distinct),
        np.arange(3),
    )
    log_tail = torch.tensor([-1.0, -80.0, -2.0])
    kept = torch.tensor([[1, 0]]).expand(3, 2)
    head = SparseTargets(kept, torch.log(torch.full((3, 2), 0.4)), log_tail, torch.tensor([1, 1, 1]))
    got = rows.padded().targets(head, "tail")
    assert got.weights_NK is not None
    tail = log_tail.exp()[:, None]
    torch.testing.assert_close(got.weights_NK[:, 2:], tail * torch.tensor([[1, 2], [0, 0], [3, 0]]) / 3)
    with pytest.raises(ValueError, match="1 of 3 rows have a tail and no draw of it"):
        rows.padded().targets(replace(head, log_tail_N=torch.full((3,), -1.0)), "tail")


def test_targets_without_the_draws_that_are_asked_for_are_refused(tmp_path):
    plain = Store(tmp_path / "plain", identity(), captured)
    with pytest.raises(CannotCaptureError, match=r"holds no tokens drawn from the teacher; set capture\.draws"):
        plain.load(draws=True)
    drawn = Store(tmp_path / "drawn", drawing())
    with pytest.raises(CannotCaptureError, match=r"temperature 1\.0, but tokens were drawn at 2\.0"):
        drawn.load(draws=True)


def test_a_drawn_id_that_the_student_lacks_is_refused_by_row(tmp_path):
    store = Store(tmp_path, drawing())
    kept = max(int(r.ids_NK[s.loss_mask[1:]].max()) for s, r in zip(store.sequences, store.rows, strict=True))
    limit = max(kept, *(int(s.tokens.max()) for s in store.sequences)) + 1
    assert limit < 997
    store.load(temperature=2.0, student_ids=limit)
    with pytest.raises(UserError, match=rf"row \d+ drew id \d+, but the student has logits for ids below {limit} only"):
        store.load(temperature=2.0, student_ids=limit, draws=True)


V, K, D, N, COPIES, GROUPS = 53, 5, 8, 9, 100, 50


def redrawn(
    z_NV: torch.Tensor, labels_N: torch.Tensor, objective: str, temperature: float, group: int
) -> SparseTargets:
    """Targets of COPIES redraws of N rows, by the worker's own draws, as the store keeps them."""
    z = z_NV.repeat(COPIES, 1)
    spec = DrawSpec(6, objective == "head_tail", temperature)
    top = z.log_softmax(1).amax(1)
    words = draw_from_logits(spec, z.clone(), K, torch.from_numpy(row_keys(group, 0, len(z))), top)
    drawn: Draws = draws_from_words(words.numpy())
    rows = DrawnRows()
    rows.add(StoredDraws(drawn.words(), drawn.logprobs_M.astype("<f2"), drawn.distinct_N), np.arange(len(z)))
    return rows.padded().targets(exact_targets(z, labels_N.repeat(COPIES), K, temperature), FROM[objective])


@pytest.mark.parametrize("objective", FROM)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_on_drawn_tokens_is_unbiased(objective, temperature):
    """The mean over 5,000 redraws is the dense loss and the dense gradient, within its standard error."""
    g = torch.Generator().manual_seed(11)
    z = teacher_logits("plain", N, V, g).float()
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=g)
    want_value, (_, want) = dense_loss(
        Case(hidden, weight, exact_targets(z.double(), labels, V, temperature)), LossSpec(V, temperature)
    )
    values, grads = [], []
    for group in range(GROUPS):
        targets = redrawn(z, labels, objective, temperature, group)
        spec = LossSpec(V, temperature, objective=objective)
        loss = head_loss(hidden.repeat(COPIES, 1), weight, None, targets, spec).objective_sum / COPIES
        values.append(loss.detach())
        grads.append(torch.autograd.grad(loss, weight)[0])
    value, grad = torch.stack(values), torch.stack(grads)
    assert abs(value.mean() - want_value) < 4 * value.std() / math.sqrt(GROUPS)
    off = (grad.mean(0) - want).abs() / (grad.std(0) / math.sqrt(GROUPS)).clamp_min(1e-12)
    assert off.max() < 5  # 424 coordinates
    assert 0.5 < off.pow(2).mean() < 1.8  # the deviations are those of chance: neither bias nor a dead gradient
    assert (grad.mean(0) - want).norm() < 0.1 * want.norm()
