"""A private Ray cluster in a process of its own, which ends with its standard input: `python -m tests.stages.cluster`.

Starting Ray and its helper actors takes some ten seconds of two cores; the stage tests of one session share a cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from distill_ray.config import Recipe
from distill_ray.preflight import Finding
from distill_ray.preflight.hardware import hardware
from distill_ray.session import cluster_address, ray_session

CPUS = 4


def counted(recipe: Recipe, address: str | None) -> Finding:
    """What `check` finds of the hardware at an address, by itself."""
    where = cluster_address(address)
    with ray_session(where) if where else nullcontext():
        return hardware(recipe, where)


@contextmanager
def private_cluster() -> Iterator[str]:
    """The address of a cluster with `CPUS` CPUs."""
    command = [sys.executable, "-m", "tests.stages.cluster"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address, "Ray did not start"
            yield address
        finally:
            process.stdin.close()
            process.wait(120)


def main() -> None:
    """Start Ray, print its address, and wait."""
    import ray

    sys.stdout, terminal = sys.stderr, sys.stdout  # Ray prints where the address goes
    with ray_session("local", num_cpus=CPUS):
        print(ray.get_runtime_context().gcs_address, file=terminal, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"
    main()
