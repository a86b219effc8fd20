"""Every objective, value and both gradients, against float64 autograd of its dense formula."""

import math

import pytest
import torch

from distill_ray.losses import OBJECTIVES, LossSpec, SparseTargets, Tiling, drawn_targets, head_loss, head_tail_targets
from tests.unit.loss_reference import (
    DRAWN,
    EXACT,
    Case,
    dense_loss,
    dense_rows,
    draw,
    exact_targets,
    masked,
    teacher_logits,
)

N, V, D = 9, 53, 8


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors of a few hundred numbers: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TYPES = [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
EDGES = ("plain", "P→1", "S→1", "k=1", "one_hot", "uniform", "ignored", "K=V")


def _make(objective, edge, dtype, temperature=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = {"k=1": 1, "K=V": V}.get(edge, 6)
    z = teacher_logits(edge, N, V, g)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V + 3, D, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[0] = z[0].argmax()  # a label inside the kept ids, whatever the seed
    if objective in DRAWN:
        targets = draw(z, labels, objective, temperature, min(k, V - 5), 7, g)
    else:
        targets = exact_targets(z, labels, k, temperature)
    if edge == "S→1":  # the student is sure of kept tokens: 1 − S ≈ e^-40, 0 as a difference even in float64
        hidden[:, 0] = 8.0
        weight[:, 0] = -2.5
        weight[targets.ids_NK[0], 0] = 2.5
        targets = _same_ids(targets)
    if edge == "ignored":
        targets = masked(targets, torch.arange(N) % 3 != 1)
    return Case(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets)


def _same_ids(targets: SparseTargets) -> SparseTargets:
    """Every row with the ids of row 0, so that one student can be sure of all of them."""
    first = targets.select(torch.zeros(N, dtype=torch.long))
    return SparseTargets(
        first.ids_NK,
        targets.logprobs_NK,
        targets.log_tail_N,
        targets.labels_N,
        None,
        targets.temperature,
        targets.logprobs_T,
        targets.log_tail_T,
        targets.weights_NK if targets.weights_NK is None else first.weights_NK,
    )


def _check(case, spec, rel, tiling=None):
    want, grads = dense_loss(case, spec)
    got = head_loss(case.hidden, case.weight, None, case.targets, spec, tiling=tiling)
    assert got.objective_sum.item() == pytest.approx(want.item(), rel=rel, abs=rel)
    for mine, exact in zip(torch.autograd.grad(got.objective_sum, (case.hidden, case.weight)), grads, strict=True):
        assert mine.dtype == case.hidden.dtype
        # At a minimum (the student equal to the teacher) the gradient itself is rounding: judged against its terms.
        assert (mine.double() - exact).norm() <= rel * exact.norm() + rel * 1e-3
    return got


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("dtype", "rel"), TYPES, ids=str)
def test_value_and_gradients_equal_the_dense_formula(objective, edge, temperature, dtype, rel):
    case = _make(objective, edge, dtype, temperature)
    for alpha in (0.0, 0.3):
        spec = LossSpec(V, temperature, alpha, objective)
        _check(case, spec, rel, Tiling(4, 16) if alpha else None)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scale_and_softcap(objective, temperature):
    case = _make(objective, "plain", torch.float64, temperature)
    _check(case, LossSpec(V, temperature, 0.3, objective, logit_scale=0.5, softcap=3.0), 1e-9, Tiling(4, 16))


@pytest.mark.parametrize("objective", [x for x in EXACT if x != "reverse_kl"])
def test_the_whole_vocabulary_kept_gives_the_dense_divergence(objective):
    case = _make(objective, "K=V", torch.float64)
    z = case.hidden.detach() @ case.weight.detach()[:V].T
    log_q = z.log_softmax(1).gather(1, case.targets.ids_NK)
    log_p = case.targets.logprobs_NK
    spec = LossSpec(V, objective=objective)
    got = head_loss(case.hidden, case.weight, None, case.targets, spec).kl_t_sum
    share = {"jsd": spec.jsd_beta, "skewed_kl": spec.skew}.get(objective, 0.0)
    m = share * log_p.exp() + (1 - share) * log_q.exp()
    kl = (log_p.exp() * (log_p - m.log())).sum()
    if objective == "jsd":
        kl = share * kl + (1 - share) * (log_q.exp() * (log_q - m.log())).sum()
    assert got.item() == pytest.approx(kl.item(), rel=1e-6)


def test_limits_of_the_mixed_objectives():
    """A vanishing share makes skewed KL the forward one, and JSD/β too; the other end of JSD is the reverse."""
    case = _make("bucket", "plain", torch.float64)

    def value(objective, **kinds):
        spec = LossSpec(V, objective=objective, **kinds)
        return head_loss(case.hidden, case.weight, None, case.targets, spec).kl_t_sum.item()

    forward, reverse = value("bucket"), value("reverse_kl")
    assert value("skewed_kl", skew=1e-9) == pytest.approx(forward, rel=1e-5)
    assert value("jsd", jsd_beta=1e-9) / 1e-9 == pytest.approx(forward, rel=1e-4)
    assert value("jsd", jsd_beta=1 - 1e-9) / 1e-9 == pytest.approx(reverse, rel=1e-4)
    assert forward != pytest.approx(reverse, rel=0.05)


def test_truncated_goes_below_zero_and_keeps_its_gradient():
    """A clamp at 0 would stop the gradient of just the rows that put mass on the kept tokens."""
    case = _make("truncated", "uniform", torch.float64)
    case.targets = _same_ids(case.targets)
    with torch.no_grad():  # every row sure of the six kept tokens, alike: q = 1/6 where p = 1/53
        case.hidden[:, 0], case.weight[:, 0] = 4.0, 0.0
        case.weight[case.targets.ids_NK[0]] = torch.eye(1, D, dtype=torch.float64) * 3
    got = _check(case, LossSpec(V, objective="truncated"), 1e-6)
    assert got.objective_sum.item() < 0
    (grad,) = torch.autograd.grad(
        head_loss(case.hidden, case.weight, None, case.targets, LossSpec(V, objective="truncated")).objective_sum,
        case.hidden,
    )
    assert grad.norm() > 1e-3


def test_renormalised_does_not_move_the_tail():
    case = _make("renormalised", "plain", torch.float64)
    one = Case(case.hidden[:1].detach().requires_grad_(), case.weight, case.targets.select(slice(0, 1)))
    loss = head_loss(one.hidden, one.weight, None, one.targets, LossSpec(V, objective="renormalised")).objective_sum
    (grad,) = torch.autograd.grad(loss, one.weight)
    kept = torch.zeros(len(grad), dtype=torch.bool).index_fill(0, one.targets.ids_NK[0], True)
    assert (grad[kept].norm(dim=1) > 1e-3).all()
    assert grad[~kept].abs().max() < 1e-14


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_supervised_row(objective):
    case = _make(objective, "plain", torch.float32)
    targets = masked(case.targets, torch.zeros(N, dtype=torch.bool))
    sums = head_loss(case.hidden, case.weight, None, targets, LossSpec(V, 1.0, 0.3, objective))
    sums.objective_sum.backward()
    assert not sums.metrics().any()
    for leaf in (case.hidden, case.weight):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def _redrawn(case, z, objective, temperature, m, groups, copies, seed):
    """Losses and weight gradients [groups, …] of a case, each the mean of `copies` redraws of its N rows."""
    g = torch.Generator().manual_seed(seed)
    hidden = case.hidden.detach().repeat(copies, 1)
    z, labels = z.repeat(copies, 1), case.targets.labels_N.repeat(copies)
    values, grads = [], []
    for _ in range(groups):
        targets = draw(z, labels, objective, temperature, 5, m, g)
        spec = LossSpec(V, temperature, objective=objective)
        loss = head_loss(hidden, case.weight, None, targets, spec).objective_sum / copies
        values.append(loss.detach())
        grads.append(torch.autograd.grad(loss, case.weight)[0])
    return torch.stack(values), torch.stack(grads)


@pytest.mark.parametrize("objective", DRAWN)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_of_draws_are_unbiased(objective, temperature):
    """The mean over 5,000 redraws is the dense gradient within its standard error, in every coordinate."""
    case = _make(objective, "plain", torch.float64, temperature, seed=3)
    z = teacher_logits("plain", N, V, torch.Generator().manual_seed(5))
    dense = Case(case.hidden, case.weight, exact_targets(z, case.targets.labels_N, V, temperature))
    want_value, (_, want) = dense_loss(dense, LossSpec(V, temperature))
    values, grads = _redrawn(case, z, objective, temperature, 6, groups=50, copies=100, seed=17)
    error = grads.std(0) / math.sqrt(len(grads))
    off = ((grads.mean(0) - want).abs() / error.clamp_min(1e-12))[:V]
    assert off.max() < 5  # 424 coordinates
    assert 0.5 < off.pow(2).mean() < 1.8  # the deviations are those of chance: neither bias nor a dead gradient
    assert error[:V].norm() < 0.1 * want.norm()
    assert abs(values.mean() - want_value) < 4 * values.std() / math.sqrt(len(values))


def test_drawing_from_the_truncated_top_k_is_biased():
    """The fault that the test above must see: the same mean is far from the dense gradient."""
    case = _make("sampled", "plain", torch.float64)
    z = teacher_logits("plain", N, V, torch.Generator().manual_seed(1))
    cut = z.scatter(1, (-z).topk(V - 6, 1).indices, -1e4)
    dense = Case(case.hidden, case.weight, exact_targets(z, case.targets.labels_N, V, 1.0))
    _, (_, want) = dense_loss(dense, LossSpec(V))
    means = [_redrawn(case, x, "sampled", 1.0, 50, 2, 100, 1)[1].mean(0) for x in (z, cut)]
    whole, truncated = (((mean - want).norm() / want.norm()).item() for mean in means)
    assert whole < 0.05 < 0.1 < truncated


def test_head_and_tail_vary_less_than_plain_draws():
    case = _make("sampled", "plain", torch.float64)
    z = teacher_logits("plain", N, V, torch.Generator().manual_seed(2))
    # 12 drawn against 5 exact + 7 drawn
    spread = [_redrawn(case, z, o, 1.0, m, 100, 1, 2)[1].var(0).sum() for o, m in (("sampled", 12), ("head_tail", 7))]
    assert spread[1] < spread[0]


def test_draws_at_a_temperature_estimate_the_divergence_at_one_without_bias():
    case = _make("sampled", "plain", torch.float64, 2.0, seed=8)
    g = torch.Generator().manual_seed(4)
    z = teacher_logits("plain", N, V, torch.Generator().manual_seed(6))
    exact = exact_targets(z, case.targets.labels_N, V, 1.0)
    hidden, weight = case.hidden.detach(), case.weight.detach()
    want = dense_rows(hidden @ weight[:V].T, exact, LossSpec(V)).sum()
    copies, spec = 20, LossSpec(V, 2.0, objective="sampled")
    got = []
    for _ in range(25):
        targets = draw(z.repeat(copies, 1), exact.labels_N.repeat(copies), "sampled", 2.0, 5, 40, g)
        got.append(head_loss(hidden.repeat(copies, 1), weight, None, targets, spec).kl_t1_sum / copies)
    mean, error = torch.stack(got).mean(), torch.stack(got).std() / math.sqrt(len(got))
    assert abs(mean - want) < 4 * error
    assert error < 0.1 * want


def test_targets_that_an_objective_cannot_use_are_refused():
    exact, drawn = (_make(x, "plain", torch.float64) for x in ("bucket", "sampled"))
    with pytest.raises(ValueError, match="'sampled', but these targets hold the exact top k"):
        head_loss(exact.hidden, exact.weight, None, exact.targets, LossSpec(V, objective="sampled"))
    with pytest.raises(ValueError, match="'bucket', but these targets hold draws"):
        head_loss(drawn.hidden, drawn.weight, None, drawn.targets, LossSpec(V))
    with pytest.raises(ValueError, match="stand at 1"):
        head_loss(drawn.hidden, drawn.weight, None, drawn.targets, LossSpec(V, 2.0, objective="sampled"))


def test_faulty_draws_are_refused():
    ids, logp, labels = torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]]), torch.tensor([0])
    with pytest.raises(ValueError, match="1 of 1 rows hold no draw"):
        drawn_targets(ids, torch.zeros(1, 2, dtype=torch.long), logp, labels)
    head = SparseTargets(ids, logp, torch.tensor([-0.7]), labels)
    with pytest.raises(ValueError, match="1 of 1 rows draw a tail token that is among their top 2"):
        head_tail_targets(head, torch.tensor([[2]]), torch.tensor([[-2.0]]))
    with pytest.raises(ValueError, match="no tail draws"):
        head_tail_targets(head, ids[:, :0], logp[:, :0])
