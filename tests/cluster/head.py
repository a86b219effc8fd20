"""A real head node of its own with a dashboard and token authentication, as a cluster has it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.stages.jobs import Process

START_S = 240.0
_STARTS = 4


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str
    """Of its dashboard, `http://…`."""
    token: str
    folder: Path
    """Everything that Ray writes."""
    process: Process

    def get(self, page: str) -> Any:
        """What the dashboard answers. (Ray's own client takes its token once a process, and this one has used Ray.)"""
        return self._ask("GET", page).json()

    def put(self, page: str, data: bytes) -> None:
        """Sent to the dashboard, and taken."""
        self._ask("PUT", page, data)

    def _ask(self, method: str, page: str, data: bytes | None = None) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = requests.request(method, f"{self.address}{page}", headers=headers, data=data, timeout=30)
        answer.raise_for_status()
        return answer

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Everything that the cluster tells of each job, by submission id."""
        return {job["submission_id"]: job for job in self.get("/api/jobs/") if job["submission_id"]}

    def log(self, submission_id: str) -> str:
        """What the job's driver printed so far."""
        return self.get(f"/api/jobs/{submission_id}/logs")["logs"]

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that have joined."""
        return self.get("/api/v0/nodes")["data"]["result"]["result"]


@contextmanager
def head(cpus: int = 4) -> Iterator[Head]:
    """A head node; this process's environment holds its token, and what it started ends with it.

    Its nodes find this package only through a job: PYTHONPATH is not handed on.
    """
    token = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", token)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        found = _started(cpus, token)
        try:
            yield found
        finally:
            _end(found)


def _started(cpus: int, token: str) -> Head:
    """A head that came up. Ray gives its own processes 30 s for it, which a busy machine exceeds now and then."""
    said = ""
    for _ in range(_STARTS):
        found = _start(cpus, token)
        if _is_up(found):
            return found
        said = found.process.stderr
        _end(found)
    raise AssertionError(f"Ray did not start:\n{said}")


def _start(cpus: int, token: str) -> Head:
    # Ray's sockets lie in there, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="dr-", dir="/tmp"))
    names = ("dashboard", "port", "agent", "agent-grpc", "runtime-env", "metrics", "client", "object", "node")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    with pytest.MonkeyPatch.context() as of_nodes:
        of_nodes.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        of_nodes.delenv("PYTHONPATH", raising=False)
        process = Process(_command(cpus, folder, ports))
    return Head(f"http://127.0.0.1:{ports['dashboard']}", token, folder, process)


def _end(found: Head) -> None:
    found.process.kill_all()
    shutil.rmtree(found.folder, ignore_errors=True)


def _command(cpus: int, folder: Path, ports: dict[str, int]) -> list[str]:
    stated = {
        "--node-ip-address": "127.0.0.1",
        "--temp-dir": folder,
        "--num-cpus": cpus,
        "--port": ports["port"],
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": ports["dashboard"],
        "--dashboard-agent-listen-port": ports["agent"],
        "--dashboard-agent-grpc-port": ports["agent-grpc"],
        "--runtime-env-agent-port": ports["runtime-env"],
        "--metrics-export-port": ports["metrics"],
        "--ray-client-server-port": ports["client"],
        "--object-manager-port": ports["object"],
        "--node-manager-port": ports["node"],
        "--object-store-memory": 300_000_000,
    }
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"] + [
        f"{name}={value}" for name, value in stated.items()
    ]


def _is_up(found: Head) -> bool:
    """Wait until the dashboard answers and the node has joined; False where Ray ends before."""
    deadline = time.monotonic() + START_S
    while found.process.poll() is None and time.monotonic() < deadline:
        try:
            if found.nodes():
                return True
        except requests.RequestException:
            pass  # not yet
        time.sleep(0.3)
    return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
