"""A Ray cluster of several nodes on this one machine, with GPUs that are declared and not there.

    python cluster/local_cluster.py up                 # a head without GPUs, two teacher nodes, one student node
    python cluster/local_cluster.py up --autoscale     # the head alone; Ray's autoscaler adds and removes nodes
    python cluster/local_cluster.py down

Every node is a raylet of its own with its own workers. Teacher nodes carry the label `distill-ray/role=teacher`,
student nodes `distill-ray/role=student`, as `[cluster] pin_by_label` wants them. A process that asks for such a GPU is
given a number and no device, so teachers and training workers need `use_gpu = false`, or an engine that uses none.

`down` ends exactly the processes that `up` started, and theirs: they are known by process id and start time, and by a
mark in their environment. It never calls `ray stop`, which would end every Ray process on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROLE_LABEL = "distill-ray/role"
MARK = "DISTILL_RAY_LOCAL_CLUSTER"
HEAD_ID = "f" * 51 + "00000"
"""The autoscaler finds its own head by this id."""
STORE_BYTES = 400 * 2**20
"""Object store of each node."""
_TERM_S = 15.0


@dataclass(frozen=True)
class Shape:
    """What there is."""

    teachers: int = 2
    """Teacher nodes; with `autoscale` the most there may be."""
    students: int = 1
    """Student nodes; with `autoscale` the most there may be."""
    gpus: int = 8
    """Declared GPUs of each of them."""
    cpus: int = 4
    """CPUs of each of them, declared too."""
    head_cpus: int = 4
    autoscale: bool = False
    idle_s: float = 20.0
    """Seconds after which an idle node of the autoscaler goes away."""
    dashboard_port: int | None = None
    """With one, jobs can be submitted there."""


@dataclass(frozen=True)
class Started:
    """What `up` leaves in its folder."""

    address: str
    mark: str
    temp: str
    processes: tuple[tuple[int, float], ...]
    """Process ids and start times."""
    auth: str
    dashboard: str | None


def up(folder: Path, shape: Shape, env: dict[str, str] | None = None) -> Started:
    """Start the cluster; its address is usable when this returns.

    Args:
        folder: where its state is kept, for `down`.
        shape: its nodes.
        env: more environment for all of its processes.

    Raises:
        SystemExit: a cluster of this folder is up, or Ray could not be started; nothing is left running.
    """
    state = folder / "cluster.json"
    if state.exists() and _alive(_read(folder)):
        raise SystemExit(f"a cluster is up at {_read(folder).address}: end it first (make cluster-down)")
    folder.mkdir(parents=True, exist_ok=True)
    mark, port = secrets.token_hex(8), _free_port()
    # Unix sockets lie below it, whose paths have to be short; and a folder of its own leaves other clusters' alone.
    temp = f"/tmp/dr-{mark}"
    environ = {**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"), **(env or {}), MARK: mark}
    address = f"{_own_ip()}:{port}"
    dashboard = None if shape.dashboard_port is None else f"http://127.0.0.1:{shape.dashboard_port}"
    started = Started(address, mark, temp, (), environ["RAY_AUTH_MODE"], dashboard)
    try:
        _start_head(shape, folder, port, temp, environ, address)
        if not shape.autoscale:
            for role, count in (("teacher", shape.teachers), ("student", shape.students)):
                for _ in range(count):
                    _start_node(role, shape, address, environ)
    except BaseException:
        _end(started)
        raise
    processes = tuple((p.pid, p.create_time()) for p in _processes(started))
    started = Started(**{**asdict(started), "processes": processes})
    state.write_text(json.dumps(asdict(started), indent=1))
    return started


def down(folder: Path) -> int:
    """End the cluster of a folder and remove what Ray wrote; returns how many processes were ended.

    Raises:
        SystemExit: none is known there, or a process of it would not end.
    """
    if not (folder / "cluster.json").exists():
        raise SystemExit(f"no cluster is known in {folder}: nothing to end")
    count = _end(_read(folder))
    (folder / "cluster.json").unlink()
    return count


@contextmanager
def running(folder: Path, shape: Shape, env: dict[str, str] | None = None) -> Iterator[Started]:
    """A cluster for the time of a block."""
    started = up(folder, shape, env)
    try:
        yield started
    finally:
        down(folder)


def _start_head(shape: Shape, folder: Path, port: int, temp: str, environ: dict[str, str], address: str) -> None:
    arguments = ["--head", f"--port={port}", f"--num-cpus={shape.head_cpus}", "--num-gpus=0", f"--temp-dir={temp}"]
    arguments.append(f"--ray-client-server-port={_free_port()}")
    if shape.dashboard_port is None:
        arguments.append("--include-dashboard=false")
    else:
        arguments += ["--include-dashboard=true", f"--dashboard-port={shape.dashboard_port}"]
    if shape.autoscale:
        config = folder / "autoscaler.json"
        config.write_text(json.dumps(autoscaler_config(shape, address), indent=1))
        arguments.append(f"--autoscaling-config={config.resolve()}")
        environ = environ | {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_NODE_TYPE_NAME": "ray.head.default",
        }
    _ray_start(arguments, environ)


def _start_node(role: str, shape: Shape, address: str, environ: dict[str, str]) -> None:
    labels = f"--labels={ROLE_LABEL}={role}"
    _ray_start([f"--address={address}", f"--num-cpus={shape.cpus}", f"--num-gpus={shape.gpus}", labels], environ)


def _ray_start(arguments: list[str], environ: dict[str, str]) -> None:
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
    command = [*ray, f"--object-store-memory={STORE_BYTES}", *arguments]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"ray start failed ({found.returncode}):\n{found.stdout}{found.stderr}")


def autoscaler_config(shape: Shape, address: str) -> dict[str, Any]:
    """What Ray's autoscaler (v2) reads: node types by role, none of them to begin with."""
    node = {"resources": {"CPU": shape.cpus, "GPU": shape.gpus, "object_store_memory": STORE_BYTES}, "node_config": {}}
    types = {
        role: {**node, "labels": {ROLE_LABEL: role}, "min_workers": 0, "max_workers": most}
        for role, most in (("teacher", shape.teachers), ("student", shape.students))
    }
    head = {"resources": {"CPU": shape.head_cpus}, "node_config": {}, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "local",
        "max_workers": shape.teachers + shape.students,
        "idle_timeout_minutes": shape.idle_s / 60,
        "upscaling_speed": 100.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": address,
        },
        "available_node_types": {"ray.head.default": head, **types},
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }


def _end(started: Started) -> int:
    """End every process of the cluster; new ones too, which it may start meanwhile."""
    ended: set[int] = set()
    deadline = time.monotonic() + _TERM_S
    while found := list(_processes(started)):
        late = time.monotonic() > deadline
        for process in found:
            # At first only the roots, and gently: a raylet ends its own workers.
            if late or process.pid not in ended:
                _signal(process, late)
            ended.add(process.pid)
        psutil.wait_procs(found, 0.5)
        if time.monotonic() > deadline + _TERM_S:
            raise SystemExit(f"processes {sorted(p.pid for p in found)} of the cluster would not end")
    shutil.rmtree(started.temp, ignore_errors=True)
    return len(ended)


def _signal(process: psutil.Process, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return


def _processes(started: Started) -> Iterator[psutil.Process]:
    """Live processes of the cluster: the recorded ones, those with its mark, and all that descend from either."""
    recorded, seen = dict(started.processes), set[int]()
    for process in psutil.process_iter():
        try:
            ours = recorded.get(process.pid) == process.create_time() or _has_mark(process, started.mark)
            tree = [process, *process.children(recursive=True)] if ours and process.pid not in seen else []
        except psutil.NoSuchProcess:
            continue
        for each in tree:
            if each.pid not in seen and _is_running(each):
                seen.add(each.pid)
                yield each


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == mark
    except (psutil.AccessDenied, psutil.ZombieProcess, OSError):
        return False


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _alive(started: Started) -> bool:
    return any(True for _ in _processes(started))


def _read(folder: Path) -> Started:
    found = json.loads((folder / "cluster.json").read_text())
    return Started(**{**found, "processes": tuple((pid, at) for pid, at in found["processes"])})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _own_ip() -> str:
    import ray

    return ray.util.get_node_ip_address()


def _tell(started: Started, shape: Shape) -> None:
    nodes = f"a head and {shape.teachers} teacher and {shape.students} student node(s) of {shape.gpus} declared GPUs"
    if shape.autoscale:
        nodes = f"a head; up to {shape.teachers} teacher and {shape.students} student nodes come when asked for"
    print(f"up: {nodes}\n\n  export RAY_AUTH_MODE={started.auth}")
    print(f"  distill-ray check  my.toml --address {started.address}")
    print(f"  distill-ray run    my.toml --address {started.address}")
    if started.dashboard is not None:
        print(f"  distill-ray submit my.toml --address {started.dashboard}")
    print(
        "\n`[cluster] pin_by_label = true` in the recipe keeps each role to its nodes. It ends with: make cluster-down"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("up", "down"))
    parser.add_argument("--folder", type=Path, default=Path(".cluster"), help="where the state is kept")
    parser.add_argument("--teachers", type=int, default=Shape.teachers, help="teacher nodes (default: 2)")
    parser.add_argument("--students", type=int, default=Shape.students, help="student nodes (default: 1)")
    parser.add_argument("--gpus", type=int, default=Shape.gpus, help="declared GPUs of a node (default: 8)")
    parser.add_argument("--autoscale", action="store_true", help="nodes come and go, up to those numbers")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="for `submit`; 0: no dashboard")
    given = parser.parse_args()
    if given.command == "down":
        print(f"down: {down(given.folder)} processes ended")
        return
    shape = Shape(
        given.teachers,
        given.students,
        given.gpus,
        autoscale=given.autoscale,
        dashboard_port=given.dashboard_port or None,
    )
    _tell(up(given.folder, shape), shape)


if __name__ == "__main__":
    main()
