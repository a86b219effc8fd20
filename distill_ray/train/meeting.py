"""Ranks that wait for each other longer than a collective may last."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")
_MEET_S = 60.0


def patiently(act: Callable[[], T]) -> list[T]:
    """Every rank acts, in a thread of its own, and gets what all of them answer. A collective.

    Hundreds of gigabytes take longer to move than a process group lets a rank wait in a collective (Ray Train: half an
    hour), so the ranks meet again and again until all are done.
    """
    import torch.distributed as dist

    done = [False] * dist.get_world_size()
    with ThreadPoolExecutor(1, "patient") as pool:
        mine = pool.submit(act)
        while not all(done):
            wait([mine], timeout=_MEET_S)
            dist.all_gather_object(done, mine.done())
    answers: list[Any] = [None] * len(done)
    dist.all_gather_object(answers, mine.result())
    return answers
