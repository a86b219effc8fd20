"""Kill anywhere: SIGKILL the driver and all its processes at random instants of every stage, then run it again."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.stages.jobs import Job

pytestmark = [pytest.mark.kill, pytest.mark.timeout(1500)]

STAGES = ("capture", "train", "evaluate", "export")
PLAN = {  # seed → the stages in which one run is killed, in order
    11: ("capture", "capture", "train", "train", "evaluate", "export"),
    12: ("capture", "train", "train", "train", "evaluate", "export"),
}


def started(stage: str) -> str:
    return f'"stage": "{stage}", "event": "start"'


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("calm")
    job = Job(folder, str(folder / "root"))
    job.run()
    return job


@pytest.mark.parametrize("seed", PLAN)
def test_a_run_killed_in_every_stage_ends_as_the_calm_one(seed: int, calm: Job, tmp_path: Path):
    rng = random.Random(seed)
    seconds = {s: e["seconds"] for s, e in ((s, calm.published()[f"timings/{s}"]) for s in STAGES)}
    job = Job(tmp_path, str(tmp_path / "root"))
    kills = []
    for stage in PLAN[seed]:
        process = job.start()
        if process.wait_for(started(stage)):
            delay = rng.uniform(0, seconds[stage])
            time.sleep(delay)
        else:
            delay = -1.0  # the stage had ended before: nothing left to kill in it
        if process.poll() is None:
            killed = process.kill_all()
            kills.append((stage, round(delay, 2), killed))
        else:
            assert process.poll() == 0, process.stderr
    print(f"\nseed {seed}: killed (stage, seconds into it, processes) {kills}")
    job.run()
    assert len(kills) >= 4, kills
    assert_same_outcome(job, calm, relative=1e-5)


def assert_same_outcome(job: Job, calm: Job, *, relative: float) -> None:
    """Same rows, none twice; one metrics line a step; same losses; same figures."""
    rows = job.rows()
    assert rows == calm.rows()
    assert len({(unit, i) for unit, i, _, _ in rows}) == len(rows)
    assert [s for s, _ in job.losses()] == [s for s, _ in calm.losses()]
    assert [v for _, v in job.losses()] == pytest.approx([v for _, v in calm.losses()], rel=relative)
    assert job.report()["after"]["kl_t1"] == pytest.approx(calm.report()["after"]["kl_t1"], rel=relative)
    # A doubled or half-written object would stand beside those of the calm run.
    assert [p.name for p in job.unit_objects()] == [p.name for p in calm.unit_objects()]
