"""Time and memory of the fused head with sparse targets: float32, forward and backward, one process, rivals in turns.

The rival is torch's own fused cross-entropy on hard labels, pinned to its fast setting; three bare matrix products in
the same tiles say how near the loss is to what any head costs. Peaks are of separate processes, less one that only
makes the inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_ray.losses import LossSpec, SparseTargets, Tiling, default_tiling, head_loss
from tests.bench.measure import medians, peak_mib

ROWS, FEW_ROWS, HIDDEN, VOCAB, K = 2048, 1024, 256, 128_256, 64
RIVAL = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--vocab", type=int, default=VOCAB, help=f"vocabulary (default {VOCAB:,})")
    parser.add_argument("--only", choices=("time", "scale", "memory"), help="one part of the figures")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `loss.*`."""
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "time": lambda: times(arguments.vocab, arguments.repeats),
        "scale": lambda: scale(arguments.vocab, arguments.repeats),
        "memory": lambda: memory(arguments.vocab),
    }
    return {k: v for name, part in parts.items() if arguments.only in (None, name) for k, v in part().items()}


def make(rows: int, vocab: int) -> tuple[Tensor, Tensor, SparseTargets]:
    """Hidden states, head weight and targets of a teacher whose kept mass is about 0.9."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=g)
    weight = torch.randn(vocab, HIDDEN, generator=g).mul_(HIDDEN**-0.5)
    # Distinct in a row and spread over the vocabulary, as a real teacher's are.
    ids = (torch.randint(vocab, (rows, 1), generator=g) + torch.randperm(K, generator=g) * (vocab // K)) % vocab
    logprobs = (-1.3 * torch.arange(1, K + 1).log()).log_softmax(0) - 0.1
    labels = torch.where(torch.rand(rows, generator=g) < 0.6, ids[:, 0], torch.randint(vocab, (rows,), generator=g))
    targets = SparseTargets(
        ids,
        logprobs.expand(rows, -1).contiguous(),
        torch.full((rows,), -torch.expm1(torch.tensor(-0.1)).item()).log(),
        labels,
    )
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def fused(hidden: Tensor, weight: Tensor, targets: SparseTargets, **spec: float) -> None:
    head_loss(hidden, weight, None, targets, LossSpec(len(weight), **spec)).objective_sum.div(len(targets)).backward()  # type: ignore[arg-type]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: SparseTargets) -> None:
    F.linear_cross_entropy(hidden, weight, targets.labels_N, options=RIVAL).backward()


def full_logits(hidden: Tensor, weight: Tensor, targets: SparseTargets) -> None:
    """The same bucket objective by plain autograd through all logits."""
    logits = hidden @ weight.T
    log_q = logits.gather(1, targets.ids_NK) - logits.logsumexp(1, keepdim=True)
    tail = torch.log1p(-log_q.exp().sum(1).clamp_max(1 - 1e-6))
    p, p_tail = targets.logprobs_NK.exp(), targets.log_tail_N.exp()
    rows = (p * (targets.logprobs_NK - log_q)).sum(1) + p_tail * (targets.log_tail_N - tail)
    rows.mean().backward()


def three_matmuls(hidden: Tensor, weight: Tensor, tiling: Tiling) -> None:
    """Logits, gradient of the hidden states and of the weight, in the tiles of the fused head, and nothing else."""
    with torch.no_grad():
        vocab = len(weight)
        flat = torch.empty(tiling.rows * vocab)
        dhidden, dweight = torch.zeros_like(hidden), torch.empty_like(weight)
        columns = [slice(a, min(a + tiling.columns, vocab)) for a in range(0, vocab, tiling.columns)]
        for begin in range(0, len(hidden), tiling.rows):
            rows = hidden[begin : begin + tiling.rows]
            n = len(rows)
            tiles = [flat[n * c.start : n * c.stop].view(n, -1) for c in columns]
            for c, tile in zip(columns, tiles, strict=True):
                torch.mm(rows, weight[c].T, out=tile)
            for c, tile in zip(columns, tiles, strict=True):
                dhidden[begin : begin + n].addmm_(tile, weight[c])
                dweight[c].addmm_(tile.T, rows, beta=1 if begin else 0)


def _fresh(work: Callable[..., None], hidden: Tensor, weight: Tensor, *rest: object) -> Callable[[], None]:
    def once() -> None:
        hidden.grad = weight.grad = None
        work(hidden, weight, *rest)

    return once


def times(vocab: int, repeats: int) -> dict[str, float]:
    """Median seconds at FEW_ROWS and their ratios."""
    inputs = make(FEW_ROWS, vocab)
    seconds = medians(
        {
            "fused": _fresh(fused, *inputs),
            "linear_cross_entropy": _fresh(linear_cross_entropy, *inputs),
            "three_matmuls": _fresh(three_matmuls, inputs[0], inputs[1], default_tiling(vocab)),
            "mixed": _fresh(lambda *x: fused(*x, hard_label_weight=0.1), *inputs),
        },
        repeats,
    )
    return {
        "loss.seconds": seconds["fused"],
        "loss.linear_cross_entropy_seconds": seconds["linear_cross_entropy"],
        "loss.time_vs_linear_cross_entropy": seconds["fused"] / seconds["linear_cross_entropy"],
        "loss.mixed_time_vs_linear_cross_entropy": seconds["mixed"] / seconds["linear_cross_entropy"],
        "loss.time_vs_three_matmuls": seconds["fused"] / seconds["three_matmuls"],
    }


def scale(vocab: int, repeats: int) -> dict[str, float]:
    """Time at ROWS against all logits at once, and against half the rows."""
    many = make(ROWS, vocab)
    few = (many[0].detach()[:FEW_ROWS].clone().requires_grad_(), many[1], many[2].select(slice(0, FEW_ROWS)))
    seconds = medians(
        {"few": _fresh(fused, *few), "many": _fresh(fused, *many), "full_logits": _fresh(full_logits, *many)}, repeats
    )
    return {
        "loss.speedup_vs_full_logits": seconds["full_logits"] / seconds["many"],
        "loss.time_2n_over_twice_n": seconds["many"] / (2 * seconds["few"]),
    }


def once(kind: str, rows: int, vocab: int) -> None:
    """What a process of its own does for `memory`."""
    inputs = make(rows, vocab)
    if kind != "inputs":
        globals()[kind](*inputs)


def memory(vocab: int) -> dict[str, float]:
    """Peak MiB beyond imports and inputs, both gradients included, and their ratios."""

    inputs = {rows: peak_mib(once, "inputs", rows, vocab) for rows in (FEW_ROWS, ROWS, 4 * FEW_ROWS)}

    def beyond(kind: str, rows: int) -> float:
        return peak_mib(once, kind, rows, vocab) - inputs[rows]

    few, many, more = (beyond("fused", rows) for rows in (FEW_ROWS, ROWS, 4 * FEW_ROWS))
    rival = beyond("linear_cross_entropy", FEW_ROWS)
    return {
        "loss.peak_mib": few,
        "loss.linear_cross_entropy_peak_mib": rival,
        "loss.peak_vs_linear_cross_entropy": few / rival,
        "loss.memory_vs_full_logits": many / beyond("full_logits", ROWS),
        "loss.peak_growth_mib_n_to_4n": more - few,
    }
