"""Processes that make up a group under torch.distributed, each of them gone in one instant when its work is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch


def spawn(work: Callable[..., None], args: tuple[Any, ...], world: int) -> None:
    """`work(rank, *args)` in `world` processes, in which it must join a process group; raises what one of them does."""
    torch.multiprocessing.spawn(_work, args=(work, args), nprocs=world)


def _work(rank: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    work(rank, *args)
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end: DeepSpeed holds the group, so its threads outlive the group's end, and one that
    # then drops the last tensor of a collective asks a dying interpreter for its lock, which aborts the process
    # (pytorch/pytorch#179291, #190489).
    os._exit(0)
