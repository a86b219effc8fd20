"""A node that is taken away with notice: knowing of it, and leaving so that Ray Train starts the group again.

What Ray 2.60 does: a drained node (`ray drain-node`, a spot notice, or SIGTERM to `ray start`) keeps its workers until
the deadline. Ray Train tells all workers, and at the deadline, whatever they do, it restarts the group on the budget
of preemptions. To it, a worker that returns earlier has finished, and one that dies earlier has failed. So the workers
return `LEFT`, and a callback of ours turns that into the error that Ray Train itself raises at the deadline.
"""

from __future__ import annotations

from typing import Any

LEFT = "left"
"""What the training function returns where training is not over."""
POLL_S = 1.0
"""Seconds between two looks of Ray Train at the nodes; its own 5 s are most of a short notice."""
POLL_VARIABLE = "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"


def notice() -> Any:
    """Ray Train's `PreemptionInfo` where a node of the group is about to go, else None. Costs nothing."""
    # The public `ray.train.get_preemption_info` is a call to an actor and a barrier of all ranks; ours meet anyway.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info
