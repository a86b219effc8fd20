"""Timing and memory, the same way for every bench."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LEAST_REPEATS = 5


def medians(rivals: Mapping[str, Callable[[], Any]], repeats: int = LEAST_REPEATS) -> dict[str, float]:
    """Median seconds of each rival, taken in turns, so that a busy machine slows all of them alike.

    Args:
        rivals: name → work; each runs once more beforehand, which is not counted.
        repeats: timed rounds, at least 5.
    """
    if repeats < LEAST_REPEATS:
        raise ValueError(f"{repeats} repeats; a median here takes at least {LEAST_REPEATS}")
    for work in rivals.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for round_ in range(repeats):
        # What ran before weighs on a work, so it does not always come after the same one.
        for name, work in list(rivals.items())[:: -1 if round_ % 2 else 1]:
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def peak_mib(work: Callable[..., Any], *arguments: Any) -> float:
    """Most resident MiB of a fresh process that does nothing but `work(*arguments)`, imports included; see `apart`."""
    return apart(work, *arguments)[1]


def apart(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `work(*arguments)` returns in a fresh process that does nothing else, and that process's peak MiB.

    Args:
        work: a function of an importable module.
        arguments: picklable, as is what it returns.

    Raises:
        RuntimeError: the process failed; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(its, work, arguments))
    process.start()
    its.close()
    try:
        return mine.recv()
    except EOFError:
        raise RuntimeError(f"{work.__qualname__} failed in its own process; see its traceback above") from None
    finally:
        process.join()


def _report_peak(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    result = work(*arguments)
    pipe.send((result, resident_mib()[1]))


def resident_mib(process: int | str = "self") -> tuple[float, float]:
    """MiB that a process holds, and the most it ever held."""
    # Not getrusage: its ru_maxrss starts from what the parent held when it forked, and survives exec.
    status = Path(f"/proc/{process}/status").read_text()
    now, most = (int(status.split(name)[1].split()[0]) / 1024 for name in ("VmRSS:", "VmHWM:"))
    return now, most
