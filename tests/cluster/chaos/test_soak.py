"""The whole pipeline, again and again, under kills, lost nodes, drain notices and store faults at once.

`SOAK_S` (default 360, at most 3,600) seconds of it; `SOAK_SEED` chooses other blows.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.chaos.nodes import Nodes
from tests.cluster.chaos.outcome import assert_same_outcome, target_objects
from tests.cluster.chaos.proxy import FaultProxy, Rule
from tests.cluster.chaos.test_nodes import TRAIN_WORKER, Driven
from tests.stages.jobs import Job

SECONDS = min(3600.0, float(os.environ.get("SOAK_S", "360")))
SEED = int(os.environ.get("SOAK_SEED", "20261128"))
BLOW_EVERY_S = (10.0, 80.0)
"""A worker group takes half a minute to start, a driver and its group most of one: at shorter pauses none gets on."""
_FINISH_S = 900.0
"""Seconds after the last blow that the run in progress gets to end."""
STORE_FAULTS: tuple[Rule, ...] = (
    {"probability": 0.05, "error": {"code": "SlowDown", "status": 503}},
    {"probability": 0.02, "reset": True},
    {"probability": 0.02, "response": {"corrupt_bytes": 16}},
    {"probability": 0.05, "latency": 500},
)

pytestmark = [pytest.mark.soak, pytest.mark.timeout(SECONDS + 2 * _FINISH_S)]


@pytest.fixture
def nodes(calm: Job, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    started = Nodes()
    yield started
    started.kill()


class Blows:
    """Chooses a blow that fits the stage, strikes, and mends the cluster, never the run."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self.struck = rng, Counter[str]()

    def strike(self, driven: Driven) -> None:
        stage = "student" if "targets" in driven.job.published() else "teacher"
        name = self._rng.choice(["process", "process", "node", "drain", "driver"])
        if getattr(self, f"_{name}")(driven, stage):
            self.struck[f"{stage} {name}" if name != "driver" else "driver"] += 1

    def _process(self, driven: Driven, stage: str) -> bool:
        title = TRAIN_WORKER if stage == "student" else "ray::"
        found = driven.nodes.workers(stage, title)
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
            if found:
                self._rng.choice(found).kill()
                return True
        return False

    def _node(self, driven: Driven, stage: str) -> bool:
        driven.nodes.lose(stage)
        driven.nodes.add(stage)
        return True

    def _drain(self, driven: Driven, stage: str) -> bool:
        driven.nodes.drain(stage, 5.0)
        time.sleep(5)
        return self._node(driven, stage)

    def _driver(self, driven: Driven, stage: str) -> bool:
        driven.driver.signal(signal.SIGKILL)
        driven.start()
        return True


def test_soak(calm: Job, nodes: Nodes, proxy: FaultProxy, s3_uri: str, tmp_path: Path) -> None:
    rng, began = random.Random(SEED), time.monotonic()
    blows, faults, runs, again = Blows(rng), Counter[str](), 0, 0
    pool = {"[capture]": "replicas = { min = 2, max = 2 }\n[capture]"}
    while time.monotonic() - began < SECONDS:
        folder = tmp_path / str(runs)
        folder.mkdir()
        driven = Driven(Job(folder, f"{s3_uri}/{runs}", epochs=calm.epochs, edits=pool), nodes, 0)
        proxy.rules(*STORE_FAULTS)
        driven.start()
        ends = began + SECONDS
        strike_at = time.monotonic() + rng.uniform(*BLOW_EVERY_S)
        while driven.driver.poll() != 0:
            assert time.monotonic() < ends + _FINISH_S, driven.driver.stderr
            if driven.driver.poll() not in (None, 0):
                # Too many blows in one command: it must have said so, and the same command goes on.
                # (Ray Train's account of its workers' errors, which is part of such a message, holds their tracebacks.)
                assert re.search(r"^distill-ray: ", driven.driver.stderr, re.MULTILINE), driven.driver.stderr
                again += 1
                driven.start()
            elif strike_at < time.monotonic() < ends:
                blows.strike(driven)
                strike_at = time.monotonic() + rng.uniform(*BLOW_EVERY_S)
            time.sleep(0.2)
        faults += proxy.fired()
        proxy.rules()
        assert_same_outcome(driven.job, calm)
        assert len(target_objects(driven.job)) == len(target_objects(calm))
        runs += 1
    seconds = time.monotonic() - began
    print(f"\nseed {SEED}: {runs} runs in {seconds:.0f} s, each as the calm one; commands given again: {again}")
    print(f"blows {sum(blows.struck.values())}: {dict(blows.struck)}")
    print(f"store faults {sum(faults.values())}: {dict(faults)}")
    assert sum(blows.struck.values()) >= SECONDS // 100
    assert sum(faults.values()) >= 30
