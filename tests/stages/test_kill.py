"""Kill anywhere: SIGKILL the driver and all its processes at random instants of every stage, then run it again."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.stages.jobs import Job, assert_same_outcome, started, wide_teacher

pytestmark = [pytest.mark.kill, pytest.mark.timeout(3600), pytest.mark.usefixtures("cluster_address")]

STAGES = ("capture", "train", "evaluate", "export")
PLAN = {  # seed → the stages in which one run is killed, in order
    11: ("capture", "capture", "train", "train", "evaluate", "export"),
    12: ("capture", "train", "train", "train", "evaluate", "export"),
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("calm")
    job = Job(folder, str(folder / "root"))
    job.call()
    return job


def kill_within(job: Job, stage: str, seconds: float) -> tuple[str, float, int] | None:
    """Start the command, SIGKILL everything `seconds` into `stage`; None where it had ended before that."""
    process = job.start()
    if process.wait_for(started(stage)):
        time.sleep(seconds)
    if process.poll() is None:
        return stage, round(seconds, 2), process.kill_all()
    assert process.poll() == 0, process.stderr
    return None


@pytest.mark.parametrize("seed", [11, pytest.param(12, marks=pytest.mark.slow)])
def test_a_run_killed_in_every_stage_ends_as_the_calm_one(seed: int, calm: Job, tmp_path: Path):
    rng = random.Random(seed)
    seconds = {s: calm.published()[f"timings/{s}"]["seconds"] for s in STAGES}
    job = Job(tmp_path, str(tmp_path / "root"))
    # A rerun may be faster than the calm run was: not up to its very end.
    kills = [kill_within(job, stage, rng.uniform(0, 0.8 * seconds[stage])) for stage in PLAN[seed]]
    print(f"\nseed {seed}: killed (stage, seconds into it, processes) {kills}")
    job.call()
    assert sum(k is not None for k in kills) >= 5, kills
    assert_same_outcome(job, calm, relative=1e-5)
    # Packed rows too: the reference engine moves no bit.
    assert job.rows() == calm.rows()


@pytest.mark.parametrize(
    ("dtype", "relative"), [("float32", 1e-4), pytest.param("bfloat16", 1e-2, marks=pytest.mark.slow)]
)
def test_a_vllm_run_killed_while_it_captures_and_trains_ends_as_the_calm_one(
    dtype: str, relative: float, tmp_path: Path
):
    rng = random.Random(13)
    # 128 wide, because vLLM's CPU attention takes no head of 16
    runs = [
        Job(
            tmp_path / name, str(tmp_path / name / "root"), engine="vllm", dtype=dtype, epochs=1, teacher=wide_teacher()
        )
        for name in ("calm", "killed")
    ]
    calm, job = runs
    calm.call()
    units = len(calm.unit_objects())
    seconds = {s: calm.published()[f"timings/{s}"]["seconds"] for s in STAGES}
    process = job.start()
    wanted = rng.randrange(1, units // 2)
    while process.poll() is None and len(job.unit_objects()) < wanted:
        time.sleep(0.01)
    kills = [(f"capture, {wanted} of {units} units stored", 0.0, process.kill_all())]
    assert 0 < len(job.unit_objects()) < units, "the kill must fall among the units"
    kills.append(kill_within(job, "capture", rng.uniform(0, 0.5 * seconds["capture"])))
    kills.append(kill_within(job, "train", rng.uniform(0, 0.5 * seconds["train"])))
    assert None not in kills, kills
    print(f"\n{dtype}: killed (stage, seconds into it, processes) {kills}")
    job.call()
    assert_same_outcome(job, calm, relative=relative)


def test_no_process_outlives_a_driver_that_is_killed(tmp_path: Path):
    job = Job(tmp_path, str(tmp_path / "root"), engine="vllm", teacher=wide_teacher())
    process = job.start()
    while process.poll() is None and not job.unit_objects():
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    before = len(process.members())
    # Ray's own agents look for their raylet once in a while.
    left = [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()[:80]) for pid in process.gone()]
    assert left == [], f"{len(left)} of {before} processes still run"


def test_a_driver_paused_past_its_lease_publishes_nothing(calm: Job, tmp_path: Path):
    """The first driver is stopped with all its processes while it trains; a second one takes the run over."""
    job = Job(tmp_path, str(tmp_path / "root"))
    first = job.start()
    assert first.wait_for(started("train"))
    while "checkpoint/step-00000003" not in job.published():
        time.sleep(0.05)
        assert first.poll() is None, first.stderr
    members = first.members()
    for pid in members:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert "student" not in job.published(), "paused too late"
        refused = job.call(code=2)
        assert "is being worked on by" in refused.stderr
        time.sleep(61)  # the lease's 60 s
        job.call()
        after = {p: p.read_bytes() for p in Path(job.root).rglob("*") if p.is_file()}
    finally:
        for pid in members:
            os.kill(pid, signal.SIGCONT)
    assert first.wait(300) not in (0, 130)
    assert "took over with epoch 2" in first.stderr, first.stderr
    changed = {p: d for p, d in after.items() if not p.exists() or p.read_bytes() != d}
    assert not changed
    assert_same_outcome(job, calm, relative=1e-5)
