"""Distillation losses on sparse targets, and the fused head that never holds [tokens, vocabulary] logits.

Pure torch: no ray, no I/O. `head_loss` trains, `head_metrics` evaluates, `OBJECTIVES` is where a new objective goes.
"""

from distill_ray.losses.draws import drawn_targets, head_tail_targets
from distill_ray.losses.head import head_loss, project
from distill_ray.losses.metrics import ModelRows, RowMetrics, compare_rows, default_chunk, head_metrics
from distill_ray.losses.objectives import NEED_DRAWS, OBJECTIVES, Objective, TeacherRows, bucket_kl, partition_kl
from distill_ray.losses.partition import RowIds, Split, split_logits
from distill_ray.losses.tiles import Tiling, default_tiling
from distill_ray.losses.types import LossSpec, LossSums, SparseTargets

__all__ = [
    "NEED_DRAWS",
    "OBJECTIVES",
    "LossSpec",
    "LossSums",
    "ModelRows",
    "Objective",
    "RowIds",
    "RowMetrics",
    "SparseTargets",
    "Split",
    "TeacherRows",
    "Tiling",
    "bucket_kl",
    "compare_rows",
    "default_chunk",
    "default_tiling",
    "drawn_targets",
    "head_loss",
    "head_metrics",
    "head_tail_targets",
    "partition_kl",
    "project",
    "split_logits",
]
