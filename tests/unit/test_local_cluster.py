"""The local cluster's autoscaler configuration, by Ray's own schema, and which processes are taken for its own."""

from __future__ import annotations

import subprocess
import time

import psutil
from ray.autoscaler._private.util import validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from cluster.local_cluster import MARK, ROLE_LABEL, Shape, Started, _processes, autoscaler_config
from distill_ray.config import cluster


def test_rays_autoscaler_takes_the_configuration():
    found = autoscaler_config(Shape(teachers=3, students=1, idle_s=30), "127.0.0.1:6379")
    validate_config(found)
    types = AutoscalingConfig(found, skip_content_hash=True).get_node_type_configs()
    assert {name: t.labels for name, t in types.items() if t.labels} == {
        "teacher": {cluster.ROLE_LABEL: cluster.TEACHER_ROLE},
        "student": {cluster.ROLE_LABEL: cluster.STUDENT_ROLE},
    }
    assert (types["teacher"].max_worker_nodes, types["teacher"].resources["GPU"]) == (3, 8)
    assert ROLE_LABEL == cluster.ROLE_LABEL


def _started(*processes: tuple[int, float]) -> Started:
    return Started("127.0.0.1:1", "mark-of-this-test", "/nowhere", processes, "disabled", None)


def test_a_recorded_id_that_another_process_has_by_now_is_left_alone():
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(["sleep", "60"]) as ours:
        created = psutil.Process(ours.pid).create_time()
        recorded = (other.pid, created - 1000), (ours.pid, created)
        assert [p.pid for p in _processes(_started(*recorded))] == [ours.pid]
        for process in (other, ours):
            process.kill()


def test_a_process_born_later_is_known_by_its_mark():
    environ = {MARK: "mark-of-this-test", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"], env=environ) as parent:
        deadline = time.monotonic() + 120
        while len(list(_processes(_started()))) < 2:
            assert time.monotonic() < deadline, "the child is not found"
            time.sleep(0.05)
        for process in list(_processes(_started())):
            process.kill()
        assert parent.wait(120) != 0
