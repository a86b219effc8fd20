"""Which process holds a lease, and whether it can be known to be dead."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

_ENDED = ("Z", "X")
"""States of a process that waits for its parent alone."""


@dataclass(frozen=True)
class Owner:
    """A driver process, told apart from every other one that was or will be."""

    id: str
    """Random; two leases of one process differ."""
    host: str
    pid: int
    boot_id: str
    """The kernel's; shared by all containers of a machine, new after a reboot. Empty where there is none."""
    pid_namespace: str
    """What `pid` is counted in. Empty where there is none."""
    started: str
    """Start of the process in clock ticks since boot: a number of another process that took over the same pid. Empty
    where /proc does not tell."""

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"


def this_process() -> Owner:
    """A new identity for this process."""
    pid = os.getpid()
    return Owner(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=pid,
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        started=_start_of(pid) or "",
    )


def is_dead(owner: Owner) -> bool:
    """True only where it can be known: same boot, same pid namespace, and that process is gone."""
    if not owner.boot_id or not owner.pid_namespace:
        return False
    if (owner.boot_id, owner.pid_namespace) != (_boot_id(), _pid_namespace()):
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, and alive
    started = _start_of(owner.pid)
    if started is None or not owner.started:
        return False  # a /proc mounted with hidepid hides the processes of others
    return started in _ENDED or started != owner.started


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux: expiry alone decides
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, its state where it has ended; None: it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name is in parentheses and may hold spaces and parentheses itself.
    fields = text.rpartition(")")[2].split()
    return fields[0] if fields[0] in _ENDED else fields[19]
