"""What the training workers need of the cluster, and what it has."""

from __future__ import annotations

from distill_ray.config.sections import TrainSection
from distill_ray.session import describe_room


def worker_resources(train: TrainSection) -> dict[str, float]:
    """Ray resources of one training worker."""
    return {"CPU": 1.0, "GPU": 1.0} if train.use_gpu else {"CPU": 1.0}


def is_waiting() -> bool:
    """Whether a group of workers waits for room: one that has it and is only slow to start does not count."""
    from ray.util import placement_group_table

    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in placement_group_table().values())


def describe(train: TrainSection) -> str:
    """Needed, free and present resources in one clause. Ray is connected."""
    needed = {name: train.workers.max * n for name, n in worker_resources(train).items()}
    return f"train.workers.max={train.workers.max} {describe_room(needed)}"
