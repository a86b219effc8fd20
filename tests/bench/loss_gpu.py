"""The fused head on a GPU: 8,192 tokens × D 4,096 × V 151,936, bf16, k = 64, forward and backward, beside its rivals.

Needs a CUDA device and says so without one. Liger's fused cross-entropy takes part where `liger_kernel` is installed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_ray.losses import LossSpec, SparseTargets, head_loss

ROWS, HIDDEN, VOCAB, K = 8192, 4096, 151_936, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds (default 9)")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `loss_gpu.*`: milliseconds, and GiB beyond inputs and gradients."""
    if not torch.cuda.is_available():
        raise SystemExit("this bench needs a CUDA GPU: none is visible")
    hidden, weight, targets = _inputs()
    rivals: dict[str, Callable[[], None]] = {
        "fused": lambda: _fused(hidden, weight, targets),
        "three_matmuls": lambda: _three_matmuls(hidden, weight),
        "linear_cross_entropy": lambda: _torch_ce(hidden, weight, targets),
    }
    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore

        liger = LigerFusedLinearCrossEntropyLoss()
        rivals["liger_cross_entropy"] = lambda: liger(weight, hidden, targets.labels_N).backward()
    figures: dict[str, float] = {}
    for name, work in rivals.items():
        figures[f"loss_gpu.{name}_gib"] = _extra_gib(work, hidden, weight)
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(arguments.repeats):
        for name, work in rivals.items():
            hidden.grad = weight.grad = None
            taken[name].append(_milliseconds(work))
    return figures | {f"loss_gpu.{name}_ms": statistics.median(ms) for name, ms in taken.items()}


def _inputs() -> tuple[Tensor, Tensor, SparseTargets]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16) * HIDDEN**-0.5
    ids = torch.stack([torch.randperm(VOCAB, device="cuda")[:K] for _ in range(ROWS)])
    logprobs = (-1.3 * torch.arange(1, K + 1, device="cuda").log()).log_softmax(0) - 0.1
    tail = torch.full((ROWS,), 0.1, device="cuda").expm1().mul(torch.tensor(0.1).neg().exp().item()).log()
    targets = SparseTargets(ids, logprobs.expand(ROWS, -1).contiguous(), tail, ids[:, 0])
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _fused(hidden: Tensor, weight: Tensor, targets: SparseTargets) -> None:
    head_loss(hidden, weight, None, targets, LossSpec(VOCAB)).objective_sum.div(ROWS).backward()


def _torch_ce(hidden: Tensor, weight: Tensor, targets: SparseTargets) -> None:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=512)
    F.linear_cross_entropy(hidden, weight, targets.labels_N, options=options).backward()


def _three_matmuls(hidden: Tensor, weight: Tensor) -> None:
    with torch.no_grad():
        logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden


def _milliseconds(work: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _extra_gib(work: Callable[[], None], hidden: Tensor, weight: Tensor) -> float:
    """Peak beyond the inputs and both gradients; the call also warms up."""
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() + sum(x.numel() * x.element_size() for x in (hidden, weight))
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
