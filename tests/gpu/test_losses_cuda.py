"""The fused head by Triton on a GPU against float64 autograd of the dense formulas."""

import pytest
import torch

from distill_ray.losses import OBJECTIVES, LossSpec, head_loss, triton_pass
from tests.unit.loss_reference import DRAWN, Case, dense_loss, draw, exact_targets, teacher_logits

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and triton_pass.AVAILABLE), reason="needs a CUDA GPU and triton; neither is faked"
)

N, V, D = 700, 5003, 64


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_value_and_gradients_equal_the_dense_formula(objective, temperature, dtype, rel, softcap):
    torch.backends.cuda.matmul.allow_tf32 = False
    g = torch.Generator().manual_seed(0)
    z = teacher_logits("plain", N, V, g)
    hidden = torch.randn(N, D, generator=g).to(dtype)
    weight = (torch.randn(V + 13, D, generator=g) * D**-0.5).to(dtype)
    labels = torch.randint(0, V, (N,), generator=g)
    if objective in DRAWN:
        targets = draw(z, labels, objective, temperature, 16, 20, g)
    else:
        targets = exact_targets(z, labels, 32, temperature)
    spec = LossSpec(V, temperature, 0.3, objective, softcap=softcap)
    want, grads = dense_loss(Case(hidden, weight, targets), spec)
    leaves = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()
    got = head_loss(*leaves, None, targets.to("cuda"), spec).objective_sum
    assert got.item() == pytest.approx(want.item(), rel=rel)
    for mine, exact in zip(torch.autograd.grad(got, leaves), grads, strict=True):
        assert (mine.cpu().double() - exact).norm() <= rel * exact.norm()
