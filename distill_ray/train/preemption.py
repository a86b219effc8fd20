"""A node that is taken away with notice: knowing of it, and leaving so that Ray Train starts the group again.

What Ray 2.60 does: a drained node (`ray drain-node`, a spot notice, or SIGTERM to `ray start`) keeps its workers until
the deadline. Ray Train tells all of them, and restarts the group, on the budget of preemptions, once all have ended
and one of them *died* on that node; or at the deadline, whatever they do. A worker that returns has finished: were all
to return, training would be over. So those on the node die, and the others return.
"""

from __future__ import annotations

import os
import sys
from typing import Any

POLL_S = 1.0
"""Seconds between two looks of Ray Train at the nodes; its own 5 s are most of a short notice."""
POLL_VARIABLE = "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"


def notice() -> Any:
    """Ray Train's `PreemptionInfo` where a node of the group is about to go, else None. Costs nothing."""
    # The public `ray.train.get_preemption_info` is a call to an actor and a barrier of all ranks; ours meet anyway.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def leave(rank: int, world: int) -> None:
    """End this process if its node goes; return if another's does. A collective; the checkpoint is published."""
    import torch.distributed as dist

    mine = notice()
    everyone: list[list[int]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, mine.preempted_ranks if mine else [])
    # A notice reaches the ranks one after the other; none may return that another one knows to be doomed.
    if rank in {doomed for ranks in everyone for doomed in ranks}:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
