"""The bucket objective against dense Kullback-Leibler divergence, and its edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.losses import SparseTargets, bucket_kl

V = 37


def _teacher(z_NV, k, temperature=1.0):
    """(ids, log p at T, log tail at T) of the k tokens most likely at T = 1, from dense teacher logits."""
    ids = z_NV.topk(k, dim=1).indices
    logp = (z_NV / temperature).log_softmax(1)
    rest = logp.scatter(1, ids, -math.inf)
    return ids, logp.gather(1, ids), rest.logsumexp(1)


def _logits(n=6, v=V, seed=0, scale=3.0, dtype=torch.float64):
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * scale


def _dense_kl(z_teacher, z_student):
    p = z_teacher.log_softmax(1)
    return (p.exp() * (p - z_student.log_softmax(1))).sum(1)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_equals_dense_kl_with_the_whole_vocabulary_kept(dtype, rel):
    teacher, student = _logits(seed=1, dtype=dtype), _logits(seed=2, dtype=dtype)
    ids, logp, _ = _teacher(teacher, V)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    # −80 is what the codec stores for an empty tail.
    got = bucket_kl(a, ids, logp, torch.full((len(a),), -80.0, dtype=dtype))
    want = _dense_kl(teacher, b)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(got, want, rtol=rel, atol=rel)
    torch.testing.assert_close(a.grad, b.grad, rtol=rel, atol=rel)


@pytest.mark.parametrize("k", [1, 2, 5, V - 1])
def test_gradient_formula(k):
    teacher, student = _logits(seed=3), _logits(seed=4).requires_grad_()
    ids, logp, log_tail = _teacher(teacher, k)
    bucket_kl(student, ids, logp, log_tail).sum().backward()
    q = student.detach().softmax(1)
    kept = q.gather(1, ids).sum(1, keepdim=True)
    want = q * (1 - log_tail.exp()[:, None] / (1 - kept))  # off K
    want = want.scatter(1, ids, q.gather(1, ids) - logp.exp())  # on K
    torch.testing.assert_close(student.grad, want, rtol=1e-8, atol=1e-10)


def test_gradcheck():
    ids, logp, log_tail = _teacher(_logits(n=3, v=9, seed=5), 4)
    student = _logits(n=3, v=9, seed=6, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: bucket_kl(z, ids, logp, log_tail), student)


def test_full_kl_is_bucket_plus_what_lies_in_the_tail():
    teacher, student = _logits(seed=7), _logits(seed=8)
    ids, logp, log_tail = _teacher(teacher, 5)
    tail_p = teacher.scatter(1, ids, -math.inf).log_softmax(1)
    tail_q = student.scatter(1, ids, -math.inf).log_softmax(1)
    inside = torch.where(tail_p.exp() > 0, tail_p.exp() * (tail_p - tail_q), 0).sum(1)
    got = bucket_kl(student, ids, logp, log_tail) + log_tail.exp() * inside
    torch.testing.assert_close(got, _dense_kl(teacher, student), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_exact_tail_at_another_temperature(temperature):
    teacher, student = _logits(seed=9), _logits(seed=10)
    ids, logp, log_tail = _teacher(teacher, 4, temperature)
    got = bucket_kl(student, ids, logp, log_tail, temperature)
    p = (teacher / temperature).log_softmax(1)
    q = (student / temperature).log_softmax(1)
    two = lambda x: torch.cat([x.gather(1, ids), x.scatter(1, ids, -math.inf).logsumexp(1)[:, None]], 1)  # noqa: E731
    want = (two(p).exp() * (two(p) - two(q))).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_zipf_tail_at_two_is_the_true_one():
    """The example of soft-targets.md: the tail at T = 2 is most of the mass, though the kept mass at T = 1 is 0.934."""
    z = -1.5 * torch.arange(1, 128_257, dtype=torch.float64).log()[None]
    _, _, tail = _teacher(z, 128)
    _, logp_T, tail_T = _teacher(z, 128, 2.0)
    assert 1 - tail.exp().item() == pytest.approx(0.934, abs=1e-3)
    assert tail_T.exp().item() == pytest.approx(0.861, abs=1e-3)
    # A student equal to the teacher is at the minimum, which a wrong tail would move.
    assert bucket_kl(z, torch.arange(128)[None], logp_T, tail_T, 2.0).item() == pytest.approx(0, abs=1e-9)


@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, V),
    scale=st.sampled_from([0.0, 0.1, 5.0, 40.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
@settings(max_examples=60, deadline=None)
def test_never_negative_and_at_most_the_full_divergence(seed, k, scale, temperature):
    teacher, student = _logits(n=4, seed=seed, scale=scale), _logits(n=4, seed=seed + 1, scale=scale)
    got = bucket_kl(student, *_teacher(teacher, k, temperature), temperature)
    assert (got >= -1e-12).all()
    assert (got <= _dense_kl(teacher / temperature, student / temperature) + 1e-9).all()
    same = bucket_kl(teacher, *_teacher(teacher, k, temperature), temperature)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-9)


@pytest.mark.parametrize("log_tail", [-80.0, -math.inf])
def test_kept_mass_that_rounds_to_one(log_tail):
    """P = 1 in float32: one peer's bucket is NaN here."""
    ids = torch.tensor([[3, 1]])
    logp = torch.tensor([[0.5, 0.5]]).log()
    z = _logits(n=1, dtype=torch.float32).requires_grad_()
    loss = bucket_kl(z, ids, logp, torch.tensor([log_tail]))
    loss.sum().backward()
    assert z.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(z.grad).all()
    q = z.detach().softmax(1)
    torch.testing.assert_close(z.grad[0, 3], q[0, 3] - 0.5)


def test_student_whose_kept_mass_rounds_to_one():
    """S → 1: 1 − S is 0 in float32, but the tail's own LSE still knows it."""
    z = torch.zeros(1, V)
    z[0, 2] = 60.0
    z.requires_grad_()
    ids, logp, log_tail = torch.tensor([[2]]), torch.tensor([[math.log(0.9)]]), torch.tensor([math.log(0.1)])
    loss = bucket_kl(z, ids, logp, log_tail)
    loss.sum().backward()
    assert z.grad is not None
    want = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 60 - math.log(V - 1))
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert z.grad[0, 2].item() == pytest.approx(0.1, rel=1e-4)
    assert z.grad.sum().item() == pytest.approx(0, abs=1e-6)


def test_one_hot_and_uniform_teachers():
    student = torch.zeros(1, V, dtype=torch.float64)
    one_hot = bucket_kl(student, torch.tensor([[4]]), torch.zeros(1, 1), torch.tensor([-80.0]))
    assert one_hot.item() == pytest.approx(math.log(V))
    ids, logp, log_tail = _teacher(torch.zeros(1, V, dtype=torch.float64), 3)
    assert bucket_kl(student, ids, logp, log_tail).item() == pytest.approx(0, abs=1e-12)


def test_one_hot_row_with_underflowed_kept_tokens():
    logp = torch.tensor([[0.0, -math.inf]])
    z = torch.zeros(1, V, requires_grad=True)
    loss = bucket_kl(z, torch.tensor([[4, 5]]), logp, torch.tensor([-80.0]))
    loss.sum().backward()
    assert z.grad is not None
    assert loss.item() == pytest.approx(math.log(V), rel=1e-5)
    assert torch.isfinite(z.grad).all()


def test_a_missing_temperature_is_refused():
    ids, logp, log_tail = _teacher(_logits(), 3)
    with pytest.raises(ValueError, match="capture that temperature"):
        SparseTargets(ids, logp, log_tail, ids[:, 0], temperature=2.0)
    with pytest.raises(ValueError, match="not 2"):
        SparseTargets(ids, logp, log_tail, ids[:, 0]).at(2.0)
