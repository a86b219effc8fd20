"""The benches of the training side: what they judge by, and that their rivals do the same work."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from distill_ray.losses import LossSpec, head_loss
from distill_ray.teacher.draws import DrawSpec
from distill_ray.teacher.seeds import row_keys
from tests.bench import checkpoint, ingest, lessons, quality, step


def test_an_ordering_is_seen_only_beyond_the_noise_over_seeds():
    assert quality.verdict([1.0, 1.1, 0.9]) == 1
    assert quality.verdict([-1.0, -1.1, -0.9]) == -1
    assert quality.verdict([1.0, 0.1, 0.4]) == 0  # all above 0, and yet
    assert quality.verdict([1.0]) == 0


def test_every_claim_is_judged_and_none_is_forced():
    results = {(arm, s): {"loss": 3.0, "kl": 1.0, "ece": 0.1} for arm in quality.ARMS for s in (0, 1, 2)}
    for s in (0, 1, 2):
        results["ce", s] |= {f"angle.{arm}": 10.0 for arm in quality.ARMS}
        results["dense", s]["loss"] = 2.0 + 0.01 * s
    found = quality._orderings(results, (0, 1, 2))
    assert found["quality.order.dense_better_than_ce"] == 1
    assert found["quality.order.sampled_12_near_dense"] == -1
    assert found["quality.order.bucket_12_better_than_ce"] == 0
    assert set(found.values()) == {-1.0, 0.0, 1.0}


def test_calibration_error_is_the_gap_of_accuracy_and_confidence():
    right = torch.arange(100) < 80
    assert lessons.ece(torch.full((100,), 0.8), right) == pytest.approx(0, abs=1e-6)
    assert lessons.ece(torch.full((100,), 0.9), right) == pytest.approx(0.1, abs=1e-6)
    assert lessons.ece(torch.cat([torch.full((50,), 1.0), torch.full((50,), 0.1)]), right) == pytest.approx(0.25)


def test_the_bias_ratio_is_1_for_noise_alone_and_large_for_a_bias():
    generator, dense = torch.Generator().manual_seed(0), torch.zeros(4000, dtype=torch.float64)

    def noisy(bias: float) -> float:
        return quality._ratio(lambda _: bias + torch.randn(4000, generator=generator, dtype=torch.float64), dense, 100)

    assert noisy(0.0) == pytest.approx(1, abs=0.1)
    assert noisy(0.2) == pytest.approx(5, abs=0.5)
    unbiased = {"quality.sampled_bias_ratio": 1.0, "quality.head_tail_bias_ratio": 1.0}
    quality._require_unbiased({**unbiased, "quality.sampled_of_top12_bias_ratio": 9.0})
    with pytest.raises(AssertionError, match="is biased"):
        quality._require_unbiased({**unbiased, "quality.head_tail_bias_ratio": 2.0})
    with pytest.raises(AssertionError, match="sees no bias"):
        quality._require_unbiased({**unbiased, "quality.sampled_of_top12_bias_ratio": 1.0})


def test_padded_draws_are_what_was_drawn():
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    words = lessons.drawn_words(logits, torch.from_numpy(row_keys(1, 0, 5)), DrawSpec(20, False, 1.0), 8)
    found = lessons.padded(words)
    assert (found.counts_NM.sum(1) == 20).all()
    logprobs = logits.log_softmax(1).gather(1, torch.from_numpy(found.ids_NM))
    used = torch.from_numpy(found.counts_NM > 0)
    torch.testing.assert_close(torch.from_numpy(found.logprobs_NM)[used], logprobs[used])


def test_hard_labels_are_the_product_s_cross_entropy():
    batch = step.batch(2 * step.DOCUMENT, 0)
    assert torch.equal(batch.targets.labels_N, batch.input_ids[0][batch.rows + 1])
    mass = batch.targets.logprobs_NK.exp().sum(1) + batch.targets.log_tail_N.exp()
    torch.testing.assert_close(mass, torch.ones(len(mass)))
    hidden, weight = torch.randn(len(batch.rows), 8), torch.nn.Parameter(torch.randn(step.VOCAB, 8))
    spec = LossSpec(step.VOCAB, hard_label_weight=1.0)
    sums = step.HardLabels(weight, None, spec)(hidden, batch.targets, spec)
    wanted = head_loss(hidden, weight, None, batch.targets, spec)
    torch.testing.assert_close(sums[0], wanted.objective_sum.double(), rtol=1e-5, atol=0)
    assert (sums[3], sums[6]) == (sums[0].detach(), len(batch.rows))


def test_packs_are_nearly_full():
    assert 0.97 <= step.packing_fill(5000) <= 1


def test_blocked_seconds_are_medians_over_rounds():
    ways = [(1.0, 10.0, 2.0), (9.0, 20.0, 1.0), (2.0, 90.0, 4.0)]
    rounds = [
        {"ours": a, "synchronous": b, "dcp_async": c, "quiet_steps": [1.0], "busy_steps": [1.5, 1.5], "in_flight": 3.0}
        | {"bytes": 2**21}
        for a, b, c in ways
    ]
    found = checkpoint.figures(rounds)
    assert found["checkpoint.blocked_fraction"] == 0.1
    assert found["checkpoint.blocked_vs_dcp_async"] == 1.0
    assert (found["checkpoint.added_step_s"], found["checkpoint.state_mib"]) == (0.5, 2.0)
    with pytest.raises(ValueError, match="at least 5"):
        checkpoint.run(argparse.Namespace(rounds=4))


def test_both_readers_give_all_rows_of_a_real_server():
    with ingest.stored(units=2, rows=2000, rival_rows=100) as store:
        assert ingest.load(store) == store.rows > 4000
        assert ingest.load_lists(store) == 100
        waited = ingest.waits(store, 2 * store.rows)
    assert waited["step.data_wait_run_s"] >= 2 * store.rows / ingest.CONSUMED_PER_S
    assert 0 < waited["step.data_wait_first_s"] < waited["step.data_wait_run_s"]


def test_windows_share_no_document_and_hold_whole_ones(monkeypatch: pytest.MonkeyPatch):
    texts = [f"{number} " + " ".join(str(number * i) for i in range(3000)) for number in range(40)]
    monkeypatch.setattr(lessons, "documents", lambda: texts)
    monkeypatch.setattr(lessons, "VOCAB", 600)
    first, second = lessons.windows((3000, 2000))
    assert first.shape == (math.floor(3000 / lessons.LENGTH), lessons.LENGTH)
    assert not {tuple(w) for w in first.tolist()} & {tuple(w) for w in second.tolist()}
    with pytest.raises(SystemExit, match="ask for fewer"):
        lessons.windows((10**7, 1))
