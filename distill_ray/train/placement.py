"""What the training workers need of the cluster, and what it has."""

from __future__ import annotations

from collections.abc import Mapping

from distill_ray.config.student import TrainSection
from distill_ray.session import describe_room, free_resources


def worker_resources(train: TrainSection) -> dict[str, float]:
    """Ray resources of one training worker."""
    return {"CPU": 1.0, "GPU": 1.0} if train.use_gpu else {"CPU": 1.0}


def is_elastic(train: TrainSection) -> bool:
    """Whether the group may have fewer workers than `workers.max`."""
    return train.workers.min < train.workers.max


def room(train: TrainSection, selector: Mapping[str, str], held: Mapping[str, int] | None = None) -> dict[str, int]:
    """Workers that each node could take now, by node id; nodes about to go away are left out. Ray is connected.

    Args:
        train: what one worker needs.
        selector: labels that a worker's node must have.
        held: workers of ours, perhaps dead by now, whose resources on a node are still reserved.
    """
    from ray._private import state

    free, leaving = free_resources(selector), state.state.get_draining_nodes()
    needed = worker_resources(train)
    return {
        node: int(min(has.get(name, 0.0) // n for name, n in needed.items())) + (held or {}).get(node, 0)
        for node, has in free.items()
        if node not in leaving
    }


def is_waiting(train: TrainSection, selector: Mapping[str, str], sized: bool) -> bool:
    """Whether a group of workers waits for room: one that has it and is only slow to start does not count.

    Args:
        train: what one worker needs.
        selector: labels that a worker's node must have.
        sized: whether an elastic group's number of workers has been chosen.
    """
    from ray.util import placement_group_table

    if is_elastic(train) and not sized:
        # Ray Train reserves nothing before there is room for the least number of workers.
        return sum(room(train, selector).values()) < train.workers.min
    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in placement_group_table().values())


def describe(train: TrainSection, selector: Mapping[str, str]) -> str:
    """Needed, free and present resources in one clause. Ray is connected."""
    name, least = ("min", train.workers.min) if is_elastic(train) else ("max", train.workers.max)
    needed = {resource: least * n for resource, n in worker_resources(train).items()}
    return f"train.workers.{name}={least} {describe_room(needed, selector)}"
