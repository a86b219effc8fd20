"""What a cluster looks like over time, seen from outside: nodes by role, GPUs that are held, and where actors are.

Reads the cluster's own state (GCS), without connecting a driver.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from ray._private.state import GlobalState
from ray._raylet import GcsClient, GcsClientOptions
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated.autoscaler_pb2 import NodeStatus

ROLE = "distill-ray/role"
_EVERY_S = 0.25
_LOOK_AT_ACTORS = 8
"""Samples between two looks at all actors."""


@dataclass(frozen=True)
class Sample:
    """One moment."""

    at: float
    """`time.monotonic()`."""
    nodes: dict[str, int]
    """Live nodes by role; the head has none."""
    held: dict[str, float]
    """GPUs in use, by role of their node."""
    asked: float
    """GPUs that are asked for and not there."""


@dataclass
class Watch:
    """Samples for the time of a block. Another thread reads; what it found is whole once the block is left."""

    address: str
    samples: list[Sample] = field(default_factory=list)
    actors: set[tuple[str, str]] = field(default_factory=set)
    """(class, role of its node) of every actor that was ever seen alive."""

    def __enter__(self) -> Self:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        gcs, state = GcsClient(self.address), GlobalState()
        state._initialize_global_state(
            GcsClientOptions.create(self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        count = 0
        while not self._done.wait(_EVERY_S):
            found = get_cluster_resource_state(gcs)
            roles = {node.node_id.hex(): node.labels.get(ROLE, "") for node in found.node_states}
            self.samples.append(_sample(found))
            if count % _LOOK_AT_ACTORS == 0:
                for actor in state.actor_table(None, actor_state_name="ALIVE").values():
                    node = actor["Address"]["NodeID"]
                    self.actors.add((actor["ActorClassName"], roles.get(node, "gone")))
            count += 1

    def first(self, role: str, count: int, since: float = 0.0) -> float | None:
        """When so many nodes of a role were first there."""
        return next((s.at for s in self.samples if s.at >= since and s.nodes.get(role, 0) >= count), None)

    def asked_first(self, since: float = 0.0) -> float | None:
        """When a GPU was first asked for that was not there."""
        return next((s.at for s in self.samples if s.at >= since and s.asked), None)

    def gone(self, role: str, since: float) -> float | None:
        """When no node of a role was left, for good."""
        last = max((s.at for s in self.samples if s.nodes.get(role)), default=since)
        return next((s.at for s in self.samples if s.at > last), None)

    def most(self, role: str, since: float = 0.0, until: float = float("inf")) -> int:
        """Most nodes of a role that were there at once."""
        return max((s.nodes.get(role, 0) for s in self.samples if since <= s.at <= until), default=0)

    def held_s(self, role: str) -> float:
        """GPU-seconds held on nodes of a role."""
        return sum(a.held.get(role, 0.0) * (b.at - a.at) for a, b in pairwise(self.samples))

    def timeline(self) -> list[str]:
        """A line for each change of nodes or held GPUs, in seconds since the first sample."""
        lines, before, begun = list[str](), None, self.samples[0].at if self.samples else 0.0
        for s in self.samples:
            now = {k: v for k, v in s.nodes.items() if k and v}, {k: v for k, v in s.held.items() if k and v}
            if now != before:
                nodes = "  ".join(f"{n} {role} node(s)" for role, n in sorted(now[0].items())) or "no node but the head"
                held = "  ".join(f"{n:g} GPUs held on {role}" for role, n in sorted(now[1].items()))
                lines.append(f"{s.at - begun:7.1f} s  {nodes}  {held}".rstrip())
                before = now
        return lines


def _sample(found: Any) -> Sample:
    nodes, held = dict[str, int](), dict[str, float]()
    for node in found.node_states:
        if node.status == NodeStatus.DEAD:
            continue
        role = node.labels.get(ROLE, "")
        nodes[role] = nodes.get(role, 0) + 1
        used = node.total_resources.get("GPU", 0.0) - node.available_resources.get("GPU", 0.0)
        held[role] = held.get(role, 0.0) + used
    asked = sum(r.request.resources_bundle.get("GPU", 0.0) * r.count for r in found.pending_resource_requests)
    return Sample(time.monotonic(), nodes, held, asked)


def roles_of(actors: set[tuple[str, str]], part: str) -> set[str]:
    """Roles of the nodes on which actors were whose class name has `part`."""
    return {role for name, role in actors if part in name}
