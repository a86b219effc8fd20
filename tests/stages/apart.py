"""A function in a process of its own that has imported everything beforehand.

Threads of Ray's own may outlive `ray.shutdown()` in the core worker, and a later `ray.init()` then crashes the process
now and then (ray-project/ray#31145). So no process here connects to Ray twice: each command is forked from a server
that imported what is slow and never connected.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.stages.preloaded"])


def apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args, **kwargs)`, computed in a process of its own with this one's environment and folder.

    Args:
        function: at the top of a module; it, its arguments and its result or exception travel pickled.

    Raises:
        AssertionError: the process ended without an answer.
        Exception: what the function raised.
    """
    with forked(function, *args, **kwargs) as (process, answer):
        try:
            done, found = answer.recv()
        except EOFError:
            process.join(60)
            raise AssertionError(f"{function.__name__} ended its process with code {process.exitcode}") from None
        process.join(60)
    if not done:
        raise found
    assert process.exitcode == 0, f"{function.__name__} answered, then ended with code {process.exitcode}"
    return found


@contextmanager
def forked(function: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> Iterator[tuple[BaseProcess, Connection]]:
    """Such a process, and where its answer comes; SIGKILL ends it at the end of the block."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_answer, args=(theirs, dict(os.environ), os.getcwd(), function, args, kwargs))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


def _answer(
    pipe: Connection, environ: dict[str, str], folder: str, function: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    try:
        answer = True, function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - raised again by the caller
        answer = False, error
    pipe.send(answer)
    pipe.close()


def printing(out: Path, err: Path, function: Callable[[list[str]], int], argv: list[str]) -> int:
    """`function(argv)` with the process's standard output and error, native code's too, in two files."""
    sys.stdout.flush()
    sys.stderr.flush()
    for path, number in ((out, 1), (err, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
    try:
        return function(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
