"""Teacher and student of one family with embeddings padded to different numbers of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_ray.errors import UserError
from distill_ray.losses import LossSpec, SparseTargets, head_loss
from distill_ray.student.module import shared_vocabulary
from tests.unit.student_fakes import tiny_config, tiny_model
from tests.unit.test_ingest_loader import Corpus

TEACHER_ROWS, STUDENT_ROWS = 152_064, 151_936
"""Qwen2.5-72B and Qwen2.5-0.5B."""


def test_the_softmax_runs_over_the_ids_that_both_have():
    model = tiny_model(tiny_config())  # 64 rows
    assert shared_vocabulary(model, teacher_rows=70, top_k=8) == 64
    assert shared_vocabulary(model, teacher_rows=60, top_k=8) == 60
    with pytest.raises(UserError, match=r"top_k=64.*64 rows.*teacher has 70.*at most 63"):
        shared_vocabulary(model, teacher_rows=70, top_k=64)


def test_rows_that_only_the_teacher_has_lie_in_the_tail_at_real_sizes():
    """Against the divergence written out over the teacher's rows, where q is 0 on those the student lacks."""
    n, k, d = 3, 8, 6
    g = torch.Generator().manual_seed(0)
    p_logits = torch.randn(n, TEACHER_ROWS, generator=g, dtype=torch.float64) * 3
    p_logits[:, STUDENT_ROWS:] = 3.0  # padding that does take probability: 128 · e³ against 152,000 · e^4.5
    log_p = p_logits.log_softmax(1)
    kept, ids = log_p.topk(k, 1)
    assert ids.max() < STUDENT_ROWS
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64)
    weight = torch.randn(STUDENT_ROWS, d, generator=g, dtype=torch.float64)
    vocab = shared_vocabulary(_Head(weight), TEACHER_ROWS, k)  # type: ignore[arg-type]
    got = head_loss(hidden, weight, None, SparseTargets(ids, kept, tail, ids[:, 0]), LossSpec(vocab))

    q = torch.cat([(hidden @ weight.T).softmax(1), torch.zeros(n, TEACHER_ROWS - STUDENT_ROWS).double()], 1)
    q_kept = q.gather(1, ids)
    q_tail = q.scatter(1, ids, 0).sum(1)
    want = (kept.exp() * (kept - q_kept.log())).sum() + (tail.exp() * (tail - q_tail.log())).sum()
    assert got.objective_sum.item() == pytest.approx(want.item(), rel=1e-9)


class _Head:
    """As much of a model as `shared_vocabulary` asks for."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def get_output_embeddings(self) -> _Head:
        return self


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("store"), seed=7, lengths=(3, 6))


def test_a_kept_id_that_the_student_lacks_is_refused_by_unit_row_and_id(corpus: Corpus):
    plan = corpus.plan(packs_per_batch=1)
    refs = [ref for step in range(plan.steps) for pack in plan.batch(step) for ref in pack]
    supervised = {key: np.flatnonzero(corpus.sequences[key].loss_mask[1:]) for key in {(r.unit, r.index) for r in refs}}
    high = max(int(corpus.rows[key].ids_NK[rows].max()) for key, rows in supervised.items())
    # Ids of the tokens themselves must be known too, so that only kept ids can be the reason here.
    assert max(int(corpus.sequences[key].tokens.max()) for key in supervised) < high
    assert corpus.load(plan, student_ids=high + 1)
    with pytest.raises(UserError, match=rf"row \d+ keeps id {high}, .*below {high} only") as caught:
        corpus.load(plan, student_ids=high)
    key = next(k for k in supervised if f"unit {k[0]} sequence {k[1]} row" in str(caught.value))
    row = int(str(caught.value).split(" row ")[1].split()[0])
    assert row in supervised[key]
    assert high in corpus.rows[key].ids_NK[row]


def test_a_token_that_the_student_lacks_is_refused(corpus: Corpus):
    with pytest.raises(UserError, match=r"sequence \d+ has token id \d+, .*below 1 only"):
        corpus.load(corpus.plan(), student_ids=1)
