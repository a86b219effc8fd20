"""Cron fires twice in one week, and an old cluster comes back while the new one runs: on S3, each on its own cluster.

The lease itself: tests/unit/test_lease.py; the same on a local root: test_pipeline.py, test_kill.py in tests/stages.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from distill_ray.lease import read_record
from distill_ray.storage import open_storage
from tests.cluster.chaos.outcome import assert_same_outcome
from tests.stages.jobs import Job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]


def test_cron_fires_twice_and_one_works(calm: Job, s3_uri: str, tmp_path: Path) -> None:
    job = Job(tmp_path, s3_uri, epochs=calm.epochs)
    first, second = job.start(), job.start()
    codes = sorted([first.wait(900), second.wait(900)])
    refused = first if first.poll() == 2 else second
    assert codes == [0, 2], first.stderr + second.stderr
    assert "is being worked on by" in refused.stderr
    assert_same_outcome(job, calm)
    record = read_record(open_storage(job.root), "runs/tiny/v1")
    assert record is not None
    assert record.epoch == 1, "one writer"


def test_an_old_cluster_that_comes_back_publishes_nothing(calm: Job, s3_uri: str, tmp_path: Path) -> None:
    job = Job(tmp_path, s3_uri, epochs=calm.epochs)
    old = job.start()
    while not any(name.startswith("checkpoint/") for name in job.published()):
        assert old.poll() is None, old.stderr
        time.sleep(0.05)
    members = old.members()
    _signal(members, signal.SIGSTOP)
    try:
        assert "student" not in job.published(), "paused too late"
        time.sleep(61)  # the lease's 60 s
        new = job.start()
        assert new.wait_for('"stage": "train", "event": "start"', 600)
    finally:
        _signal(members, signal.SIGCONT)
    assert new.wait(900) == 0, new.stderr
    assert old.wait(300) not in (0, 130)
    assert "took over with epoch 2" in old.stderr, old.stderr
    assert_same_outcome(job, calm)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
