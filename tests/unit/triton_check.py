"""The Triton pass against the dense formula, on the CPU: run with TRITON_INTERPRET=1 in the environment.

Prints one JSON object: case → largest relative deviation of value and gradients.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from distill_ray.losses import OBJECTIVES, LossSpec
from distill_ray.losses.head import run_pass
from distill_ray.losses.passes import HeadInputs
from distill_ray.losses.triton_pass import TritonPass
from tests.unit.loss_reference import Case, dense_loss, draw, exact_targets, teacher_logits

N, V, D = 5, 37, 6


def small_pass(inputs: HeadInputs) -> TritonPass:
    """Several chunks, the last one shorter, and several blocks a row."""
    return TritonPass(inputs, rows=2, block=16)


def deviation(objective: str, temperature: float, dtype: torch.dtype, k: int, softcap: float | None) -> float:
    g = torch.Generator().manual_seed(0)
    z = teacher_logits("plain", N, V, g)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(V + 3, D, generator=g, dtype=torch.float64).to(dtype)
    labels = z.argmax(1) if k == V else torch.randint(0, V, (N,), generator=g)
    if objective in ("sampled", "head_tail"):
        targets = draw(z, labels, objective, temperature, 4, 5, g)
    else:
        targets = exact_targets(z, labels, k, temperature)
    spec = LossSpec(V, temperature, 0.3, objective)
    spec = spec if softcap is None else replace(spec, softcap=softcap, logit_scale=0.5)
    want, (want_hidden, want_weight) = dense_loss(Case(hidden, weight, targets), spec)
    got, _, (d_hidden, d_weight, _) = run_pass(hidden, weight, None, targets, spec, (True, True, False), small_pass)
    assert d_hidden is not None
    assert d_weight is not None
    assert not d_weight[V:].any()
    off = [abs(got.item() - want.item()) / abs(want.item())]
    off += [((a.double() - b).norm() / b.norm()).item() for a, b in ((d_hidden, want_hidden), (d_weight, want_weight))]
    return max(off)


def main() -> None:
    found = {}
    for objective in OBJECTIVES:
        found[f"float32 {objective} T=1"] = deviation(objective, 1.0, torch.float32, 5, None)
        found[f"float32 {objective} T=2 soft-cap"] = deviation(objective, 2.0, torch.float32, 5, 3.0)
    found["float32 bucket K=V"] = deviation("bucket", 2.0, torch.float32, V, None)
    found["bfloat16 bucket"] = deviation("bucket", 2.0, torch.bfloat16, 5, None)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
