"""The whole pipeline on a real S3 server whose answers are slow, lost, damaged, throttled or refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.chaos.outcome import assert_same_outcome
from tests.cluster.chaos.proxy import FaultProxy, Rule
from tests.stages.jobs import Job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]

FAULTS: dict[str, Rule] = {
    "slow-down": {"probability": 0.3, "error": {"code": "SlowDown", "status": 503}},
    "resets": {"probability": 0.2, "reset": True},
    "cut-uploads": {"probability": 0.3, "request": {"cut_upload": {"after_frac": 0.5}}},
    "broken-streams": {"probability": 0.3, "response": {"abort_frac": 0.5}},
    "corrupted-bodies": {"probability": 0.3, "response": {"corrupt_bytes": 16}},
}
HURT = {
    "cut-uploads": {"PutObject"},
    "broken-streams": {"GetObject", "ListObjectsV2"},
    "corrupted-bodies": {"GetObject", "ListObjectsV2"},
}
"""Operations that have the body which the fault is about: the proxy counts it on the others too, and does nothing."""


@pytest.fixture(autouse=True)
def calm_again(proxy: FaultProxy) -> Iterator[None]:
    yield
    proxy.rules()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_through_a_faulty_store_ends_as_the_calm_one(
    fault: str, calm: Job, proxy: FaultProxy, s3_uri: str, tmp_path: Path
) -> None:
    job = Job(tmp_path, s3_uri, epochs=calm.epochs)
    proxy.rules(FAULTS[fault])
    started = time.monotonic()
    job.call()
    fired, seconds = proxy.fired(), time.monotonic() - started
    proxy.rules()
    print(f"\n{fault}: {sum(fired.values())} faults in {seconds:.0f} s: {dict(fired)}")
    assert sum(count for operation, count in fired.items() if operation in HURT.get(fault, fired)) >= 20
    assert_same_outcome(job, calm)


def test_a_run_whose_store_takes_2_s_to_answer_ends_as_the_calm_one(
    calm: Job, proxy: FaultProxy, s3_uri: str, tmp_path: Path
) -> None:
    job = Job(tmp_path, s3_uri, epochs=calm.epochs)
    proxy.rules({"latency": 2000})
    before, started = proxy.requests(), time.monotonic()
    job.call()
    print(f"\n2 s latency: {proxy.requests() - before} requests in {time.monotonic() - started:.0f} s")
    proxy.rules()
    assert_same_outcome(job, calm)


@pytest.mark.parametrize("stage", ["capture", "train"])
def test_an_outage_of_60_s_is_outlasted(stage: str, calm: Job, proxy: FaultProxy, s3_uri: str, tmp_path: Path) -> None:
    job = Job(tmp_path, s3_uri, epochs=calm.epochs)
    process = job.start()
    assert process.wait_for(f'"stage": "{stage}", "event": "start"', 600)
    proxy.stop()
    try:
        time.sleep(60)
    finally:
        proxy.start()
    assert process.wait(900) == 0, process.stderr
    assert_same_outcome(job, calm)


def test_a_clock_that_is_off_ends_the_command_with_the_remedy_and_costs_nothing(
    calm: Job, proxy: FaultProxy, s3_uri: str, tmp_path: Path
) -> None:
    job = Job(tmp_path, s3_uri, epochs=calm.epochs)
    process = job.start()
    assert process.wait_for('"stage": "train", "event": "start"', 600)
    proxy.rules({"error": {"code": "RequestTimeTooSkewed", "status": 403}})
    code = process.wait(900)
    proxy.rules()
    assert code == 2, process.stderr
    assert "this machine's clock is off by more than 15 minutes: set it by NTP" in process.stderr
    assert "Traceback" not in process.stderr
    job.call()
    assert_same_outcome(job, calm)
