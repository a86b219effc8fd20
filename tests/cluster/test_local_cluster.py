"""`make cluster-up` and `make cluster-down`: nodes with roles and declared GPUs; no other process is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state

from cluster import local_cluster
from tests.cluster.simulated import recipe
from tests.stages.apart import apart
from tests.stages.cluster import counted

pytestmark = pytest.mark.cluster

REPO = Path(local_cluster.__file__).parent.parent


def _command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "cluster" / "local_cluster.py"), *arguments, "--folder", str(folder)]
    environ = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, check=False)


def _nodes(address: str) -> list[tuple[str, float]]:
    found = get_cluster_resource_state(GcsClient(address)).node_states
    return sorted((node.labels.get("distill-ray/role", ""), node.total_resources.get("GPU", 0.0)) for node in found)


def _runs(pid: int, since: float) -> bool:
    """A process that has ended keeps its id until whatever adopted it takes note, and init may be slow at that."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == since and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_up_gives_labelled_nodes_and_down_ends_its_own_processes_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with subprocess.Popen(["sleep", "600"]) as bystander:
        try:
            up = _command(tmp_path, "up", "--teachers", "1", "--dashboard-port", "0")
            assert up.returncode == 0, up.stderr
            state = json.loads((tmp_path / "cluster.json").read_text())
            assert f"distill-ray run    my.toml --address {state['address']}" in up.stdout
            assert "export RAY_AUTH_MODE=disabled" in up.stdout
            assert _nodes(state["address"]) == [("", 0.0), ("student", 8.0), ("teacher", 8.0)]
            fact = apart(counted, recipe(str(tmp_path / "root"), tmp_path, 4096), state["address"]).fact
            assert fact.startswith("16 GPU(s) and 12 CPU(s) on 3 node(s)")
            assert "autoscaler" not in fact
            again = _command(tmp_path, "up")
            assert again.returncode != 0
            assert "a cluster is up" in again.stderr
            down = _command(tmp_path, "down")
            assert down.returncode == 0, down.stderr
            assert bystander.poll() is None
        finally:
            bystander.kill()  # else the block waits for its end
            _command(tmp_path, "down")
    assert not [pid for pid, since in state["processes"] if _runs(pid, since)]
    assert not Path(state["temp"]).exists()
    assert _command(tmp_path, "down").returncode != 0
