"""Model FLOPs of a training step, and what a device could do at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from torch import Tensor, nn

from distill_ray.config.student import TrainSection

if TYPE_CHECKING:
    from distill_ray.student.module import DistillModule

BF16_TFLOPS: Mapping[str, float] = {
    "NVIDIA A10": 125.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}
"""torch's name of a whole GPU → dense bfloat16 TFLOP/s of its data sheet (there often printed with sparsity: twice)."""


def peak_flops(section: TrainSection, device_name: str | None) -> float | None:
    """FLOP/s of one worker's device at its peak; None where that is not known, and then there is no MFU.

    Args:
        section: may state it; else only bfloat16 is known.
        device_name: `torch.cuda.get_device_name()`; None for a CPU. A part of a GPU (MIG) has a name of its own.
    """
    if section.peak_tflops is not None:
        return section.peak_tflops * 1e12
    known = None if section.precision != "bf16" or device_name is None else BF16_TFLOPS.get(device_name)
    return None if known is None else known * 1e12


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one optimizer step by the formula of the PaLM paper (Chowdhery et al. 2022, appendix B).

    A token costs 6·N + 12·L·H·Q·T: N weights of the body (embeddings look up and multiply nothing), L layers of H heads
    of width Q, context T. T is the length of the token's own document, at most a layer's sliding window: packs are
    no context. As in the paper, causal attention counts as if it were full, and what is computed again in the backward
    pass (gradient checkpointing) does not count. The head costs 6·V·D, at supervised rows only: it sees no others. A
    frozen weight has no gradient of its own: 4 instead of 6.
    """

    weights: float
    """Of a token, in all weights of the body."""
    attention: tuple[tuple[int | None, float], ...]
    """(sliding window, 12·H·Q times the layers that have it)."""
    head: float
    """Of a supervised row."""

    @classmethod
    def of(cls, module: DistillModule) -> Self | None:
        """Of a student before ZeRO partitions it, adapters included; None for a mixture of experts.

        There not every token sees every weight.
        """
        if any("experts" in name for name, _ in module.body.named_parameters()):
            return None
        embeddings = {id(m.weight) for m in module.body.modules() if isinstance(m, nn.Embedding)}
        weights = sum(_cost(p) for p in module.body.parameters() if id(p) not in embeddings)
        config = module.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        windows = layer_windows(config)
        attention = tuple((w, 12.0 * heads * width * windows.count(w)) for w in dict.fromkeys(windows))
        return cls(weights, attention, _cost(module.head.weight))

    def of_step(self, lengths: np.ndarray, supervised: int) -> float:
        """Of a global batch.

        Args:
            lengths: int [documents] tokens of each.
            supervised: rows that the head sees.
        """
        context = np.zeros(len(lengths))
        for window, each in self.attention:
            context += each * (lengths if window is None else np.minimum(lengths, window))
        return float((lengths * (self.weights + context)).sum()) + self.head * supervised


def _cost(weight: Tensor) -> float:
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()


def layer_windows(config: object) -> list[int | None]:
    """Sliding window of each layer, None where it has none."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * getattr(config, "num_hidden_layers", 0)
    return [window if kind == "sliding_attention" else None for kind in kinds]
