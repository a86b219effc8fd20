"""A cluster of real Ray nodes on this machine, GPUs declared, and ways to lose its parts without a word."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import psutil
from ray.cluster_utils import Cluster

# Three missed checks of a second: by default Ray knows of a lost node only after some fifteen seconds.
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
SHAPES = {"teacher": {"num_cpus": 0, "num_gpus": 1}, "student": {"num_cpus": 1, "num_gpus": 0}}


class Nodes:
    """A head without resources, where drivers are, two nodes of a teacher each and two of a training worker each."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "_system_config": QUICK}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.of: dict[str, list[Any]] = {role: [] for role in SHAPES}
        try:
            for role in SHAPES:
                self.add(role, 2)
        except BaseException:
            self.kill()
            raise

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self, role: str, count: int = 1) -> None:
        """In the main thread only: a node takes signal handlers."""
        self.of[role] += [self._cluster.add_node(**SHAPES[role]) for _ in range(count)]

    def workers(self, role: str, title: str) -> list[psutil.Process]:
        """Processes of Ray workers on the role's nodes whose title holds `title`."""
        found = []
        for node in self.of[role]:
            for process in _raylet(node).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if title in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def lose(self, role: str) -> None:
        """All processes of the oldest node at once, as when its power goes."""
        node = self.of[role].pop(0)
        _kill_all_of(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, role: str, seconds: float) -> None:
        """What `ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION` does, to the oldest node."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + seconds) * 1000)
        gcs = GcsClient(address=self.address)
        assert gcs.drain_node(self.of[role][0].node_id, reason, "spot", deadline_ms)[0]

    def kill(self) -> None:
        """SIGKILL every process of every node, the head's with its record of the cluster among them."""
        for node in self._cluster.list_all_nodes():
            _kill_all_of(node)
        self._cluster.shutdown()
        self.of = {role: [] for role in SHAPES}


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _kill_all_of(node: Any) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in _raylet(node).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    node.kill_all_processes(check_alive=False, allow_graceful=False)
