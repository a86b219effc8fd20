"""What killed commands spent stays counted: a capture with a teacher that takes seconds, killed and resumed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill_ray import cost
from distill_ray.config import load_recipe
from distill_ray.cost.usage import Usage
from distill_ray.storage import open_storage
from tests.assets import smollm2_folder
from tests.stages.jobs import Job, write_documents

pytestmark = pytest.mark.timeout(600)


def _usages(job: Job) -> list[Usage]:
    found, problems = cost.read_usage(open_storage(job.root), "runs/tiny/v1")
    assert problems == []
    return found


@pytest.mark.long
def test_a_killed_capture_and_the_one_that_resumes_it_are_summed(tmp_path: Path):
    write_documents(tmp_path / "data" / "a.jsonl", 0, 8)
    job = Job(tmp_path, str(tmp_path / "root"), teacher=smollm2_folder())
    process = job.start(command="capture")
    # Until a write tells of units: the first one tells of none.
    while process.poll() is None and not any(node.done for u in _usages(job) for node in u.nodes):
        time.sleep(0.05)
    assert process.kill_all() > 1, process.stderr
    (killed,) = _usages(job)
    assert (killed.stage, killed.epoch, killed.ended) == ("capture", 1, False)
    (lost,) = killed.nodes
    assert lost.node_type == "local"
    assert lost.start_s > 0
    assert lost.busy_s > 0
    stored = len(job.unit_objects())
    assert lost.done <= stored + 2, "two more are on their way from the teacher to the store"

    shown = job.run(command="status").stdout
    assert f"cost      capture {lost.seconds / 3600:.3g} CPU process hours" in shown
    assert "in 1 command(s)" in shown
    assert f"{stored} of " in shown

    job.run(command="capture")
    assert stored < len(job.unit_objects()), "the kill must fall among the units"
    first, second = _usages(job)
    assert first == killed
    assert (second.epoch, second.ended) == (2, True)
    assert second.nodes[0].done == len(job.unit_objects()) - stored
    (together,) = cost.by_stage([first, second])
    assert together.commands == 2
    assert together.on.seconds == pytest.approx(lost.seconds + second.nodes[0].seconds)
    assert together.on.processes == 2
    shown = job.run(command="status").stdout
    assert f"${together.on.seconds / 3600 * 2.0:,.2f} in 2 command(s)" in shown
    assert cost.hours_held(open_storage(job.root), load_recipe(job.recipe)) == 0


@pytest.mark.parametrize(
    ("market", "named"), [("on-demand", "h100"), pytest.param("spot", "h100/spot", marks=pytest.mark.long)]
)
def test_a_node_is_named_by_its_group_and_whether_it_is_spot(market: str, named: str):
    code = (
        "import os; os.environ['RAY_AUTH_MODE'] = 'disabled'\nimport ray\nfrom distill_ray.cost import node_type\n"
        f"labels = {{'ray.io/node-group': 'h100', 'ray.io/market-type': {market!r}}}\n"
        "ray.init(address='local', num_cpus=1, include_dashboard=False, labels=labels, log_to_driver=False)\n"
        "print('named', ray.get(ray.remote(node_type).remote()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert f"named {named}\n" in done.stdout, done.stderr
