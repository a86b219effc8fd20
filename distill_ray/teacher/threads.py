"""Rows of a tile spread over the cores that torch computes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch


def by_rows(n_rows: int, work: Callable[[int, int], None]) -> None:
    """Do `work(begin, end)` for parts of the rows, on as many threads as torch takes."""
    threads = torch.get_num_threads()
    if threads == 1 or n_rows < 2 * threads:
        work(0, n_rows)
    else:
        bounds = np.linspace(0, n_rows, 4 * threads + 1).astype(int).tolist()
        list(_pool(threads).map(work, bounds[:-1], bounds[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads on the cores of torch's own: a thread of Python would inherit the main thread's, which vLLM binds."""
    allowed = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    bound = set().union(*(cores for cores in allowed if len(cores) == 1))
    own = bound if len(bound) == threads else set().union(*allowed)
    return ThreadPoolExecutor(threads, "reduce", lambda: os.sched_setaffinity(0, own))
