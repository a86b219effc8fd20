"""Nodes that come and go: training goes on with those there are, at the losses of a run that lost none."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from distill_ray import train
from distill_ray.config import Recipe
from distill_ray.lease import Lease, read_published
from distill_ray.session import ray_session
from distill_ray.storage import open_storage
from distill_ray.targets import RunManifest
from distill_ray.telemetry import Progress
from distill_ray.train.board import Board
from distill_ray.train.job import make_plan
from tests.stages.apart import apart
from tests.stages.train_assets import PlainLoop, make_targets, tiny_recipe

pytestmark = pytest.mark.long

AT = 4
"""The step after which nodes come or go."""
# Three missed checks of a second: by default Ray knows of a lost node only after some fifteen seconds.
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}


@dataclass
class Nodes:
    """A head without CPUs, where the driver is, and nodes with room for one worker each."""

    cluster: Cluster
    workers: list[Any]

    def add(self) -> None:
        self.workers.append(self.cluster.add_node(num_cpus=1))

    def lose(self) -> None:
        """All processes of a node at once, as when its power goes: workers would outlive their raylet by seconds."""
        node = self.workers.pop()
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, seconds: float) -> None:
        """What `ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION` does."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + seconds) * 1000)
        gcs = GcsClient(address=self.cluster.address)
        assert gcs.drain_node(self.workers[-1].node_id, reason, "spot", deadline_ms)[0]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield Nodes(cluster, [])
        cluster.shutdown()


class Waits(Board):
    """Writes down every step; after step `AT`, the first time, waits until the nodes are as the test wants them."""

    folder = Path()

    def post(self, line: dict[str, float]) -> int:
        with (self.folder / "posted").open("a") as file:
            file.write(f"{line['step']}\n")
        if line["step"] == AT and not (self.folder / "reached").exists():
            (self.folder / "reached").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.05)
        return super().post(line)


class Heard(Progress):
    """Writes down every sentence."""

    folder = Path()

    def note(self, text: str) -> None:
        with (self.folder / "notes").open("a") as file:
            file.write(text + "\n")


def _train(recipe: Recipe, manifest: RunManifest, address: str, folder: Path) -> None:
    board = type("WaitsHere", (Waits,), {"folder": folder})
    heard = type("HeardHere", (Heard,), {"folder": folder})
    storage = open_storage(recipe.storage.root)
    with ray_session(address), Lease.acquire(storage, recipe.run_prefix) as lease:
        train.run(recipe, storage, manifest, lease.token, threading.Event(), heard, board_class=board)


@dataclass
class Outcome:
    losses: list[float]
    tokens: list[int]
    reference: list[float]
    planned: list[int]
    posted: list[int]
    notes: str
    conversions: list[dict[str, Any]]


def run(
    root: Path, nodes: Nodes, first: int, change: Callable[[], None], later: Callable[[], None], **section: Any
) -> Outcome:
    """Train on `first` nodes; after step `AT`, `change` them, and once training goes on, do what comes `later`."""
    for _ in range(first):
        nodes.add()
    recipe = tiny_recipe(root, train={"workers": {"min": 1, "max": 2}, "settle_s": 4.0, **section})
    storage = open_storage(recipe.storage.root)
    manifest = make_targets(storage, recipe)
    plan = make_plan(recipe, manifest)
    reference = PlainLoop(recipe, manifest, storage).losses(plan)
    assert len(reference) > AT + 2

    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(apart, _train, recipe, manifest, nodes.cluster.address, root)
        # Here, not in the thread: a node that is added takes signal handlers.
        while not (root / "reached").exists() and not trained.done():
            time.sleep(0.05)
        try:
            change()
        finally:
            (root / "go").touch()
        later()
        trained.result()
    lines = [json.loads(x) for x in storage.get(f"{recipe.run_prefix}/metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == list(range(plan.steps))
    published = read_published(storage, recipe.run_prefix)
    return Outcome(
        [line["loss"] for line in lines],
        [line["tokens"] for line in lines],
        reference,
        [plan.supervised(step) for step in range(plan.steps)],
        [int(x) for x in (root / "posted").read_text().split()],
        (root / "notes").read_text(),
        [entry for name, entry in published.items() if name.startswith("universal/")],
    )


def test_a_lost_node_leaves_a_group_of_one_that_ends_at_the_same_losses(tmp_path: Path, nodes: Nodes) -> None:
    found = run(tmp_path, nodes, 2, nodes.lose, lambda: None, max_failures=1)
    assert found.losses == pytest.approx(found.reference, rel=1e-5)
    assert found.tokens == found.planned
    # Saved were two steps, and perhaps four: that checkpoint was on its way.
    restart = found.posted[AT + 1]
    assert restart in (AT - 2, AT)
    assert found.posted == [*range(AT + 1), *range(restart, len(found.losses))]
    assert "started again with 1 workers (before: 2)" in found.notes
    assert "waiting for resources" not in found.notes
    assert "was saved by 2 workers; converted for any number in" in found.notes


def _notice(nodes: Nodes) -> None:
    nodes.drain(8.0)
    time.sleep(2.5)  # until Ray Train has looked


def test_a_drain_notice_of_8_s_loses_no_finished_step_and_counts_as_no_failure(tmp_path: Path, nodes: Nodes) -> None:
    def take() -> None:
        time.sleep(5.5)
        nodes.lose()

    found = run(tmp_path, nodes, 2, lambda: _notice(nodes), take, max_failures=0)
    assert found.losses == pytest.approx(found.reference, rel=1e-5)
    assert found.tokens == found.planned
    assert found.posted == list(range(len(found.losses))), "no step was done twice"
    assert f"the workers leave after {AT + 2} steps, which are saved" in found.notes
    assert "started again with 1 workers (before: 2)" in found.notes


def test_a_group_of_fixed_size_leaves_on_notice_and_goes_on_once_another_node_is_there(
    tmp_path: Path, nodes: Nodes
) -> None:
    def replace() -> None:
        time.sleep(5.5)
        nodes.lose()
        nodes.add()

    workers = {"min": 2, "max": 2}
    found = run(tmp_path, nodes, 2, lambda: _notice(nodes), replace, max_failures=0, workers=workers)
    assert found.losses == pytest.approx(found.reference, rel=1e-5)
    assert found.posted == list(range(len(found.losses))), "no step was done twice"
    assert f"the workers leave after {AT + 2} steps, which are saved" in found.notes
    assert found.conversions == []


def test_a_new_node_is_used_after_the_group_has_saved_and_left(tmp_path: Path, nodes: Nodes) -> None:
    def add() -> None:
        nodes.add()
        time.sleep(8.0)  # the settling time, and two looks

    found = run(tmp_path, nodes, 1, add, lambda: None, max_failures=0, grow_after_s=0.0)
    assert found.losses == pytest.approx(found.reference, rel=1e-5)
    assert found.posted == list(range(len(found.losses))), "no step was done twice"
    # Asked while the board waited, it can say so only at the step after that.
    assert f"there is room for more workers: the workers leave after {AT + 3} steps, which are saved" in found.notes
    assert "started again with 2 workers (before: 1)" in found.notes
