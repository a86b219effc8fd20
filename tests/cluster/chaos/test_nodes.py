"""SIGKILL of processes, nodes, drivers and whole clusters, and drain notices, on real Ray nodes and a real S3 server.

SIGKILL of an engine's worker is in tests/stages/test_engine_death.py; a driver with all its cluster at random moments
in tests/stages/test_kill.py; elastic training in tests/stages/test_elastic.py.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.chaos.nodes import Nodes
from tests.cluster.chaos.outcome import assert_same_outcome, target_objects
from tests.stages.jobs import Job, Process

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

SEED = 20_261_128
UNIT_S = 2.0
NOTICE_S = 3.0
"""Of a teacher's node: in it two teachers do three units or four of the twelve."""
TRAIN_WORKER = "RayTrainWorker"


@pytest.fixture
def nodes(calm: Job, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    started = Nodes()
    yield started
    started.kill()


@dataclass
class Driven:
    """A job and its driver on a cluster that is about to be hurt."""

    job: Job
    nodes: Nodes
    units: int

    def start(self) -> Process:
        arguments = [str(self.job.recipe), self.nodes.address, str(self.job.folder), str(UNIT_S)]
        self.driver = Process([sys.executable, "-m", "tests.cluster.chaos.slowly", *arguments])
        return self.driver

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 240
        while not ready():
            assert self.driver.poll() is None, f"ended before {what}:\n{self.driver.stderr}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.driver.stderr}"
            time.sleep(0.05)

    def at_a_unit(self, rng: random.Random) -> int:
        """Waits until some of the units are stored; returns how many were waited for."""
        wanted = rng.randrange(2, self.units - 4)
        self.wait(lambda: len(target_objects(self.job)) >= wanted, f"{wanted} units")
        assert len(target_objects(self.job)) < self.units, "the blow must fall among the units"
        return wanted

    def at_a_checkpoint(self) -> None:
        self.wait(lambda: any(n.startswith("checkpoint/") for n in self.job.published()), "a checkpoint")
        assert "student" not in self.job.published(), "the blow must fall among the steps"

    def teachers(self) -> list[int]:
        """Processes that opened an engine, in order."""
        return [int(line) for line in (self.job.folder / "teachers").read_text().split()]

    def finish(self, timeout: float = 400) -> None:
        assert self.driver.wait(timeout) == 0, self.driver.stderr


@pytest.fixture
def driven(nodes: Nodes, calm: Job, s3_uri: str, tmp_path: Path) -> Driven:
    pool = {"[capture]": "replicas = { min = 2, max = 2 }\n[capture]"}
    job = Job(tmp_path, s3_uri, epochs=calm.epochs, edits=pool)
    return Driven(job, nodes, len(target_objects(calm)))


def kill_teacher(driven: Driven) -> None:
    os.kill(driven.teachers()[-1], signal.SIGKILL)


def lose_teacher_node(driven: Driven) -> None:
    driven.nodes.lose("teacher")


def lose_all_teacher_nodes(driven: Driven) -> None:
    for _ in range(2):
        driven.nodes.lose("teacher")
    driven.nodes.add("teacher", 2)


def drain_teacher_node(driven: Driven) -> None:
    driven.nodes.drain("teacher", NOTICE_S)
    time.sleep(NOTICE_S)
    driven.nodes.lose("teacher")


@pytest.mark.parametrize("blow", [kill_teacher, lose_teacher_node, lose_all_teacher_nodes, drain_teacher_node])
def test_a_blow_to_the_teachers_costs_no_row(blow: Callable[[Driven], None], driven: Driven, calm: Job) -> None:
    rng = random.Random(f"{SEED} {blow.__name__}")
    driven.start()
    at = driven.at_a_unit(rng)
    blow(driven)
    stored = len(target_objects(driven.job))
    driven.finish()
    print(f"\n{blow.__name__} after {at} of {driven.units} units; teachers opened: {len(driven.teachers())}")
    assert stored < driven.units, "the blow came too late"
    assert_same_outcome(driven.job, calm)


def kill_train_worker(driven: Driven) -> None:
    workers = driven.nodes.workers("student", TRAIN_WORKER)
    assert len(workers) == 2
    workers[0].kill()


def lose_train_node(driven: Driven) -> None:
    driven.nodes.lose("student")
    driven.nodes.add("student")


def drain_train_node(driven: Driven) -> None:
    driven.nodes.drain("student", 8.0)
    driven.nodes.add("student")


@pytest.mark.parametrize("blow", [kill_train_worker, lose_train_node, drain_train_node])
def test_a_blow_to_the_training_ends_at_the_same_losses(
    blow: Callable[[Driven], None], driven: Driven, calm: Job
) -> None:
    driven.start()
    driven.at_a_checkpoint()
    blow(driven)
    driven.finish()
    assert_same_outcome(driven.job, calm)


@pytest.mark.parametrize("stage", ["capture", "train"])
def test_a_driver_killed_on_a_cluster_that_lives_on(stage: str, driven: Driven, calm: Job) -> None:
    rng = random.Random(f"{SEED} driver {stage}")
    driver = driven.start()
    driven.at_a_unit(rng) if stage == "capture" else driven.at_a_checkpoint()
    driver.signal(signal.SIGKILL)
    driven.start()  # at once: what the dead one left on the cluster may still be working
    driven.finish()
    assert_same_outcome(driven.job, calm)


def test_a_whole_cluster_is_lost_and_a_new_one_goes_on_from_storage_alone(driven: Driven, calm: Job) -> None:
    rng = random.Random(f"{SEED} cluster")
    for moment in (lambda: driven.at_a_unit(rng), driven.at_a_checkpoint):
        driver = driven.start()
        moment()
        driver.signal(signal.SIGKILL)
        driven.nodes.kill()
        driven.nodes.__init__()
    driven.start()
    driven.finish()
    assert_same_outcome(driven.job, calm)
