"""Connecting to Ray: a private cluster on this machine, or one that is already there."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distill_ray.config import Recipe
from distill_ray.errors import DistillError, UserError

SAY_FULL_S = 10.0
"""After so long without room for it, a stage says what it waits for."""
_SOCKET_BYTES = 107
"""Most bytes of the path of a Unix socket on Linux."""


def cluster_address(address: str | None) -> str | None:
    """Of the running cluster that a command uses: what it was given, else RAY_ADDRESS; None for a private one."""
    found = address or os.environ.get("RAY_ADDRESS") or "local"
    return None if found == "local" else found


def private_cpus(recipe: Recipe) -> int:
    """Logical CPUs of a private cluster on which every stage of the recipe can be placed.

    At least 4, since tasks are many and small, and as many as the machine has; each training worker and each teacher
    without a GPU asks for one or less. More than the machine has only means that they share.
    """
    teachers = 0 if recipe.teacher.use_gpu else recipe.teacher.replicas.max
    return max(4, os.cpu_count() or 1, recipe.train.workers.max + teachers)


@contextmanager
def ray_session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Connect to Ray and disconnect at the end.

    Args:
        address: `local` or None without RAY_ADDRESS starts a private cluster that dies with this process; else a
            running cluster's address (`auto`, `host:6379`).
        num_cpus: logical CPUs of the private cluster (`private_cpus`).

    Raises:
        UserError: no cluster answers at the address.
        DistillError: the machine is too busy to start a private one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without a mode, Ray 2.60 turns token auth on for a private cluster and leaves a token in the home folder.
    where = cluster_address(address)
    if where is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Ray's own processes print warnings of theirs on our terminal; what matters arrives as an exception.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # ray.init() takes SIGTERM for itself, and an eviction would then no longer stop the run cleanly.
    with _own_sigterm():
        _connect(where, num_cpus)
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def free_resources(selector: Mapping[str, str] | None = None) -> dict[str, dict[str, float]]:
    """Resources free on each live node, by node id. Ray is connected.

    Args:
        selector: labels and their values, of which a node must have all; no other form of Ray's selectors.
    """
    from ray._private import state

    free = state.available_resources_per_node()
    return {node["NodeID"]: free.get(node["NodeID"], {}) for node in live_nodes(selector)}


def live_nodes(selector: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Ray's account of each live node that has these labels. Ray is connected."""
    import ray

    wanted = (selector or {}).items()
    return [node for node in ray.nodes() if node["Alive"] and wanted <= node["Labels"].items()]


def is_autoscaled() -> bool:
    """Whether an autoscaler (v2) works on the cluster and may add nodes. Ray is connected.

    KubeRay and `ray up` name the type of each node; an autoscaler without node types, as every head has, only watches.
    """
    import ray
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # pyright: ignore[reportAttributeAccessIssue]

    found = GetClusterStatusReply.FromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status())
    # What the nodes' own state says of the version last seen stays 0.
    typed = any(node.ray_node_type_name for node in found.cluster_resource_state.node_states)
    return typed and found.autoscaling_state.autoscaler_state_version > 0


def describe_room(needed: Mapping[str, float], selector: Mapping[str, str] | None = None) -> str:
    """Needed, present and free resources in one clause. Ray is connected."""
    nodes, free = live_nodes(selector), free_resources(selector).values()

    def has(name: str) -> str:
        total = sum(node["Resources"].get(name, 0) for node in nodes)
        return f"{total:g} {name} ({sum(node.get(name, 0) for node in free):g} free)"

    wanted = " and ".join(f"{n:g} {name}" for name, n in needed.items())
    where = "".join(f" on {len(nodes)} node(s) labelled {k}={v}" for k, v in (selector or {}).items())
    return f"needs {wanted}; the cluster has {' and '.join(map(has, needed))}{where}"


def note_full(
    what: str,
    needed: Mapping[str, float],
    note: Callable[[str], None],
    stop: threading.Event,
    selector: Mapping[str, str] | None = None,
) -> None:
    """Say so where the cluster has had no room for some seconds: Ray by itself would wait silently, for ever.

    Args:
        what: the thing that is about to be started.
        needed: its Ray resources; its GPUs must be free on one node.
        note: takes the sentence.
        stop: ends the wait when set.
        selector: labels that its node must have.
    """
    since = time.monotonic()
    while not has_room(needed, selector):
        if time.monotonic() - since > SAY_FULL_S:
            note(f"waiting for resources: {what} {describe_room(needed, selector)}")
            return
        if stop.wait(0.2):
            return


def has_room(needed: Mapping[str, float], selector: Mapping[str, str] | None = None) -> bool:
    """Whether nodes with these labels have so much free now, one of them all of the GPUs. Ray is connected."""
    free = free_resources(selector).values()
    if any(sum(node.get(name, 0) for node in free) < n for name, n in needed.items()):
        return False
    gpus = needed.get("GPU", 0)
    return gpus <= 1 or any(node.get("GPU", 0) >= gpus for node in free)


def is_death(error: BaseException) -> bool:
    """Whether Ray lost a process or its node, and not an error that was raised inside one."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    # What Ray's memory monitor kills, actor or task, ends with an OutOfMemoryError, which is a class of its own. An
    # actor whose constructor raised counts as dead to Ray.
    if isinstance(error, RayActorError):
        return not error.actor_init_failed
    return isinstance(error, OutOfMemoryError | WorkerCrashedError | NodeDiedError)


def died(what: str, error: BaseException) -> DistillError:
    """What to tell the user of a process of ours that Ray lost.

    Args:
        what: a clause that names it.
        error: as Ray raised it.
    """
    # Ray's account of an out-of-memory kill goes on with pages of its object store's counters.
    account = str(error).partition("Object store memory usage")[0]
    return DistillError(
        f"{what}. Usual causes: out of memory, or a failure whose traceback lies in the log of that process on its "
        "node, under /tmp/ray/session_latest/logs. What is finished is kept, the same command goes on from there. "
        "Ray says: " + " ".join(account.split())
    )


def on_this_node() -> dict[str, Any]:
    """Options of an actor that does a driver's waiting beside it. Ray is connected."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
    # Settings of Ray Data and Ray Train that the user gave to the command are read where these run.
    env = {name: value for name, value in os.environ.items() if name.startswith(("RAY_DATA_", "RAY_TRAIN_"))}
    return options | ({"runtime_env": {"env_vars": env}} if env else {})


def check_temporary_folder() -> None:
    """Raises UserError where the sockets of a private cluster would have paths too long for the system."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
    folder = os.environ.get(name, "/tmp")
    longest = f"{folder}/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    if (size := len(os.fsencode(longest))) > _SOCKET_BYTES:
        raise UserError(
            f"{name}={folder} is too long: Ray's sockets below it would have paths of {size} bytes, and "
            f"{_SOCKET_BYTES} is the most; set {name} to a shorter folder"
        )


def _connect(where: str | None, num_cpus: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if where is None:
        check_temporary_folder()
        cpus = num_cpus or max(4, os.cpu_count() or 1)
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        except Exception as error:
            # Ray raises nothing more exact, and its limit cannot be set.
            if "timed out during startup" not in str(error):
                raise
            raise DistillError(
                f"Ray did not start on this machine within its 30 s (load {os.getloadavg()[0]:.0f} on {os.cpu_count()} "
                "CPUs); run the same command again when less else runs here"
            ) from error
    elif where.startswith("ray://"):
        raise UserError(
            f"{where}: through Ray's client the stages cannot stream their results; run the command on a node of the "
            "cluster with --address auto, or submit it as a job there"
        )
    else:
        try:
            ray.init(address=where, **quiet)
        except (ConnectionError, ValueError, TimeoutError) as error:
            raise UserError(f"no Ray cluster answers at {where}: {error}; start one, or leave --address out") from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
