"""Functions as machine code, compiled when their module is first imported, or loaded from numba's cache on disk.

Modules that use this are imported at first use, never by the command line: numba alone takes most of a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba

_log = logging.getLogger(__name__)


def compiled(signature: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: compile for exactly one signature, without Python objects and without the GIL.

    One signature a function, and every constant from its own file or passed in: numba numbers a function's overloads in
    one index, which processes may overwrite for each other, and it recompiles only when that one file has changed.
    What it calls must be `njit(forceinline=True)`: a call left as one reaches the callee's own code where they are
    compiled, and the copy linked to the caller where they are loaded; their sums may differ in the last bit.
    Where the cache can be neither read nor written (read-only package and home, full disk, damaged file), the function
    is compiled in memory, some seconds a process. NUMBA_CACHE_DIR names another folder.

    Args:
        signature: numba types of the arguments.
    """

    def compile_it(function: Callable[..., Any]) -> Callable[..., Any]:
        with _one_process_a_host():
            try:
                return numba.njit(signature, nogil=True, error_model="numpy", cache=True)(function)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
                _log.warning("no compiler cache for %s (%s); set NUMBA_CACHE_DIR", function.__qualname__, error)
        return numba.njit(signature, nogil=True, error_model="numpy")(function)

    return compile_it


@contextlib.contextmanager
def _one_process_a_host() -> Iterator[None]:
    """All workers of a node start at once; one compiles, the others wait and load what it made."""
    path = Path(tempfile.gettempdir()) / f"distill-ray-compiler-{os.getuid()}.lock"
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:  # the lock saves work only
            yield
            return
        stack.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
