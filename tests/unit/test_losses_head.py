"""The fused head against the plain one: values, gradients, chunks, masks, padding, types."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from distill_ray.losses import (
    LossSpec,
    ModelRows,
    SparseTargets,
    Tiling,
    bucket_kl,
    compare_rows,
    head_loss,
    head_metrics,
)

N, V, D, K = 11, 29, 7, 5


def _make(dtype=torch.float64, *, rows=V, k=K, n=N, temperature=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias, teacher = draw(n, D), draw(rows, D), draw(rows), draw(n, V) * 2
    logp, logp_T = teacher.log_softmax(1), (teacher / temperature).log_softmax(1)
    ids = teacher.topk(k, 1).indices
    tails = [x.scatter(1, ids, -math.inf).logsumexp(1).float() for x in (logp, logp_T)]
    targets = SparseTargets(
        ids,
        logp.gather(1, ids).to(torch.promote_types(dtype, torch.float32)),
        tails[0],
        torch.randint(0, V, (n,), generator=g),
        None,
        temperature,
        logp_T.gather(1, ids).to(torch.promote_types(dtype, torch.float32)),
        tails[1],
    )
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return leaves, targets


def _plain(leaves, targets, spec):
    """The same loss with full logits and plain autograd."""
    hidden, weight, bias = leaves
    z = hidden @ weight[: spec.vocab_size].T
    z = z if bias is None else z + bias[: spec.vocab_size]
    z = z * spec.logit_scale
    z = z if spec.softcap is None else torch.tanh(z / spec.softcap) * spec.softcap
    T, alpha = spec.temperature, spec.hard_label_weight
    kl_T = bucket_kl(z, targets.ids_NK, *targets.at(T), T)
    kl_1 = bucket_kl(z, targets.ids_NK, targets.logprobs_NK, targets.log_tail_N)
    ce = F.cross_entropy(z, targets.labels_N, reduction="none")
    keep = torch.ones(len(z), dtype=torch.bool) if targets.mask_N is None else targets.mask_N
    total = ((1 - alpha) * T**2 * kl_T + alpha * ce)[keep].sum()
    agree = (z.argmax(1) == targets.ids_NK[:, 0])[keep].sum()
    kept = (1 - targets.log_tail_N.exp())[keep].sum()
    return total, (kl_T[keep].sum(), kl_1[keep].sum(), ce[keep].sum(), kept, agree, keep.sum())


def _grads(total, leaves):
    return torch.autograd.grad(total, [x for x in leaves if x is not None])


SPECS = [
    LossSpec(V),
    LossSpec(V, hard_label_weight=0.3),
    LossSpec(V, hard_label_weight=1.0),
    LossSpec(V, temperature=2.0, hard_label_weight=0.1),
    LossSpec(V, temperature=2.0),
    LossSpec(V, hard_label_weight=0.2, logit_scale=0.25, softcap=1.5),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("tiling", [Tiling(1, 7), Tiling(4, 100), Tiling(100, 1), None], ids=str)
def test_values_and_gradients_equal_the_plain_head(spec, tiling):
    leaves, targets = _make(temperature=spec.temperature)
    want, sums = _plain(leaves, targets, spec)
    got = head_loss(*leaves, targets, spec, tiling=tiling)
    torch.testing.assert_close(got.objective_sum, want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got.metrics()[1:], torch.stack([x.double() for x in sums]), rtol=1e-5, atol=1e-6)
    for a, b in zip(_grads(got.objective_sum, leaves), _grads(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str
)
def test_equals_dense_kl_with_the_whole_vocabulary_kept(dtype, rel):
    """Value and both gradients against the dense divergence of float64 logits from the same (rounded) inputs."""
    leaves, targets = _make(dtype, k=V)
    leaves[2] = None
    exact = [x.detach().double().requires_grad_() for x in leaves[:2]]
    z = exact[0] @ exact[1].T
    logp = targets.logprobs_NK.double()
    want = (logp.exp() * (logp - z.log_softmax(1).gather(1, targets.ids_NK))).sum()
    got = head_loss(*leaves, targets, LossSpec(V), tiling=Tiling(3, 8))
    assert got.objective_sum.item() == pytest.approx(want.item(), rel=rel)
    for a, b in zip(_grads(got.objective_sum, leaves), _grads(want, exact), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= rel * b.norm()


def test_a_second_backward_is_refused_rather_than_scaled_twice():
    leaves, targets = _make(n=3)
    loss = head_loss(*leaves, targets, LossSpec(V)).objective_sum
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_t_squared_is_on_the_gradient():
    """At small logits the gradient of T²·KL_T hardly depends on T; without the factor it would fall as 1/T²."""
    norms = []
    for T in (1.0, 4.0):
        (hidden, weight, _), targets = _make(temperature=T)
        (g,) = _grads(head_loss(hidden, weight, None, targets, LossSpec(V, temperature=T)).objective_sum, [hidden])
        norms.append(g.norm().item())
    assert 0.4 < norms[1] / norms[0] < 2.5
    (hidden, weight, _), targets = _make(temperature=4.0)
    spec = LossSpec(V, temperature=4.0)
    (g,) = _grads(head_loss(hidden, weight, None, targets, spec).objective_sum, [hidden])
    bare = bucket_kl(hidden @ weight.T, targets.ids_NK, *targets.at(4.0), 4.0).sum()
    torch.testing.assert_close(g, 16 * _grads(bare, [hidden])[0], rtol=1e-6, atol=1e-9)


def test_padded_vocabulary_rows_take_no_part():
    leaves, targets = _make(rows=V + 6)
    cut = [leaves[0], leaves[1].detach()[:V].requires_grad_(), leaves[2].detach()[:V].requires_grad_()]
    spec = LossSpec(V, hard_label_weight=0.5)
    padded = head_loss(*leaves, targets, spec)
    exact = head_loss(*cut, targets, spec)
    assert padded.objective_sum == exact.objective_sum
    grads = _grads(padded.objective_sum, leaves)
    assert not grads[1][V:].any()
    assert not grads[2][V:].any()
    assert torch.equal(grads[1][:V], _grads(exact.objective_sum, cut)[1])


def test_masked_rows_take_no_part():
    leaves, targets = _make()
    mask = torch.arange(N) % 3 != 0
    spec = LossSpec(V, hard_label_weight=0.5)
    got = head_loss(*leaves, replace(targets, mask_N=mask), spec, tiling=Tiling(4, 10))
    want, _ = _plain(leaves, replace(targets, mask_N=mask), spec)
    assert got.count == mask.sum()
    grads = _grads(got.objective_sum, leaves)
    assert not grads[0][~mask].any()
    for a, b in zip(grads, _grads(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("masked", [True, False])
def test_no_supervised_row_gives_zero_loss_and_gradients_that_flow(masked):
    leaves, targets = _make()
    if masked:
        targets = replace(targets, mask_N=torch.zeros(N, dtype=torch.bool))
        hidden = leaves[0]
    else:
        targets, hidden = targets.select(slice(0, 0)), leaves[0][torch.zeros(0, dtype=torch.long)]
    fired = []
    leaves[1].register_hook(lambda g: fired.append(g.abs().max().item()))
    sums = head_loss(hidden, *leaves[1:], targets, LossSpec(V, temperature=1.0, hard_label_weight=0.5))
    sums.objective_sum.backward()
    assert not sums.metrics().any()
    assert fired == [0.0]
    assert all(x.grad is not None and not x.grad.any() for x in leaves)


def test_a_frozen_head_gets_no_gradient():
    (hidden, weight, bias), targets = _make()
    weight, bias = weight.detach(), bias.detach()
    sums = head_loss(hidden, weight, bias, targets, LossSpec(V))
    sums.objective_sum.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        quiet = head_loss(hidden, weight, bias, targets, LossSpec(V))
    assert not quiet.objective_sum.requires_grad
    assert quiet.objective_sum == sums.objective_sum


def test_bfloat16_weight_gradient_does_not_stall_over_many_chunks():
    """Summed in bf16, contributions of 0.5 to a sum of 256 are lost one by one."""
    scale = torch.tensor([256.0] + [0.5] * 64)[:, None]
    hidden = (scale * torch.ones(65, D)).bfloat16()
    weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(65, 1, dtype=torch.long)
    targets = SparseTargets(ids, torch.full((65, 1), -1e-6), torch.full((65,), -14.0), ids[:, 0])
    head_loss(hidden, weight, None, targets, LossSpec(V), tiling=Tiling(1, 16)).objective_sum.backward()
    assert weight.grad is not None
    assert weight.grad[0, 0].item() == pytest.approx(288 * (1 / V - 1), rel=1e-2)


def test_shapes_and_temperatures_that_do_not_fit_are_refused():
    leaves, targets = _make()
    with pytest.raises(ValueError, match="4 hidden rows for 11 targets"):
        head_loss(leaves[0][:4], *leaves[1:], targets, LossSpec(V))
    with pytest.raises(ValueError, match="29 rows, fewer than the vocabulary's 30"):
        head_loss(*leaves, targets, LossSpec(30))
    with pytest.raises(ValueError, match="stand at 1"):
        head_loss(*leaves, targets, LossSpec(V, temperature=2.0))


def test_row_metrics_against_dense_ones():
    leaves, targets = _make(rows=V + 3)
    hidden, weight, bias = (x.detach() for x in leaves)
    got = head_metrics(hidden, weight, bias, targets, vocab_size=V, chunk=4)
    q = (hidden @ weight[:V].T + bias[:V]).log_softmax(1)
    both = [(targets.logprobs_NK, targets.log_tail_N)]
    both.append((q.gather(1, targets.ids_NK), q.scatter(1, targets.ids_NK, -math.inf).logsumexp(1)))
    (p_K, p_tail), (q_K, q_tail) = [(a.exp(), b.exp().double()) for a, b in both]
    torch.testing.assert_close(got.acceptance_N, torch.minimum(p_K, q_K).sum(1) + torch.minimum(p_tail, q_tail))
    torch.testing.assert_close(got.logprob_N, q.gather(1, targets.labels_N[:, None])[:, 0])
    torch.testing.assert_close(got.confidence_N, q.exp().amax(1))
    assert torch.equal(got.correct_N, q.argmax(1) == targets.labels_N)
    assert torch.equal(got.top1_agree_N, q.argmax(1) == targets.ids_NK[:, 0])
    sums = head_loss(hidden, weight, bias, targets, LossSpec(V))
    torch.testing.assert_close(got.kl_N.sum(), sums.kl_t1_sum)
    assert len(head_metrics(hidden[:0], weight, bias, targets.select(slice(0, 0)), vocab_size=V).kl_N) == 0


def test_a_student_equal_to_the_teacher():
    """KL 0 and acceptance 1 at every row, through the fused head."""
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    logp = (hidden @ weight.T).log_softmax(1)
    kept, ids = logp.topk(K, 1)
    tail = logp.scatter(1, ids, -math.inf).logsumexp(1)
    got = head_metrics(hidden, weight, None, SparseTargets(ids, kept, tail, ids[:, 0]), vocab_size=V)
    assert got.kl_N.abs().max() < 1e-5
    assert (got.acceptance_N - 1).abs().max() < 1e-5
    assert got.top1_agree_N.all()


def test_the_teacher_compared_with_itself():
    _, targets = _make(torch.float32)
    stored = ModelRows(
        targets.logprobs_NK, targets.log_tail_N, targets.ids_NK[:, 0], targets.logprobs_NK[:, 0], torch.zeros(N)
    )
    got = compare_rows(stored, targets, vocab_size=V)
    assert not got.kl_N.any()
    torch.testing.assert_close(got.acceptance_N, torch.ones(N))
    assert got.top1_agree_N.all()
