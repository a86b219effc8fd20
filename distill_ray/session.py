"""Connecting to Ray: a private cluster on this machine, or one that is already there."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distill_ray.config import Recipe
from distill_ray.errors import UserError

# Workers never ask a model hub or a statistics server for anything.
_WORKER_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}


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
            running cluster's address (`auto`, `ray://host:10001`).
        num_cpus: logical CPUs of the private cluster (`private_cpus`).

    Raises:
        UserError: no cluster answers at the address.
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


def on_this_node() -> dict[str, Any]:
    """Options of an actor that does a driver's waiting beside it. Ray is connected."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _connect(where: str | None, num_cpus: int | None) -> None:
    import ray

    env = {"runtime_env": {"env_vars": _WORKER_ENV}, "log_to_driver": False, "logging_level": logging.CRITICAL}
    if where is None:
        cpus = num_cpus or max(4, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **env)
    else:
        try:
            ray.init(address=where, **env)
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
