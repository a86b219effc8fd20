"""From a run's targets to packed micro-batches: the plan (pure arithmetic), packing, prefetch, attention masks.

Train and evaluate share it. The plan never opens a target object; the loader fetches each one whole, once.
"""

from distill_ray.ingest.attention import attention_mask
from distill_ray.ingest.batch import PackedBatch, collate
from distill_ray.ingest.loader import PackLoader, rank_micro_batches
from distill_ray.ingest.packing import pack_lengths
from distill_ray.ingest.plan import BatchPlan, Pack, PlanUnit, SeqRef, build_plan
from distill_ray.ingest.units import UnitCache, open_cache

__all__ = [
    "BatchPlan",
    "Pack",
    "PackLoader",
    "PackedBatch",
    "PlanUnit",
    "SeqRef",
    "UnitCache",
    "attention_mask",
    "build_plan",
    "collate",
    "open_cache",
    "pack_lengths",
    "rank_micro_batches",
]
