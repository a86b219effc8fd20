"""What a run is called in Kubernetes; the same recipe and version always give the same names."""

from __future__ import annotations

import hashlib
import re

from distill_ray.config import Recipe
from distill_ray.errors import UserError

# KubeRay 1.7 appends to these names, and refuses longer ones instead of cutting them.
RAYCLUSTER_LENGTH, RAYJOB_LENGTH, RAYCRONJOB_LENGTH = 53, 47, 36

_VALID = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def _checked(name: str, longest: int, what: str) -> str:
    if not _VALID.fullmatch(name) or len(name) > longest:
        raise UserError(
            f"{name!r} cannot be the name of a {what}: Kubernetes wants lower-case letters, digits and '-', a letter "
            f"first, and KubeRay at most {longest} characters (these are {len(name)}); change the recipe's name"
        )
    return name


def cluster_name(recipe: Recipe) -> str:
    """Of a RayCluster that serves any version of the recipe."""
    return _checked(recipe.name, RAYCLUSTER_LENGTH, "RayCluster")


def weekly_name(recipe: Recipe) -> str:
    """Of a CronJob or RayCronJob; leaves room for the names of the jobs that it makes."""
    # A week's RayJob is called `<name>-2026-w48`: nine characters more than its CronJob.
    return _checked(recipe.name, RAYCRONJOB_LENGTH, "CronJob or RayCronJob")


def run_name(recipe: Recipe) -> str:
    """Of the RayJob of one version: `<name>-<version>`, so that a second one of the same week collides with it."""
    version = recipe.version.lower()
    plain = re.sub(r"[^a-z0-9-]", "-", version).strip("-")
    if plain != version:
        # Versions 1.0 and 1-0 are two runs.
        plain += "-" + hashlib.sha256(version.encode()).hexdigest()[:4]
    return _checked(f"{recipe.name}-{plain}", RAYJOB_LENGTH, "RayJob")
