"""From a run's targets to packed micro-batches: the plan (pure arithmetic), packing, prefetch, attention masks.

Train and evaluate share it. The plan never opens a target object; the loader fetches each one whole, once. What holds
tensors (`loader`, `batch`, `attention`) is imported from its module at first use: torch takes seconds, and a driver
that only plans does without.
"""

from distill_ray.ingest.cache import UnitCache, open_cache
from distill_ray.ingest.mixing import check_mix
from distill_ray.ingest.packing import pack_lengths
from distill_ray.ingest.plan import BatchPlan, Pack, PlanUnit, SeqRef, batch_id, build_plan

__all__ = [
    "BatchPlan",
    "Pack",
    "PlanUnit",
    "SeqRef",
    "UnitCache",
    "batch_id",
    "build_plan",
    "check_mix",
    "open_cache",
    "pack_lengths",
]
