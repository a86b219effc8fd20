"""Distillation losses on sparse targets, and the fused head that never holds [tokens, vocabulary] logits.

Pure torch: no ray, no I/O. `head_loss` trains, `head_metrics` evaluates, `OBJECTIVES` is where a new objective goes.
"""

from distill_ray.losses.head import default_chunk, head_loss, project
from distill_ray.losses.metrics import ModelRows, RowMetrics, compare_rows, head_metrics
from distill_ray.losses.objectives import OBJECTIVES, Objective, bucket, bucket_kl, partition_kl
from distill_ray.losses.partition import Split, StudentChunk
from distill_ray.losses.types import LossSpec, LossSums, SparseTargets

__all__ = [
    "OBJECTIVES",
    "LossSpec",
    "LossSums",
    "ModelRows",
    "Objective",
    "RowMetrics",
    "SparseTargets",
    "Split",
    "StudentChunk",
    "bucket",
    "bucket_kl",
    "compare_rows",
    "default_chunk",
    "head_loss",
    "head_metrics",
    "partition_kl",
    "project",
]
