"""What a training worker is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill_ray.config import Recipe
from distill_ray.ingest import BatchPlan, build_plan
from distill_ray.lease import LeaseToken
from distill_ray.storage import Storage
from distill_ray.targets import RunManifest


@dataclass(frozen=True)
class Job:
    """Everything a worker needs; travels to it once."""

    recipe: Recipe
    storage: Storage
    manifest: RunManifest
    token: LeaseToken
    board: Any
    """Handle of the `Board` actor."""
    meter: Any = None
    """Actor to which workers post their seconds."""


def make_plan(recipe: Recipe, manifest: RunManifest) -> BatchPlan:
    """Every training batch of the run; the same on every worker and after every resume."""
    train = recipe.train
    return build_plan(
        manifest,
        holdout=recipe.corpus.holdout,
        split="train",
        seed=train.seed,
        epochs=train.epochs,
        max_steps=train.max_steps,
        mix=train.mix,
        pack_tokens=train.pack_tokens,
        packs_per_batch=train.packs_per_batch,
    )
